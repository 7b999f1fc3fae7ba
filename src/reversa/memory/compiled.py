"""What PyTorch's own partitioner keeps of a compiled model, under its ``activation_memory_budget``."""

# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch._functorch.config as functorch_config
from functorch.compile import aot_function, min_cut_rematerialization_partition, nop
from torch import Tensor, nn
from torch.func import functional_call

from reversa.memory.costs import POLICIES, SCALARS, STORE, Costs
from reversa.memory.planned import Way
from reversa.memory.profile import profile
from reversa.memory.step import Step
from reversa.memory.units import put_engines

SHARES = (0.5,)
"""Of what would be kept without a budget."""


def compiled_ways(costs: Costs) -> Iterator[Way]:
    """A step of the model as one graph, cut into a forward and a backward part by PyTorch's partitioner.

    The operations are those of the graph, one by one: what a compiler fuses takes less time and fewer bytes.
    """
    step = costs.step
    put_engines(step.model, costs.units, [[POLICIES[STORE]] * unit.length for unit in costs.units])
    for share in SHARES:
        graph = _AsGraph(step.model)
        whole = Step(graph, step.given, step.loss, step.optimizer, step.precision, step.device)
        try:
            with functorch_config.patch(activation_memory_budget=share), costs.mode:
                whole.run()  # which makes the graph
                whole.release()
                found = profile(whole, [], costs.speed)
        except Exception as error:
            reason = f"{type(error).__name__}: {str(error).strip().split(chr(10), 1)[0]}"
            warnings.warn(f"no plan beside PyTorch's activation_memory_budget: {reason}", stacklevel=2)
            return
        yield Way(f"compiled, activation_memory_budget={share}", found.peak + SCALARS, found.total)


class _AsGraph(nn.Module):
    """A module whose forward pass is traced with its backward pass, and cut."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

        def call(parameters: dict[str, Tensor], buffers: dict[str, Tensor], args: Any, kwargs: Any) -> Any:
            # Statistics are written to a copy: an input that is written to cannot be kept for the backward pass.
            own = {name: buffer.clone() for name, buffer in buffers.items()}
            return functional_call(model, (parameters, own), args, kwargs)

        self.graph: Any = aot_function(call, nop, nop, partition_fn=min_cut_rematerialization_partition)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        parameters, buffers = dict(self.model.named_parameters()), dict(self.model.named_buffers())
        return self.graph(parameters, buffers, args, kwargs)

"""One recorded forward pass of a fake copy: which module was called with which tensors, and the graph that came of it.

Fake tensors have shapes and autograd graphs and no numbers, so this costs neither memory nor arithmetic, and draws no
random number. The live model is copied first: run under fake tensors itself, it would count its batches.
"""

from __future__ import annotations

import copy
import logging
import random
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode  # private: PyTorch has no public name for them
from torch.utils._pytree import tree_map_only

from reversa.convert.residual import Edge, edge_of
from reversa.engine.steps import first_tensor
from reversa.errors import ConversionError

Key = int | str


class NotCopied(ConversionError):
    """The model cannot be copied: FSDP2 has sharded it, or it holds what cannot be."""


@dataclass(frozen=True, eq=False)
class Seen:
    """A tensor as it was at one moment: a change in place gives it another version, and another edge."""

    tensor: Tensor
    version: int
    edge: Edge | None

    @staticmethod
    def of(tensor: Tensor) -> Seen:
        return Seen(tensor, tensor._version, edge_of(tensor) if tensor.requires_grad else None)

    @property
    def changed(self) -> bool:
        """Whether it has been written to since."""
        return self.tensor._version != self.version

    def fits(self, other: Seen) -> bool:
        """Whether a step could carry the one on as the other: same shape and floating type, on the same device."""
        a, b = self.tensor, other.tensor
        return a.is_floating_point() and (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)


@dataclass(eq=False)
class Call:
    """One call of a module: the tensors among its own arguments, by position or keyword, and what it gave on."""

    name: str
    inputs: dict[Key, Seen]
    output: Seen | None = None
    writes: set[Key] = field(default_factory=set[Key])
    """Arguments that were changed in place while the module ran."""
    stored: dict[int, int] = field(default_factory=dict[int, int])
    """What autograd stored for the backward pass while the module ran: bytes, by the address of the storage."""


def record(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Call]:
    """Every module call of one forward pass, in the order in which the calls began.

    The pass is made in the mode (train or eval) that each module is in, with gradients for every parameter. Nothing of
    the live model changes: no parameter, buffer, mode or hook; nor does any random number generator.

    Raises:
        ConversionError: the model cannot be copied, or cannot be run on fake tensors with these arguments.

    >>> model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    >>> [(call.name, list(call.inputs)) for call in record(model, (torch.ones(2, 3),), {})]
    [('', [0]), ('0', [0]), ('1', [0])]
    """
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    calls: list[Call] = []
    with quietly(), torch.inference_mode(False), torch.enable_grad():
        try:
            with FakeCopyMode(fake):
                twin = copy.deepcopy(model)
            _show_blocks(twin)
        except Exception as error:
            raise NotCopied(_message("could not be copied (copy.deepcopy)", model, error)) from error
        try:
            with fake, _watched(twin, calls):
                args, kwargs = tree_map_only(Tensor, lambda t: _with_graph(fake.from_tensor(t)), (args, dict(kwargs)))
                for parameter in filter(torch.is_floating_point, twin.parameters()):
                    parameter.requires_grad_(True)  # frozen blocks have residual additions, too
                twin(*args, **kwargs)
        except Exception as error:
            raise ConversionError(_message("could not be run on these inputs", model, error)) from error
    return calls


def _show_blocks(model: nn.Module) -> None:
    """Switch off what hides blocks from a recorded pass: reentrant checkpoints, and layers left out at random."""
    for module in model.modules():
        for name in ("gradient_checkpointing", "layerdrop"):
            if getattr(module, name, None):
                setattr(module, name, type(getattr(module, name))(0))


def _with_graph(tensor: Tensor) -> Tensor:
    """A tensor with a gradient that is no leaf, so that the model may write to it."""
    return tensor.detach().requires_grad_().clone() if tensor.is_floating_point() else tensor


@contextmanager
def _watched(model: nn.Module, calls: list[Call]) -> Iterator[None]:
    """Hooks on every module that fill the list; taken off at the end, lest they keep the model in a cycle."""
    names = {module: name for name, module in model.named_modules()}
    running: list[Call] = []
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    alive: list[Tensor] = []  # an address is used again where a tensor dies

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given: dict[Key, Any] = {**dict(enumerate(args)), **kwargs}
        call = Call(names[module], {key: Seen.of(value) for key, value in given.items() if isinstance(value, Tensor)})
        calls.append(call)
        running.append(call)

    def after(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        call, carried = running.pop(), first_tensor(output)
        call.output = Seen.of(carried) if isinstance(carried, Tensor) else None
        call.writes = {key for key, seen in call.inputs.items() if seen.changed}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.layout is torch.strided and (storage := tensor.untyped_storage())._cdata not in own:
            alive.append(tensor)
            for call in running:
                call.stored[storage._cdata] = storage.nbytes()
        return tensor

    with ExitStack() as hooks:
        hooks.enter_context(torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor))
        for module in names:
            module._forward_hooks.clear()  # the user's: what they reach is not a copy
            module._forward_pre_hooks.clear()
            hooks.enter_context(module.register_forward_pre_hook(before, with_kwargs=True))
            hooks.enter_context(module.register_forward_hook(after))
        yield


@contextmanager
def quietly() -> Iterator[None]:
    """No warnings and no logged tracebacks of a run that is not the user's, and Python's generator as it was."""
    log, state = logging.getLogger("torch._subclasses.fake_tensor"), random.getstate()

    def nothing(_: logging.LogRecord) -> bool:
        return False

    log.addFilter(nothing)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.removeFilter(nothing)
        random.setstate(state)


def _message(what: str, model: nn.Module, error: Exception) -> str:
    first_line = str(error).strip().split("\n", 1)[0]
    return (
        f"Finding the stages needs one forward pass of a copy of {type(model).__name__} on fake tensors (shapes "
        f"without numbers), and the model {what}: {type(error).__name__}: {first_line}\n"
        "Pass example= with arguments that the model accepts. A forward that depends on the numbers in a tensor "
        "(.item(), if x.sum() > 0) cannot be followed: move that out of the model. Where it only draws random numbers "
        "in training, convert in evaluation mode: convert(model.eval()).train()."
    )

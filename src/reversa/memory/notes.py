"""What the numbers of a report do not know, in plain sentences."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from reversa.check.trace import chains, is_exact
from reversa.engine import Engine, Mixed, Offload
from reversa.schemes import IResNet

ALLOCATOR = (
    "counted are the bytes of tensors. What an allocator adds (rounding, its cache, fragmentation) and workspaces "
    "inside one operation (cuDNN's, cuBLAS's) come on top."
)
DROPOUT = (
    "on the CPU a dropout mask takes as many bytes as the tensor it is for, and attention with dropout keeps all of "
    "its weights; on CUDA a mask takes one byte for each element, and fused attention keeps no weights."
)
COMPILED = "code under torch.compile is counted as if it ran eagerly; compiled, it holds other tensors, mostly fewer."
SEARCH = "the inverse of IResNet searches until it converges; two iterations stand for all, so its flops are too few."
OFFLOAD = (
    "the step runs on the CPU, where Offload() copies activations beside themselves; on an accelerator it frees them."
)
MIXED = (
    "in exact arithmetic the CPU copies a tensor inside an operation, where integers meet real numbers: not counted."
)
EVAL = "the model is in eval() mode. In train() mode it may hold other tensors (statistics, dropout masks)."
SEVERAL = "the model is spread over {devices}. Counted is {device} alone."


def is_compiled(model: nn.Module) -> bool:
    """Whether ``torch.compile`` is somewhere in a model.

    >>> is_compiled(nn.Linear(2, 2))
    False
    """
    return any(
        getattr(module, "_compiled_call_impl", None) is not None
        or type(module).__name__ == "OptimizedModule"
        or getattr(vars(module).get("_reversa"), "compiled", None) is not None
        for module in model.modules()
    )


def eagerly(model: nn.Module) -> AbstractContextManager[Any]:
    """A context in which compiled parts of a model run as they are written."""
    return torch.compiler.set_stance("force_eager") if is_compiled(model) else nullcontext()


def notes_on(model: nn.Module, device: torch.device, measured: bool) -> tuple[str, ...]:
    """The notes that apply to a step of that model."""
    return tuple(_notes(model, device, measured))


def _notes(model: nn.Module, device: torch.device, measured: bool) -> Iterator[str]:
    on_cpu = device.type == "cpu"
    holders = [holder for _, holder, _ in chains(model)]
    if not model.training:
        yield EVAL
    if on_cpu or not measured:
        yield ALLOCATOR
    if on_cpu and any(_drops(module) for module in model.modules()):
        yield DROPOUT
    if on_cpu and any(_offloads(holder.engine) for holder in holders):
        yield OFFLOAD
    if on_cpu and any(is_exact(holder, model) for holder in holders):
        yield MIXED
    if is_compiled(model):
        yield COMPILED
    if not measured and any(isinstance(holder.scheme, IResNet) for holder in holders):
        yield SEARCH
    devices = sorted({str(tensor.device) for tensor in (*model.parameters(), *model.buffers())})
    if len(devices) > 1:
        yield SEVERAL.format(devices=" and ".join(devices), device=device)


def _offloads(engine: Engine) -> bool:
    engines = [part for part, _ in engine.parts] if isinstance(engine, Mixed) else [engine]
    return any(isinstance(each, Offload) for each in engines)


def _drops(module: nn.Module) -> bool:
    """Whether a module makes dropout masks: a Dropout layer, or attention and recurrent layers with dropout inside."""
    rate = getattr(module, "p", None) if "Dropout" in type(module).__name__ else getattr(module, "dropout", 0.0)
    return module.training and isinstance(rate, float) and rate > 0

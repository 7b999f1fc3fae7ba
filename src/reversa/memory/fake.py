"""A model and its inputs in fake tensors: shapes, types and graphs, and neither numbers nor memory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (  # private: PyTorch has no public names for them
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeCopyMode,
    FakeTensorMode,
)
from torch.optim import Optimizer

from reversa.check.trace import chains
from reversa.errors import SettingError
from reversa.memory.settings import Arguments, Settings, with_tensors
from reversa.schemes import IResNet, State

NEEDS_NUMBERS = (DataDependentOutputException, DynamicOutputShapeException)
"""What fake tensors raise where a number in a tensor decides."""


def fake_mode() -> FakeTensorMode:
    """A mode for one model and its inputs. Tensors that a loss function brings along are taken as they are."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def fake_copies(mode: FakeTensorMode, settings: Settings) -> tuple[nn.Module, Optimizer | None]:
    """Copies of a model and of the optimizer over its parameters. What is on the meta device is on the CPU then.

    Raises:
        SettingError: something cannot be copied.
    """
    name = type(settings.model).__name__
    try:
        memo = {id(tensor): fake for tensor, fake in _off_meta(mode, settings.model)}
        with FakeCopyMode(mode):
            twin, optimizer = copy.deepcopy((settings.model, settings.made_optimizer), memo)
    except Exception as error:
        raise SettingError(
            f"an estimate works on a copy of the model, and copy.deepcopy({name}) failed: {type(error).__name__}: "
            f"{_first_line(error)}. Estimate it before it is wrapped for distributed training, and before it keeps "
            "tensors with a graph."
        ) from error
    twin.zero_grad(set_to_none=True)
    if optimizer is not None:
        optimizer.state.clear()  # it makes a new one in its next step; the old one's counters are numbers that it reads
    for _, holder, _ in chains(twin):
        if isinstance(holder.scheme, IResNet):
            holder.scheme = _TwoIterations(**vars(holder.scheme))
    with mode:
        return twin, settings.optimizer_of(twin, optimizer)


def fake_inputs(mode: FakeTensorMode, settings: Settings) -> Arguments:
    """The same arguments in fake tensors; shapes become floating tensors of the model's type."""

    def made(tensor: Tensor) -> Tensor:
        fake = torch.empty_like(tensor, device=settings.device) if tensor.is_meta else mode.from_tensor(tensor.detach())
        return fake.detach().requires_grad_(tensor.requires_grad)

    def shaped(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=settings.dtype, device=settings.device)

    with mode:
        return with_tensors(settings.given, made, shaped)


class _TwoIterations(IResNet):
    """The inverse as it is from its second iteration on: how many there are, only numbers would tell."""

    def search(self, state: State, step: int, f: Callable[[Tensor], Tensor]) -> tuple[Tensor, State]:
        (after,) = state
        x = after
        for _ in range(2):
            new = after - f(x)
            (new - x).abs().max()
            x = new
        return x, state


def _off_meta(mode: FakeTensorMode, model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    """Parameters and buffers on the meta device, and their like on the CPU: there kernels are chosen as in training."""
    with mode:
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_meta:
                fake = torch.empty_like(tensor.detach(), device="cpu")
                is_parameter = isinstance(tensor, nn.Parameter)
                yield tensor, nn.Parameter(fake, tensor.requires_grad) if is_parameter else fake


@contextmanager
def explained(model: nn.Module, inputs: str) -> Iterator[None]:
    """Say what to do where a model cannot be run on fake tensors; its own errors come with the inputs' shapes.

    Raises:
        SettingError: a number in a tensor decides what the model computes.
    """
    try:
        with _untouched(model):
            yield
    except NEEDS_NUMBERS as error:
        raise SettingError(
            f"{type(model).__name__} needs the numbers in its tensors, and an estimate has none "
            f"({type(error).__name__}: {_first_line(error)}). Use reversa.memory.measure, which runs the step."
        ) from error
    except Exception as error:
        error.add_note(f"reversa.memory.estimate ran {type(model).__name__} on inputs of shape {inputs}")
        raise


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Take away again what is left in the parameters' gradients, and raise where something was.

    Raises:
        SettingError: the copy has used the original's parameters.
    """
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    changed = False
    try:
        yield
    finally:
        for parameter, grad in gradients:
            changed |= parameter.grad is not grad
            parameter.grad = grad
    if changed:
        raise SettingError(
            f"an estimate works on a copy of the model, and this copy of {type(model).__name__} uses the original's "
            "parameters: a forward was replaced by a function that holds the module it was made for. Estimate the "
            "model before that."
        )


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]

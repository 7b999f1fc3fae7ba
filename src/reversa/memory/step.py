"""One training step, counted: of real tensors or of fake ones, by the same code."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from reversa.check.step import tensors_of
from reversa.errors import SettingError
from reversa.memory.ledger import Ledger, Place
from reversa.memory.places import Stage, Where
from reversa.memory.report import Flops, MemoryReport, Moment, StageMemory
from reversa.memory.settings import PRECISIONS, Arguments, Loss, Settings, in_words


@dataclass
class Step:
    """A model and all that a step of its training needs, to be used up."""

    model: nn.Module
    given: Arguments
    loss: Loss
    optimizer: Optimizer | None
    precision: str | None
    device: torch.device

    def forward(self) -> Tensor:
        """The loss. What the model returned is let go, but for what autograd keeps of it."""
        args, kwargs = self.given
        with self.autocast():
            loss = self.loss(self.model(*args, **kwargs))
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise SettingError(f"loss must make one number of the model's output, got {type(loss).__name__}")
        if not loss.requires_grad:
            raise SettingError(
                "the loss depends on nothing that requires a gradient, so there is no training step: every parameter "
                "is frozen, or the model detaches its output"
            )
        return loss

    def autocast(self) -> AbstractContextManager[Any]:
        """What the forward pass runs in."""
        if self.precision is None:
            return nullcontext()
        return torch.autocast(self.device.type, PRECISIONS[self.precision])

    def update(self) -> None:
        """The optimizer's step, where there is one."""
        if self.optimizer is None:
            return
        try:
            self.optimizer.step()
        except TypeError as error:
            raise SettingError(
                f"{type(self.optimizer).__name__}.step() cannot be called without arguments ({error}): use an "
                "optimizer that needs no closure, or none"
            ) from error

    def run(self) -> None:
        """The whole step, not counted."""
        self.release()
        self.forward().backward()
        self.update()

    def release(self) -> None:
        """Let all gradients go, as ``zero_grad()`` does."""
        for leaf in self.leaves():
            leaf.grad = None

    def inputs(self) -> Iterator[Tensor]:
        """Every tensor among the arguments."""
        return tensors_of(self.given)

    def leaves(self) -> list[Tensor]:
        """What gradients are accumulated in."""
        return [t for t in chain(self.model.parameters(), self.inputs()) if t.requires_grad and t.is_leaf]

    def state(self) -> list[Tensor]:
        """The tensors that the optimizer keeps."""
        if self.optimizer is None:
            return []
        return [leaf for leaf in tree_leaves(dict(self.optimizer.state)) if isinstance(leaf, Tensor)]


@dataclass(frozen=True)
class Count:
    """What a counted step came to."""

    peak: Moment
    after_forward: Moment
    stages: tuple[StageMemory, ...]
    flops: Flops


def count(step: Step, stages: list[Stage]) -> Count:
    """Run a step under a ledger.

    The optimizer's state is counted as it is from the second step on: where there is none yet, a step of the
    optimizer's that is not counted makes it.
    """
    ledger = Ledger(step.device, step.leaves())
    after: dict[str, int] = {}
    held: dict[Place | None, int] = {}

    def between() -> None:
        after.update(ledger.split)
        held.update(ledger.made_at())

    run_under(ledger, step, Where(step.model, stages, ledger).told(), between)
    after["optimizer_state"] = ledger.split["optimizer_state"]
    forward, backward, _ = ledger.phases
    return Count(
        Moment(ledger.most.phase, **ledger.most.split),
        Moment("after the forward pass", **after),
        tuple(_held(stage, number, held) for number, stage in enumerate(stages)),
        Flops(forward.flops, backward.flops, backward.recomputed),
    )


def run_under(
    ledger: Ledger,
    step: Step,
    forward: AbstractContextManager[None] | None = None,
    between: Callable[[], None] | None = None,
) -> None:
    """Make a step, phase by phase.

    Args:
        ledger: what counts it.
        step: what is made.
        forward: a context of the forward pass.
        between: called between the forward and the backward pass.
    """
    ledger.was_there("parameters", step.model.parameters())
    ledger.was_there("buffers", step.model.buffers())
    ledger.was_there("inputs", step.inputs())
    with _no_collector():
        with forward or nullcontext(), ledger.phase("forward", "activations"):
            loss = step.forward()
        if between is not None:
            between()
        with ledger.phase("backward", "temporary"):
            loss.backward()
        del loss
        step.update()
        ledger.was_there("optimizer_state", step.state())
        with ledger.phase("optimizer step", "temporary"):
            step.update()


def as_report(
    settings: Settings, step: Step, counted: Count, notes: tuple[str, ...], seconds: float | None = None
) -> MemoryReport:
    """The report of a step that was counted; without a time, an estimate."""
    return MemoryReport(
        model=type(settings.model).__name__,
        source="estimated" if seconds is None else "measured",
        device=str(step.device),
        inputs=in_words(settings.given),
        precision=step.precision,
        optimizer=None if step.optimizer is None else type(step.optimizer).__name__,
        peak=counted.peak,
        after_forward=counted.after_forward,
        stages=counted.stages,
        flops=counted.flops,
        seconds=seconds,
        notes=notes,
    )


def _held(stage: Stage, number: int, held: dict[Place | None, int]) -> StageMemory:
    by_block = tuple(held.get((number, block), 0) for block in range(len(stage.blocks)))
    return StageMemory(stage.name, stage.rule, stage.blocks, by_block, held.get((number, -1), 0))


@contextmanager
def _no_collector() -> Iterator[None]:
    """Nothing is freed at moments that nobody knows: what lies in a cycle stays alive."""
    gc.collect(1)  # of all objects it would take a second in a large program, before each of many steps
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()

"""Where a forward pass is: in which stage of the model, and in which of its blocks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from reversa.check.trace import chains, is_exact
from reversa.convert.example import same_class_runs
from reversa.memory.ledger import Ledger, Place
from reversa.sequence import ReversibleSequence


@dataclass(frozen=True)
class Stage:
    """Blocks of one kind, one behind the other: a reversible chain, or a run that could be one."""

    name: str
    rule: str
    blocks: tuple[str, ...]
    sequence: str | None = None
    """Where the chain is a :class:`ReversibleSequence`: its path."""
    per_block: int = 1
    """Residual functions that a block has."""


def stages_of(model: nn.Module) -> list[Stage]:
    """Every chain of a model, and every run of neighbours built alike outside of chains.

    >>> [(stage.name, stage.rule, len(stage.blocks)) for stage in stages_of(nn.Sequential(*map(nn.Linear, [2], [2])))]
    []
    """
    found: list[Stage] = []
    modules = dict(model.named_modules(remove_duplicate=False))
    paths = {module: path for path, module in modules.items()}
    for name, holder, places in chains(model):
        rule = f"{holder.scheme}, {holder.engine}{', exact' if is_exact(holder, model) else ''}"
        if isinstance(holder, ReversibleSequence):
            per_block, path = max(1, len(holder.functions) // len(holder.blocks)), paths[holder]
            prefix = f"{path}.blocks" if path else "blocks"
            blocks = tuple(f"{prefix}.{i}" for i in range(len(holder.blocks)))
            found.append(Stage(name, rule, blocks, path, per_block))
        else:
            per_block = holder.scheme.functions_per_block
            found.append(Stage(name, rule, tuple(places[::per_block]), None, per_block))
    inside = {m for stage in found for block in stage.blocks for m in modules[block].modules()}
    for run in same_class_runs(model).stages:
        if not any(m in inside for block in run.blocks for m in modules[block].modules()):
            found.append(Stage(run.name, "as it is", run.blocks))
    return found


@dataclass
class _Run:
    """A sequence that is running: hooks of its functions count its steps."""

    stage: int
    functions: set[nn.Module]
    step: int = -1


class Where:
    """Hooks that tell a ledger where the forward pass is.

    What a chain makes between two of its functions belongs to the first of them.
    """

    def __init__(self, model: nn.Module, stages: list[Stage], ledger: Ledger) -> None:
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.stages = stages
        self.ledger = ledger
        self.stack: list[Any] = []

    @contextmanager
    def told(self) -> Iterator[None]:
        """Inside, the ledger is told; the hooks go at the end."""
        functions: set[nn.Module] = set()
        with ExitStack() as hooks:
            for number, stage in enumerate(self.stages):
                if stage.sequence is None:
                    for index, block in enumerate(stage.blocks):
                        self._hook(hooks, self.modules[block], (number, index))
                else:
                    sequence: Any = self.modules[stage.sequence]
                    functions |= set(sequence.functions)
                    self._hook(hooks, sequence, _Run(number, set(sequence.functions)))
            for function in functions:
                hooks.enter_context(function.register_forward_pre_hook(self._step, prepend=True, with_kwargs=True))
                hooks.enter_context(function.register_forward_hook(self._stepped))
            yield
        self.stack.clear()
        self._tell()

    def _hook(self, hooks: ExitStack, module: nn.Module, place: _Run | Place) -> None:
        def enter(_: nn.Module, *given: Any) -> None:
            if isinstance(place, _Run):
                place.step = -1
            self.stack.append(place)
            self._tell(given)

        def leave(_: nn.Module, args: Any, output: Any) -> None:
            last = self.ledger.place if isinstance(place, _Run) else place
            if last is not None:
                self.ledger.left(last, output)
            if self.stack:
                self.stack.pop()
            self._tell()

        hooks.enter_context(module.register_forward_pre_hook(enter, prepend=True, with_kwargs=True))
        hooks.enter_context(module.register_forward_hook(leave))

    def _step(self, function: nn.Module, *given: Any) -> None:
        if self._runs(function):
            self.stack[-1].step += 1
            self._tell(given)

    def _stepped(self, function: nn.Module, args: Any, output: Any) -> None:
        if self._runs(function) and self.ledger.place is not None:
            self.ledger.returned(self.ledger.place, output)

    def _runs(self, function: nn.Module) -> bool:
        run = self.stack[-1] if self.stack else None
        return isinstance(run, _Run) and function in run.functions

    def _tell(self, given: Any = ()) -> None:
        place = self.stack[-1] if self.stack else None
        if isinstance(place, _Run):
            stage = self.stages[place.stage]
            place = place.stage, min(place.step // stage.per_block, len(stage.blocks) - 1)
        self.ledger.move(place, given)

"""Parts of one chain under engines of their own: what a memory plan is made of."""

# pyright: reportUnnecessaryIsInstance=false

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from reversa.engine.policies import Engine
from reversa.engine.steps import Function, Opening, Steps
from reversa.errors import SettingError
from reversa.schemes import Scheme, State

Part = tuple[Engine, int]


@dataclass(frozen=True, repr=False)
class Mixed(Engine):
    """Parts of a chain, one behind the other, each under an engine of its own.

    Where a part that computes back ends, the state is kept. :func:`reversa.memory.plan` finds the parts that take the
    least time within a budget.

    Args:
        parts: engine and number of steps of each part, in the order of the steps.

    Raises:
        SettingError: a part of another kind or without a step; or, when a chain begins, one of another length.

    >>> import torch, reversa
    >>> engine = Mixed([(reversa.Invert(), 6), (reversa.Recompute(), 1), (reversa.Store(), 1)])
    >>> blocks = [torch.nn.Linear(4, 4) for _ in range(8)]
    >>> seq = reversa.ReversibleSequence(blocks, scheme=reversa.Momentum(0.9), engine=engine)
    >>> seq(torch.randn(2, 4)).sum().backward()
    """

    parts: Sequence[Part]

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", tuple((engine, count) for engine, count in self.parts))
        for engine, count in self.parts:
            if not isinstance(engine, Engine) or isinstance(engine, Mixed) or not isinstance(count, int) or count < 1:
                raise SettingError(
                    "Mixed needs pairs of an engine (Invert, Store, Recompute, Offload) and a number of steps >= 1, "
                    f"got ({engine!r}, {count!r})"
                )
        if not self.parts:
            raise SettingError("Mixed needs at least one part, such as (Invert(), 8); got none")

    def __repr__(self) -> str:
        return f"Mixed({', '.join(f'{count} x {engine}' for engine, count in self.parts)})"

    @property
    def inverts(self) -> bool:
        return any(engine.inverts for engine, _ in self.parts)

    @property
    def length(self) -> int:
        """Steps in all."""
        return sum(count for _, count in self.parts)

    def begin(self, scheme: Scheme, length: int | None = None, first: int = 0) -> Steps:
        self._check(length)
        return _MixedSteps(scheme, self, first)

    def run(
        self,
        scheme: Scheme,
        fs: Sequence[Function],
        opening: Opening,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        first: int = 0,
    ) -> tuple[State, Any]:
        self._check(len(fs))
        at, output, handed = 0, None, opening
        for engine, count in self.parts:
            output = None
            state, output = engine.run(scheme, fs[at : at + count], handed, args, kwargs, first + at)
            handed, at = [state].pop, at + count
            del state  # no frame holds it while the next part goes on from it
        return handed(), output

    def kept_states(self, scheme: Scheme, length: int, dtype: torch.dtype) -> str:
        return "; ".join(engine.kept_states(scheme, count, dtype) for engine, count in self.parts)

    def kept_bytes(self, scheme: Scheme, length: int, dtype: torch.dtype, elements: int, stored: int) -> int:
        return sum(
            engine.kept_bytes(scheme, count, dtype, elements, stored * count // length) for engine, count in self.parts
        )

    def _check(self, length: int | None) -> None:
        if length is not None and length != self.length:
            raise SettingError(
                f"{self} is for {self.length} steps; the chain has {length}. Make a plan for this model."
            )


class _MixedSteps(Steps):
    """Hands each step to the part that it belongs to."""

    def __init__(self, scheme: Scheme, engine: Mixed, first: int) -> None:
        super().__init__(scheme, first)
        self.parts = iter(engine.parts)
        self.stop = first
        self.part: Steps | None = None

    def _take(
        self, f: Function, state: State, args: tuple[Any, ...], kwargs: Mapping[str, Any], module: Any, where: object
    ) -> tuple[State, Any]:
        while self.taken >= self.stop:
            self._next()
        assert self.part is not None
        self.part.taken = self.taken  # a pass that goes on with a changed state begins in the middle
        result = self.part.step(f, state, args, kwargs, module)
        if self.taken + 1 == self.stop:
            self.part.end()
        return result

    def _next(self) -> None:
        engine, count = next(self.parts)
        self.part = engine.begin(self.scheme, count, self.stop)
        self.stop += count

    def end(self) -> None:
        if self.part is not None:
            self.part.end()

"""What each block costs under each policy, from one step of fake tensors for each: what a plan is made of."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from reversa.check.trace import Holder
from reversa.engine import Engine, Invert, Offload, Recompute, Store
from reversa.exact import run_in
from reversa.memory.fake import fake_copies, fake_inputs, fake_mode
from reversa.memory.profile import Profile, profile
from reversa.memory.settings import PRECISIONS, Settings
from reversa.memory.solve import INVERT, OFFLOAD, Block, Choice, Solution
from reversa.memory.speed import Speed
from reversa.memory.step import Step
from reversa.memory.units import Unit, be_exact, holders_of, put_engines, units_of

STORE, RECOMPUTE = "store", "recompute"
SCALARS = 256
"""Bytes of single numbers that may live an operation longer where nobody looks at the blocks."""
POLICIES: dict[str, Engine] = {STORE: Store(), RECOMPUTE: Recompute(), INVERT: Invert(), OFFLOAD: Offload()}


class Costs:
    """A model's blocks with all their choices.

    Args:
        settings: the training step.
        allow: the policies that may be chosen, names of :data:`POLICIES`.
        speed: of the device.
        exact: let every chain run in exact arithmetic.
    """

    def __init__(self, settings: Settings, allow: Sequence[str], speed: Speed, exact: bool = False) -> None:
        self.settings = settings
        self.exact = exact
        self.speed = speed
        self.mode = fake_mode()
        twin, optimizer = fake_copies(self.mode, settings)
        given = fake_inputs(self.mode, settings)
        self.step = Step(twin, given, settings.loss_function, optimizer, settings.precision, settings.device)
        self.units = units_of(twin)
        self.holders = holders_of(twin)
        if exact:
            be_exact(self.holders.values())
        self.inverters = {name: _inverter(holder.engine) for name, holder in self.holders.items()}
        # Without the states that drift asks for: where they are depends on what is chosen.
        self.free = {name: replace(run, anchors=None, accept_drift=True) for name, run in self.inverters.items()}
        self.every = {name: self._every(holder) for name, holder in self.holders.items()}
        wanted = [action for action in (STORE, RECOMPUTE, INVERT, OFFLOAD) if action in {STORE, RECOMPUTE, *allow}]
        self.profiles = {action: self._uniform(action) for action in wanted if action != INVERT or self.holders}
        self.places = self.profiles[STORE].places
        self.kept = self._kept()
        self.blocks = [self._block(u, allow) for u in range(len(self.places))]
        self.rest = {
            a: Choice("", 0, found.needed[-1], found.seconds[-1], found.forth[-1]) for a, found in self.profiles.items()
        }
        self.rest[""] = self.rest[STORE]  # of a model without blocks
        self.update = self.profiles[STORE].update

    def engines(self, actions: Sequence[str]) -> list[list[Engine]]:
        """The engine of every block of every unit; a block that no step came to stores."""
        chosen: dict[Any, str] = dict(zip(self.places, actions, strict=True))
        return [
            [self._engine(unit, chosen.get((number, block), STORE)) for block in range(unit.length)]
            for number, unit in enumerate(self.units)
        ]

    def profiled(self, engines: list[list[Engine]]) -> Profile:
        """A step with these engines."""
        put_engines(self.step.model, self.units, engines)
        self.step.release()
        with self.mode:
            return profile(self.step, self.units, self.speed)

    def trial(self, actions: Sequence[str]) -> Solution:
        """What these choices come to, in a step that is made with them."""
        found = self.profiled(self.engines(actions))
        return Solution(tuple(actions), found.peak + SCALARS, found.total)

    def _uniform(self, action: str) -> Profile:
        """Every block under one policy."""
        of = [self.free[u.chain] if u.chain and action == INVERT else self._engine(u, action) for u in self.units]
        return self.profiled([[engine] * unit.length for engine, unit in zip(of, self.units, strict=True)])

    def _engine(self, unit: Unit, action: str) -> Engine:
        if action != INVERT:
            return POLICIES[action]
        return POLICIES[STORE] if unit.chain is None else self.inverters[unit.chain]

    def _block(self, u: int, allow: Sequence[str]) -> Block:
        number, _ = self.places[u]
        unit = self.units[number]
        chain = unit.chain
        can = [a for a in self.profiles if a in allow and (a != INVERT or chain is not None)] or [STORE]
        found = self.profiles
        choices = tuple(
            Choice(a, found[a].held[u], found[a].needed[u], found[a].seconds[u], found[a].forth[u]) for a in can
        )
        closing, anchor = self.kept.get(number, (0, 0))
        last = u + 1 == len(self.places) or self.places[u + 1][0] != number
        every = self.every.get(chain or "")
        return Block(choices, closing, anchor, every and max(1, every // unit.stage.per_block), last)

    def _kept(self) -> dict[int, tuple[int, int]]:
        """For each chain, bytes kept where inverted steps end: before stored ones, and before others."""
        if INVERT not in self.profiles:
            return {}
        found, inside = self.profiled([self._cut(unit) for unit in self.units]), self.profiles[INVERT]
        kept = dict(zip(found.places, map(operator.sub, found.held, inside.held), strict=True))
        result: dict[int, tuple[int, int]] = {}
        for number, unit in enumerate(self.units):
            first, second = _cuts(unit.length)
            # The state between two runs: the block behind it has taken over the tensor that it was given.
            between = kept.get((number, first - 1), 0) + kept.get((number, first), 0) if first else 0
            result[number] = kept.get((number, second - 1), 0), between
        return result

    def _cut(self, unit: Unit) -> list[Engine]:
        """Two runs of inverted blocks, then stored ones."""
        if unit.chain is None:
            return [POLICIES[STORE]] * unit.length
        first, second = _cuts(unit.length)
        run = self.free[unit.chain]
        other = replace(run, anchors=unit.length * unit.stage.per_block)  # another engine, so that it does not go on
        stored = [POLICIES[STORE]] * (unit.length - second)
        return [*[run] * first, *[other] * (second - first), *stored]

    def _every(self, holder: Holder) -> int | None:
        """Inverted steps from one kept state to the next, as the drift law asks for."""
        if holder.scheme.amplification == float("inf"):
            return None  # every step keeps its state: that is in what it holds
        dtype = self.settings.dtype
        under = PRECISIONS.get(self.settings.precision or "", dtype)
        engine = _inverter(holder.engine)
        return engine.interval(run_in(holder.scheme, holder.exact, dtype, under), None, dtype, under)


def _inverter(engine: Engine) -> Invert:
    return replace(engine, keep=0) if isinstance(engine, Invert) else Invert()


def _cuts(length: int) -> tuple[int, int]:
    """Where a chain of that length is cut to see what is kept between its parts; 0 where it is too short."""
    return (2, 4) if length > 4 else (0, length - 1)

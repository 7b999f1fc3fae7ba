"""From what a solver promises to what a step of fake tensors confirms; and the usual ways to compare with."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from math import isqrt

from reversa.memory.costs import RECOMPUTE, SCALARS, STORE, Costs
from reversa.memory.notes import is_compiled
from reversa.memory.planned import Way
from reversa.memory.solve import INVERT, Block, Solution, fastest, leanest

TRIES = 5
"""Steps that are made to find a plan that fits as closely as it was predicted to."""


def best(trials: Trials, budget: int) -> Solution | None:
    """The fastest choice that fits, confirmed.

    The sums over blocks can be off by a state, where policies meet. So the solver is asked for a little more or less
    than the budget: by what the last trial showed it to be off.
    """
    costs = trials.costs
    target, tried = float(budget), set[tuple[str, ...]]()
    for _ in range(TRIES):
        found = fastest(costs.blocks, costs.rest, target)
        if found is None or found.actions in tried:
            break
        tried.add(found.actions)
        target = budget - (trials.make(found.actions).peak - found.peak)
    return trials.within(budget)


class Trials:
    """Choices that were tried."""

    def __init__(self, costs: Costs) -> None:
        self.costs = costs
        self.made: dict[tuple[str, ...], Solution] = {}
        for action in (STORE, RECOMPUTE):
            if all(_has(block, action) for block in costs.blocks):
                found, actions = costs.profiles[action], (action,) * len(costs.blocks)
                self.made[actions] = Solution(actions, found.peak + SCALARS, found.total)

    def make(self, actions: Sequence[str]) -> Solution:
        """A step with these choices."""
        actions = tuple(actions)
        if actions not in self.made:
            self.made[actions] = self.costs.trial(actions)
        return self.made[actions]

    def least(self) -> int:
        """The least peak of those that promise the least."""
        self.make(leanest(self.costs.blocks, self.costs.rest).actions)
        for others in (STORE, RECOMPUTE):
            if all(_has(block, others) for block in self.costs.blocks):
                self.make([INVERT if _has(block, INVERT) else others for block in self.costs.blocks])
        return min(trial.peak for trial in self.made.values())

    def within(self, budget: int) -> Solution | None:
        """The fastest that fits."""
        fitting = (trial for trial in self.made.values() if trial.peak <= budget)
        return min(fitting, key=lambda trial: trial.seconds, default=None)


def _has(block: Block, action: str) -> bool:
    return any(choice.action == action for choice in block.choices)


def ways_of(costs: Costs) -> tuple[Way, ...]:
    """The usual ways to train the same model."""
    stored, recomputed = costs.profiles[STORE], costs.profiles[RECOMPUTE]
    ways = [
        Way("all stored", stored.peak + SCALARS, stored.total),
        Way("checkpoint each block", recomputed.peak + SCALARS, recomputed.total),
        Way("checkpoint every sqrt(n) blocks", _in_segments(costs) + SCALARS, recomputed.total),
    ]
    if costs.holders:
        can = (costs.units[unit].chain is not None for unit, _ in costs.places)
        inverted = costs.trial([INVERT if chain else STORE for chain in can])
        ways.append(Way("all inverted", inverted.peak, inverted.seconds))
    if is_compiled(costs.settings.model):
        from reversa.memory.compiled import compiled_ways  # PyTorch's tracer takes a second to import

        ways += compiled_ways(costs)
    return tuple(ways)


def _in_segments(costs: Costs) -> int:
    """The peak where the inputs of segments of sqrt(n) blocks are stored, and segments are recomputed as a whole."""
    stored, recomputed = costs.profiles[STORE], costs.profiles[RECOMPUTE]
    held = peak = 0
    for number, places in groupby(range(len(costs.places)), key=lambda u: costs.places[u][0]):
        blocks = list(places)
        size = max(1, isqrt(costs.units[number].length))
        for first in range(0, len(blocks), size):
            inside = 0
            for u in blocks[first : first + size]:
                peak = max(peak, held + inside + max(stored.forth[u], stored.needed[u]))
                inside += stored.held[u]
            held += recomputed.held[blocks[first]]
            if first:
                held += _streams_beside(costs, number) * recomputed.given[blocks[first]]
    return max(peak, held + max(recomputed.forth[-1], recomputed.needed[-1]), costs.update)


def _streams_beside(costs: Costs, number: int) -> int:
    """Tensors of the state that a segment of a chain begins with, beside what its first block stores anyway."""
    chain = costs.units[number].chain
    if chain is None:
        return 0
    scheme = costs.holders[chain].scheme
    return max(0, scheme.num_streams - scheme.functions_per_block)

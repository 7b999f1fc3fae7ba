"""The fastest way to train a model within a memory budget, block by block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from math import isqrt
from typing import Any

import torch
from torch import nn

from reversa.convert.record import quietly
from reversa.errors import BudgetError, SettingError, nearest
from reversa.memory.budget import bytes_of
from reversa.memory.costs import POLICIES, RECOMPUTE, STORE, Costs
from reversa.memory.fake import explained
from reversa.memory.notes import eagerly, notes_on
from reversa.memory.planned import Plan, Way
from reversa.memory.report import in_bytes
from reversa.memory.settings import Loss, OptimizerLike, Settings, in_words
from reversa.memory.solve import INVERT, OFFLOAD, Block, Solution, fastest, leanest
from reversa.memory.speed import Speed

TRIES = 5
"""Steps that are made to find a plan that fits as closely as it was predicted to."""

FEW, MORE = 12, (1.16, 1.12, 1.08, 1.05, 1.03, 1.01, 0.99, 0.96)
"""So few blocks are planned with more trials, of what the solver finds for so much of the budget."""


def plan(
    model: nn.Module,
    inputs: Any,
    budget: str | float,
    allow: Sequence[str] | None = None,
    loss: Loss | None = None,
    optimizer: OptimizerLike = None,
    precision: str | None = None,
    speed: Speed | None = None,
) -> Plan:
    """Find the way to train a model that is predicted to take the least time and whose peak fits into a budget.

    For each block of a reversible chain, and for each block outside of chains, one policy is chosen:

    - ``"store"``: its activations are stored. No time, most memory.
    - ``"recompute"``: its input is stored, and it is evaluated once more.
    - ``"invert"``: its input is computed back from its output (blocks of chains). Where such a run of blocks ends, and
      wherever the scheme's drift law asks for it, a state is kept.
    - ``"offload"``: its activations wait in the host's memory.

    The peak is that of the whole step: forward pass, loss, backward pass, optimizer's step. Bytes and operations of
    each block under each policy come from steps of fake tensors (:func:`reversa.memory.estimate`); dynamic programming
    over the blocks finds the choice; a step of fake tensors with this choice confirms its peak. Nothing is computed.

    Args:
        model: any module, converted or not; it is not touched.
        inputs: as in :func:`reversa.memory.estimate`.
        budget: bytes, or a number with a unit such as ``"16 GiB"``.
        allow: the policies to choose from. If not given: all of them, ``"offload"`` on an accelerator only.
        loss: as in :func:`reversa.memory.estimate`.
        optimizer: as in :func:`reversa.memory.estimate`.
        precision: as in :func:`reversa.memory.estimate`.
        speed: of the device that will train; None measures this machine's, in a fraction of a second. Only the
            choice and the seconds depend on it, no byte does.

    Returns:
        The plan: ``plan.apply(model)``, ``print(plan)``, ``plan.peak_bytes``, ``plan.seconds``.

    Raises:
        BudgetError: no plan fits. It says what the least is, as ``error.least_bytes`` too.
        SettingError: an unknown unit or policy; and what :func:`reversa.memory.estimate` raises.

    >>> import reversa
    >>> blocks = [nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 64)) for _ in range(12)]
    >>> model = reversa.ReversibleSequence(blocks, scheme=reversa.Momentum(0.99))
    >>> speed = Speed(flops=20e12, flops_16=300e12, bandwidth=2e12, host=25e9)
    >>> found = plan(model, (4096, 64), budget="30 MiB", optimizer=torch.optim.SGD, speed=speed)
    >>> found.peak_bytes <= 30 * 2**20
    True
    >>> model = found.apply(model)
    >>> model.engine
    Mixed(4 x Invert(), 8 x Store())
    """
    settings = Settings(model, inputs, loss, optimizer, precision)
    most = bytes_of(budget)
    allowed = _allowed(allow, settings.device)
    speed = speed or Speed.measured(settings.device)
    with _prepared(settings):
        costs = Costs(settings, allowed, speed)
        found, least = _best(costs, most)
        ways = _ways(costs)
    if found is None:
        raise BudgetError(
            f"no plan for {type(model).__name__} (inputs {in_words(settings.given)}) takes less than "
            f"{in_bytes(least)}; the budget is {in_bytes(most)}. {_remedy(costs, allowed)}",
            least,
        )
    return Plan(
        type(model).__name__,
        in_words(settings.given),
        most,
        found.peak,
        found.seconds,
        least,
        tuple(costs.units),
        tuple(map(tuple, costs.engines(found.actions))),
        ways,
        speed,
        notes_on(model, settings.device, measured=False),
    )


def _allowed(allow: Sequence[str] | None, device: torch.device) -> tuple[str, ...]:
    if allow is None:
        return tuple(name for name in POLICIES if name != OFFLOAD or device.type != "cpu")
    for name in [allow] if isinstance(allow, str) else allow:
        if name not in POLICIES:
            raise SettingError(nearest(name, POLICIES, "policy"))
    if not allow or isinstance(allow, str):
        raise SettingError(f"allow needs a list of policies, such as ['store', 'invert']; got {allow!r}")
    if OFFLOAD in allow and device.type == "cpu":
        raise SettingError("offload frees no memory where the model itself is on the CPU: leave it out of allow")
    return tuple(allow)


@contextmanager
def _prepared(settings: Settings) -> Iterator[None]:
    """What steps of fake tensors are made in."""
    shapes, model = in_words(settings.given), settings.model
    with quietly(), eagerly(model), torch.inference_mode(False), torch.enable_grad(), explained(model, shapes):
        yield


def _best(costs: Costs, budget: int) -> tuple[Solution | None, int]:
    """The fastest choice that fits, confirmed, and the least that any takes.

    The sums over blocks are right to a few states, where policies meet. So the solver is asked for a little more or
    less than the budget: by what the last trial showed it to be off; and where blocks are so few that a state matters,
    by several amounts.
    """
    trials = _Trials(costs)
    least = trials.least()
    best, target = trials.within(budget), float(budget)
    targets = [budget * more for more in MORE] if len(costs.blocks) <= FEW else []
    for _ in range(TRIES + len(targets)):
        found = fastest(costs.blocks, costs.rest, target)
        if found is None or found.actions in trials.made:
            if not targets:
                break
            target = targets.pop()
            continue
        trial = trials.make(found.actions)
        target = budget - (trial.peak - found.peak)
        best = trials.within(budget)
    return best, least


class _Trials:
    """Choices that were tried."""

    def __init__(self, costs: Costs) -> None:
        self.costs = costs
        self.made: dict[tuple[str, ...], Solution] = {}

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


def _ways(costs: Costs) -> tuple[Way, ...]:
    """The usual ways to train the same model."""
    stored, recomputed = costs.profiles[STORE], costs.profiles[RECOMPUTE]
    ways = [
        Way("all stored", stored.peak, stored.total),
        Way("checkpoint each block", recomputed.peak, recomputed.total),
        Way("checkpoint every sqrt(n) blocks", _in_segments(costs), recomputed.total),
    ]
    if costs.holders:
        can = (costs.units[unit].chain is not None for unit, _ in costs.places)
        inverted = costs.trial([INVERT if chain else STORE for chain in can])
        ways.append(Way("all inverted", inverted.peak, inverted.seconds))
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
                peak = max(peak, held + inside + stored.needed[u])
                inside += stored.held[u]
            held += recomputed.held[blocks[first]]
    return max(peak, held + costs.rest[RECOMPUTE].needed, costs.update)


def _remedy(costs: Costs, allowed: Sequence[str]) -> str:
    if not costs.holders:
        return "Convert the model first (reversa.convert), take smaller inputs, or precision='bf16'."
    more = "" if INVERT in allowed else "Allow 'invert', take"
    return f"{more or 'Take'} smaller inputs, an optimizer with less state, or precision='bf16'."

"""The fastest way to train a model within a memory budget, block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from reversa.convert.record import quietly
from reversa.errors import BudgetError, SettingError, nearest
from reversa.exact import check_exact
from reversa.memory.budget import bytes_of
from reversa.memory.costs import POLICIES, Costs
from reversa.memory.fake import explained
from reversa.memory.largest import batch_of, largest, with_batch
from reversa.memory.notes import eagerly, notes_on
from reversa.memory.planned import Plan, Way
from reversa.memory.search import Trials, best, ways_of
from reversa.memory.settings import Loss, OptimizerLike, Settings, in_words
from reversa.memory.solve import INVERT, OFFLOAD
from reversa.memory.speed import Speed
from reversa.memory.units import holders_of
from reversa.words import in_bytes

EXACT = "exact"
ANY_SPEED = Speed(1e13, 1e14, 1e12, 1e10)
"""Where only bytes are asked for."""


def plan(
    model: nn.Module,
    inputs: Any,
    budget: str | float,
    allow: Sequence[str] | None = None,
    batch: int | Literal["max"] | None = None,
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
    - ``"exact"``: all chains may run in exact arithmetic. No state is kept for drift then, only the bits that a scheme
      loses. The numbers are those of ``exact=True``.

    The peak is that of the whole step: forward pass, loss, backward pass, optimizer's step. Bytes and operations of
    each block under each policy come from steps of fake tensors (:func:`reversa.memory.estimate`); dynamic programming
    over the blocks finds the choice; a step of fake tensors with this choice confirms its peak. Nothing is computed.

    Args:
        model: any module, converted or not; it is not touched.
        inputs: as in :func:`reversa.memory.estimate`.
        budget: bytes, or a number with a unit such as ``"16 GiB"``.
        allow: the policies to choose from. If not given: all of them but ``"exact"``, and ``"offload"`` on an
            accelerator only.
        batch: plan for this batch instead of the one of the inputs; ``"max"`` finds the largest that fits.
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
    >>> found = plan(model, (4096, 64), "24 MiB", allow=["store", "invert"], speed=speed)
    >>> found.peak_bytes <= 24 * 2**20
    True
    >>> model = found.apply(model)
    >>> model.engine
    Mixed(1 x Store(), 10 x Invert(), 1 x Store())
    """
    most = bytes_of(budget)
    step: Any = {"loss": loss, "optimizer": optimizer, "precision": precision}
    if batch == "max":
        batch = largest_size(model, partial(with_batch, inputs), most, batch_of(inputs), allow, **step)
    inputs = inputs if batch is None else with_batch(inputs, _checked(batch))
    (found,) = curve(model, inputs, [most], allow, speed=speed, **step)
    if isinstance(found, BudgetError):
        raise found
    return found


def curve(
    model: nn.Module,
    inputs: Any,
    budgets: Iterable[str | float],
    allow: Sequence[str] | None = None,
    loss: Loss | None = None,
    optimizer: OptimizerLike = None,
    precision: str | None = None,
    speed: Speed | None = None,
) -> list[Plan | BudgetError]:
    """Plans for several budgets, in the time of hardly more than one.

    Args:
        model: as in :func:`plan`.
        inputs: as in :func:`plan`.
        budgets: each as in :func:`plan`.
        allow: as in :func:`plan`.
        loss: as in :func:`reversa.memory.estimate`.
        optimizer: as in :func:`reversa.memory.estimate`.
        precision: as in :func:`reversa.memory.estimate`.
        speed: as in :func:`plan`.

    Returns:
        For each budget the plan, or the error that :func:`plan` raises where none fits.

    >>> model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
    >>> found, error = curve(model, (512, 64), ["1 MiB", "1 KiB"])
    >>> found.peak_bytes == found.least_bytes == error.least_bytes
    True
    """
    settings = Settings(model, inputs, loss, optimizer, precision)
    allowed, asked = _allowed(allow, settings.device), [bytes_of(budget) for budget in budgets]
    with _prepared(settings):
        tried = _tried(settings, allowed, speed or Speed.measured(settings.device))
        ways = ways_of(tried[0].costs)
        return [_plan(tried, budget, ways) for budget in asked]


def _tried(settings: Settings, allowed: tuple[str, ...], speed: Speed) -> list[Trials]:
    """Trials with the model's chains as they are; and with all of them in exact arithmetic, where that is allowed."""
    for holder in holders_of(settings.model).values() if EXACT in allowed else ():
        check_exact(holder.scheme, True)
    tried = [Trials(Costs(settings, [name for name in allowed if name != EXACT], speed))]
    if EXACT in allowed:
        tried.append(Trials(Costs(settings, [*allowed, INVERT], speed, exact=True)))
    for trials in tried:
        trials.least()
    return tried


def _plan(tried: list[Trials], budget: int, ways: tuple[Way, ...]) -> Plan | BudgetError:
    costs = tried[0].costs
    model, shapes = costs.settings.model, in_words(costs.settings.given)
    fitting = [(found, trials.costs) for trials in tried if (found := best(trials, budget)) is not None]
    least = min(trials.least() for trials in tried)
    if not fitting:
        return BudgetError(
            f"no plan for {type(model).__name__} (inputs {shapes}) takes less than {in_bytes(least)}; the budget is "
            f"{in_bytes(budget)}. {_remedy(costs)}",
            least,
        )
    found, costs = min(fitting, key=lambda one: one[0].seconds)
    return Plan(
        model=type(model).__name__,
        inputs=shapes,
        budget=budget,
        peak_bytes=found.peak,
        seconds=found.seconds,
        least_bytes=least,
        units=tuple(costs.units),
        engines=tuple(map(tuple, costs.engines(found.actions))),
        ways=ways,
        speed=costs.speed,
        exact=costs.exact,
        notes=notes_on(model, costs.settings.device, measured=False),
    )


def largest_size(
    model: nn.Module,
    inputs_at: Callable[[int], Any],
    budget: str | float,
    start: int = 1,
    allow: Sequence[str] | None = None,
    loss: Loss | None = None,
    optimizer: OptimizerLike = None,
    precision: str | None = None,
) -> int:
    """The largest batch, image side or sequence length that fits into a budget with the plan of least memory.

    Args:
        model: as in :func:`plan`.
        inputs_at: the inputs of a size, as :func:`reversa.memory.estimate` takes them.
        budget: as in :func:`plan`.
        start: the first size to look at; the nearer it is, the sooner the answer comes.
        allow: as in :func:`plan`.
        loss: as in :func:`reversa.memory.estimate`.
        optimizer: as in :func:`reversa.memory.estimate`.
        precision: as in :func:`reversa.memory.estimate`.

    Raises:
        BudgetError: size 1 does not fit.
        SettingError: as in :func:`plan`.

    >>> model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
    >>> largest_size(model, lambda batch: (batch, 64), "1 MiB", start=64)
    566
    """

    def least(size: int) -> int:
        settings = Settings(model, inputs_at(size), loss, optimizer, precision)
        with _prepared(settings):
            return min(t.least() for t in _tried(settings, _allowed(allow, settings.device), ANY_SPEED))

    return largest(least, bytes_of(budget), start)


def _checked(batch: object) -> int:
    if isinstance(batch, int) and not isinstance(batch, bool) and batch >= 1:
        return batch
    raise SettingError(f"batch must be a whole number above 0, 'max' or None, got {batch!r}")


def _allowed(allow: Sequence[str] | None, device: torch.device) -> tuple[str, ...]:
    if allow is None:
        return tuple(name for name in POLICIES if name != OFFLOAD or device.type != "cpu")
    for name in [allow] if isinstance(allow, str) else allow:
        if name not in (*POLICIES, EXACT):
            raise SettingError(nearest(name, (*POLICIES, EXACT), "policy"))
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


def _remedy(costs: Costs) -> str:
    less = "smaller inputs, an optimizer with less state, or precision='bf16'."
    if not costs.holders:
        return f"Convert the model first (reversa.convert), or take {less}"
    return f"Take {less}" if INVERT in costs.profiles else f"Allow 'invert', or take {less}"

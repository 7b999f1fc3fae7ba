"""``reversa plan --largest``: the largest batch, side or length that fits into a budget, in several ways to train."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import gcd
from typing import Any

from torch import nn

from reversa.cli.job import Job, explained, sized
from reversa.cli.tables import Result, Row
from reversa.cli.text import most_tokens
from reversa.errors import BudgetError
from reversa.memory import estimate, largest_size
from reversa.memory.budget import bytes_of
from reversa.memory.costs import POLICIES, RECOMPUTE, STORE
from reversa.memory.largest import largest
from reversa.memory.units import put_engines, units_of
from reversa.words import aligned, in_bytes

POSITIONS = {"batch": 0, "side": 2, "length": 1}
MOST_HALVINGS = 16
"""Sides are tried in steps of it, or of its part that the given side is a multiple of."""


class _NoLonger(Exception):
    """A model of text has no positions for more."""


def fitting(
    job: Job, model: nn.Module, original: nn.Module | None, what: str, budget: str, allow: Sequence[str] | None
) -> Result:
    """One row for each way to train: the largest size.

    Args:
        job: the network.
        model: what is planned for.
        original: what it was before it was converted, if it was.
        what: ``"batch"``, ``"side"`` or ``"length"``.
        budget: as the user wrote it.
        allow: the policies of the plan.

    Raises:
        BudgetError: not even size 1 fits, with the plan of least memory.
    """
    most = bytes_of(budget)
    sizes = {
        "plan of least memory": largest_planned(job, model, what, budget, allow),
        "checkpoint each block": _uniform(job, model, what, most, RECOMPUTE),
        "all stored": _uniform(job, model, what, most, STORE),
    }
    if original is not None:
        sizes["the original, all stored"] = _uniform(job, original, what, most, STORE)
    rows: list[Row] = [{"way": way, what: size} for way, size in sizes.items()]
    cells = [(way, str(size) if size else "none") for way, size in sizes.items()]
    heading = f"{job.network.spec}: the largest {what} that fits into {in_bytes(most)} (inputs {job.inputs(what)})"
    return Result("\n".join([heading, "", *aligned([("", what), *cells]), *_notes(job, model, what, sizes)]), rows)


def _notes(job: Job, model: nn.Module, what: str, sizes: Mapping[str, int]) -> list[str]:
    room = most_tokens(model) if what == "length" else None
    if room is not None and room in sizes.values():
        return ["", f"It has positions for {room} tokens: no more were tried."]
    unit = unit_of(job, what)
    return ["", f"Tried in steps of {unit}."] if unit > 1 else []


def unit_of(job: Job, what: str) -> int:
    """Steps in which sizes are tried: networks that halve their images, or cut them in patches, take not every side."""
    return gcd(job.shape[-1], MOST_HALVINGS) if what == "side" else 1


def largest_planned(job: Job, model: nn.Module, what: str, budget: str, allow: Sequence[str] | None) -> int:
    """The largest size with the plan of least memory."""
    return _largest(
        job, model, what, lambda inputs_at, start: largest_size(model, inputs_at, budget, start, allow, **job.step)
    )


def _uniform(job: Job, model: nn.Module, what: str, most: int, policy: str) -> int:
    """The largest size with one policy for every block; 0 where there is none."""
    units = units_of(model)
    put_engines(model, units, [[POLICIES[policy]] * unit.length for unit in units])

    def peak(inputs: Any) -> int:
        return estimate(model, inputs, **job.step).peak_bytes

    try:
        return _largest(
            job, model, what, lambda inputs_at, start: largest(lambda size: peak(inputs_at(size)), most, start)
        )
    except BudgetError:
        return 0


def _largest(job: Job, model: nn.Module, what: str, search: Callable[[Callable[[int], Any], int], int]) -> int:
    _, at_size = sized(job, what, "--largest")
    room = most_tokens(model) if what == "length" else None
    unit = unit_of(job, what)

    def inputs_at(units: int) -> Any:
        if room is not None and units > room:
            raise _NoLonger
        return at_size(lambda *_, **__: model, units * unit)[1]

    try:
        with explained(job, against=what, choose="another --largest, or another --input"):
            return unit * search(inputs_at, room or job.shape[POSITIONS[what]] // unit)
    except _NoLonger:
        return room or 0

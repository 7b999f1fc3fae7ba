"""The least time within a budget: dynamic programming over the blocks of a model, forwards.

All that a later block needs to know of those before it is how much they hold, and how long the run of inverted steps is
that it may go on with. Of two choices so far that agree in the latter, one that holds more and takes longer is dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

INVERT, OFFLOAD = "invert", "offload"
MOST = 3000
"""Choices so far that are kept; of more, neighbours that hold nearly the same are merged."""


class Choice(NamedTuple):
    """One way to train one block, and what that takes."""

    action: str
    held: int
    """Bytes from its forward to its backward pass."""
    needed: int
    """The most bytes alive in its backward pass, without those that blocks before it hold."""
    seconds: float
    forth: int = 0
    """The same in its forward pass."""


@dataclass(frozen=True)
class Block:
    """A block and its choices.

    Attributes:
        choices: at least one.
        closing: bytes of the state that is kept where a run of inverted steps ends behind this block and stored or
            recomputed ones follow. (What is kept behind the last block of a chain is in what that block holds.)
        anchor: the same where inverted steps follow.
        every: inverted steps from one kept state to the next; None: as many as there are.
        last: no step of the same chain follows.
    """

    choices: tuple[Choice, ...]
    closing: int = 0
    anchor: int = 0
    every: int | None = None
    last: bool = True


Rest = Mapping[str, Choice]


class Solution(NamedTuple):
    """What was chosen for each block, the bytes alive at most, and the seconds."""

    actions: tuple[str, ...]
    peak: int
    seconds: float


class _Path(NamedTuple):
    """Choices for the first blocks."""

    held: int
    peak: int
    seconds: float
    action: str = ""
    before: _Path | None = None

    def actions(self) -> tuple[str, ...]:
        found: list[str] = []
        at: _Path | None = self
        while at is not None and at.before is not None:
            found.append(at.action)
            at = at.before
        return tuple(reversed(found))


Cost = Callable[[_Path], float]


def fastest(blocks: Sequence[Block], rest: Rest, budget: float) -> Solution | None:
    """The choices of the least time whose peak fits.

    Args:
        blocks: in the order of the forward pass.
        rest: what comes after the last block (the head, the loss), by the last block's action.
        budget: bytes.

    Returns:
        None where nothing fits.

    >>> store, recompute = Choice("store", 4, 5, 1.0), Choice("recompute", 1, 5, 1.3)
    >>> blocks, rest = [Block((store, recompute))] * 3, dict.fromkeys(["store", "recompute"], Choice("", 0, 1, 0.0))
    >>> fastest(blocks, rest, 10)
    Solution(actions=('recompute', 'store', 'store'), peak=10, seconds=3.3)
    >>> fastest(blocks, rest, 6) is None
    True
    """
    ends = _walk(blocks, rest, budget, lambda path: path.seconds)
    return _solution(min(ends, key=lambda path: path.seconds)) if ends else None


def leanest(blocks: Sequence[Block], rest: Rest) -> Solution:
    """The choices of the least peak.

    >>> store, recompute = Choice("store", 4, 5, 1.0), Choice("recompute", 1, 5, 1.3)
    >>> leanest([Block((store, recompute))] * 3, dict.fromkeys(["store", "recompute"], Choice("", 0, 1, 0.0))).peak
    7
    """
    ends = _walk(blocks, rest, float("inf"), lambda path: path.peak)
    return _solution(min(ends, key=lambda path: (path.peak, path.seconds)))


def _solution(end: _Path) -> Solution:
    return Solution(end.actions()[:-1], end.peak, end.seconds)


def _walk(blocks: Iterable[Block], rest: Rest, budget: float, cost: Cost) -> list[_Path]:
    runs: dict[int, list[_Path]] = {0: [_Path(0, 0, 0.0)]}
    before: Block | None = None
    for block in blocks:
        found: dict[int, list[_Path]] = {}
        for run, paths in runs.items():
            for choice in block.choices:
                extra, now = _follow(run, choice, before, block)
                found.setdefault(now, []).extend(_longer(paths, choice, extra, budget))
        runs = {run: _best(paths, cost) for run, paths in found.items()}
        before = block
    ends = [path for paths in runs.values() for path in paths]
    return [end for path in ends for end in _longer([path], rest[path.action], 0, budget)]


def _follow(run: int, choice: Choice, before: Block | None, block: Block) -> tuple[int, int]:
    """Bytes that are kept between two blocks because of what the second does, and the length of the run after it."""
    inverts = choice.action == INVERT
    extra, now = 0, int(inverts)
    if run and before is not None:
        if inverts and run != block.every:
            now = 1 if block.every is None else run + 1
        elif inverts or choice.action == OFFLOAD:
            extra = before.anchor
        else:
            extra = before.closing  # the block holds its own input
    return extra, 0 if block.last else now


def _longer(paths: Iterable[_Path], choice: Choice, extra: int, budget: float) -> Iterator[_Path]:
    for path in paths:
        held = path.held + extra
        peak = max(held + choice.needed, path.held + choice.forth)  # a state kept in between is the one just made
        if peak <= budget:
            seconds = path.seconds + choice.seconds
            yield _Path(held + choice.held, max(path.peak, peak), seconds, choice.action, path)


def _best(paths: list[_Path], cost: Cost) -> list[_Path]:
    """Those that no other beats in both what they hold and what they cost."""
    paths.sort(key=lambda path: (path.held, cost(path)))
    kept: list[_Path] = []
    for path in paths:
        if not kept or cost(path) < cost(kept[-1]) * (1 - 1e-12):
            kept.append(path)
    if len(kept) > MOST:
        width = (kept[-1].held - kept[0].held) / MOST
        kept = list({int((path.held - kept[0].held) / width): path for path in reversed(kept)}.values())[::-1]
    return kept

"""Runs of blocks that go on with each other's tensor, and which of them are worth a chain."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from reversa.convert.record import Key, Seen


@dataclass(frozen=True, eq=False)
class Block:
    """A call that a reversible step could take over: where x came in, where x + f(x) went out, what acted on it."""

    name: str
    key: Key
    given: Seen
    gave: Seen
    after: tuple[str, ...]
    stored: Mapping[int, int]

    def continues(self, other: Block) -> bool:
        return self.key == other.key and self.given.tensor is other.gave.tensor


Run = list[Block]


def parent_of(name: str) -> str:
    """The path of the module that holds this one."""
    return name.rpartition(".")[0]


def is_within(name: str, outer: str) -> bool:
    """Whether a module is the other, or lies in it."""
    return name == outer or name.startswith(f"{outer}.")


def runs_of(verdicts: dict[str, Block | str]) -> list[Run]:
    """The blocks, gathered into runs of children of one parent that go on with each other's tensor."""
    latest: dict[str, Run] = {}
    runs: list[Run] = []
    for name, block in verdicts.items():
        if isinstance(block, str):
            continue
        run = latest.get(parent_of(name))
        if run is None or not block.continues(run[-1]):
            run = latest[parent_of(name)] = []
            runs.append(run)
        run.append(block)
    return runs


def most_saving(runs: list[Run]) -> list[Run]:
    """Of runs inside the blocks of another, either these or that: what saves more; where they save the same, that."""
    inner = {id(run): [other for other in runs if other is not run and _is_inside(other, run)] for run in runs}

    def best(among: list[Run]) -> list[Run]:
        outermost = [run for run in among if not any(run in inner[id(other)] for other in among)]
        return [one for run in outermost for one in _better([run], best(inner[id(run)]))]

    return best(runs)


def _better(outer: list[Run], inner: list[Run]) -> list[Run]:
    return max(outer, inner, key=lambda runs: sum(map(_saves, runs))) if inner else outer


def _is_inside(run: Run, outer: Run) -> bool:
    return any(is_within(run[0].name, block.name) for block in outer)


def _saves(run: Run) -> int:
    """Bytes that a chain saves at the peak, when one block has its activations back: all but those, and a state."""
    state = 2 * run[0].given.tensor.nbytes
    return sum(stored_by(run).values()) - max(sum(block.stored.values()) for block in run) - state


def stored_by(run: Run) -> dict[int, int]:
    """What autograd stores in the run's blocks: bytes, by the address of the storage."""
    return {storage: size for block in run for storage, size in block.stored.items()}

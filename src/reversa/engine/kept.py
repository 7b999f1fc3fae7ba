"""States between two uses."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from typing import NamedTuple

from reversa.schemes import State


class KeptState(NamedTuple):
    """The streams of a state without their graph, and the versions that they had."""

    streams: State
    versions: list[int]

    @staticmethod
    def of(state: State) -> KeptState:
        return KeptState(tuple(stream.detach() for stream in state), [stream._version for stream in state])

    @property
    def unchanged(self) -> bool:
        """Whether nobody wrote to it since."""
        return [stream._version for stream in self.streams] == self.versions


class Cursor:
    """How far a backward pass has come: the state before ``step``. It moves in place, so that old streams are freed."""

    __slots__ = ("state", "step", "task")

    def __init__(self, task: int, step: int, state: State) -> None:
        self.task = task
        self.step = step
        self.state = state

"""A scheme in integers: the same formula, of which every bit can be computed back."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from reversa.errors import StateError
from reversa.exact.fixed import real
from reversa.exact.joined import joined
from reversa.exact.watch import Range
from reversa.schemes import Scheme, State


class ExactScheme(Scheme):
    """A scheme whose state is held in integers.

    The state is ``(*carriers, *integers, *spilled)``, with one carrier and one tensor of integers for each stream.
    Carriers are the streams as the residual functions and autograd see them: floating tensors whose values are the
    integers' and whose graph is the formula's. What is spilled are words of bits that the formula takes from an
    integer, kept for the way back.

    A carrier that nobody reads takes no memory: it is one zero seen through strides of 0 in the forward pass, where it
    has the graph, and empty in the backward pass, which recovers integers alone.

    Args:
        scheme: the formula.
        scales: for each stream, the integer that stands for 1.
        dtype: the integers' type.
    """

    exact = True

    range: Range
    """Whether the integers still are what the formula makes of real numbers."""

    way_back: bool = True
    """Somebody may go back over the steps that follow: what they spill is kept."""

    def __init__(self, scheme: Scheme, scales: Sequence[float], dtype: torch.dtype) -> None:
        self.scheme = scheme
        self.scales = tuple(scales)
        self.dtype = dtype
        self.num_streams = scheme.num_streams  # type: ignore[misc]
        self.functions_per_block = scheme.functions_per_block  # type: ignore[misc]
        self.carries_input = scheme.carries_input  # type: ignore[misc]
        self.source = scheme.source  # type: ignore[misc]

    def __repr__(self) -> str:
        return f"{self.scheme} in {self.arithmetic}"

    @property
    @abstractmethod
    def arithmetic(self) -> Any:
        """What the integers are: a :class:`~reversa.exact.FixedPoint` or a :class:`~reversa.exact.Ratio`."""

    @property
    def amplification(self) -> float:
        return 1.0

    def drift(self, steps: int, eps: float) -> float:
        """None: what is computed back has the same bits."""
        return 0.0

    def element_bytes(self, dtype: torch.dtype) -> int:
        return self.dtype.itemsize

    def spilled_tensors(self, steps: int) -> int:
        """How many tensors the state has grown by after so many steps: each of one byte for every element, or as said
        there.
        """
        return self.spilled_bytes(steps)

    def modules(self) -> tuple[nn.Module, ...]:
        return self.scheme.modules()

    def open(self, x: Tensor) -> State:
        return self.quantized(self.scheme.open(x))

    def quantized(self, streams: State) -> State:
        """The state before the first step, from streams of real numbers."""
        if streams[0].dim() == 0 or streams[0].is_nested:
            raise StateError("exact arithmetic needs a dense input of at least one dimension")
        integers = self._integers(streams)
        values = tuple(
            real(integer, 1 / scale, stream.dtype) if self._is_read(i) else nothing(stream)
            for i, (integer, scale, stream) in enumerate(zip(integers, self.scales, streams, strict=True))
        )
        unit = tuple(tuple(float(i == j) for j in range(len(streams))) for i in range(len(streams)))
        return (*joined(values, unit, *streams), *integers)

    def close(self, state: State) -> Tensor:
        self.range.settle()
        return self.scheme.close(state[: self.num_streams])

    def told(self, state: State) -> State:
        return state[self.num_streams :]

    def split(self, state: State) -> tuple[State, State, State]:
        """Carriers, integers, and what was spilled."""
        n = self.num_streams
        return state[:n], state[n : 2 * n], state[2 * n :]

    def shown(self, state: State, step: int) -> State:
        """A state before a step for somebody who reads it: every carrier with its value.

        Raises:
            StateError: it has left the range of the integers.
        """
        self.range.settle()
        carriers, integers, spilled = self.split(state)
        values = self.streams(state, step)
        carriers = tuple(
            carrier if self._is_read(i) else joined((values[i],), ((1.0,),), carrier)[0]
            for i, carrier in enumerate(carriers)
        )
        return (*carriers, *integers, *spilled)

    def remainder(self, streams: State) -> State:
        """What rounding to integers takes from the first state; nothing where it takes nothing."""
        rest = tuple(
            stream.detach() - real(integer, 1 / scale, stream.dtype)
            for stream, integer, scale in zip(streams, self._integers(streams), self.scales, strict=True)
        )
        return rest if any(bool(r.any()) for r in rest) else ()

    def taken(self, state: State, steps: int) -> tuple[State, State]:
        """A state after all steps as somebody gives it: the state, and the remainder.

        Raises:
            StateError: it is not one that :meth:`shown` gave.
        """
        n = self.num_streams
        length = 2 * n + self.spilled_tensors(steps)
        integers = state[n : 2 * n]
        if len(state) not in (length, length + n) or any(i.dtype != self.dtype for i in integers):
            raise StateError(
                f"inverse_state in exact arithmetic needs the state that forward_state returned: {n} streams, {n} "
                f"tensors of integers, {length - 2 * n} of spilled bits; got {len(state)} tensors."
            )
        hollow = tuple(empty(stream) for stream in state[:n])
        return (*hollow, *state[n:length]), state[length:]

    def first(self, state: State, remainder: State) -> State:
        """The state before the first step, with the remainder of its rounding put back."""
        values = self.streams(state, 0)
        values = tuple(v + r for v, r in zip(values, remainder, strict=True)) if remainder else values
        return (*values, *state[self.num_streams :])

    def resumed(self, x: Tensor, state: State, step: int) -> tuple[State, int]:
        _, *rest = self.shown(state, step)[: self.num_streams]
        return self.quantized((x, *rest)), self._resumes_at(step)

    def _resumes_at(self, step: int) -> int:
        """The number of a step whose state was made anew: 0 where integers are held in a unit that the number tells."""
        return 0

    def _integers(self, streams: State) -> State:
        """The first state as integers."""
        first, *others = (stream.detach() for stream in streams)
        integer = self._integer(0, first)
        return (integer, *(self._beside(integer, i, stream) for i, stream in enumerate(others, 1)))

    def _beside(self, first: Tensor, i: int, stream: Tensor) -> Tensor:
        """Another stream's integers. Where it is expanded, as a velocity at rest is, they are laid out as the first's:
        residual functions return values in that layout, and a sum over one layout is made in place.
        """
        if 0 not in stream.stride():
            return self._integer(i, stream)
        stored = stream[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in stream.stride())]
        return torch.empty_like(first).copy_(self._integer(i, stored))

    @abstractmethod
    def streams(self, state: State, step: int) -> State:
        """The streams as real numbers, from the state before a step."""

    @abstractmethod
    def _integer(self, i: int, stream: Tensor) -> Tensor:
        """A stream of the first state as integers."""

    def _is_read(self, i: int) -> bool:
        """Whether residual functions, or the output, read this stream."""
        return True


def nothing(like: Tensor) -> Tensor:
    """A zero of that shape and type without memory."""
    return torch.zeros((), dtype=like.dtype, device=like.device).expand(like.shape)


def empty(like: Tensor) -> Tensor:
    """In the place of a carrier where only integers are known."""
    return like.new_empty(0)

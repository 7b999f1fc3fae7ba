"""Where integers and real numbers part: noticed at the step that does it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple
from weakref import ref

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from reversa.errors import StateError
from reversa.schemes import State


def peak(x: Tensor) -> Tensor | float:
    """The largest magnitude; nan where there is one. A number on the CPU, elsewhere a tensor: reading it waits."""
    if isinstance(x, FakeTensor) or x.is_meta or not x.numel():
        return 0.0
    low, high = torch.aminmax(x)  # on the CPU many times faster than a norm
    return max(-low.item(), high.item()) if x.device.type == "cpu" else torch.maximum(-low, high)


def refuse_beyond(what: str, x: Tensor, limit: float, step: int, bits: int, remedy: str) -> None:
    """Raise where a magnitude reaches the limit.

    Raises:
        StateError: it does, or is not a number.
    """
    refuse(what, float(peak(x)), limit, step, bits, remedy)


def refuse(what: str, value: float, limit: float, step: int, bits: int, remedy: str) -> None:
    """Raise where the largest magnitude reaches the limit.

    Raises:
        StateError: it does, or is not a number.
    """
    if value < limit:
        return
    if not math.isfinite(value):
        raise StateError(
            f"step {step}: {what} is not finite. Look at the input and the weights, lower the learning rate, or use a "
            "wider data type."
        )
    raise StateError(
        f"step {step}: {what} reaches {value:.3g}; {bits}-bit fixed point holds magnitudes below {limit:.3g} there. "
        f"{remedy}"
    )


class Linear(NamedTuple):
    """A step as a linear map, ``streams' = matrix @ streams + weights * value``."""

    matrix: Sequence[Sequence[float]]
    weights: Sequence[float]


class _Reading(NamedTuple):
    """What a step tells of the magnitudes after it."""

    step: int
    form: Linear
    limits: Sequence[float]
    follows: bool
    value: Tensor | float
    stream: Callable[[int], Tensor | float]


class Range:
    r"""Whether all sums of a run stay in the range of the integers, mostly from what ``f`` returned alone.

    .. math:: s'_i = \sum_j m_{ij} s_j + w_i f \quad\Rightarrow\quad
        \max|s'_i| \le \sum_j |m_{ij}| \max|s_j| + |w_i| \max|f|

    A stream itself is looked at where this bound reaches its limit, and where a step does not follow the one before. On
    the CPU all is read at once; elsewhere reading a number waits for the device, so that numbers are collected until
    :meth:`settle`.

    Args:
        bits: of the integers.
        names: what errors call the streams and, last, the value.
        remedies: what to do where one of them is too large.
    """

    def __init__(self, bits: int, names: Sequence[str], remedies: Sequence[str]) -> None:
        self.bits = bits
        self.names = names
        self.remedies = remedies
        self._bounds: list[float] = []
        self._after: tuple[ref[Tensor], ...] = ()
        self._unread: list[_Reading] = []

    def see(
        self,
        step: int,
        form: Linear,
        limits: Sequence[float],
        before: State,
        after: State,
        value: Tensor,
        stream: Callable[[int], Tensor],
    ) -> None:
        """Judge a step: now, or in :meth:`settle`.

        Args:
            step: its number.
            form: its formula.
            limits: what the magnitudes of the streams after it and, last, of the value must stay below.
            before: the integers before it.
            after: the integers after it.
            value: what ``f`` returned.
            stream: gives a stream after it, as real numbers.

        Raises:
            StateError: a magnitude reaches its limit.
        """
        follows = len(self._after) == len(before) and all(a() is b for a, b in zip(self._after, before, strict=True))
        self._after = tuple(map(ref, after))
        magnitude = peak(value)
        if not isinstance(magnitude, Tensor):
            self._judge(_Reading(step, form, limits, follows, magnitude, lambda i: peak(stream(i))))
        else:
            magnitudes = [peak(stream(i)) for i in range(len(after))]
            self._unread.append(_Reading(step, form, limits, follows, magnitude, magnitudes.__getitem__))

    def settle(self) -> None:
        """Judge the steps whose numbers were not read yet."""
        unread, self._unread = self._unread, []
        for reading in unread:
            self._judge(reading)

    def _judge(self, reading: _Reading) -> None:
        step, (matrix, weights), limits, follows, value, stream = reading
        largest = float(value)
        self._refuse(-1, largest, limits[-1], step)
        known = self._bounds if follows else [math.inf] * len(matrix)
        bounds: list[float] = []
        for i, (row, weight) in enumerate(zip(matrix, weights, strict=True)):
            bound = sum(abs(m) * b for m, b in zip(row, known, strict=True) if m) + abs(weight) * largest
            if bound >= limits[i]:
                bound = float(stream(i))
                self._refuse(i, bound, limits[i], step)
            bounds.append(bound)
        self._bounds = bounds

    def _refuse(self, i: int, magnitude: float, limit: float, step: int) -> None:
        refuse(self.names[i], magnitude, limit, step, self.bits, self.remedies[i])

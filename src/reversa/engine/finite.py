"""Whether states are finite: what overflowed cannot be computed back, and gradients of it would be noise."""

from __future__ import annotations

import cmath
from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from reversa.errors import StateError
from reversa.schemes import State


def total(tensor: Tensor) -> Tensor:
    """The sum of all elements, without a graph: finite only where all of them are."""
    if tensor.dtype in (torch.float16, torch.bfloat16):
        return tensor.detach().sum(dtype=torch.float32)
    return tensor.detach().sum()


def is_finite(total: Tensor) -> bool:
    """Whether a sum is neither inf nor nan."""
    return cmath.isfinite(total.item())


class Totals:
    """The sum of each step's value, all in one tensor, so that a deeper chain holds nothing more up to 64 steps.

    >>> totals = Totals()
    >>> for value in (torch.ones(3), torch.tensor([1.0, torch.inf]), torch.ones(2)):
    ...     totals.add(value)
    >>> totals.first_not_finite()
    1
    """

    __slots__ = ("_all", "_count")

    def __init__(self) -> None:
        self._all: Tensor | None = None
        self._count = 0

    def add(self, value: Tensor) -> None:
        """The next step's."""
        new = total(value)
        if self._all is None:
            self._all = new.new_empty(64)
        elif self._count == len(self._all):
            self._all = torch.cat([self._all, torch.empty_like(self._all)])
        self._all[self._count] = new
        self._count += 1

    def first_not_finite(self) -> int | None:
        """The number of the first step whose value was not finite; None where all were."""
        if self._all is None:
            return None
        return next((step for step in range(self._count) if not is_finite(self._all[step])), None)


def all_finite(state: State) -> bool:
    """Whether no stream holds inf or nan, as far as there are numbers to look at. Integers are always finite."""
    if isinstance(state[0], FakeTensor) or state[0].is_meta:
        return True
    return all(is_finite(total(s)) for s in state if s.is_floating_point() or s.is_complex())


def refuse_not_finite(places: Sequence[object], culprit: int | None, recovered: bool) -> NoReturn:
    """Say where a state became infinite: the one after the last step of a chain, or the one recovered before its first.

    Args:
        places: what to call each step.
        culprit: the step whose value was the first that was not finite, where there is one.
        recovered: whether the state is the recovered one.

    Raises:
        StateError: always.
    """
    first, last = places[0], places[-1]
    if recovered:
        raise StateError(
            f"the state recovered before {first} is not finite, though the one after {last} was: the inverse lost "
            "all digits in float arithmetic. Keep states in between with Invert(anchors='auto'), choose gamma "
            "nearer to 1, or use float64."
        )
    if culprit is not None:
        raise StateError(
            f"{places[culprit]} returned inf or nan in the forward pass, so no state can be recovered from "
            "the end. Look at its input and weights, lower the learning rate, or use a wider data type."
        )
    raise StateError(
        f"the state after {last} is not finite: the input of {first} was not, or a sum overflowed. "
        "Look at the input, or use a wider data type."
    )

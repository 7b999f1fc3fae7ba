"""Whether states are finite: what overflowed cannot be computed back, and gradients of it would be noise."""

from __future__ import annotations

import cmath
from collections.abc import Sequence

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


def refuse_not_finite(state: State, places: Sequence[object], sums: Sequence[Tensor], recovered: bool) -> None:
    """Look at the state after the last step of a chain, or at the one that was recovered before the first.

    Args:
        state: the state.
        places: what to call each step.
        sums: of each step's value, from the forward pass.
        recovered: whether the state is the recovered one.

    Raises:
        StateError: it holds inf or nan; the message names the step where it began.
    """
    if isinstance(state[0], FakeTensor) or state[0].is_meta or all(map(is_finite, map(total, state))):
        return
    first, last = places[0], places[-1]
    if recovered:
        raise StateError(
            f"the state recovered before {first} is not finite, though the one after {last} was: the inverse lost "
            "all digits in float arithmetic. Keep states in between with Invert(anchors='auto'), choose gamma "
            "nearer to 1, or use float64."
        )
    for place, sum_ in zip(places, sums, strict=True):
        if not is_finite(sum_):
            raise StateError(
                f"{place} returned inf or nan in the forward pass, so no state can be recovered from "
                "the end. Look at its input and weights, lower the learning rate, or use a wider data type."
            )
    raise StateError(
        f"the state after {last} is not finite: the input of {first} was not, or a sum overflowed. "
        "Look at the input, or use a wider data type."
    )

"""The elementwise arithmetic of exact steps: few passes over memory, and on request compiled into one.

Every product is rounded to an integer before anything is added to it. So no compiler can contract a product and a sum,
and compiled and eager code give the same bits. Arguments are tensors, numbers and what a dictionary takes as a key.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """At least float32: products with a scale are not rounded to 16 bits."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def floating(integer: Tensor, dtype: torch.dtype) -> Tensor:
    """Integers as floating numbers, fresh ones, in which a state of that type is computed."""
    return integer.double() if dtype == torch.float64 else integer.float()


def real(integer: Tensor, scale: Tensor | float, dtype: torch.dtype) -> Tensor:
    """``integer * scale`` in a floating type; exact wherever the integer fits into its digits."""
    return floating(integer, dtype).mul_(scale).to(dtype)


def rounded(product: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest integers; those towards zero where float32 meets 64 bits. The product is given up.

    There most products are integers already, since a unit is so small, and a pass over memory is saved. Elsewhere steps
    that all err towards zero would add up.
    """
    truncates = dtype == torch.int64 and product.dtype == torch.float32
    return product.to(dtype) if truncates else product.round_().to(dtype)


def plus(integer: Tensor, increment: Tensor) -> Tensor:
    """The sum in the integer's layout: functions compute other bits over another one. The increment is given up."""
    return increment.add_(integer) if increment.stride() == integer.stride() else integer + increment


def minus(integer: Tensor, decrement: Tensor) -> Tensor:
    """The difference in the integer's layout. The decrement is given up."""
    alike = decrement.stride() == integer.stride()
    return torch.sub(integer, decrement, out=decrement) if alike else integer - decrement


def increased(integer: Tensor, value: Tensor, scale: Tensor | float) -> Tensor:
    """``integer + rounded(value * scale)``."""
    return plus(integer, rounded(torch.mul(wide(value), scale), integer.dtype))


def decreased(integer: Tensor, value: Tensor, scale: Tensor | float) -> Tensor:
    """``integer - rounded(value * scale)``: undoes :func:`increased`."""
    return minus(integer, rounded(torch.mul(wide(value), scale), integer.dtype))


def advanced(
    X: Tensor, V: Tensor, value: Tensor, push: Tensor | float, move: Tensor | float, unit: Tensor | float
) -> tuple[Tensor, Tensor, Tensor]:
    """``V' = V + rounded(value * push)``, ``X' = X + rounded(V' * move)``, and X' times ``unit`` as real numbers."""
    dtype = value.dtype
    V = increased(V, value, push)
    X = plus(X, rounded(floating(V, dtype).mul_(move), X.dtype))
    return X, V, real(X, unit, dtype)


def retreated(
    X: Tensor, V: Tensor, move: Tensor | float, unit: Tensor | float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """``X = X' - rounded(V' * move)``, and X times ``unit`` as real numbers: undoes half of :func:`advanced`."""
    X = minus(X, rounded(floating(V, dtype).mul_(move), X.dtype))
    return X, real(X, unit, dtype)


def combined(integers: Sequence[Tensor], row: Sequence[int]) -> Tensor:
    """``row @ integers``; an integer itself where nothing is done to it."""
    terms = [i if weight == 1 else weight * i for i, weight in zip(integers, row, strict=True) if weight]
    return terms[0] if len(terms) == 1 else terms[0] + terms[1]


def moved(
    X: Tensor, Y: Tensor, row: Sequence[int], value: Tensor, push: Tensor | float, unit: Tensor | float
) -> tuple[Tensor, Tensor]:
    """``row @ (X, Y) + rounded(value * push)``, and this times ``unit`` as real numbers."""
    integer = increased(combined((X, Y), row), value, push)
    return integer, real(integer, unit, value.dtype)


def blended(
    P: Tensor, c: Tensor, value: Tensor, pull: Tensor | float, push: Tensor | float, unit: Tensor | float
) -> tuple[Tensor, Tensor]:
    """``P + round(c * pull) + rounded(value * push)``, and this times ``unit`` as real numbers."""
    integer = increased(increased(P, c, pull), value, push)
    return integer, real(integer, unit, value.dtype)


def unblended(N: Tensor, c: Tensor, value: Tensor, pull: Tensor | float, push: Tensor | float) -> Tensor:
    """``N - rounded(c * pull) - rounded(value * push)``: undoes :func:`blended`."""
    return decreased(decreased(N, value, push), c, pull)


def separated(X: Tensor, Y: Tensor, row: Sequence[int], unit: Tensor | float, dtype: torch.dtype) -> Tensor:
    """``row @ (X, Y)`` times ``unit``, as real numbers."""
    return real(combined((X, Y), row), unit, dtype)

"""Values that were computed in integers, with the gradient of a formula."""

# pyright: reportIncompatibleMethodOverride=false

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from reversa.exact._torch import transforms_active

Weight = float | Tensor
Weights = tuple[tuple[Weight, ...], ...]
"""A linear map: for each output, the weight of each input: a number, or one for each sample."""


class _Joined(torch.autograd.Function):
    """Rounding has no derivative; the gradient is that of the same sum of real numbers."""

    @staticmethod
    def forward(ctx: Any, values: tuple[Tensor, ...], weights: Weights, *inputs: Tensor) -> tuple[Tensor, ...]:
        _keep(ctx, weights)
        return values

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        return _gradients(ctx, grads)


class _JoinedInTransform(torch.autograd.Function):
    """The same in the form that ``torch.func`` needs, and that takes PyTorch 100 us more to call."""

    @staticmethod
    def forward(values: tuple[Tensor, ...], weights: Weights, *inputs: Tensor) -> tuple[Tensor, ...]:
        return values

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _keep(ctx, inputs[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        return _gradients(ctx, grads)


def _keep(ctx: Any, weights: Weights) -> None:
    ctx.weights = weights
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grads: tuple[Tensor | None, ...]) -> tuple[Any, ...]:
    sums = _Sums()
    columns = zip(*ctx.weights, strict=True)
    wanted = ctx.needs_input_grad[2:]
    inputs: list[Tensor | None] = []
    for i, (column, need) in enumerate(zip(columns, wanted, strict=True)):
        sums.spent = i + 1 == len(wanted)
        inputs.append(_gradient(column, grads, sums) if need else None)
    if inputs[-1] is None and wanted[-1]:  # Momentum(gamma=1) ignores f, whose gradients are 0 and not missing
        inputs[-1] = next((torch.zeros_like(g) for g in grads if g is not None), None)
    return None, None, *inputs


class _Sums:
    """Sums of gradients that serve several inputs."""

    def __init__(self) -> None:
        self.made: dict[tuple[int, ...], Tensor] = {}
        self.returned: set[tuple[int, ...]] = set()
        self.spent = False
        """No input follows, so that a sum can be given up: fetching new memory costs more than a product."""

    def times(self, weight: float, numbers: tuple[int, ...], terms: Sequence[Tensor]) -> Tensor:
        """``weight`` times the sum of the terms, which are the gradients of those numbers."""
        if numbers not in self.made:
            total = terms[0]
            for term in terms[1:]:
                total = total + term
            self.made[numbers] = total
        total = self.made[numbers]
        if weight == 1:
            self.returned.add(numbers)
            return total
        mine = self.spent and len(terms) > 1 and numbers not in self.returned
        return total.mul_(weight) if mine else weight * total


def _gradient(weights: Sequence[Weight], grads: Sequence[Tensor | None], sums: _Sums) -> Tensor | None:
    """``sum(w * g)``. Mostly all weights are the same, and the sum of the gradients serves several inputs."""
    pairs = enumerate(zip(weights, grads, strict=True))
    terms = [(i, w, g) for i, (w, g) in pairs if g is not None and (isinstance(w, Tensor) or w != 0)]
    if not terms:
        return None
    (_, first, total), *rest = terms
    if any(isinstance(w, Tensor) for _, w, _ in terms):
        return cast(Tensor, sum(w * g for _, w, g in terms))
    if all(w == first for _, w, _ in rest):
        return sums.times(cast(float, first), tuple(i for i, _, _ in terms), [g for _, _, g in terms])
    total = first * total
    for _, w, g in rest:
        total = torch.add(total, g, alpha=cast(float, w))
    return total


def joined(values: tuple[Tensor, ...], weights: Weights, *inputs: Tensor) -> tuple[Tensor, ...]:
    """The values as they are, for autograd the sums ``weights @ inputs``."""
    function = _JoinedInTransform if transforms_active() else _Joined
    return cast(tuple[Tensor, ...], function.apply(values, weights, *inputs))

"""Additive couplings: two streams that take turns, each moved by a function of the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from reversa.errors import StateError
from reversa.schemes.base import Scheme, State


@dataclass(frozen=True)
class Coupling(Scheme):
    """What RevNet and NICE share: the streams are the halves of x along ``dim``, and steps alternate between them.

    Nothing is lost in a step (``|b| = 1``): the drift is rounding alone.
    """

    dim: int = 1

    first: ClassVar[int]
    """The stream that step 0 moves."""

    def open(self, x: Tensor) -> State:
        if not -x.dim() <= self.dim < x.dim():
            raise StateError(
                f"{type(self).__name__}(dim={self.dim}) splits x along a dimension that it does not have: "
                f"x has shape {tuple(x.shape)}. Choose another dim."
            )
        if x.shape[self.dim] % 2:
            raise StateError(
                f"{type(self).__name__}(dim={self.dim}) splits x into two equal streams, but dimension {self.dim} of "
                f"{tuple(x.shape)} is odd. Choose an even width, or another dim."
            )
        # Copies, so that a stream has the same layout before its first step and ever after: compiled code relies on it.
        one, two = x.chunk(2, self.dim)
        return one.clone(), two.clone()

    def close(self, state: State) -> Tensor:
        return torch.cat(state, self.dim)

    def _moved(self, step: int) -> int:
        return (self.first + step) % 2

    def argument(self, state: State, step: int) -> Tensor:
        return state[1 - self._moved(step)]

    def forward(self, state: State, value: Tensor, step: int) -> State:
        one, two = state
        return (one + value, two) if self._moved(step) == 0 else (one, two + value)

    def uncover(self, state: State, step: int) -> tuple[Tensor, State]:
        moved = self._moved(step)
        return state[1 - moved], (state[moved],)

    def inverse(self, argument: Tensor, rest: State, value: Tensor, step: int) -> State:
        moved = rest[0] - value
        return (moved, argument) if self._moved(step) == 0 else (argument, moved)


@dataclass(frozen=True)
class RevNet(Coupling):
    r"""Reversible residual block with two functions.

    .. math:: y_1 = x_1 + F(x_2), \qquad y_2 = x_2 + G(y_1)

    Inverse: :math:`x_2 = y_2 - G(y_1)`, then :math:`x_1 = y_1 - F(x_2)`. A block is ``(F, G)`` and makes two
    steps. State ``(x1, x2)``: the halves of x along ``dim``; the output is their concatenation.

    Args:
        dim: the dimension along which x is split; its size must be even.

    Raises:
        StateError: (in :meth:`open`) x has no such dimension, or its size is odd.

    Source: Gomez, Ren, Urtasun, Grosse: The Reversible Residual Network, NeurIPS 2017, arXiv:1707.04585.

    >>> import torch
    >>> scheme = RevNet(dim=1)
    >>> state = scheme.forward(scheme.open(torch.zeros(1, 4)), torch.ones(1, 2), step=0)
    >>> scheme.close(state)
    tensor([[1., 1., 0., 0.]])
    """

    source: ClassVar[str] = "Gomez et al., 2017, arXiv:1707.04585"
    functions_per_block: ClassVar[int] = 2
    first: ClassVar[int] = 0


@dataclass(frozen=True)
class AdditiveCoupling(Coupling):
    r"""NICE's additive coupling layer: one function, and the halves change places from layer to layer.

    .. math:: y_1 = x_1, \qquad y_2 = x_2 + m(x_1)

    Inverse: :math:`x_2 = y_2 - m(y_1)`. The layer after it moves the first half by a function of the second, and
    so on in turn. State ``(x1, x2)``: the halves of x along ``dim``; the Jacobian's determinant is 1.

    Args:
        dim: the dimension along which x is split; its size must be even.

    Raises:
        StateError: (in :meth:`open`) x has no such dimension, or its size is odd.

    Source: Dinh, Krueger, Bengio: NICE: Non-linear Independent Components Estimation, 2014, arXiv:1410.8516.

    >>> import torch
    >>> scheme = AdditiveCoupling(dim=1)
    >>> state = scheme.forward(scheme.open(torch.zeros(1, 4)), torch.ones(1, 2), step=0)
    >>> scheme.close(state)
    tensor([[0., 0., 1., 1.]])
    """

    source: ClassVar[str] = "Dinh et al., 2014, arXiv:1410.8516"
    first: ClassVar[int] = 1

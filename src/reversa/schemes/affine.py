"""Affine coupling: one half of a state is scaled and shifted by functions of the other half."""

# pyright: reportUnnecessaryIsInstance=false

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from reversa.errors import SettingError
from reversa.schemes.base import Scheme, State, added, at_rest, halves

LARGEST_BOUND = 80


@dataclass(frozen=True)
class AffineCoupling(Scheme):
    r"""Affine coupling layer of two functions, with the logarithm of its Jacobian's determinant.

    .. math:: y_1 = x_1, \qquad y_2 = x_2 \odot e^{s} + T(x_1), \qquad s = m \tanh(S(x_1) / m)

    Inverse: :math:`x_2 = (y_2 - T(y_1)) \odot e^{-s}`. The layer after it moves the first half, and so on in turn. A
    block is ``(S, T)`` and makes two steps, the scaling and the shift. State ``(x1, x2, l)``: the halves of x along
    ``dim``, and l, the sum of all s so far for each element: :meth:`log_determinant`. The output is the two halves;
    :meth:`ReversibleSequence.forward_state` of ``scheme.open(x)`` gives all three.

    How much is lost depends on the data: a step multiplies rounding errors of the half that it scales by at most
    :math:`e^m` on its way back, which the drift law counts with. Linear stability: that of :class:`AdditiveCoupling`
    where S = 0; any other constant scale grows or fades. Integers cannot be multiplied by :math:`e^s` and come
    back; for exact arithmetic use :class:`AdditiveCoupling`.

    Args:
        dim: the dimension along which x is split; its size must be even.
        bound: m, the largest :math:`|s|`.

    Raises:
        SettingError: the bound is not in (0, 80].
        StateError: (in :meth:`open`) x has no such dimension, or its size is odd.

    Source: Dinh, Sohl-Dickstein, Bengio: Density Estimation using Real NVP, ICLR 2017, arXiv:1605.08803.

    >>> import torch, reversa
    >>> seq = reversa.ReversibleSequence([(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))] * 4, AffineCoupling())
    >>> state = seq.forward_state(seq.scheme.open(torch.randn(5, 4)))
    >>> seq.scheme.log_determinant(state).shape
    torch.Size([5])
    """

    dim: int = 1
    bound: float = 1.0

    source: ClassVar[str] = "Dinh et al., 2017, arXiv:1605.08803"
    functions_per_block: ClassVar[int] = 2
    num_streams: ClassVar[int] = 3
    multiplies: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not (isinstance(self.bound, (int, float)) and 0 < self.bound <= LARGEST_BOUND):
            raise SettingError(
                f"the bound of the scale's logarithm must lie in (0, {LARGEST_BOUND}], got {self.bound!r}: more is "
                "beyond float32. The default is 1."
            )

    @property
    def amplification(self) -> float:
        # Each half is scaled in every fourth step.
        return math.exp(self.bound / 4)

    def log_determinant(self, state: State) -> Tensor:
        """``log |det dy/dx|`` of every sample (along dim 0), from the state that the chain ends with."""
        return state[2].flatten(1).sum(1)

    def open(self, x: Tensor) -> State:
        one, two = halves(x, self.dim, "AffineCoupling")
        return one, two, at_rest(one)

    def close(self, state: State) -> Tensor:
        return torch.cat(state[:2], self.dim)

    def argument(self, state: State, step: int) -> Tensor:
        return state[1 - _moved(step)]

    def forward(self, state: State, value: Tensor, step: int) -> State:
        moved, total = state[_moved(step)], state[2]
        if step % 2:
            return _state(moved + value, state[1 - _moved(step)], total, step)
        s = self._logarithm(value)
        return _state(moved * s.exp().to(moved.dtype), state[1 - _moved(step)], total + s, step)

    def uncover(self, state: State, step: int) -> tuple[Tensor, State]:
        return state[1 - _moved(step)], (state[_moved(step)], state[2])

    def inverse(self, argument: Tensor, rest: State, value: Tensor, step: int) -> State:
        moved, total = rest
        if step % 2:
            return _state(added(moved, value, -1), argument, total, step)
        s = self._logarithm(value)
        return _state(moved * (-s).exp().to(moved.dtype), argument, total - s, step)

    def _logarithm(self, value: Tensor) -> Tensor:
        return self.bound * torch.tanh(value / self.bound)


def _moved(step: int) -> int:
    """The half that a step moves: the second one in the first two steps, then the first, and so on."""
    return 1 - step // 2 % 2


def _state(moved: Tensor, other: Tensor, total: Tensor, step: int) -> State:
    return (other, moved, total) if _moved(step) else (moved, other, total)

"""Leapfrog: a second-order equation, computed with its velocity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from reversa.errors import SettingError
from reversa.schemes.base import Scheme, State, added, at_rest, check_step_size


@dataclass(frozen=True)
class Leapfrog(Scheme):
    r"""The leapfrog step of :math:`\ddot y = -f(y)`.

    .. math:: y_{j+1} = 2 y_j - y_{j-1} - h^2 f_j(y_j)

    computed with the velocity :math:`v_j = y_j - y_{j-1}`, because :math:`2 y_j - y_{j-1}` loses digits:

    .. math:: v' = v - h^2 f(y), \qquad y' = y + v'

    Inverse: :math:`y = y' - v'`, then :math:`v = v' + h^2 f(y)`. State ``(y, v)``; the output is the last y. No bits
    are lost. Linear stability: for :math:`f = \lambda` real with :math:`0 \le h^2 \lambda \le 4`, which the symmetric
    :math:`f(y) = K^\top \sigma(K y + b)` (:class:`reversa.models.functions.Symmetric`) has for small h.

    The first velocity is 0 for ``"rest"`` (:math:`y_{-1} = y_0`, as in the authors' MATLAB code), :math:`y_0` for
    ``"zero"`` (:math:`y_{-1} = 0`, the only reading of the paper's text: it doubles the state in the first step), and
    ``"euler"`` makes the first step :math:`y_1 = y_0 - h f_0(y_0)`.

    Args:
        h: the step size.
        init: the first velocity: ``"rest"``, ``"zero"`` or ``"euler"``.

    Raises:
        SettingError: h is not a positive number, or another init.

    Source: Chang et al., AAAI 2018, arXiv:1709.03698.

    >>> import torch
    >>> scheme = Leapfrog(h=0.5)
    >>> state = scheme.forward(scheme.open(torch.zeros(3)), torch.ones(3), step=0)
    >>> scheme.forward(state, torch.ones(3), step=1)
    (tensor([-0.7500, -0.7500, -0.7500]), tensor([-0.5000, -0.5000, -0.5000]))
    """

    h: float = 0.1
    init: Literal["rest", "zero", "euler"] = "rest"

    source: ClassVar[str] = "Chang et al., 2018, arXiv:1709.03698"
    carries_input: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_step_size(self.h)
        if self.init not in ("rest", "zero", "euler"):
            raise SettingError(f"Leapfrog's init must be 'rest', 'zero' or 'euler', got {self.init!r}")

    def _weight(self, step: int) -> float:
        return -self.h if step == 0 and self.init == "euler" else -(self.h**2)

    def open(self, x: Tensor) -> State:
        return x, x if self.init == "zero" else at_rest(x)

    def close(self, state: State) -> Tensor:
        return state[0]

    def argument(self, state: State, step: int) -> Tensor:
        return state[0]

    def forward(self, state: State, value: Tensor, step: int) -> State:
        y, v = state
        v = added(v, value, self._weight(step))
        return y + v, v

    def uncover(self, state: State, step: int) -> tuple[Tensor, State]:
        y, v = state
        return y - v, (v,)

    def inverse(self, argument: Tensor, rest: State, value: Tensor, step: int) -> State:
        return argument, added(rest[0], value, -self._weight(step))

"""Two registers: the newest state and the one before it. Midpoint, and the step of i-RevNet."""

from __future__ import annotations

import cmath
import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from reversa.errors import SettingError
from reversa.schemes.base import Scheme, State, added, at_rest, check_step_size, halves, times


class Coefficients(NamedTuple):
    """What the next state takes of the newest, of the one before it, and of the residual function."""

    a: float | Tensor
    b: float | Tensor
    w: float | Tensor


class Registers(Scheme):
    r"""A step that goes from the last two states to the next.

    .. math:: c' = a c + b p + w f(c), \qquad p' = c

    Inverse: :math:`c = p'`, then :math:`p = (c' - a c - w f(c)) / b`. State ``(c, p)``, the newest first;
    :math:`\log_2(1/|b|)` bits are lost.

    A coefficient is a number, or a tensor of one number for each sample.
    """

    carries_input: ClassVar[bool] = True

    whole: ClassVar[bool] = False
    """a and b are whole numbers in every step."""

    @abstractmethod
    def coefficients(self, step: int) -> Coefficients:
        """a, b and w of a step."""

    @property
    def amplification(self) -> float:
        r"""One over the smallest root of :math:`\mu^2 = a \mu + b`."""
        a, b, _ = map(float, self.coefficients(1))
        root = cmath.sqrt(a * a + 4 * b)
        largest = max(abs(a + root), abs(a - root)) / 2  # the product of both is -b
        return largest / abs(b) if b else math.inf

    def magnitudes(self, step: int) -> tuple[float, float, float]:
        """The largest magnitudes of a, b and w over the samples, without reading a tensor: a GPU is not waited for."""
        a, b, w = self.coefficients(step)
        return abs(float(a)), abs(float(b)), abs(float(w))

    def told(self, state: State) -> State:
        return state[:1] if self.amplification == math.inf else state  # of the older one nothing comes back

    def close(self, state: State) -> Tensor:
        return state[0]

    def argument(self, state: State, step: int) -> Tensor:
        return state[0]

    def forward(self, state: State, value: Tensor, step: int) -> State:
        c, p = state
        a, b, w = self.coefficients(step)
        return added(added(times(p, b), c, a), value, w), c

    def uncover(self, state: State, step: int) -> tuple[Tensor, State]:
        new, c = state
        return c, (new,)

    def inverse(self, argument: Tensor, rest: State, value: Tensor, step: int) -> State:
        a, b, w = self.coefficients(step)
        if isinstance(b, (int, float)) and b == 0:  # nothing is left of it; nor did the step take anything of it
            return argument, at_rest(argument)
        return argument, times(added(added(rest[0], value, -w), argument, -a), 1 / b)


@dataclass(frozen=True)
class Midpoint(Registers):
    r"""The explicit midpoint rule: every second state is moved by what the state between them says.

    .. math:: y_{j+1} = y_{j-1} + 2 h f_j(y_j)

    Inverse: :math:`y_{j-1} = y_{j+1} - 2 h f_j(y_j)`. State ``(y_j, y_{j-1})``; the output is the last y. No bits are
    lost.

    The first step has no state before it. ``"euler"`` makes it :math:`y_1 = y_0 + h f_0(y_0)`; ``"zero"`` is what the
    paper displays, :math:`y_1 = 2 h f_0(y_0)`, which forgets the input but for what f says of it.

    Linear stability: for imaginary :math:`f = \lambda` with :math:`|h \lambda| \le 1`, which
    is what the antisymmetric field :math:`f(y) = \sigma((K - K^\top) y + b)` of the paper is made for
    (:class:`reversa.models.functions.Antisymmetric`); anywhere else one solution grows, and rounding errors with it.

    Args:
        h: the step size.
        init: the first step: ``"euler"`` or ``"zero"``.

    Raises:
        SettingError: h is not a positive number, or another init.

    Source: Chang et al., AAAI 2018, arXiv:1709.03698, where neither first step is derived.

    >>> import torch
    >>> scheme = Midpoint(h=0.5)
    >>> state = scheme.forward(scheme.open(torch.zeros(3)), torch.ones(3), step=0)
    >>> scheme.forward(state, torch.ones(3), step=1)
    (tensor([1., 1., 1.]), tensor([0.5000, 0.5000, 0.5000]))
    """

    h: float = 0.1
    init: Literal["euler", "zero"] = "euler"

    source: ClassVar[str] = "Chang et al., 2018, arXiv:1709.03698"
    whole: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_step_size(self.h)
        if self.init not in ("euler", "zero"):
            raise SettingError(f"Midpoint's init must be 'euler' or 'zero', got {self.init!r}")

    def coefficients(self, step: int) -> Coefficients:
        return Coefficients(0, 1, self.h if step == 0 and self.init == "euler" else 2 * self.h)

    def open(self, x: Tensor) -> State:
        return x, x if self.init == "euler" else at_rest(x)


@dataclass(frozen=True)
class IRevNet(Registers):
    r"""The step of i-RevNet: one function, and the streams change places.

    .. math:: y_1 = x_2, \qquad y_2 = x_1 + F(x_2)

    Inverse: :math:`x_2 = y_1`, then :math:`x_1 = y_2 - F(y_1)`. State ``(x2, x1)``, the newest first: the halves of x
    along ``dim``; the output is the concatenation of x1 and x2. No bits are lost. Linear stability: none but
    :math:`F = 0`, since the product of a step's eigenvalues is -1.

    Args:
        dim: the dimension along which x is split; its size must be even.

    Raises:
        StateError: (in :meth:`open`) x has no such dimension, or its size is odd.

    Source: Jacobsen, Smeulders, Oyallon: i-RevNet: Deep Invertible Networks, ICLR 2018, arXiv:1802.07088.

    >>> import torch
    >>> scheme = IRevNet()
    >>> scheme.close(scheme.forward(scheme.open(torch.tensor([[1.0, 2.0]])), torch.ones(1, 1), step=0))
    tensor([[2., 2.]])
    """

    dim: int = 1

    source: ClassVar[str] = "Jacobsen et al., 2018, arXiv:1802.07088"
    carries_input: ClassVar[bool] = False
    whole: ClassVar[bool] = True

    def coefficients(self, step: int) -> Coefficients:
        return Coefficients(0, 1, 1)

    def open(self, x: Tensor) -> State:
        one, two = halves(x, self.dim, "IRevNet")
        return two, one

    def close(self, state: State) -> Tensor:
        return torch.cat((state[1], state[0]), self.dim)

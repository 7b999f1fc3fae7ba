"""BDIA: an ordinary residual network that is reversible while it is trained."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from reversa.errors import SettingError, StateError
from reversa.schemes.base import Scheme, State
from reversa.schemes.registers import Coefficients, Registers


@dataclass(frozen=True)
class BDIA(Registers):
    r"""Averages two ways of getting from one state to the next; without the averaging it is the residual network.

    .. math:: x_{k+1} = g x_{k-1} + (1 - g) x_k + (1 + g) f_k(x_k)

    Inverse: :math:`x_{k-1} = (x_{k+1} - (1 - g) x_k - (1 + g) f_k(x_k)) / g`. State ``(x_k, x_{k-1})``; the output is
    the last x. The first step is the residual one, :math:`x_1 = x_0 + f_0(x_0)`.

    In training :math:`g = \pm \gamma`, drawn for each sample (along dim 0) and step; in ``eval()`` it is 0, which is
    the plain residual network :math:`x_{k+1} = x_k + f_k(x_k)`: a trained model needs no Reversa any more. A chain in
    ``eval()`` whose gradient is asked for keeps every state. A converted stage is in the mode of its first block.

    Each step loses :math:`\log_2(1/\gamma)` bits per element, one at the default, and each inverse step multiplies
    rounding errors by :math:`1/\gamma`. Linear stability: for :math:`f = \lambda` the roots of
    :math:`\mu^2 = (1 - g + (1 + g) \lambda) \mu + g` must not leave the unit disc; for a real :math:`\lambda` and
    :math:`\gamma = 1/2` they do not while :math:`-2/3 \le \lambda \le 0`, with either sign.

    Args:
        gamma: size of the average, in (0, 1).
        random: draw the sign for each sample and step; False takes plus everywhere, in ``eval()`` too.

    Raises:
        SettingError: gamma outside (0, 1).
        StateError: (when run) the input has no dimension.

    Source: Zhang, Lewis, Kleijn: On exact bit-level reversible transformers without changing architectures, ICML 2025,
    arXiv:2407.09093. Their integers have 9 fractional bits and one bit for each step on the side; ``exact=True`` is
    finer, and keeps as many bits.

    >>> import torch
    >>> scheme = BDIA(gamma=0.5, random=False)
    >>> state = scheme.forward(scheme.open(torch.zeros(3)), torch.ones(3), step=0)
    >>> scheme.forward(state, torch.ones(3), step=1)[0]
    tensor([2., 2., 2.])
    """

    gamma: float = 0.5
    random: bool = True
    drawn: Tensor | None = field(default=None, repr=False, compare=False)
    """The signs of one run, (steps, samples): from :meth:`begun`."""

    source: ClassVar[str] = "Zhang et al., 2025, arXiv:2407.09093"

    def __post_init__(self) -> None:
        if not (isinstance(self.gamma, (int, float)) and 0 <= self.gamma < 1) or (self.random and not self.gamma):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise SettingError(f"gamma must lie in (0, 1), got {self.gamma!r}. BDIA's paper has 0.5.")

    def begun(self, x: Tensor, steps: int | None, training: bool) -> Scheme:
        if not self.random:
            return self
        if not training:
            return replace(self, gamma=0.0, random=False)
        if steps is None:
            raise SettingError(f"{self} draws its signs for a whole run, whose number of steps must be known")
        if not x.dim():
            raise StateError(f"{self} draws a sign for each sample along dim 0, and the input has no dimension")
        signs = torch.randint(0, 2, (steps, x.shape[0], *[1] * (x.dim() - 1)), device=x.device)
        return replace(self, drawn=(2 * signs - 1).to(x.dtype))

    @property
    def amplification(self) -> float:
        return 1 / self.gamma if self.gamma else math.inf

    def coefficients(self, step: int) -> Coefficients:
        if step == 0:
            return Coefficients(0, 1, 1)  # both registers are x_0
        g = self.gamma if self.drawn is None else self.gamma * self.drawn[step]
        return Coefficients(1 - g, g, 1 + g)

    def magnitudes(self, step: int) -> tuple[float, float, float]:
        if self.drawn is None or step == 0:
            return super().magnitudes(step)
        return 1 + self.gamma, self.gamma, 1 + self.gamma

    def open(self, x: Tensor) -> State:
        return x, x

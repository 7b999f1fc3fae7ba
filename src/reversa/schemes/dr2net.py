"""Dr2Net: from a pretrained residual network to a reversible one, while it is fine-tuned."""

# pyright: reportUnnecessaryIsInstance=false

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from reversa.errors import SettingError
from reversa.schemes.base import State, at_rest
from reversa.schemes.registers import Coefficients, Registers


@dataclass(frozen=True)
class Dr2Net(Registers):
    r"""Two residual connections, of which one passes the step in between.

    .. math:: x_{k+1} = f_k(x_k) + \alpha x_k + y_k, \qquad y_{k+1} = \beta x_k

    computed as :math:`x_{k+1} = \alpha x_k + \beta x_{k-1} + f_k(x_k)`. Inverse:
    :math:`x_{k-1} = (x_{k+1} - \alpha x_k - f_k(x_k)) / \beta`. State ``(x_k, x_{k-1})``, at first ``(x_0, 0)``; the
    output is the last x.

    With :math:`\alpha = 1, \beta = 0` it is the residual network :math:`x_{k+1} = x_k + f_k(x_k)`, whose pretrained
    weights it starts from; :meth:`at` gives the coefficients on the way to the reversible one. Each step loses
    :math:`\log_2(1/\beta)` bits per element. With small :math:`\beta` little comes back: ``Invert()`` keeps more
    states then, and at 0 every one.

    Linear stability: for :math:`f = \lambda` the roots of :math:`\mu^2 = (\alpha + \lambda) \mu + \beta` must not leave
    the unit disc: for a real :math:`\lambda`, :math:`|\alpha + \lambda| \le 1 - \beta`.

    Args:
        alpha: weight of the connection to the state, at least 0.
        beta: weight of the connection to the state before it, in [0, 1]. Signals keep their size where both add up to
            1. The coefficients of the paper's experiments could not be had; these defaults are ours.

    Raises:
        SettingError: a coefficient outside its range.

    Source: Zhao, Liu, Mangalam, Qian, Zohra, Alghannam, Malik, Ghanem: Dr2Net: Dynamic Reversible Dual-Residual
    Networks for Memory-Efficient Finetuning, CVPR 2024, arXiv:2401.04105.

    >>> import torch
    >>> scheme = Dr2Net(alpha=0.3, beta=0.7)
    >>> state = scheme.forward(scheme.open(torch.ones(3)), torch.zeros(3), step=0)
    >>> scheme.forward(state, torch.zeros(3), step=1)[0]
    tensor([0.7900, 0.7900, 0.7900])
    """

    alpha: float = 0.3
    beta: float = 0.7

    source: ClassVar[str] = "Zhao et al., 2024, arXiv:2401.04105"

    def __post_init__(self) -> None:
        if not (isinstance(self.alpha, (int, float)) and 0 <= self.alpha < math.inf):
            raise SettingError(f"alpha must be a number, at least 0, got {self.alpha!r}")
        if not (isinstance(self.beta, (int, float)) and 0 <= self.beta <= 1):
            raise SettingError(f"beta must lie in [0, 1], got {self.beta!r}")

    def at(self, progress: float) -> Dr2Net:
        """The coefficients on a straight way from the residual network to this one.

        Args:
            progress: 0 for the residual network, 1 for this one.

        Raises:
            SettingError: progress outside [0, 1].

        >>> Dr2Net(0.3, 0.7).at(0.0), Dr2Net(0.3, 0.7).at(0.5)
        (Dr2Net(alpha=1.0, beta=0.0), Dr2Net(alpha=0.65, beta=0.35))
        """
        if not 0 <= progress <= 1:
            raise SettingError(f"progress must lie in [0, 1], got {progress!r}")
        return Dr2Net(1 - progress + progress * self.alpha, progress * self.beta)

    def coefficients(self, step: int) -> Coefficients:
        return Coefficients(self.alpha, self.beta, 1)

    def open(self, x: Tensor) -> State:
        return x, at_rest(x)

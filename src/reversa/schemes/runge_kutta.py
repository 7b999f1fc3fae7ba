"""Solvers of differential equations whose steps can be undone."""

# pyright: reportUnnecessaryIsInstance=false

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

from torch import Tensor

from reversa.errors import SettingError
from reversa.schemes.base import Scheme, State, check_step_size
from reversa.schemes.registers import Coefficients, Registers


@dataclass(frozen=True)
class ReversibleHeun(Registers):
    r"""The reversible Heun method: second order, with one evaluation for each step.

    .. math:: \hat y_{n+1} = 2 y_n - \hat y_n + h f_n(\hat y_n), \qquad
        y_{n+1} = y_n + \tfrac h2 \big(f_n(\hat y_n) + f_{n+1}(\hat y_{n+1})\big)

    from :math:`\hat y_0 = y_0 = x`. L functions, one for each point in time, make L - 1 steps of size h (one alone
    makes :math:`x + \frac h2 f(x)`); for one function of time put it L times into the chain.

    Put into each other, the two lines say :math:`\hat y_{n+1} = \hat y_{n-1} + 2 h f_n(\hat y_n)`, after an Euler step,
    and :math:`y_n = \frac12 (\hat y_n + \hat y_{n-1}) + \frac h2 f_n(\hat y_n)`: the midpoint rule, with another last
    step. So it is computed here. State :math:`(\hat y_n, \hat y_{n-1})`; the output is the last y. Inverse:
    :math:`\hat y_{n-1} = \hat y_{n+1} - 2 h f_n(\hat y_n)`. The last step alone loses a bit. Linear stability, as
    of the midpoint rule: for imaginary :math:`f = \lambda` with :math:`|h \lambda| \le 1`.

    Args:
        h: the step size.

    Raises:
        SettingError: h is not a positive number.

    Source: Kidger, Foster, Li, Lyons: Efficient and Accurate Gradients for Neural SDEs, NeurIPS 2021, arXiv:2105.13493.

    >>> import torch
    >>> import reversa
    >>> seq = reversa.ReversibleSequence([torch.nn.Identity()] * 101, ReversibleHeun(h=0.01))  # y' = y from 0 to 1
    >>> seq(torch.ones(1, dtype=torch.float64))
    tensor([2.7182], dtype=torch.float64)
    """

    h: float = 0.1
    last: int | None = field(default=None, repr=False, compare=False)
    """The last step of a run: from :meth:`begun`."""

    source: ClassVar[str] = "Kidger et al., 2021, arXiv:2105.13493"
    ends_otherwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_step_size(self.h)

    def begun(self, x: Tensor, steps: int | None, training: bool) -> Scheme:
        return self if steps is None else replace(self, last=steps - 1)

    @property
    def amplification(self) -> float:
        return 1.0

    def coefficients(self, step: int) -> Coefficients:
        if step == self.last:
            return Coefficients(0.5, 0.5, self.h / 2)
        return Coefficients(0, 1, self.h if step == 0 else 2 * self.h)

    def open(self, x: Tensor) -> State:
        return x, x


@dataclass(frozen=True)
class McCallumFoster(Registers):
    r"""Makes any explicit Runge-Kutta method reversible.

    .. math:: y' = \lambda y + (1 - \lambda) z + \Psi_h(z), \qquad z' = z - \Psi_{-h}(y')

    :math:`\Psi_h(z)` is what a step of size h of the method adds to z. Inverse: :math:`z = z' + \Psi_{-h}(y')`, then
    :math:`y = (y' - (1 - \lambda) z - \Psi_h(z)) / \lambda`. A block is the pair :math:`(\Psi_h, -\Psi_{-h})`, which
    :func:`reversa.models.runge_kutta.runge_kutta` makes of a function, and makes two steps. State: the two
    streams, the one that was moved last first; at first both are x, and the output is the last y.

    The order is the method's. A block loses :math:`\log_2(1/\lambda)` bits per element. Linear stability: for a real
    :math:`f = \mu`, whose increments are :math:`\phi_\pm = \Psi_{\pm h}(1)`, with
    :math:`0 \le \phi_- (1 - \lambda + \phi_+) \le 2 (1 + \lambda)`; with Euler's method that is
    :math:`-(1 - \lambda) \le h \mu \le 0`.

    Args:
        coupling: :math:`\lambda`, in (0, 1]; how strongly the two streams are kept together.

    Raises:
        SettingError: the coupling is outside (0, 1].

    Source: McCallum, Foster: Efficient, Accurate and Stable Gradients for Neural ODEs, 2024, arXiv:2410.11648.

    >>> import torch
    >>> import reversa
    >>> from reversa.models.runge_kutta import runge_kutta
    >>> pairs = [runge_kutta(torch.nn.Identity(), h=0.1, method="heun")] * 10  # y' = y from 0 to 1
    >>> seq = reversa.ReversibleSequence(pairs, McCallumFoster())
    >>> seq(torch.ones(1, dtype=torch.float64))
    tensor([2.7139], dtype=torch.float64)
    """

    coupling: float = 0.999

    source: ClassVar[str] = "McCallum and Foster, 2024, arXiv:2410.11648"
    functions_per_block: ClassVar[int] = 2

    def __post_init__(self) -> None:
        if not (isinstance(self.coupling, (int, float)) and 0 < self.coupling <= 1):
            raise SettingError(f"the coupling must lie in (0, 1], got {self.coupling!r}. The paper has 0.999.")

    @property
    def amplification(self) -> float:
        return self.coupling**-0.5

    def coefficients(self, step: int) -> Coefficients:
        return Coefficients(0, 1, 1) if step % 2 else Coefficients(1 - self.coupling, self.coupling, 1)

    def open(self, x: Tensor) -> State:
        return x, x

    def close(self, state: State) -> Tensor:
        return state[1]

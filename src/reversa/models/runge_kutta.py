"""What a step of a Runge-Kutta method adds to a state: the residual functions of reversible solvers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from reversa.errors import SettingError, nearest
from reversa.schemes.base import check_step_size

# For each stage what its argument takes of the slopes before it; then what the step takes of the slopes.
_METHODS: dict[str, tuple[Sequence[Sequence[float]], Sequence[float]]] = {
    "euler": ([[]], [1]),
    "midpoint": ([[], [1 / 2]], [0, 1]),
    "heun": ([[], [1]], [1 / 2, 1 / 2]),
    "rk4": ([[], [1 / 2], [0, 1 / 2], [0, 0, 1]], [1 / 6, 1 / 3, 1 / 3, 1 / 6]),
}


class RungeKutta(nn.Module):
    r"""The increment of an explicit Runge-Kutta method for :math:`\dot x = f(x)`.

    .. math:: k_i = f\Big(x + h \sum_{j<i} a_{ij} k_j\Big), \qquad \Psi_h(x) = h \sum_i b_i k_i

    Args:
        f: the right-hand side; called with the extra arguments of the chain.
        h: the step size; a negative one goes back in time.
        method: ``"euler"``, ``"midpoint"``, ``"heun"`` or ``"rk4"``.
        sign: what the increment is multiplied by.

    Raises:
        SettingError: no such method.

    >>> import torch
    >>> RungeKutta(torch.nn.Identity(), h=0.1, method="rk4")(torch.ones(1, dtype=torch.float64))
    tensor([0.1052], dtype=torch.float64)
    """

    def __init__(self, f: nn.Module, h: float, method: str = "heun", sign: float = 1) -> None:
        super().__init__()
        if method not in _METHODS:
            raise SettingError(nearest(method, _METHODS, "Runge-Kutta method"))
        self.f, self.h, self.method, self.sign = f, h, method, sign

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        stages, weights = _METHODS[self.method]
        slopes: list[Tensor] = []
        for row in stages:
            slopes.append(self.f(_moved(x, slopes, row, self.h), *args, **kwargs))
        return _moved(None, slopes, weights, self.sign * self.h)

    def extra_repr(self) -> str:
        return f"h={self.h}, method={self.method!r}"


def runge_kutta(f: nn.Module, h: float, method: str = "heun") -> tuple[RungeKutta, RungeKutta]:
    r"""The pair :math:`(\Psi_h, -\Psi_{-h})` of one function: a block of :class:`reversa.McCallumFoster`.

    Raises:
        SettingError: h is not a positive number, or no such method.
    """
    check_step_size(h)
    return RungeKutta(f, h, method), RungeKutta(f, -h, method, sign=-1)


def _moved(x: Tensor | None, slopes: Sequence[Tensor], weights: Sequence[float], h: float) -> Tensor:
    """``x + h * weights @ slopes``."""
    for slope, weight in zip(slopes, weights, strict=True):
        if weight:
            x = h * weight * slope if x is None else x.add(slope, alpha=h * weight)
    if x is None:
        raise SettingError("a Runge-Kutta method needs a stage")
    return x

"""The residual step with a velocity: Momentum ResNets."""

# pyright: reportUnnecessaryIsInstance=false

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from reversa.errors import SettingError, StateError
from reversa.schemes.base import Scheme, State, at_rest


@dataclass(frozen=True)
class Momentum(Scheme):
    r"""Residual step with a velocity.

    .. math:: v' = \gamma v + (1 - \gamma) f(x), \qquad x' = x + v'

    Inverse: :math:`x = x' - v'`, then :math:`v = (v' - (1 - \gamma) f(x)) / \gamma`. One evaluation of ``f``
    each way. State ``(x, v)``, both of the input's shape; the output is the last ``x``.

    Each inverse step multiplies rounding errors of ``v`` by :math:`1 / \gamma`, so the drift grows like
    :math:`\gamma^{-k}` over k steps, and :math:`\log_2(1/\gamma)` bits per element are lost in each step. Linear
    stability: for a real :math:`f = \lambda` with :math:`-2 (1 + \gamma) / (1 - \gamma) \le \lambda \le 0`.

    Args:
        gamma: weight of the old velocity, in (0, 1]. Near 0 the network is the plain residual network
            ``x' = x + f(x)``; at exactly 1 ``f`` has no influence.
        init: the first velocity: ``"zero"``, or a module that computes it from the input, ``v0 = init(x0)``.

    Raises:
        SettingError: gamma outside (0, 1], or an init that is neither ``"zero"`` nor a module.

    Source: Sander, Ablin, Blondel, Peyré: Momentum Residual Neural Networks, ICML 2021, arXiv:2102.07870.

    >>> import torch
    >>> scheme = Momentum(gamma=0.5)
    >>> x, v = scheme.forward(scheme.open(torch.zeros(3)), torch.ones(3), step=0)
    >>> x, v
    (tensor([0.5000, 0.5000, 0.5000]), tensor([0.5000, 0.5000, 0.5000]))
    """

    gamma: float = 0.9
    init: Literal["zero"] | nn.Module = "zero"

    source: ClassVar[str] = "Sander et al., 2021, arXiv:2102.07870"
    carries_input: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not (isinstance(self.gamma, (int, float)) and 0 < self.gamma <= 1):
            raise SettingError(
                f"gamma must lie in (0, 1], got {self.gamma!r}. The inverse divides by gamma: "
                "for a network close to the plain residual one choose a small gamma such as 0.01."
            )
        if not (self.init == "zero" or isinstance(self.init, nn.Module)):
            raise SettingError(f"init must be 'zero' or a module that computes v0 from x0, got {self.init!r}")

    @property
    def amplification(self) -> float:
        return 1 / self.gamma

    def at(self, progress: float, start: float = 0.01) -> Momentum:
        """The scheme on a straight way from one near the plain residual network to this one.

        Args:
            progress: 0 for where it starts, 1 for this one.
            start: gamma where it starts.

        Raises:
            SettingError: progress outside [0, 1].

        >>> Momentum(0.9).at(0.0).gamma, round(Momentum(0.9).at(0.5).gamma, 3), Momentum(0.9).at(1.0).gamma
        (0.01, 0.455, 0.9)
        """
        if not 0 <= progress <= 1:
            raise SettingError(f"progress must lie in [0, 1], got {progress!r}")
        return replace(self, gamma=self.gamma if progress == 1 else start + progress * (self.gamma - start))

    def modules(self) -> tuple[nn.Module, ...]:
        return (self.init,) if isinstance(self.init, nn.Module) else ()

    def open(self, x: Tensor) -> State:
        if isinstance(self.init, nn.Module):
            v = self.init(x)
            if v.shape != x.shape or v.dtype != x.dtype:
                raise StateError(
                    f"Momentum's init must give a velocity like x, {tuple(x.shape)} {x.dtype}; it gave "
                    f"{tuple(v.shape)} {v.dtype}. "
                    "Change its last layer."
                )
            return x, v
        return x, at_rest(x)

    def close(self, state: State) -> Tensor:
        return state[0]

    def argument(self, state: State, step: int) -> Tensor:
        return state[0]

    def forward(self, state: State, value: Tensor, step: int) -> State:
        x, v = state
        # Nested tensors have no lerp.
        v = v * self.gamma + value * (1 - self.gamma) if value.is_nested else torch.lerp(value, v, self.gamma)
        return x + v, v

    def uncover(self, state: State, step: int) -> tuple[Tensor, State]:
        x, v = state
        return x - v, (v,)

    def inverse(self, argument: Tensor, rest: State, value: Tensor, step: int) -> State:
        # v' / gamma + (1 - 1/gamma) f(x) in one kernel and without a temporary.
        return argument, torch.lerp(rest[0], value, 1 - 1 / self.gamma)

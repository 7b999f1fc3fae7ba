"""A scheme over functions that hold a skip connection too many, or one too few."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from reversa.schemes import Momentum, Scheme, State
from reversa.schemes.base import added


@dataclass(frozen=True, repr=False)
class Shifted(Scheme):
    r"""Another scheme, over the residual function :math:`f(x) + s x`.

    Args:
        scheme: the other scheme.
        shift: s: -1 where ``f`` is a block with its skip connection, 1 where one was subtracted that it never had.

    >>> import torch
    >>> scheme = Shifted(Momentum(0.5), -1)
    >>> scheme.forward(scheme.open(torch.ones(2)), torch.ones(2), step=0)  # f(x) = x: nothing to add
    (tensor([1., 1.]), tensor([0., 0.]))
    """

    scheme: Scheme
    shift: int

    source: ClassVar[str] = Momentum.source
    carries_input: ClassVar[bool] = True

    def __repr__(self) -> str:
        """The other scheme, and what it runs over."""
        return f"{self.scheme} over f(x) {self.shift:+d} x"

    @property
    def gamma(self) -> float:
        """The other scheme's."""
        return getattr(self.scheme, "gamma", 0.0)

    @property
    def amplification(self) -> float:
        return self.scheme.amplification

    def modules(self) -> tuple[nn.Module, ...]:
        return self.scheme.modules()

    def open(self, x: Tensor) -> State:
        return self.scheme.open(x)

    def close(self, state: State) -> Tensor:
        return self.scheme.close(state)

    def argument(self, state: State, step: int) -> Tensor:
        return self.scheme.argument(state, step)

    def forward(self, state: State, value: Tensor, step: int) -> State:
        return self.scheme.forward(state, added(value, self.argument(state, step), self.shift), step)

    def uncover(self, state: State, step: int) -> tuple[Tensor, State]:
        return self.scheme.uncover(state, step)

    def inverse(self, argument: Tensor, rest: State, value: Tensor, step: int) -> State:
        return self.scheme.inverse(argument, rest, added(value, argument, self.shift), step)

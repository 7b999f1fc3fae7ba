"""i-ResNet: a residual step that can be undone because its function is a contraction."""

# pyright: reportUnnecessaryIsInstance=false

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from reversa.errors import DriftError, SettingError
from reversa.schemes.base import Residual, Scheme, State


@dataclass(frozen=True)
class IResNet(Scheme):
    r"""The plain residual step, undone by iteration to a fixed point.

    .. math:: x' = x + f(x), \qquad \mathrm{Lip}(f) \le L < 1

    Inverse: :math:`x \leftarrow x' - f(x)` from :math:`x = x'`, until it changes by less than the tolerance. There is
    no formula for it; the error after n iterations is at most :math:`L^n / (1 - L)` times the first change (Banach).
    The functions must keep to L themselves: :mod:`reversa.models.lipschitz` makes them do. State ``(x,)``; the output
    is the last x.

    Linear stability: for a real :math:`f = \lambda` with :math:`-L \le \lambda \le 0`.

    A rounding error of x' comes back up to :math:`1 / (1 - L)` times as large, in each step, which is what the drift
    law counts with: with L = 0.9 and float32 ``Invert()`` keeps a state for every three steps.

    Args:
        lipschitz: L, in (0, 1).
        tolerance: the largest change of an element, relative to the largest element, that ends the iteration; None
            chooses four times the data type's precision.
        iterations: how many there may be.

    Raises:
        SettingError: a setting outside its range.
        DriftError: (on the way back) the iteration does not converge: f is no contraction.

    Source: Behrmann, Grathwohl, Chen, Duvenaud, Jacobsen: Invertible Residual Networks, ICML 2019, arXiv:1811.00995.

    >>> import torch, reversa
    >>> seq = reversa.ReversibleSequence([torch.nn.Tanh()], IResNet(lipschitz=0.9))
    >>> x = torch.tensor([1.0, 2.0])  # where tanh has a slope below 0.5
    >>> torch.allclose(seq.inverse_state((x + x.tanh(),))[0], x)
    True
    """

    lipschitz: float = 0.9
    tolerance: float | None = None
    iterations: int = 200

    source: ClassVar[str] = "Behrmann et al., 2019, arXiv:1811.00995"
    num_streams: ClassVar[int] = 1
    carries_input: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not (isinstance(self.lipschitz, (int, float)) and 0 < self.lipschitz < 1):
            raise SettingError(
                f"the Lipschitz constant must lie in (0, 1), got {self.lipschitz!r}: with 1 or more a step may have no "
                "inverse. The paper has 0.5 to 0.9."
            )
        if self.tolerance is not None and not self.tolerance > 0:
            raise SettingError(f"the tolerance must be a positive number, got {self.tolerance!r}")
        if self.iterations < 1:
            raise SettingError(f"the inverse needs at least 1 iteration, got {self.iterations}")

    @property
    def amplification(self) -> float:
        return 1 / (1 - self.lipschitz)

    def open(self, x: Tensor) -> State:
        return (x,)

    def close(self, state: State) -> Tensor:
        return state[0]

    def argument(self, state: State, step: int) -> Tensor:
        return state[0]

    def forward(self, state: State, value: Tensor, step: int) -> State:
        return (state[0] + value,)

    def uncover(self, state: State, step: int) -> tuple[Tensor, State]:
        """Where the iteration begins; :meth:`search` makes it."""
        return state[0], state

    def search(self, state: State, step: int, f: Residual) -> tuple[Tensor, State]:
        (after,) = state
        x, change, before = after, math.inf, math.inf
        limit = (4 * torch.finfo(x.dtype).eps if self.tolerance is None else self.tolerance) * _size(after)
        for _ in range(self.iterations):
            new = after - f(x)
            before, change = change, _size(new - x)
            x = new
            if change <= limit:
                return x, state
        raise DriftError(
            f"step {step}: the inverse of an i-ResNet step did not converge in {self.iterations} iterations: the last "
            f"one changed x by {change:.1e}, {change / before if before else 0:.3g} times the one before; "
            f"{limit:.1e} was asked for. Where that ratio is 1 or more, f is no contraction: give it a Lipschitz bound "
            "below 1 (reversa.models.lipschitz). Otherwise allow more iterations, or a larger tolerance: 1e-3 under "
            "autocast, where f itself is rounded to 16 bits."
        )

    def inverse(self, argument: Tensor, rest: State, value: Tensor, step: int) -> State:
        return (rest[0] - value,)


def _size(x: Tensor) -> float:
    unknown = isinstance(x, FakeTensor) or x.is_meta or not x.numel()
    return 0.0 if unknown else float(x.detach().abs().max())

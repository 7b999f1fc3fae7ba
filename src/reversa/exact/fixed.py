"""Fixed point: a real number as an integer times a power of two."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from reversa.errors import SettingError
from reversa.exact.kernels import real, rounded, wide

__all__ = ["FixedPoint", "real", "wide"]

_TYPES = {16: torch.int16, 32: torch.int32, 64: torch.int64}
# Resolution and range both serve a residual network's stream: 2^-40 and 4e6, 2^-20 and 1e3, 2^-10 and 16.
_RADIX = {16: 10, 32: 20, 64: 40}
_VELOCITY_RADIX = {16: 4, 32: 16, 64: 34}


@dataclass(frozen=True, repr=False)
class FixedPoint:
    r"""States of integers: :math:`X = \mathrm{round}(x \cdot 2^{r})`. Sums of integers can be undone bit for bit.

    Rounding is to the nearest integer; of float32 to 64 bits, where nearly all products are integers already, towards
    zero.

    A scheme that loses no information needs nothing else. Momentum holds its velocity as :math:`V_t = v_t \gamma^{-t}`
    (the *integrating factor*), so that a step is two additions; the low bits that gamma takes away leave it as words of
    8 bits, :math:`\log_2(1/\gamma)` bits per element and step, and come back on the way back.

    Args:
        bits: of each integer: 64; 32, as large as a float32; or 16 for schemes without a velocity.
        radix: r, the fractional bits of x. None chooses 40, 20 or 10 for 64, 32 or 16 bits.
        velocity_radix: the fractional bits that the velocity has at least. None chooses 34 or 16 for 64 or 32 bits.
        watch: raise :class:`~reversa.errors.StateError` where a state leaves the range in which integers and real
            numbers agree. Reversal is exact beyond it too; the values are not the scheme's any more.
        compile: compile the elementwise arithmetic of a step (one kernel forwards, two backwards), with the same bits.
            That is faster for large states. It is not the default because it needs a compiler on the machine, and the
            first steps wait for it, seconds to a minute, again for other shapes. Where it fails, a warning says
            why, and the arithmetic runs in eager mode.

    Raises:
        SettingError: another number of bits, or a radix that leaves no bits before the point.

    >>> FixedPoint(bits=32).limit
    1024.0
    """

    bits: int = 64
    radix: int | None = None
    velocity_radix: int | None = None
    watch: bool = True
    compile: bool = False

    def __post_init__(self) -> None:
        if self.bits not in _TYPES:
            raise SettingError(f"FixedPoint has 16, 32 or 64 bits, got bits={self.bits}")
        for name in ("radix", "velocity_radix"):
            radix = getattr(self, name)
            if radix is not None and not 0 < radix < self.bits - 2:
                raise SettingError(f"FixedPoint(bits={self.bits}) needs 0 < {name} < {self.bits - 2}, got {radix}")

    def __repr__(self) -> str:
        changed = [f"{f.name}={v!r}" for f in fields(self) if (v := getattr(self, f.name)) != f.default]
        return f"FixedPoint({', '.join(changed)})"

    @property
    def dtype(self) -> torch.dtype:
        """The integers' type."""
        return _TYPES[self.bits]

    @property
    def fraction(self) -> int:
        """The fractional bits of x."""
        return _RADIX[self.bits] if self.radix is None else self.radix

    @property
    def velocity_fraction(self) -> int:
        """The fractional bits of a velocity, before its factor of ``gamma**-t``."""
        return _VELOCITY_RADIX[self.bits] if self.velocity_radix is None else self.velocity_radix

    @property
    def limit(self) -> float:
        """Where |x| and a step of it stay below, no sum leaves the integers' range."""
        return 2.0 ** (self.bits - 2 - self.fraction)

    def integer(self, x: Tensor, scale: float | Tensor) -> Tensor:
        """``x * scale`` in integers."""
        return rounded(wide(x) * scale, self.dtype)

"""Arithmetic in which the drift is zero: what is computed back has the bits that were there."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from reversa.errors import SettingError
from reversa.exact._torch import maps_or_pushes_forward
from reversa.exact.additive import Additive
from reversa.exact.base import ExactScheme
from reversa.exact.fixed import FixedPoint
from reversa.exact.momentum import IntegratingFactor
from reversa.exact.ratio import InformationBuffer, Ratio
from reversa.exact.registers import IntegratingFactors
from reversa.schemes import Momentum, Scheme
from reversa.schemes.registers import Registers

__all__ = [
    "Arithmetic",
    "Exact",
    "ExactScheme",
    "FixedPoint",
    "Ratio",
    "check_exact",
    "dtype_of",
    "exact_scheme",
    "run_in",
    "run_with",
]

Arithmetic = FixedPoint | Ratio
Exact = bool | Arithmetic | None
"""Whether a chain is exact, in which arithmetic; None: only where its states have 16 bits, whose rounding drifts."""


def exact_scheme(scheme: Scheme, arithmetic: Arithmetic) -> ExactScheme:
    """The scheme in that arithmetic.

    Raises:
        SettingError: the scheme has none.

    >>> import reversa
    >>> exact_scheme(reversa.Momentum(0.9), FixedPoint())
    Momentum(gamma=0.9, init='zero') in FixedPoint()
    """
    if isinstance(arithmetic, Ratio):
        return InformationBuffer(scheme, arithmetic)
    if isinstance(scheme, Momentum):
        return IntegratingFactor(scheme, arithmetic)
    if isinstance(scheme, Registers) and not scheme.whole:
        return IntegratingFactors(scheme, arithmetic)
    return Additive(scheme, arithmetic)


def default_arithmetic(dtype: torch.dtype, under: torch.dtype) -> FixedPoint:
    """64 bits; 32 where residual functions compute in 16 bits: their own rounding is coarser than 2^-20.

    States that have 16 bits themselves are as coarse, and may be large: of the 32 bits 15 stand before the point.
    """
    if torch.finfo(dtype).bits == 16:
        return FixedPoint(bits=32, radix=16)
    return FixedPoint(bits=32 if torch.finfo(under).bits == 16 else 64)


def check_exact(scheme: Scheme, exact: Exact) -> None:
    """Refuse a setting of ``exact`` that a scheme cannot run with.

    Raises:
        SettingError: it is no arithmetic, or the scheme has none of that kind.
    """
    if exact is not None and not isinstance(exact, (bool, FixedPoint, Ratio)):
        raise SettingError(
            f"exact must be True, False, or an arithmetic, such as FixedPoint(bits=32) or Ratio(9, 10); got {exact!r}"
        )
    if exact:
        exact_scheme(scheme, FixedPoint() if exact is True else exact)


def run_in(scheme: Scheme, exact: Exact, dtype: torch.dtype, under: torch.dtype) -> Scheme:
    """The scheme in the arithmetic that is asked for; True chooses by the types of the state and of the functions."""
    if exact is None:
        exact = dtype.itemsize == 2 and _has_integers(scheme)
    if exact is False:
        return scheme
    return exact_scheme(scheme, default_arithmetic(dtype, under) if exact is True else exact)


def run_with(scheme: Scheme, exact: Exact, x: Tensor) -> Scheme:
    """The scheme in the arithmetic that it runs in with this input, now.

    Raises:
        SettingError: a transform is active that integers cannot go through.
    """
    if exact is None and (x.is_nested or maps_or_pushes_forward()):
        return scheme  # nothing is computed back there
    if exact is False or (exact is None and x.dtype.itemsize != 2):
        return scheme
    if maps_or_pushes_forward():
        raise SettingError(
            "exact arithmetic does not run under torch.func.vmap, jvp, jacfwd or hessian, nor in forward-mode "
            "differentiation, where nothing is computed back. Use exact=False there: the values are the same to "
            "rounding. torch.func.grad and jacrev do run."
        )
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return run_in(scheme, exact, x.dtype, torch.get_autocast_dtype(kind))
    return run_in(scheme, exact, x.dtype, x.dtype)


def dtype_of(model: nn.Module) -> torch.dtype:
    """The type of a model's parameters, which is that of its states unless it is called with another."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())


def _has_integers(scheme: Scheme) -> bool:
    try:
        exact_scheme(scheme, FixedPoint())
    except SettingError:
        return False
    return True

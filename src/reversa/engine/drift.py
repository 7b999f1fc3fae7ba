"""What the engine does about drift: where to keep states, and when to warn or refuse.

A scheme states its law (:meth:`reversa.schemes.Scheme.drift`); everything here only reads it.
"""

from __future__ import annotations

import warnings

import torch

from reversa.errors import DriftError, DriftWarning
from reversa.schemes import Scheme

WARN_ABOVE = 1e-4
REFUSE_ABOVE = 1e-2
LONGEST_RUN = 1 << 20


def rounding(dtype: torch.dtype, under: torch.dtype) -> float:
    """Relative rounding error of one step.

    A residual function in a narrower type flips a rounding of its own at the slightest change of its argument; what
    was observed lies near the geometric mean of the two types' precisions.
    """
    eps = torch.finfo(dtype).eps
    return max(eps, (eps * torch.finfo(under).eps) ** 0.5) if under.is_floating_point else eps


def tolerance(dtype: torch.dtype, under: torch.dtype) -> float:
    """The error at which a state is kept: 1e-4 in float32, in proportion to what a type can hold elsewhere."""
    limit = {torch.float64: 1e-11, torch.float32: WARN_ABOVE}.get(dtype, 8 * torch.finfo(dtype).eps)
    return max(limit, torch.finfo(under).eps / 4) if under.is_floating_point else limit


def error_of_run(scheme: Scheme, steps: int, eps: float) -> float:
    """Error after inverting a run of steps: each adds a rounding error, amplified by the steps inverted after it."""
    if scheme.lossless:
        return scheme.drift(steps, eps)
    return (scheme.drift(steps, eps) - eps) / (scheme.amplification - 1)


def anchor_interval(scheme: Scheme, dtype: torch.dtype, under: torch.dtype) -> int:
    """The longest run of steps that may be inverted without a state kept in between; at least 1.

    >>> from reversa.schemes import Momentum
    >>> [anchor_interval(Momentum(gamma), torch.float32, torch.float32) for gamma in (0.5, 0.9, 0.99)]
    [9, 43, 223]
    """
    eps, limit = rounding(dtype, under), tolerance(dtype, under)
    low, high = 1, LONGEST_RUN
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if error_of_run(scheme, middle, eps) <= limit else (low, middle - 1)
    return low


def accept(scheme: Scheme, steps: int, dtype: torch.dtype, under: torch.dtype, insist: bool) -> None:
    """Warn or refuse where a chain without anchors would drift.

    Raises:
        DriftError: the law passes 1e-2, and the user does not insist.
    """
    drift = scheme.drift(steps, rounding(dtype, under))
    if drift <= WARN_ABOVE:
        return
    remedies = (
        f"{steps} steps of {scheme} in {dtype} without anchors: the backward pass recovers states with a relative "
        f"error of about {drift:.0e}, and gradients with it. Use Invert(anchors='auto'), which keeps a state every "
        f"{anchor_interval(scheme, dtype, under)} steps; or exact=True, which does not drift; or gamma nearer to 1; or "
        "float64."
    )
    if drift > REFUSE_ABOVE and not insist:
        raise DriftError(f"{remedies} To go on all the same: Invert(anchors=None, accept_drift=True).")
    warnings.warn(remedies, DriftWarning, stacklevel=2)

"""Reversa: deep residual networks whose activation memory does not grow with depth."""

from reversa import errors, exact, models, schemes
from reversa.check import CheckReport, check
from reversa.convert import convert, explain, restore
from reversa.engine import Invert, Mixed, Offload, Recompute, Store, is_replaying
from reversa.errors import ReversaError
from reversa.schemes import (
    BDIA,
    AdditiveCoupling,
    AffineCoupling,
    Dr2Net,
    Hamiltonian,
    IResNet,
    IRevNet,
    Leapfrog,
    McCallumFoster,
    Midpoint,
    Momentum,
    ReversibleHeun,
    RevNet,
)
from reversa.sequence import ReversibleSequence

__version__ = "0.1.0"

__all__ = [
    "BDIA",
    "AdditiveCoupling",
    "AffineCoupling",
    "CheckReport",
    "Dr2Net",
    "Hamiltonian",
    "IResNet",
    "IRevNet",
    "Invert",
    "Leapfrog",
    "McCallumFoster",
    "Midpoint",
    "Mixed",
    "Momentum",
    "Offload",
    "Recompute",
    "RevNet",
    "ReversaError",
    "ReversibleHeun",
    "ReversibleSequence",
    "Store",
    "check",
    "convert",
    "errors",
    "exact",
    "explain",
    "is_replaying",
    "models",
    "restore",
    "schemes",
]

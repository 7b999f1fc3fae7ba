"""Reversa: deep residual networks whose activation memory does not grow with depth."""

from reversa import errors, exact, models, schemes
from reversa.check import CheckReport, check
from reversa.convert import convert, explain, restore
from reversa.engine import Invert, Offload, Recompute, Store, is_replaying
from reversa.errors import ReversaError
from reversa.schemes import AdditiveCoupling, Hamiltonian, IRevNet, Leapfrog, Midpoint, Momentum, RevNet
from reversa.sequence import ReversibleSequence

__version__ = "0.1.0"

__all__ = [
    "AdditiveCoupling",
    "CheckReport",
    "Hamiltonian",
    "IRevNet",
    "Invert",
    "Leapfrog",
    "Midpoint",
    "Momentum",
    "Offload",
    "Recompute",
    "RevNet",
    "ReversaError",
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

"""The update rules of the literature, and the one table of them."""

from __future__ import annotations

from reversa.errors import SettingError, nearest
from reversa.schemes.affine import AffineCoupling
from reversa.schemes.base import Scheme, State, round_trip, run, run_back
from reversa.schemes.bdia import BDIA
from reversa.schemes.contraction import IResNet
from reversa.schemes.coupling import AdditiveCoupling, Hamiltonian, RevNet
from reversa.schemes.dr2net import Dr2Net
from reversa.schemes.leapfrog import Leapfrog
from reversa.schemes.momentum import Momentum
from reversa.schemes.registers import IRevNet, Midpoint
from reversa.schemes.runge_kutta import McCallumFoster, ReversibleHeun

# Read by the tests, the docs, the command line and the planner: a new scheme is one file and one line here.
SCHEMES: dict[str, type[Scheme]] = {
    "momentum": Momentum,
    "revnet": RevNet,
    "additive": AdditiveCoupling,
    "hamiltonian": Hamiltonian,
    "midpoint": Midpoint,
    "leapfrog": Leapfrog,
    "irevnet": IRevNet,
    "affine": AffineCoupling,
    "iresnet": IResNet,
    "reversibleheun": ReversibleHeun,
    "mccallumfoster": McCallumFoster,
    "bdia": BDIA,
    "dr2net": Dr2Net,
}


def scheme_named(name: str) -> type[Scheme]:
    """The scheme of that name in the table.

    Raises:
        SettingError: no scheme has that name; the message lists the nearest ones.

    >>> scheme_named("momentum").__name__
    'Momentum'
    """
    if name not in SCHEMES:
        raise SettingError(nearest(name, SCHEMES, "scheme"))
    return SCHEMES[name]


__all__ = [
    "BDIA",
    "SCHEMES",
    "AdditiveCoupling",
    "AffineCoupling",
    "Dr2Net",
    "Hamiltonian",
    "IResNet",
    "IRevNet",
    "Leapfrog",
    "McCallumFoster",
    "Midpoint",
    "Momentum",
    "RevNet",
    "ReversibleHeun",
    "Scheme",
    "State",
    "round_trip",
    "run",
    "run_back",
    "scheme_named",
]

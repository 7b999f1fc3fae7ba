"""Are signals damped or blown up? Spectra of residual functions and fields, growth of perturbations, condition."""

from __future__ import annotations

from reversa.stability.chains import condition, growth, lyapunov
from reversa.stability.fields import hamiltonian_field, leapfrog_field
from reversa.stability.pictures import draw_growth, draw_spectrum
from reversa.stability.spectrum import jacobian, largest_real_part, spectrum

__all__ = [
    "condition",
    "draw_growth",
    "draw_spectrum",
    "growth",
    "hamiltonian_field",
    "jacobian",
    "largest_real_part",
    "leapfrog_field",
    "lyapunov",
    "spectrum",
]

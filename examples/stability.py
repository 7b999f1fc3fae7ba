"""Where do the eigenvalues of the papers' residual functions lie, and what do chains of them do to a perturbation?

``python examples/stability.py`` prints the numbers of docs/stability.md and draws docs/images/spectra.png. Fresh random
weights, one random image of 8 channels and 6 x 6 pixels, in float64.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

import reversa
from reversa.models.functions import Antisymmetric, Bias, Kernel, Symmetric, basic
from reversa.stability import condition, draw_spectrum, hamiltonian_field, leapfrog_field, lyapunov, spectrum

CHANNELS, PIXELS, DEPTH = 8, 6, 30
PICTURE = Path(__file__).parent.parent / "docs" / "images" / "spectra.png"


def symmetric(width: int) -> Symmetric:
    """K has four times as many rows as columns, so that a ReLU that lets half of them through leaves it injective."""
    return Symmetric(Kernel(width, hidden=4 * width), Bias(4 * width))


def antisymmetric(width: int) -> Antisymmetric:
    return Antisymmetric(Kernel(width), Bias(width))


def spectra(x: Tensor) -> dict[str, Tensor]:
    half = CHANNELS // 2
    fields = {
        "Hamiltonian": hamiltonian_field(symmetric(half), symmetric(half)),
        "Leapfrog": leapfrog_field(symmetric(half)),
        "Midpoint": antisymmetric(CHANNELS),
        "ResNet": basic(CHANNELS, CHANNELS).eval(),
    }
    return {name: spectrum(field, x) for name, field in fields.items()}


def chains() -> dict[str, reversa.ReversibleSequence]:
    half = CHANNELS // 2

    def plain() -> nn.Module:
        return basic(CHANNELS, CHANNELS).eval()

    made = {
        "Hamiltonian(h=0.1)": (
            [(symmetric(half), symmetric(half)) for _ in range(DEPTH // 2)],
            reversa.Hamiltonian(0.1),
        ),
        "Leapfrog(h=0.1)": ([symmetric(CHANNELS) for _ in range(DEPTH)], reversa.Leapfrog(0.1)),
        "Midpoint(h=0.1)": ([antisymmetric(CHANNELS) for _ in range(DEPTH)], reversa.Midpoint(0.1)),
        "Momentum(0.9), ResNet's functions": ([plain() for _ in range(DEPTH)], reversa.Momentum(0.9)),
    }
    return {name: reversa.ReversibleSequence(blocks, scheme) for name, (blocks, scheme) in made.items()}


def main() -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    x = torch.randn(1, CHANNELS, PIXELS, PIXELS)
    values = spectra(x)
    print("field, largest real part, largest imaginary part")
    for name, numbers in values.items():
        print(f"{name:35s} {numbers.real.max():10.1e} {numbers.imag.max():8.2f}")
    print(f"\nchain of {DEPTH} functions, Lyapunov exponent for each step, condition of the way back")
    for name, seq in chains().items():
        print(f"{name:35s} {lyapunov(seq, x):10.4f} {condition(seq, x):12.3g}")
    draw_spectrum(values, PICTURE)
    print(f"\n{PICTURE.relative_to(PICTURE.parents[2])}: {PICTURE.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()

"""What does a training step of Hamiltonian-1202 take in memory, beside Hamiltonian-74 and stored activations?

``python benchmarks/depth1202.py`` takes five minutes.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import report
import reversa
from reversa import models
from reversa.memory import LiveBytes

MIB = 2**20
NAMES = ("hamiltonian74", "hamiltonian218", "hamiltonian1202")
# The widths of 1202, so that nothing but the depth differs.
SAME = {"widths": (32, 32, 64, 128)}


def step(network: nn.Module, batch: int, engine: reversa.engine.Engine) -> tuple[int, Tensor]:
    """Peak live bytes of a training step without parameters and gradients, and all gradients together."""
    for chain in (m for m in network.modules() if isinstance(m, reversa.ReversibleSequence)):
        chain.engine = engine
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 3, 32, 32, generator=generator)
    network.zero_grad()
    with LiveBytes(exclude=network) as counted:
        F.cross_entropy(network(x), torch.arange(batch) % 10).backward()
    return counted.peak, torch.cat([p.grad.flatten() for p in network.parameters()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32, help="the authors' for 1202 layers")
    args = parser.parse_args()
    columns = ("network", "parameters, MiB", "computed back, MiB", "stored, MiB", "gradient, relative difference")
    table = report.Table(f"Batch {args.batch}, 32 x 32 pixels: peak of a training step", columns)
    for name in NAMES:
        print(f"{name} ...", flush=True)
        torch.manual_seed(0)
        network = models.create(name, **SAME)
        back, ours = step(network, args.batch, reversa.Invert())
        stored, theirs = step(network, args.batch, reversa.Store())
        parameters = sum(p.nbytes for p in network.parameters()) / MIB
        difference = float((ours - theirs).norm() / theirs.norm())
        table.rows.append((name, f"{parameters:.1f}", f"{back / MIB:.1f}", f"{stored / MIB:.1f}", f"{difference:.0e}"))
    table.show()
    notes = (
        "\nPeak: live bytes (reversa.memory.LiveBytes) without parameters and their gradients. All three have the "
        "widths 32-64-128, so that nothing but the depth differs; the residual functions are the authors', with BN in "
        "Hamiltonian-1202. Gradients differ in float32 because a rounding error can push a value over a ReLU's edge."
    )
    report.write("depth1202", "What does a very deep network take?", "cpu", [table], notes, ())


if __name__ == "__main__":
    main()

"""Do the networks of the papers learn? Each family on the digits, with the same budget: ``reversa train`` by name.

``python benchmarks/families.py`` takes twelve minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
from pathlib import Path

import report
from reversa.errors import ReversaError
from reversa.train import train
from reversa.train.config import TrainConfig

FAMILIES = {
    "reversibleresnet": {},
    "resnet32": {},
    "revnet38": {},
    "momentumresnet18": {},
    "hamiltonian74": {},
    "midpoint26": {},
    "leapfrog26": {},
    "irevnet163": {},
    "iresnet64": {},
    "odenetresnetsmall": {},
    "odenetsmall": {},
    "heunnet32": {},
    "vit": {},
    "revvit": {},
    "momentumvit": {},
    "simplehamiltonian218inception": {"data": "digits32", "h": 0.1},
}

NOTES = """
## How to read it

The digits of scikit-learn (1,257 to train on, 8 x 8 pixels; enlarged to 32 x 32 for the networks that need it), the
same budget for every network: epochs, batches of 64, learning rate, one seed. The budget is small and nothing was
tuned, so that the table shows that each of them learns, and not which is best. Peak: live bytes of a training step,
without parameters and gradients, beside the same network with stored activations. ResNet, HeunNet, the ViT without a
prefix and ODE-Net's ResNet have no reversible part; ODE-Net has the adjoint method, at either engine.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--models", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    args = parser.parse_args()
    columns = ("network", "first loss", "last loss", "test accuracy", "peak, MiB", "stored, MiB", "seconds")
    table = report.Table(f"{args.epochs} epochs", columns)
    with tempfile.TemporaryDirectory() as folder:
        for name in args.models:
            print(f"{name} ...", flush=True)
            config = TrainConfig(
                model=name, epochs=args.epochs, lr=args.lr, out=str(Path(folder) / name), **FAMILIES[name]
            )
            try:
                with open(os.devnull, "w") as silence, contextlib.redirect_stdout(silence):
                    result = train(config)
            except ReversaError as error:
                table.rows.append((name, *["-"] * 5, type(error).__name__))
                continue
            peaks = [f"{result.costs[engine].peak_bytes / 2**20:.1f}" for engine in ("invert", "store")]
            losses = [f"{row['train_loss']:.2f}" for row in (result.rows[0], result.rows[-1])]
            table.rows.append((name, *losses, f"{result.test_accuracy:.1%}", *peaks, f"{result.seconds:.0f}"))
    table.show()
    report.write("families", "Do the networks of the papers learn?", "cpu", [table], NOTES, ("lightning",))


if __name__ == "__main__":
    main()

"""What does conversion save on torchvision's ResNet-101 at 224 px? One training step, batch 2 to 8.

``python benchmarks/resnet101.py`` writes docs/images/resnet101_memory.png and a dated table.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

import report
import reversa
from reversa.errors import import_extra
from reversa.memory import LiveBytes

MIB = 2**20


def networks(name: str, gamma: float) -> dict[str, nn.Module]:
    """The original and the converted model, with the same random weights."""
    models = import_extra("torchvision.models", "vision")
    made: dict[str, nn.Module] = {}
    for label in ("original", "converted"):
        torch.manual_seed(0)
        model = models.get_model(name, weights=None)
        made[label] = model if label == "original" else reversa.convert(model, scheme=reversa.Momentum(gamma))
    return made


def measure(model: nn.Module, batch: int, pixels: int, device: str) -> tuple[int, int]:
    """Peak live bytes of forward, cross entropy and backward, and those held after the forward pass."""
    torch.manual_seed(1)
    x = torch.randn(batch, 3, pixels, pixels, device=device)
    target = torch.randint(1000, (batch,), device=device)
    model.zero_grad(set_to_none=True)
    gc.collect()
    with LiveBytes(exclude=model) as counted:
        loss = F.cross_entropy(model(x), target)
        held = counted.live
        loss.backward()
    return counted.peak, held


def draw(title: str, batches: Sequence[int], curves: dict[str, list[int]]) -> None:
    import_extra("matplotlib", "plot").use("Agg")
    plt = import_extra("matplotlib.pyplot", "plot")
    styles = {"original": ("#000000", "o"), "converted": ("#0072B2", "^")}
    with plt.rc_context({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = plt.subplots(figsize=(6.4, 4), dpi=160, layout="constrained")
        for label, values in curves.items():
            colour, marker = styles[label]
            gibibytes = [value / MIB / 1024 for value in values]
            axes.plot(batches, gibibytes, color=colour, marker=marker, linewidth=1.8)
            axes.annotate(
                label, (batches[-1], gibibytes[-1]), xytext=(8, 0), textcoords="offset points", color=colour,
                va="center", annotation_clip=False,
            )  # fmt: skip
        axes.set_xticks(batches)
        axes.set_ylim(bottom=0)
        axes.grid(axis="y", color="#dddddd", linewidth=0.7)
        axes.set_xlabel("images in the batch")
        axes.set_ylabel("GiB")
        axes.set_title(title, loc="left", fontsize=11)
        report.IMAGES.mkdir(parents=True, exist_ok=True)
        figure.savefig(report.IMAGES / "resnet101_memory.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet101")
    parser.add_argument("--batches", type=int, nargs="+", default=[2, 4, 6, 8])
    parser.add_argument("--pixels", type=int, default=224)
    parser.add_argument("--gamma", type=float, default=0.9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    measured: dict[str, list[tuple[int, int]]] = {}
    for label, model in networks(args.model, args.gamma).items():
        model.train().to(args.device)
        measured[label] = [measure(model, batch, args.pixels, args.device) for batch in args.batches]
    table = report.Table(
        "Live MiB, parameters and gradients aside",
        ("batch", "original, peak", "converted, peak", "saved", "original, held", "converted, held"),
    )
    for batch, (peak, held), (our_peak, our_held) in zip(args.batches, *measured.values(), strict=True):
        sizes = (f"{count / MIB:.0f}" for count in (peak, our_peak, held, our_held))
        original, converted, *rest = sizes
        table.rows.append((str(batch), original, converted, f"{1 - our_peak / peak:.0%}", *rest))
    table.show()
    steps = args.batches[-1] - args.batches[0]
    slopes = {label: (values[-1][0] - values[0][0]) / steps / MIB for label, values in measured.items() if steps}
    notes = (
        f"`reversa.convert(model, scheme=Momentum({args.gamma}))`, float32. held: after the forward pass and the loss. "
        f"One image more costs, in MiB at the peak: {', '.join(f'{k} {v:.1f}' for k, v in slopes.items())}. "
        "Counted by reversa.memory.LiveBytes: tensors; the workspaces inside convolutions are not among them."
    )
    print(notes)
    if args.model == "resnet101":
        title = f"ResNet-101, {args.pixels} px: peak memory of a training step,\nparameters and gradients aside"
        draw(title, args.batches, {label: [peak for peak, _ in values] for label, values in measured.items()})
    question = f"What does conversion save on torchvision's {args.model} at {args.pixels} px?"
    report.write(args.model, question, args.device, [table], notes, ("torchvision",))


if __name__ == "__main__":
    main()

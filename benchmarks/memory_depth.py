"""How does the memory of a training step grow with depth? The picture in the README.

``python benchmarks/memory_depth.py`` writes docs/images/memory_vs_depth.png, and the numbers beside it as .json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import report
import reversa
from contestants import pairs
from reversa.errors import import_extra
from reversa.memory import LiveBytes
from workloads import conv

GAMMA = 0.9
MIB = 2**20


def stored(functions: Sequence[nn.Module], _: int) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        for f in functions:
            x = x + f(x)
        return x

    return run


def checkpointed(functions: Sequence[nn.Module], _: int) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        for f in functions:
            x = x + checkpoint(f, x, use_reentrant=False)
        return x

    return run


def momentum(functions: Sequence[nn.Module], _: int) -> Callable[[Tensor], Tensor]:
    return reversa.ReversibleSequence(functions, reversa.Momentum(GAMMA))


def revnet(functions: Sequence[nn.Module], _: int) -> Callable[[Tensor], Tensor]:
    return reversa.ReversibleSequence(pairs(functions), reversa.RevNet())


# name, network, share of the channels in one stream, colour, marker (Okabe and Ito's colours, told apart by all eyes)
CURVES = [
    ("residual network, activations stored", stored, 1, "#000000", "o"),
    ("the same, a checkpoint at every block", checkpointed, 1, "#E69F00", "s"),
    (f"Reversa, Momentum({GAMMA})", momentum, 1, "#0072B2", "^"),  # keeps a state wherever float would drift
    ("Reversa, RevNet", revnet, 2, "#009E73", "D"),
]


def peak(network: Callable, share: int, depth: int, channels: int, size: int, batch: int) -> int:
    """Peak live bytes of one forward and backward pass, parameters and their gradients aside."""
    torch.manual_seed(0)
    functions = nn.ModuleList([conv(channels // share) for _ in range(depth)])
    run = network(list(functions), 1)
    x = torch.randn(batch, channels, size, size)
    with LiveBytes(exclude=functions) as counted:
        run(x).square().mean().backward()
    return counted.peak


def draw(depths: Sequence[int], curves: dict[str, list[int]], workload: str) -> None:
    interval = reversa.Invert().interval(reversa.Momentum(GAMMA), depths[-1], torch.float32, torch.float32)
    import_extra("matplotlib", "plot").use("Agg")
    plt = import_extra("matplotlib.pyplot", "plot")
    with plt.rc_context({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = plt.subplots(figsize=(7.2, 4.3), dpi=160, layout="constrained")
        for name, _, _, colour, marker in CURVES:
            label = name if "Momentum" not in name else f"{name},\na state kept every {interval} steps"
            values = [value / MIB for value in curves[name]]
            axes.plot(depths, values, color=colour, marker=marker, markersize=5, linewidth=1.8)
            axes.annotate(label, (depths[-1], values[-1]), xytext=(8, 0), textcoords="offset points", color=colour,
                          va="center", fontsize=10, annotation_clip=False)  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xticks(depths, [str(depth) for depth in depths])
        ticks = [2.0**k for k in range(-4, 20) if min(map(min, curves.values())) / MIB / 2 <= 2.0**k]
        ticks = [tick for tick in ticks if tick <= 2 * max(map(max, curves.values())) / MIB]
        axes.set_yticks(ticks, [f"{tick:g} MiB" if tick < 1024 else f"{tick / 1024:g} GiB" for tick in ticks])
        axes.minorticks_off()
        axes.grid(axis="y", color="#dddddd", linewidth=0.7)
        axes.set_xlabel("residual functions")
        axes.set_title("Peak memory of a training step, parameters and gradients aside", loc="left", fontsize=12)
        figure.get_layout_engine().set(rect=(0, 0.08, 1, 0.92))
        note = workload.replace("RevNet", "\nRevNet")
        figure.text(0.01, 0.01, note, fontsize=8, color="#555555", va="bottom", in_layout=False)
        report.IMAGES.mkdir(parents=True, exist_ok=True)
        figure.savefig(report.IMAGES / "memory_vs_depth.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 8, 16, 32, 64, 128, 256, 512])
    parser.add_argument("--channels", type=int, default=16)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--batch", type=int, default=8)
    args = parser.parse_args()
    torch.set_num_threads(1)
    shape = args.channels, args.size, args.batch
    curves = {
        name: [peak(network, share, depth, *shape) for depth in args.depths] for name, network, share, _, _ in CURVES
    }
    workload = (
        f"conv-BatchNorm-ReLU-conv-BatchNorm, {args.channels} channels, {args.size} x {args.size} pixels, "
        f"batch {args.batch}, float32: an activation is {args.batch * args.channels * args.size**2 * 4 / MIB:g} MiB. "
        f"RevNet: two streams of {args.channels // 2} channels"
    )
    table = report.Table(
        "Peak MiB",
        ("depth", *curves),
        [
            (str(depth), *(f"{values[i] / MIB:.2f}" for values in curves.values()))
            for i, depth in enumerate(args.depths)
        ],
    )
    table.show()
    draw(args.depths, curves, workload)
    numbers = {"unit": "bytes", "workload": workload, "depths": args.depths, "peak": curves}
    (report.IMAGES / "memory_vs_depth.json").write_text(json.dumps(numbers, indent=1) + "\n")
    question = "How does the memory of a training step grow with depth?"
    report.write("memory_depth", question, "cpu", [table], f"{workload}. Counted by reversa.memory.LiveBytes.", ())


if __name__ == "__main__":
    main()

"""The memory figures of the documents, predicted: ResNets by depth and by batch, the toy setting, RevNet, fine-tuning.

``python benchmarks/memory_figures.py`` computes nothing and needs no memory: every number is an estimate
(reversa.memory.estimate), which agrees with live bytes on the CPU to the byte. It takes five minutes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torchvision.models.resnet import Bottleneck, ResNet, resnet18, resnet34

import report
import reversa
from reversa import models
from reversa.errors import import_extra
from reversa.memory import estimate

GIB = 2**30
VARIANTS: dict[str, tuple[float, bool] | None] = {
    "stored": None,
    "Momentum(0.9)": (0.9, False),
    "Momentum(0.9), exact": (0.9, True),
}
COLOURS = dict(zip(VARIANTS, ("#000000", "#0072B2", "#D55E00"), strict=True))
DEPTHS: dict[str, Callable[[], nn.Module]] = {
    "18": resnet18,
    "34": resnet34,
    "50": lambda: ResNet(Bottleneck, [3, 4, 6, 3]),
    "101": lambda: ResNet(Bottleneck, [3, 4, 23, 3]),
    "152": lambda: ResNet(Bottleneck, [3, 8, 36, 3]),
    "3-30-160-3": lambda: ResNet(Bottleneck, [3, 30, 160, 3]),
}
BATCHES = (8, 16, 32, 48, 64, 80, 96, 112, 128)
TOY_DEPTHS = (1, 3, 10, 30, 100, 300, 1000)

NOTES = """
## How to read it

Whole training steps in float32: parameters, gradients, activations, temporary tensors and, where an optimizer is named,
its state. What an allocator and cuDNN's workspaces add on a GPU is not in them. "Stored" is the original network. The
blocks that change the shape, stem and head are stored in every row; where they are most of a network, conversion saves
little. Momentum(0.9) keeps a state every 43 steps in float32, exact arithmetic spills 0.15 bits per element and step.

- Figure 1: the published observation is "slightly worse when shallow, nearly flat from ResNet-50 on".
- Figure 2: the published replication could not train the original at batch 80 in 16 GiB.
- Figure 3: gamma = 1 - 1 / (50 depth), one function of 500-8-500, batch 500, as in the Momentum ResNets paper.
- Figure 4: the RevNet authors' note is a batch of 128 where the ResNet had 32 on the same GPU.
- Figure 5: published for a GPU limited to about 3 GiB: 2 images for the original, 4 for Momentum.
"""


def converted(make: Callable[[], nn.Module], variant: str) -> nn.Module:
    with torch.device("meta"):
        model, settings = make(), VARIANTS[variant]
    if settings is None:
        return model
    return reversa.convert(model, scheme=reversa.Momentum(settings[0]), exact=settings[1])


def peak(model: nn.Module, shape: Sequence[int], optimizer: type[torch.optim.Optimizer] | None = None) -> int:
    return estimate(model, tuple(shape), optimizer=optimizer).peak_bytes


def largest_batch(model: nn.Module, image: Sequence[int], limit: int, optimizer=None) -> int:
    """The largest batch whose step stays within the limit."""
    low, high = 0, 1
    while peak(model, (high, *image), optimizer) <= limit:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if peak(model, (middle, *image), optimizer) <= limit else (low, middle)
    return low


def by_depth() -> dict[str, list[int]]:
    return {v: [peak(converted(make, v), (64, 3, 224, 224)) for make in DEPTHS.values()] for v in VARIANTS}


def by_batch() -> tuple[dict[str, list[int]], dict[str, int]]:
    nets = {v: converted(DEPTHS["152"], v) for v in VARIANTS}
    peaks = {v: [peak(net, (batch, 3, 224, 224)) for batch in BATCHES] for v, net in nets.items()}
    return peaks, {v: largest_batch(net, (3, 224, 224), 16 * GIB) for v, net in nets.items()}


def toy(depth: int, variant: str) -> nn.Module:
    with torch.device("meta"):
        f = nn.Sequential(nn.Linear(500, 8), nn.Tanh(), nn.Linear(8, 500))
    engine = reversa.Store() if VARIANTS[variant] is None else reversa.Invert()
    exact = VARIANTS[variant] is not None and VARIANTS[variant][1]
    return reversa.ReversibleSequence([f] * depth, reversa.Momentum(1 - 1 / (50 * depth)), exact, engine)


def by_toy_depth() -> dict[str, list[int]]:
    return {v: [peak(toy(depth, v), (500, 500)) for depth in TOY_DEPTHS] for v in VARIANTS}


def revnet() -> list[tuple[str, int, int]]:
    """Networks of equal size: what batch 32 takes, and the batch that fits into what the ResNet takes."""
    nets = {}
    for name in ("resnet101", "revnet104"):
        with torch.device("meta"):
            nets[name] = models.create(name, num_classes=1000)
    limit = peak(nets["resnet101"], (32, 3, 224, 224))
    return [
        (name, peak(net, (32, 3, 224, 224)), largest_batch(net, (3, 224, 224), limit)) for name, net in nets.items()
    ]


def gib(count: int) -> str:
    return f"{count / GIB:.2f}"


def table(title: str, column: str, points: Sequence[object], peaks: dict[str, list[int]]) -> report.Table:
    rows = [(str(point), *(gib(p[i]) for p in peaks.values())) for i, point in enumerate(points)]
    return report.Table(title, (column, *peaks), rows)


def draw(depth: dict[str, list[int]], batch: dict[str, list[int]], small: dict[str, list[int]]) -> None:
    import_extra("matplotlib", "plot").use("Agg")
    plt = import_extra("matplotlib.pyplot", "plot")
    with plt.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure, panels = plt.subplots(1, 3, figsize=(10.5, 3.3), dpi=110, layout="constrained")
        for variant, colour in COLOURS.items():
            style = {"color": colour, "marker": "o", "markersize": 3, "linewidth": 1.5, "label": variant}
            panels[0].plot(range(len(DEPTHS)), [p / GIB for p in depth[variant]], **style)
            panels[1].plot(BATCHES, [p / GIB for p in batch[variant]], **style)
            panels[2].plot(TOY_DEPTHS, [p / 2**20 for p in small[variant]], **style)
        panels[0].set_xticks(range(len(DEPTHS)), list(DEPTHS), rotation=30, ha="right")
        panels[0].set(title="ResNets, 64 x 3 x 224 x 224", ylabel="peak of a training step, GiB", xlabel="depth")
        panels[1].axhline(16, color="#999999", linewidth=0.8, linestyle=":")
        panels[1].set(title="ResNet-152, 224 x 224", xlabel="images in a batch", ylabel="GiB")
        panels[2].set(
            title="the toy setting, batch 500 x 500", xlabel="depth", ylabel="MiB", xscale="log", yscale="log"
        )
        for panel in panels:
            panel.title.set_fontsize(9)
            if panel is not panels[2]:
                panel.set_ylim(bottom=0)
        panels[0].legend(frameon=False, fontsize=8)
        figure.savefig(report.IMAGES / "memory_figures.png")


def main() -> None:
    report.parser(__doc__, "nothing is left out").parse_args()
    depth = by_depth()
    batch, fits = by_batch()
    small = by_toy_depth()
    image = (3, 500, 500)
    tuning = [(v, largest_batch(converted(DEPTHS["152"], v), image, 3 * GIB, torch.optim.SGD)) for v in VARIANTS]
    tables = [
        table("1. Peak by depth, GiB, 64 x 3 x 224 x 224", "ResNet", list(DEPTHS), depth),
        table("2. Peak by batch, GiB, ResNet-152", "batch", BATCHES, batch),
        report.Table("2. Largest batch in 16 GiB, ResNet-152", tuple(fits), [tuple(map(str, fits.values()))]),
        report.Table(
            "3. Peak by depth, MiB, the toy setting",
            ("depth", *small),
            [(str(d), *(f"{p[i] / 2**20:.2f}" for p in small.values())) for i, d in enumerate(TOY_DEPTHS)],
        ),
        report.Table(
            "4. RevNet-104 beside ResNet-101",
            ("network", "peak at batch 32, GiB", "largest batch in what the ResNet takes at 32"),
            [(name, gib(taken), str(most)) for name, taken, most in revnet()],
        ),
        report.Table(
            "5. Largest batch in 3 GiB, 500 x 500, SGD", ("ResNet-152", "images"), [(v, str(n)) for v, n in tuning]
        ),
    ]
    question = "What do the networks of the documents take in memory?"
    report.finish("memory_figures", question, tables, NOTES, ("torchvision",), lambda: draw(depth, batch, small))


if __name__ == "__main__":
    main()

"""Planning under a budget: predicted time of a training step against the memory it may take, beside four baselines.

``python benchmarks/plan_curves.py`` computes nothing and needs no memory: bytes and operations are those of steps of
fake tensors, and seconds are these operations on an A100 as its data sheet has it. It takes five minutes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torchvision
from torch import nn

import report
import reversa
from reversa.cli.speeds import SPEEDS
from reversa.drawing import new_figure, saved
from reversa.errors import import_extra
from reversa.memory import Plan, Way, curve
from reversa.memory.pictures import plot_curve

GIB = 2**30
POINTS = 12
NOT_CONVERTED = ", not converted"
SPEED = SPEEDS["a100"]

NOTES = f"""
## How to read it

Predictions, no measurements: whole training steps in float32 with SGD without momentum, counted as the CPU runs them,
and seconds by the roofline model with an A100's data sheet ({SPEED.flops:g} operations a second, {SPEED.bandwidth:g}
bytes a second from and to memory). They do not depend on the machine that ran this. Every network is converted with
Momentum(0.9). A budget can be used by whatever fits into it: the ratio is the plan's time over that of the fastest
baseline that fits. "all stored", "checkpoint each block" and "all inverted" are steps of fake tensors of the same
network; the peak of "checkpoint every sqrt(n) blocks" is a sum over its blocks.

The plan is compared with other ways to train the same, converted network; the last table also has the network that is
not converted, which is another model and takes less where everything is stored. On the CPU, attention with dropout
keeps all of its weights, which is most of what GPT-2 stores; on CUDA fused attention keeps none.
"""


def gpt2_medium() -> nn.Module:
    transformers = import_extra("transformers", "hf")
    config = transformers.GPT2Config(n_embd=1024, n_layer=24, n_head=16, use_cache=False)
    return transformers.GPT2LMHeadModel(config).train()


def tokens() -> dict[str, torch.Tensor]:
    ids = torch.zeros((8, 1024), dtype=torch.long, device="meta")
    return {"input_ids": ids, "labels": ids}


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Any, Callable[[Any], torch.Tensor] | None]] = {
    "ResNet-152, 64 x 3 x 224 x 224": (torchvision.models.resnet152, (64, 3, 224, 224), None),
    "ViT-L/16, 32 x 3 x 224 x 224": (torchvision.models.vit_l_16, (32, 3, 224, 224), None),
    "GPT-2 medium, 8 x 1024 tokens": (gpt2_medium, tokens(), lambda output: output.loss),
}


def plans_of(make: Callable[[], nn.Module], inputs: Any, loss: Any) -> list[Plan]:
    """At budgets from the least to the most of use, and where a baseline begins to fit."""
    with torch.device("meta"):
        model = reversa.convert(make(), scheme=reversa.Momentum(0.9))
    step: Any = {"loss": loss, "optimizer": torch.optim.SGD, "speed": SPEED}
    (most,) = curve(model, inputs, ["1000 TiB"], **step)
    assert isinstance(most, Plan)
    least, stored = most.least_bytes, most.ways[0].peak_bytes
    even = [least + (stored - least) * i // (POINTS - 1) for i in range(POINTS)]
    budgets = sorted({*even, *(way.peak_bytes for way in most.ways if way.peak_bytes >= least)})
    return [plan for plan in curve(model, inputs, budgets, **step) if isinstance(plan, Plan)]


def fastest_way(plan: Plan, ways: Sequence[Way] | None = None) -> Way | None:
    """Of the baselines, or of others, that fit into the plan's budget."""
    fitting = (way for way in ways or plan.ways if way.peak_bytes <= plan.budget)
    return min(fitting, key=lambda way: way.seconds, default=None)


def ratio(plan: Plan, ways: Sequence[Way] | None = None) -> float:
    """The plan's time over that of the fastest that fits; 0 where none does."""
    way = fastest_way(plan, ways)
    return plan.seconds / way.seconds if way else 0.0


def table(name: str, plans: Sequence[Plan]) -> report.Table:
    columns = (
        "budget, GiB",
        "peak of the plan, GiB",
        "time of the plan, s",
        "fastest baseline",
        "its time, s",
        "ratio",
    )
    rows = []
    for plan in plans:
        way = fastest_way(plan)
        beside = (way.name, f"{way.seconds:.4f}", f"{ratio(plan):.3f}") if way else ("none fits", "", "")
        rows.append((f"{plan.budget / GIB:.2f}", f"{plan.peak_bytes / GIB:.2f}", f"{plan.seconds:.4f}", *beside))
    return report.Table(name, columns, rows)


def original_ways(make: Callable[[], nn.Module], inputs: Any, loss: Any) -> Sequence[Way]:
    """The baselines of the network that is not converted."""
    with torch.device("meta"):
        model = make()
    (most,) = curve(model, inputs, ["1000 TiB"], ["store"], loss=loss, optimizer=torch.optim.SGD, speed=SPEED)
    assert isinstance(most, Plan)
    return most.ways


def baselines(ways: dict[str, Sequence[Way]]) -> report.Table:
    rows: list[Sequence[str]] = [
        (f"{name}: {way.name}", f"{way.peak_bytes / GIB:.2f}", f"{way.seconds:.4f}")
        for name, of_network in ways.items()
        for way in of_network
    ]
    return report.Table("The baselines", ("network", "peak, GiB", "time, s"), rows)


def verdict(curves: dict[str, list[Plan]], ways: dict[str, Sequence[Way]]) -> str:
    """Whether a plan is slower than something that fits: of the same network, and of the one that is not converted."""
    worst, where = worst_ratio(curves, ways, "")
    above = "above a baseline" if worst > 1 + 1e-9 else "nowhere above a baseline that fits"
    other, there = worst_ratio(curves, ways, NOT_CONVERTED)
    return (
        f"The plan is {above}: the worst ratio is {worst:.4f} ({where}). Against the baselines of the network that is "
        f"not converted, the worst ratio is {other:.4f} ({there})."
    )


def worst_ratio(curves: dict[str, list[Plan]], ways: dict[str, Sequence[Way]], which: str) -> tuple[float, str]:
    found = [(ratio(plan, ways[name + which]), name, plan.budget) for name, plans in curves.items() for plan in plans]
    worst, name, budget = max(found)
    return worst, f"{name.partition(',')[0]}, {budget / GIB:.2f} GiB"


def draw(curves: dict[str, list[Plan]]) -> None:
    figure = new_figure(11, 3.6)
    panels = figure.subplots(1, len(curves))
    for axes, (name, plans) in zip(panels, curves.items(), strict=True):
        plot_curve(axes, plans)
        axes.set_title(name, fontsize="medium")
    for axes in panels[1:]:
        axes.set_ylabel("")
    figure.legend(*panels[0].get_legend_handles_labels(), frameon=False, ncols=6, loc="outside upper center")
    saved(figure, report.IMAGES / "plan_curves.png")


def main() -> None:
    report.parser(__doc__, "nothing is left out").parse_args()
    curves, ways = {}, {}
    for name, network in NETWORKS.items():
        curves[name] = plans_of(*network)
        ways |= {name: curves[name][0].ways, name + NOT_CONVERTED: original_ways(*network)}
    tables = [*(table(name, plans) for name, plans in curves.items()), baselines(ways)]
    said = verdict(curves, ways)
    question = "How fast is training within a memory budget? (predicted)"
    report.finish(
        "plan_curves", question, tables, f"{NOTES}\n{said}", ("torchvision", "transformers"), lambda: draw(curves)
    )
    print(said)


if __name__ == "__main__":
    main()

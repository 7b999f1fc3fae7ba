"""How near is a converted model to the original, and what does it cost? ResNet-50 and ViT-B/16, by gamma.

``python benchmarks/faithful.py`` takes eight minutes, ``--quick`` (ResNet-34, a small ViT) one. It draws
docs/images/faithful.png.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu

import report
import reversa
from drift import relative
from originals import Subject, blocks_in, checkpoint_blocks, subjects, with_relu_outside
from reversa.engine import Engine
from reversa.errors import DriftWarning, ReversaError, import_extra
from reversa.exact import Arithmetic, FixedPoint
from reversa.memory import LiveBytes

FULL, QUICK = (0.9, 0.5, 0.1, 0.01, 0.001), (0.9, 0.1, 0.001)
MIB = 2**20
AS_IT_IS = nullcontext()


# ------------------------------------------------------------------ who takes part


@dataclass(frozen=True)
class Way:
    """How a converted model gets its states back; its oracle has the same forward pass, and stores activations."""

    name: str
    colour: str
    marker: str
    engine: Engine
    exact: bool | Arithmetic = False

    def convert(self, model: nn.Module, gamma: float, engine: Engine | None = None) -> nn.Module:
        scheme, engine = reversa.Momentum(gamma), engine or self.engine
        model = reversa.convert(copy.deepcopy(model), scheme=scheme, exact=self.exact, engine=engine)
        return checkpoint_blocks(model, blocks_of(model)) if self is MIXED else model


def blocks_of(converted: nn.Module) -> list[str]:
    """Those that are reversible."""
    return [name for stage in reversa.explain(converted).stages for name in stage.blocks]


# Okabe and Ito's colours, told apart by all eyes. Ways with one arithmetic stand together: they share an oracle.
EXACT = Way("exact=True", "#0072B2", "o", reversa.Invert(), True)
HOST = Way("exact=True, save_on_cpu", "", "", reversa.Invert(), True)
EXACT_32 = Way("exact, FixedPoint(bits=32)", "#56B4E9", "D", reversa.Invert(), FixedPoint(bits=32))
MIXED = Way("bits=32, blocks left over: checkpoint", "#CC79A7", "v", reversa.Invert(), FixedPoint(bits=32))
WAYS = [
    EXACT,
    HOST,
    EXACT_32,
    MIXED,
    Way("float32, Invert()", "#009E73", "^", reversa.Invert()),
    Way("float32, anchors=None", "#D55E00", "s", reversa.Invert(anchors=None, accept_drift=True)),
]
ORIGINAL, CHECKPOINT = "original", "original, a checkpoint at every block"


# ------------------------------------------------------------------ a training step


@dataclass
class Step:
    """What a training step gave: output, all gradients, BatchNorm's statistics; and the bytes that it took."""

    output: Tensor
    gradient: Tensor
    statistics: Tensor
    peak: int
    held: int


def to_host(sent: Counter[torch.dtype]) -> save_on_cpu:
    """PyTorch's own tool. It would move nothing on the CPU: here it gets copies, and bytes are counted by type."""
    tool = save_on_cpu()
    pack = tool.pack_hook

    def counted(tensor: Tensor):
        sent[tensor.dtype] += tensor.nbytes
        return pack(tensor.detach().clone())

    tool.pack_hook = counted
    return tool


def step(model: nn.Module, subject: Subject, around: AbstractContextManager = AS_IT_IS) -> Step:
    """Forward, cross entropy and backward, with live bytes counted; parameters and gradients are not among them."""
    x, target = subject.images()
    with LiveBytes(exclude=model) as counted:
        with around:
            output = model(x)
        held = counted.live
        F.cross_entropy(output, target).backward()
    gradient = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()])
    statistics = torch.cat([torch.zeros(0), *(buffer.flatten() for buffer in model.buffers())])
    return Step(output.detach(), gradient, statistics, counted.peak, held)


@dataclass(frozen=True)
class Measured:
    """Distance of the output from the original's, bytes, and the error of the gradient; or why not."""

    distance: float = math.nan
    peak: int = 0
    held: int = 0
    error: float = math.nan
    gradient: str = ""
    host: str = ""


Results = dict[tuple[float | None, str], Measured]


def compare(got: Step, want: Step, original: Step, sent: Counter[torch.dtype] | None = None) -> Measured:
    """A step beside its oracle's, and its output beside the original model's."""
    error = relative(got.gradient, want.gradient)
    words = "equal" if error == 0 else f"{error:.0e}" if math.isfinite(error) else "not finite"
    if not torch.equal(got.output, want.output):
        words += ", other output"
    if not torch.equal(got.statistics, want.statistics):
        words += ", other BatchNorm statistics"
    host = f"{sent.total() / MIB:.1f}, of it words {sent[torch.uint8] / MIB:.2f}" if sent else ""
    return Measured(relative(got.output, original.output), got.peak, got.held, error, words, host)


def run(subject: Subject, gammas: Sequence[float]) -> Results:
    model = subject.build()
    original = step(copy.deepcopy(model), subject)
    left_over = len(blocks_of(EXACT.convert(model, 0.9))) < len(blocks_in(model))
    results: Results = {(None, ORIGINAL): compare(original, original, original)}
    results[None, CHECKPOINT] = compare(step(checkpoint_blocks(copy.deepcopy(model)), subject), original, original)
    for gamma in gammas:
        print(f"{subject.name}, gamma = {gamma} ...", flush=True)
        for _, ways in groupby((w for w in WAYS if left_over or w is not MIXED), lambda way: way.exact):
            want = None
            for way in ways:
                want = want or step(way.convert(model, gamma, reversa.Store()), subject)
                sent: Counter[torch.dtype] = Counter()
                try:
                    got = step(way.convert(model, gamma), subject, to_host(sent) if way is HOST else AS_IT_IS)
                    results[gamma, way.name] = compare(got, want, original, sent)
                except ReversaError as error:
                    results[gamma, way.name] = Measured(gradient=f"refused: {type(error).__name__}")
    return results


# ------------------------------------------------------------------ where the ReLU stands


@torch.no_grad()
def relu_table(subject: Subject, gammas: Sequence[float]) -> report.Table:
    """Distances with the ReLU inside f, as conversion has it, and outside; down to a gamma near 0."""
    model, (x, _) = subject.build(), subject.images()
    want = copy.deepcopy(model)(x)
    columns = ("gamma", "distance", "distance / gamma", "negative part, stage by stage", "ReLU outside: distance")
    table = report.Table(f"{subject.name}: the ReLU that ends a block", columns)
    shares: list[float] = []
    for gamma in (*gammas, 1e-4, 1e-5):
        converted = EXACT.convert(model, gamma)
        stages = [stage.blocks for stage in reversa.explain(converted).stages]
        for last in (converted.get_submodule(names[-1]) for names in stages):
            last.register_forward_hook(lambda _, __, y: shares.append(float(y.clamp(max=0).norm() / y.norm())))
        shares.clear()
        distance = relative(converted(x), want)
        outside = relative(with_relu_outside(model, stages, gamma)(x), want)
        negative = ", ".join(f"{share:.0e}" for share in shares)
        table.rows.append((f"{gamma:g}", f"{distance:.2g}", f"{distance / gamma:.2g}", negative, f"{outside:.2g}"))
    return table


# ------------------------------------------------------------------ tables and picture


def step_table(subject: Subject, results: Results) -> report.Table:
    columns = ("way", "bits lost", "distance", "peak MiB", "of original's", "held MiB", "gradient, beside stored")
    title = f"{subject.name}, batch {subject.batch}, {subject.pixels} px: a training step"
    table = report.Table(title, (*columns, "to the host, MiB"))
    for (gamma, name), m in results.items():
        label = name if gamma is None else f"gamma = {gamma}, {name}"
        bits = f"{-math.log2(gamma):.2f}" if gamma and not name.startswith("float") else ""
        sizes = (f"{m.peak / MIB:.1f}", f"{m.peak / results[None, ORIGINAL].peak:.0%}", f"{m.held / MIB:.1f}")
        unknown = not m.peak or m.host  # the host's memory and the device's are one here
        distance = f"{m.distance:.2g}" if m.peak else "-"
        table.rows += [()] if name in (ORIGINAL, EXACT.name) else []
        table.rows.append((label, bits, distance, *(["-"] * 3 if unknown else sizes), m.gradient, m.host))
    return table


def draw(measured: dict[Subject, Results], gammas: Sequence[float]) -> None:
    import_extra("matplotlib", "plot").use("Agg")
    plt = import_extra("matplotlib.pyplot", "plot")
    with plt.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure, grid = plt.subplots(2, 2, figsize=(9.6, 7.2), dpi=160, layout="constrained")
        for (subject, results), (left, right) in zip(measured.items(), grid, strict=True):
            left.set_title(f"{subject.name}: distance of the output from the original's", loc="left", fontsize=10.5)
            panel(left, results, gammas, lambda m: m.distance)
            left.set_yscale("log")
            right.set_title(f"{subject.name}: peak of a training step, MiB", loc="left", fontsize=10.5)
            panel(right, results, gammas, lambda m: m.peak / MIB)
            for name, line in ((ORIGINAL, "-"), (CHECKPOINT, "--")):
                right.axhline(results[None, name].peak / MIB, color="black", linestyle=line, linewidth=1.2, label=name)
            right.set_ylim(bottom=0)
        legend = grid[0][1].get_legend_handles_labels()
        title = "hollow: the gradient is wrong by 1 % or more; missing: refused with an error"
        figure.legend(*legend, loc="outside lower left", ncols=3, frameon=False, title=title, alignment="left")
        report.IMAGES.mkdir(parents=True, exist_ok=True)
        figure.savefig(report.IMAGES / "faithful.png")


def panel(axes, results: Results, gammas: Sequence[float], height: Callable[[Measured], float]) -> None:
    """Draw a line for each way. Those below are wider, so that all are seen."""
    for i, way in enumerate(way for way in WAYS if way is not HOST):
        cells = [(gamma, m) for gamma in gammas if (m := results.get((gamma, way.name), Measured())).peak]
        wrong = [(gamma, m) for gamma, m in cells if not m.error < 1e-2]
        style = {"color": way.colour, "marker": way.marker, "markersize": 4.5 + 1.2 * i, "zorder": 9 - i}
        axes.plot([g for g, _ in cells], [height(m) for _, m in cells], linewidth=1.3 + i / 2, label=way.name, **style)
        axes.plot([g for g, _ in wrong], [height(m) for _, m in wrong], linestyle="", mfc="white", **style)
    axes.set_xscale("log")
    axes.set_xticks(gammas, [f"{gamma:g}" for gamma in gammas])
    axes.minorticks_off()
    axes.grid(axis="y", color="#dddddd", linewidth=0.7)
    axes.set_xlabel("gamma")


NOTES = """
## How to read it

Random weights (own seed), training mode: BatchNorm takes the statistics of the batch, in each model its own. The loss
is the cross entropy with random labels; float32.

- **Distance**: norm of the difference between the converted model's output and the original's, relative to the latter.
- **Bits lost**: what a multiplication by gamma takes from each element, log2(1/gamma); exact arithmetic keeps it.
- **Peak, held**: live bytes of `reversa.memory.LiveBytes` in a training step and after its forward pass, without
  parameters and their gradients. Blocks that change the shape are not converted: their activations are stored, or
  recomputed by PyTorch's checkpoint ("blocks left over: checkpoint"), which moves BatchNorm's statistics twice.
- **Gradient**: of all parameters together, relative to `engine=Store()` on the same conversion (the original's for its
  checkpoint). `equal`: equal bits (`torch.equal`); output and BatchNorm statistics are compared, too.
- `anchors=None` is with `accept_drift=True`; without it Reversa refuses where its drift law passes 1e-2. In float
  `Invert()` keeps states instead; at a small gamma one for each step.
- **To the host**: what PyTorch's `torch.autograd.graph.save_on_cpu` around the forward pass gets: the chains' last
  states, the spilled words, and what autograd saves outside the chains, parameters included.
- **The ReLU**: a block of ResNet is `relu(x + g(x))`; conversion takes `f(x) = relu(x + g(x)) - x`, so that
  `x' = gamma (x + v) + (1 - gamma) relu(x + g(x))`: as gamma goes to 0, the block with its ReLU. What the ReLU would
  cut from the carried tensor is its negative part, given as a share of its norm at the end of each stage. "ReLU
  outside" is the momentum around g alone with `x' = relu(x + v')`, which has no inverse.
"""


def main() -> None:
    quick = report.parser(__doc__, "small models, fewer gammas, and no picture").parse_args().quick
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", DriftWarning)
    gammas = QUICK if quick else FULL
    measured = {subject: run(subject, gammas) for subject in subjects(quick)}
    made = [step_table(subject, results) for subject, results in measured.items()]
    made.append(relu_table(next(iter(measured)), gammas))
    question = "How near is a converted model to the original, and what does it cost?"
    picture = None if quick else partial(draw, measured, gammas)
    report.finish("faithful", question, made, NOTES, ("torchvision",), picture)


if __name__ == "__main__":
    main()

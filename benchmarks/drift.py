"""How wrong are recovered states and gradients, by depth? Float arithmetic, exact arithmetic, and momentumnet.

``python benchmarks/drift.py`` takes a minute or two, ``--quick`` half a minute. It draws docs/images/drift.png.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

import report
import reversa
from contestants import pairs
from reversa.engine import Engine
from reversa.errors import DriftWarning, MissingExtra, ReversaError, import_extra
from reversa.exact import Arithmetic, FixedPoint
from reversa.schemes import Momentum, RevNet, Scheme
from step import Network, gradient, parameters
from workloads import Workload, tanh_mlp

FULL, QUICK = (8, 32, 128, 256, 512), (8, 32, 128)
SCHEMES: list[Scheme] = [*(Momentum(gamma) for gamma in (0.5, 0.9, 0.95, 0.99)), RevNet()]
STORE, NO_ANCHORS = reversa.Store(), reversa.Invert(anchors=None, accept_drift=True)


def sequence(
    scheme: Scheme, functions: Sequence[nn.Module], exact: bool | Arithmetic, engine: Engine
) -> reversa.ReversibleSequence:
    blocks = functions if isinstance(scheme, Momentum) else pairs(functions)
    return reversa.ReversibleSequence(blocks, scheme, exact=exact, engine=engine)


@dataclass(frozen=True)
class Ours:
    """A chain of ours; its oracle has the same forward pass, and stores the activations."""

    name: str
    colour: str
    marker: str
    engine: Engine
    exact: bool | Arithmetic = False
    dtype: torch.dtype = torch.float32

    def build(self, scheme: Scheme, functions: Sequence[nn.Module]) -> Network:
        return sequence(scheme, functions, self.exact, self.engine)

    def oracle(self, scheme: Scheme, functions: Sequence[nn.Module]) -> Network:
        return sequence(scheme, functions, self.exact, STORE)


@dataclass(frozen=True)
class Theirs:
    """momentumnet's memory mode; its oracle is its own network in the ordinary mode."""

    name: str = "momentumnet, use_backprop=False"
    colour: str = "#CC79A7"
    marker: str = "v"
    dtype: torch.dtype = torch.float32

    def build(self, scheme: Scheme, functions: Sequence[nn.Module], use_backprop: bool = False) -> Network:
        package = import_extra("momentumnet", "bench")
        assert isinstance(scheme, Momentum)
        return package.MomentumNet(list(functions), gamma=scheme.gamma, use_backprop=use_backprop)

    def oracle(self, scheme: Scheme, functions: Sequence[nn.Module]) -> Network:
        return self.build(scheme, functions, use_backprop=True)


# Okabe and Ito's colours, told apart by all eyes
EXACT = [
    Ours("exact=True (64 bits)", "#0072B2", "o", reversa.Invert(), True),
    Ours("exact, FixedPoint(bits=32)", "#56B4E9", "D", reversa.Invert(), FixedPoint(bits=32)),
]
WAYS: list[Ours | Theirs] = [
    Ours("float32, anchors=None", "#D55E00", "s", NO_ANCHORS),
    Ours("float32, Invert()", "#009E73", "^", reversa.Invert()),
    Ours("float64, anchors=None", "#000000", "x", NO_ANCHORS, dtype=torch.float64),
    *EXACT,
    Theirs(),
]


@dataclass(frozen=True)
class Errors:
    """Relative errors of the first state that the backward pass computed back, and of the gradients; or why not."""

    state: float = math.nan
    gradient: float = math.nan
    failure: str | None = None

    def __str__(self) -> str:
        return self.failure or f"{shown(self.state)} / {shown(self.gradient)}"


Results = dict[tuple[Scheme, str, int], Errors]


def shown(error: float) -> str:
    return "0" if error == 0 else f"{error:.0e}" if math.isfinite(error) else "not finite"


def relative(got: Tensor, want: Tensor) -> float:
    """0 for equal bits only."""
    if torch.equal(got, want):
        return 0.0
    got, want = got.double(), want.double()
    return max(float((got - want).norm() / want.norm()), 5e-324)


def workload(scheme: Scheme, depth: int, batch: int) -> tuple[list[nn.Module], Tensor]:
    work = Workload(lambda _, width: tanh_mlp(width), 64, (batch, None), depth=depth)
    return work.build("momentum" if isinstance(scheme, Momentum) else "revnet", "cpu")


def measure(way: Ours | Theirs, scheme: Scheme, depth: int, batch: int) -> Errors:
    """Gradients beside the oracle's, and the first function's argument on the way back beside that on the way there."""
    functions, x = workload(scheme, depth, batch)
    functions = [f.to(way.dtype) for f in functions]
    x = x.detach().to(way.dtype).requires_grad_()
    leaves = [x, *parameters(functions)]
    arguments: list[Tensor] = []
    try:
        want = gradient(way.oracle(scheme, functions), x, leaves)
        network = way.build(scheme, functions)
        functions[0].register_forward_pre_hook(lambda _, args: arguments.append(args[0].detach().clone()))
        got = gradient(network, x, leaves)
    except MissingExtra:
        return Errors(failure="not installed")
    except ReversaError:
        return Errors(failure="refused")
    return Errors(relative(arguments[-1], arguments[0]), relative(got, want))


def label(scheme: Scheme) -> str:
    return f"Momentum(gamma={scheme.gamma})" if isinstance(scheme, Momentum) else type(scheme).__name__


def applies(way: Ours | Theirs, scheme: Scheme) -> bool:
    return isinstance(way, Ours) or isinstance(scheme, Momentum)


def run(depths: Sequence[int], batch: int) -> Results:
    results: Results = {}
    for scheme in SCHEMES:
        print(f"{label(scheme)} ...", flush=True)
        for way in WAYS:
            for depth in depths if applies(way, scheme) else ():
                results[scheme, way.name, depth] = measure(way, scheme, depth, batch)
    return results


# ------------------------------------------------------------------ snapshots


@torch.no_grad()
def same_bits(way: Ours, scheme: Scheme, depth: int, batch: int) -> str:
    """Whether ``inverse_state`` gives back every bit of the state that ``forward_state`` was given."""
    functions, x = workload(scheme, depth, batch)
    network = sequence(scheme, functions, way.exact, way.engine)
    first = (x, torch.randn_like(x) / 10) if isinstance(scheme, Momentum) else tuple(x.chunk(2, 1))
    try:
        back = network.inverse_state(network.forward_state(first))
    except ReversaError:
        return "refused"
    return "all" if all(torch.equal(a, b) for a, b in zip(back[:2], first, strict=True)) else "NOT ALL"


# ------------------------------------------------------------------ tables and picture


def tables(results: Results, depths: Sequence[int], batch: int) -> list[report.Table]:
    made = [
        report.Table(
            f"{label(scheme)}: error of the state / of the gradient",
            ("depth", *map(str, depths)),
            [
                (way.name, *(str(results[scheme, way.name, depth]) for depth in depths))
                for way in WAYS
                if applies(way, scheme)
            ],
        )
        for scheme in SCHEMES
    ]
    rows: list[Sequence[str]] = [
        (f"{label(scheme)}, {way.name}", *(same_bits(way, scheme, depth, batch) for depth in depths))
        for scheme in SCHEMES
        for way in EXACT
    ]
    return [*made, report.Table("Bits of a state that inverse_state gives back", ("depth", *map(str, depths)), rows)]


EQUAL, MOST = 1e-18, 1e6
"""Heights of a gradient without error, and of the largest that is drawn."""


def draw(results: Results, depths: Sequence[int]) -> None:
    import_extra("matplotlib", "plot").use("Agg")
    plt = import_extra("matplotlib.pyplot", "plot")
    with plt.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure, grid = plt.subplots(2, 3, figsize=(10.5, 6), dpi=160, layout="constrained", sharex=True, sharey=True)
        *panels, legend = grid.flat
        lines, *_ = [panel(axes, scheme, results, depths) for axes, scheme in zip(panels, SCHEMES, strict=True)]
        for axes in panels[2:]:
            axes.tick_params(labelbottom=True)
            axes.set_xlabel("residual functions")
        legend.axis("off")
        legend.legend(*zip(*lines, strict=True), loc="upper left", frameon=False)
        note = "0 (exact): all gradients equal bit for bit\nline broken: refused with an error, or not finite"
        legend.text(0.05, 0.15, note, transform=legend.transAxes, fontsize=9, color="#555555")
        title = "Relative error of the gradient, beside stored activations on the same forward pass"
        figure.suptitle(title, x=0.01, ha="left", fontsize=12)
        report.IMAGES.mkdir(parents=True, exist_ok=True)
        figure.savefig(report.IMAGES / "drift.png")


def panel(axes, scheme: Scheme, results: Results, depths: Sequence[int]) -> list[tuple[object, str]]:
    """Draw a line for each way; the lines, with their names. Those below are wider, so that all are seen."""
    axes.set_title(label(scheme), loc="left", fontsize=11)
    lines = []
    for i, way in enumerate(w for w in WAYS if applies(w, scheme)):
        cells = [results[scheme, way.name, depth] for depth in depths]
        heights = [height(cell) for cell in cells]
        style = {"color": way.colour, "marker": way.marker, "zorder": 9 - i}
        (line,) = axes.plot(depths, heights, linewidth=1.3 + 0.4 * i, markersize=4 + 0.7 * i, **style)
        lines.append((line, way.name + (" (not installed)" if cells[0].failure == "not installed" else "")))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(depths, [str(depth) for depth in depths])
    axes.set_ylim(EQUAL / 8, MOST)
    axes.set_yticks([EQUAL, *(10.0**k for k in range(-15, 6, 5))], ["0 (exact)", "1e-15", "1e-10", "1e-5", "1", "1e5"])
    axes.minorticks_off()
    axes.grid(axis="y", color="#dddddd", linewidth=0.7)
    return lines


def height(cell: Errors) -> float:
    if cell.failure or not math.isfinite(cell.gradient):
        return math.nan
    return EQUAL if cell.gradient == 0 else min(cell.gradient, MOST)


NOTES = """
## How to read it

Residual functions: Linear-Tanh-Linear of width 64 (RevNet: two streams of width 64), batch {batch}, PyTorch's
initialisation, loss `{loss}`. Depth counts residual functions.

- **State**: norm of the error of the first residual function's argument, as the backward pass computed it back,
  relative to the one of the forward pass. **Gradient**: the same of all parameters' and the input's gradients together,
  relative to those of `engine=Store()` on the same forward pass. `0` stands for equal bits only (`torch.equal`).
- momentumnet is compared with itself: its `use_backprop=True`, with the same parameters. Its memory mode also rounds
  gamma and the velocity in the forward pass, which is in its gradient error at any depth.
- `not finite`: the number is infinite or not a number, and nobody was told. `refused`: Reversa raised an error
  instead of giving a gradient; in float, because a recovered state was not finite.
- `anchors=None` is with `accept_drift=True`; without it Reversa refuses before the first step where its drift law
  passes 1e-2. Warnings are silenced here.
- The last table starts from a state with a velocity that is not zero, and compares all bits of both streams.
"""


def main() -> None:
    quick, depths, batch = report.depths_and_batch(__doc__, FULL, QUICK, batch=16)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", DriftWarning)
    warnings.simplefilter("ignore", FutureWarning)  # of the packages: names that PyTorch gives up
    results = run(depths, batch)
    made = tables(results, depths, batch)
    notes = NOTES.format(batch=batch, loss="(y**2).mean()")
    question = "How wrong are recovered states and gradients, by depth?"
    report.finish("drift", question, made, notes, ["momentumnet"], None if quick else partial(draw, results, depths))


if __name__ == "__main__":
    main()

"""What does an exact Momentum chain hold, by depth? Live bytes, and the spilled bits beside the theory.

``python benchmarks/exact_memory.py`` takes two minutes, ``--quick`` less. It draws docs/images/exact_memory.png.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

import report
import reversa
from reversa.engine import Engine
from reversa.errors import ReversaError, import_extra
from reversa.exact import Arithmetic, FixedPoint
from reversa.memory import LiveBytes
from step import parameters
from workloads import memory_workload

GAMMAS = (0.9, 0.5, 0.95, 0.99)
FULL, QUICK = (8, 32, 128, 512), (8, 128)
MIB = 2**20


@dataclass(frozen=True)
class Way:
    """How the states come back; ``bits`` of an integer where they are integers."""

    name: str
    engine: Engine
    exact: bool | Arithmetic = False
    bits: int = 0


STORE = Way("float32, Store()", reversa.Store())
EXACT = [
    Way("exact, 64 bits", reversa.Invert(), FixedPoint(), 64),
    Way("exact, 32 bits", reversa.Invert(), FixedPoint(bits=32), 32),
]
WAYS = [*EXACT, Way("float32, Invert()", reversa.Invert()), STORE]


@dataclass(frozen=True)
class Held:
    """Bytes alive after the forward pass, their peak in a training step, spilled bits per element; or why not."""

    held: int = 0
    peak: int = 0
    spilled: float = 0.0
    elements: int = 1
    failure: str | None = None

    @property
    def bits(self) -> float:
        """Held for each element of the input."""
        return 8 * self.held / self.elements


Results = dict[tuple[float, str, int], Held]


def measure(way: Way, gamma: float, depth: int, batch: int) -> Held:
    functions, x = memory_workload("momentum", depth, batch=batch).build("momentum", "cpu")
    network = reversa.ReversibleSequence(functions, reversa.Momentum(gamma), exact=way.exact, engine=way.engine)
    try:
        with LiveBytes(exclude=[x, *parameters(functions)]) as counted:
            y = network(x)
            held = counted.live
            loss = y.square().mean()
            del y
            loss.backward()
        spilled = spilled_bits(network, x.detach()) if way.bits else 0.0
    except ReversaError as error:
        return Held(failure=f"refused: {type(error).__name__}")
    return Held(held, counted.peak, spilled, x.numel())


@torch.no_grad()
def spilled_bits(network: reversa.ReversibleSequence, x: torch.Tensor) -> float:
    """Bits per element of the words that ``forward_state`` returns behind the streams and their integers."""
    state = network.forward_state((x, torch.zeros_like(x)))
    words = [part for part in state if part.dtype == torch.uint8]
    return sum(8 * word.nbytes for word in words) / x.numel()


def theory(gamma: float, depth: float) -> float:
    """Bits per element that the multiplications by gamma take away."""
    return -depth * math.log2(gamma)


def state_bits(way: Way) -> int:
    """Two integers, and the output in float32."""
    return 2 * way.bits + 32


# ------------------------------------------------------------------ tables


def name(gamma: float, way: Way) -> str:
    return f"gamma = {gamma}, {way.name}"


def size_table(title: str, what: str, results: Results, depths: Sequence[int]) -> report.Table:
    rows: list[Sequence[str]] = []
    for gamma in GAMMAS:
        for way in WAYS if gamma == GAMMAS[-1] else WAYS[:-1]:  # what is stored does not depend on gamma
            cells = [results[gamma, way.name, depth] for depth in depths]
            label = name(gamma, way) if way is not STORE else f"any gamma, {way.name}"
            rows.append((label, *(cell.failure or f"{getattr(cell, what) / MIB:.3f}" for cell in cells)))
        rows.append(())
    return report.Table(title, ("MiB at depth", *map(str, depths)), rows[:-1])


def spilled_table(results: Results, depths: Sequence[int]) -> report.Table:
    rows: list[Sequence[str]] = []
    for gamma in GAMMAS:
        rows.append((f"gamma = {gamma}, theory", *(f"{theory(gamma, depth):.2f}" for depth in depths)))
        for way in EXACT:
            cells = [results[gamma, way.name, depth] for depth in depths]
            beside = [
                cell.failure or against(cell.spilled, theory(gamma, depth))
                for cell, depth in zip(cells, depths, strict=True)
            ]
            rows.append((name(gamma, way), *beside))
        rows.append(())
    return report.Table(
        "Spilled bits per element, beside depth * log2(1/gamma)", ("at depth", *map(str, depths)), rows[:-1]
    )


def against(spilled: float, wanted: float) -> str:
    return f"{spilled:g} ({spilled / wanted - 1:+.1%}, {(spilled - wanted) / 8:+.2f} words)"


def held_table(results: Results, depths: Sequence[int]) -> report.Table:
    """Whether the live bytes are what the state and the spilled bits make, and nothing else."""
    rows = []
    for gamma in GAMMAS:
        for way in EXACT:
            cells = [results[gamma, way.name, depth] for depth in depths]
            rest = [cell.failure or f"{cell.bits - state_bits(way) - cell.spilled:.3f}" for cell in cells]
            rows.append((name(gamma, way), *rest))
    title = "Held bits per element that are neither the last state (two integers), nor the output, nor spilled"
    return report.Table(title, ("at depth", *map(str, depths)), rows)


# ------------------------------------------------------------------ picture

COLOURS = dict(zip(GAMMAS, ("#0072B2", "#D55E00", "#009E73", "#CC79A7"), strict=True))


def draw(results: Results, depths: Sequence[int]) -> None:
    import_extra("matplotlib", "plot").use("Agg")
    plt = import_extra("matplotlib.pyplot", "plot")
    with plt.rc_context({"font.size": 10.5, "axes.spines.top": False, "axes.spines.right": False}):
        figure, panels = plt.subplots(1, 2, figsize=(9.6, 4.6), dpi=160, layout="constrained", sharey=True)
        for axes, way in zip(panels, EXACT, strict=True):
            panel(axes, way, results, depths)
        panels[0].set_ylabel("bits held per element of the input")
        figure.suptitle("Held after the forward pass by an exact Momentum chain", x=0.01, ha="left", fontsize=12)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower left", ncols=3, frameon=False)
        report.IMAGES.mkdir(parents=True, exist_ok=True)
        figure.savefig(report.IMAGES / "exact_memory.png")


def panel(axes, way: Way, results: Results, depths: Sequence[int]) -> None:
    axes.set_title(f"{way.name}: {state_bits(way)} for state and output", loc="left", fontsize=10.5)
    lengths = [2 ** (k / 8) for k in range(round(8 * math.log2(depths[0])), round(8 * math.log2(depths[-1])) + 1)]
    for gamma, colour in COLOURS.items():
        wanted = [state_bits(way) + theory(gamma, length) for length in lengths]
        axes.plot(lengths, wanted, color=colour, linewidth=1.3, zorder=1)
        cells = [(depth, results[gamma, way.name, depth]) for depth in depths]
        points = [(depth, cell.bits) for depth, cell in cells if not cell.failure]
        axes.plot(*zip(*points, strict=True), "o", color=colour, markersize=5, label=f"gamma = {gamma}, measured")
    stored = [results[GAMMAS[0], STORE.name, depth].bits for depth in depths]
    axes.plot(depths, stored, "s--", color="#777777", markersize=4, linewidth=1, label="float32, activations stored")
    axes.plot([], [], color="black", linewidth=1.3, label="theory: depth * log2(1/gamma) more")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(depths, [str(depth) for depth in depths])
    ticks = [2**k for k in range(6, 17) if 2**k <= 2 * max(stored)]
    axes.set_yticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.grid(axis="y", color="#dddddd", linewidth=0.7)
    axes.set_xlabel("residual functions")


NOTES = """
## How to read it

Residual functions: Linear-Tanh-Linear of width {width}, batch {batch}: a float32 state has {elements} elements,
{mib:g} MiB. Live bytes are those of `reversa.memory.LiveBytes`, parameters and accumulated gradients aside. Held: after
the forward pass, the output included. Peak: in a training step with loss `(y**2).mean()`.

- The theory: each multiplication by gamma takes log2(1/gamma) bits from every element. They are spilled in words of
  8 bits, so up to a word less than the theory is spilled: the rest is still inside the integers.
- The last table is what is held beside the two integers of each element, the output and the spilled words: one number
  for each step, which says where a value was not finite.
- Float `Invert()` keeps a state every so many steps (anchors), because float32 would drift; exact arithmetic needs
  none.
"""


def run(depths: Sequence[int], batch: int) -> Results:
    results: Results = {}
    for gamma in GAMMAS:
        print(f"gamma = {gamma} ...", flush=True)
        for way in WAYS:
            known = GAMMAS[0] if way is STORE else gamma
            for depth in depths:
                again = results.get((known, way.name, depth))
                results[gamma, way.name, depth] = again or measure(way, gamma, depth, batch)
    return results


def main() -> None:
    quick, depths, batch = report.depths_and_batch(__doc__, FULL, QUICK, batch=4096)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", reversa.errors.DriftWarning)
    results = run(depths, batch)
    made = [
        spilled_table(results, depths),
        size_table("Held after the forward pass", "held", results, depths),
        size_table("Peak of a training step", "peak", results, depths),
        held_table(results, depths),
    ]
    work = memory_workload("momentum", 1, batch=batch)
    elements = batch * work.width
    notes = NOTES.format(width=work.width, batch=batch, elements=elements, mib=4 * elements / MIB)
    question = "What does an exact Momentum chain hold, by depth?"
    report.finish("exact_memory", question, made, notes, (), None if quick else partial(draw, results, depths))


if __name__ == "__main__":
    main()

"""What does a training step cost, in time and in memory? Reversa, PyTorch's checkpoint, and the published packages.

``python benchmarks/step.py`` takes ten minutes, ``--quick`` a minute or two.
"""

from __future__ import annotations

import argparse
import copy
import gc
import random
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import report
from contestants import CONTESTANTS, Contestant, Network
from reversa.errors import MissingExtra
from reversa.memory import LiveBytes
from workloads import QUICK, TIMED, Workload, memory_workload

SCHEMES = ("momentum", "revnet")
DEPTHS = (8, 32)
SQUARE, MEAN = "(y**2).mean()", "y.mean()"
LOSSES: dict[str, Callable[[Tensor], Tensor]] = {SQUARE: lambda y: (y**2).mean(), MEAN: lambda y: y.mean()}


@dataclass
class Row:
    """What was measured of one contestant with one scheme: text of a cell, by column."""

    contestant: str
    scheme: str
    ratios: dict[str, list[float]] = field(default_factory=dict)
    memory: dict[tuple[str, int], tuple[float, float]] = field(default_factory=dict)  # peak, held
    error: float = 0.0
    failure: str | None = None


def train(network: Network, x: Tensor, leaves: Sequence[Tensor], loss: Callable[[Tensor], Tensor]) -> None:
    for leaf in leaves:
        leaf.grad = None
    loss(network(x)).backward()


def gradient(network: Network, x: Tensor, leaves: Sequence[Tensor]) -> Tensor:
    train(network, x, leaves, LOSSES[SQUARE])
    return torch.cat([torch.zeros(0) if leaf.grad is None else leaf.grad.detach().flatten().cpu() for leaf in leaves])


def clock(device: str) -> float:
    """Seconds: of this process's CPU time, which other processes do not disturb, or of a synchronized device."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def timed(device: str, function: Callable[[], object], repeat: int) -> float:
    gc.collect()
    start = clock(device)
    for _ in range(repeat):
        function()
    return clock(device) - start


def describe(error: Exception) -> str:
    return "not installed" if isinstance(error, MissingExtra) else f"fails: {type(error).__name__}"


def parameters(functions: Sequence[nn.Module]) -> list[Tensor]:
    return [p for f in functions for p in f.parameters()]


# ------------------------------------------------------------------ time


def time_workload(name: str, work: Workload, rows: dict[tuple[str, str], Row], scheme: str, args) -> None:
    """Rounds in which everybody makes a step in turn; each time is divided by plain's of the same round."""
    functions, x = work.build(scheme, args.device)
    leaves = [x, *parameters(functions)]
    wide, wide_x = copy.deepcopy(functions), x.detach().double().requires_grad_()
    wide_leaves = [wide_x, *parameters([f.double() for f in wide])]
    stream = torch.randn([work.width if size is None else size for size in work.shape], device=args.device)
    runs: dict[str, Callable[[], object]] = {}
    want: Tensor | None = None
    for contestant in CONTESTANTS:
        row = rows.get((contestant.name, scheme))
        if row is None or row.failure == "not installed":
            continue
        try:
            got = gradient(contestant.build(scheme, wide, work.dim), wide_x, wide_leaves)
            network = contestant.build(scheme, functions, work.dim)
            train(network, x, leaves, LOSSES[MEAN])
        except Exception as error:
            row.failure = describe(error)
            continue
        want = got if want is None else want  # plain comes first
        row.error = max(row.error, float((got - want).norm() / want.norm()))
        runs[contestant.name] = lambda network=network: train(network, x, leaves, LOSSES[MEAN])
    runs["floor"] = lambda: evaluate(functions, stream)
    for number in range(args.rounds):
        names = random.Random(number).sample(list(runs), len(runs))  # nobody always follows the same other
        seconds = {name: timed(args.device, runs[name], work.repeat) for name in names}
        for contestant, value in seconds.items():
            ratio = value / seconds["plain"]
            rows[contestant, scheme].ratios.setdefault(name, []).append(1 + ratio if contestant == "floor" else ratio)


@torch.no_grad()
def evaluate(functions: Sequence[nn.Module], x: Tensor) -> None:
    """One more evaluation of every residual function: the least that a reversible step must add to plain."""
    for f in functions:
        f(x)


# ------------------------------------------------------------------ memory


def measure_memory(contestant: Contestant, row: Row, args) -> None:
    """Peak and held after the forward pass, in tensors of the input's size, parameters and gradients aside."""
    for depth in DEPTHS:
        for loss_name, loss in LOSSES.items():
            work = memory_workload(row.scheme, depth, batch=args.memory_batch)
            functions, x = work.build(row.scheme, args.device)
            leaves = [x, *parameters(functions)]
            network = contestant.build(row.scheme, functions, work.dim)
            train(network, x, leaves, loss)
            for leaf in leaves:
                leaf.grad = None
            unit = x.numel() * x.element_size()
            with LiveBytes(exclude=leaves, device=args.device) as counted:
                y = network(x)
                held = counted.live
                result = loss(y)
                del y
                result.backward()
            row.memory[loss_name, depth] = counted.peak / unit, held / unit


# ------------------------------------------------------------------ the table


def cells(row: Row, workloads: Sequence[str]) -> list[str]:
    times = []
    for name in workloads:
        ratios = row.ratios.get(name)
        times.append(row.failure or "-" if not ratios else f"{statistics.median(ratios):.3f} ±{spread(ratios):.2f}")
    error = "" if row.contestant == "floor" or not row.ratios else f"{row.error:.0e}"
    return [row.contestant, *times, error, arrow(row, SQUARE, 0), arrow(row, MEAN, 0), arrow(row, MEAN, 1)]


def arrow(row: Row, loss: str, which: int) -> str:
    if row.contestant == "floor":
        return ""
    if not row.memory:
        return row.failure or "-"
    return " → ".join(f"{row.memory[loss, depth][which]:.2f}" for depth in DEPTHS)


def spread(values: Sequence[float]) -> float:
    """Half the distance between the quartiles."""
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / 2


def table(rows: dict[tuple[str, str], Row], workloads: Sequence[str], scheme: str) -> report.Table:
    depths = " → ".join(map(str, DEPTHS))
    columns = [
        scheme,
        *(f"{name}, x plain" for name in workloads),
        "gradient error",
        f"peak {SQUARE}, {depths}",
        f"peak {MEAN}",
        "held after forward",
    ]
    title = {"momentum": "Momentum(gamma=0.95)", "revnet": "RevNet"}[scheme]
    return report.Table(title, columns, [cells(row, workloads) for row in rows.values() if row.scheme == scheme])


def verdicts(rows: dict[tuple[str, str], Row], workloads: Sequence[str]) -> str:
    """The targets, beside what was measured."""
    lines = []
    for scheme in {scheme: None for _, scheme in rows}:
        median = {
            (row.contestant, name): statistics.median(row.ratios[name])
            for row in rows.values()
            if row.scheme == scheme
            for name in workloads
            if name in row.ratios
        }
        peers = [c.name for c in CONTESTANTS if c.package and scheme in c.schemes]
        for name in workloads:
            ours, keep = median["Reversa Invert()", name], median["Reversa Invert(keep=1)", name]
            floor = median["floor", name]
            fastest = min(((median[peer, name], peer) for peer in peers if (peer, name) in median), default=None)
            beside = f"fastest peer {fastest[1]} {fastest[0]:.3f}" if fastest else "no peer is installed"
            lines.append(
                f"- {scheme}, {name}: Invert() {ours:.3f} ({ours / floor - 1:+.1%} over the floor), "
                f"Invert(keep=1) {keep:.3f} ({keep / floor - 1:+.1%}), floor {floor:.3f}, {beside}"
            )
        for loss in LOSSES:
            peaks = {
                name: row.memory[loss, DEPTHS[-1]][0] for (name, s), row in rows.items() if s == scheme and row.memory
            }
            lean = min(((peaks[peer], peer) for peer in peers if peer in peaks), default=None)
            beside = f"leanest peer {lean[1]} {lean[0]:.2f}" if lean else "no peer is installed"
            lines.append(f"- {scheme}, peak with {loss}: Invert() {peaks['Reversa Invert()']:.2f} tensors, {beside}")
    return "\n".join(lines)


NOTES = """
## How to read it

Time: one forward and backward pass divided by plain backpropagation's in the same round, median over {rounds}
interleaved rounds, ± half the distance between the quartiles. `floor` is 1 + (every residual function once more without
a graph) / plain: what computing the states back must cost. Timed is CPU time where the device is the CPU.

Gradient error: norm of the difference to plain's gradients over all parameters and the input, relative, in float64, the
largest of the workloads; momentumnet rounds gamma to 16 bits and the velocity to float32.

Memory: live bytes of tensors in units of the network's input, parameters and accumulated gradients aside, on
Linear-Tanh-Linear functions (RevNet: two streams of half the width), at depth {depths}. `held` is what is alive
when the forward pass has ended, the output included. On the CPU, Offload() keeps its tensors in the memory that is
counted. Peers are used with their default settings: their dropout, BatchNorm statistics and autocast are not what
plain training gives, which costs them nothing here.
"""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller networks and fewer rounds: a minute")
    parser.add_argument("--workloads", nargs="+", choices=sorted(TIMED), default=list(TIMED))
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=list(SCHEMES))
    parser.add_argument("--rounds", type=int, help="default: 11, with --quick 5")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    args.rounds = args.rounds or (5 if args.quick else 11)
    args.memory_batch = 4096 if args.quick else 16384
    return args


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    for category in (DeprecationWarning, FutureWarning, UserWarning):  # of the packages: names that PyTorch gives up
        warnings.simplefilter("ignore", category)
    rows = {("floor", scheme): Row("floor", scheme) for scheme in args.schemes}
    for scheme in args.schemes:
        for contestant in CONTESTANTS:
            if scheme not in contestant.schemes:
                continue
            row = rows[contestant.name, scheme] = Row(contestant.name, scheme)
            try:
                measure_memory(contestant, row, args)
            except Exception as error:
                row.failure = describe(error)
    for scheme in args.schemes:
        for name in args.workloads:
            print(f"timing {scheme}, {name} ...", flush=True)
            time_workload(name, (QUICK if args.quick else TIMED)[name], rows, scheme, args)
    tables = [table(rows, args.workloads, scheme) for scheme in args.schemes]
    for one in tables:
        one.show()
    verdict = verdicts(rows, args.workloads)
    print(verdict, flush=True)
    notes = f"## Beside the targets\n\n{verdict}\n" + NOTES.format(
        rounds=args.rounds, depths=" and ".join(map(str, DEPTHS))
    )
    packages = [contestant.package for contestant in CONTESTANTS if contestant.package]
    name = "step_quick" if args.quick else "step"
    report.write(name, "What does a training step cost?", args.device, tables, notes, packages)


if __name__ == "__main__":
    main()

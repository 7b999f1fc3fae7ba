"""What does exact arithmetic cost in time? Exact chains beside the float chain, plain backpropagation and momentumnet.

``python benchmarks/exact_time.py`` takes a few minutes, ``--quick`` half a minute.
"""

from __future__ import annotations

import argparse
import random
import statistics
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import report
import reversa
from reversa.errors import import_extra
from reversa.exact import FixedPoint
from step import LOSSES, MEAN, Network, describe, parameters, spread, timed, train
from workloads import QUICK, TIMED

GAMMA = 0.9
PLAIN, FLOAT = "plain", "float Invert()"
TARGETS = {"exact int64, eager": 0.12, "exact int64, compiled": 0.08}


def plain(functions: Sequence[nn.Module]) -> Network:
    def run(x: Tensor) -> Tensor:
        v = torch.zeros_like(x)
        for f in functions:
            v = GAMMA * v + (1 - GAMMA) * f(x)
            x = x + v
        return x

    return run


def chain(exact: object) -> Callable[[Sequence[nn.Module]], Network]:
    return lambda functions: reversa.ReversibleSequence(functions, reversa.Momentum(GAMMA), exact=exact)


def ratio(functions: Sequence[nn.Module]) -> Network:
    """The documents' arithmetic: multiplication by 9/10 with a buffer of the remainders."""
    return chain(reversa.exact.Ratio(9, 10))(functions)


def momentumnet(functions: Sequence[nn.Module]) -> Network:
    package = import_extra("momentumnet", "bench")
    return package.MomentumNet(list(functions), gamma=GAMMA, use_backprop=False)


CONTESTANTS: dict[str, Callable[[Sequence[nn.Module]], Network]] = {
    PLAIN: plain,
    FLOAT: chain(False),
    "exact int64, eager": chain(FixedPoint()),
    "exact int64, compiled": chain(FixedPoint(compile=True)),
    "exact int32, eager": chain(FixedPoint(bits=32)),
    "exact int32, compiled": chain(FixedPoint(bits=32, compile=True)),
    "momentumnet, memory mode": momentumnet,
}
if hasattr(reversa.exact, "Ratio"):
    CONTESTANTS["exact ratio 9/10"] = ratio

Times = dict[tuple[str, str], list[float]]
"""Seconds of each round, by contestant and workload."""


def time_workload(name: str, times: Times, failures: dict[str, str], args: argparse.Namespace) -> None:
    """Rounds in which everybody makes the same training step in turn."""
    work = (QUICK if args.quick else TIMED)[name]
    functions, x = work.build("momentum", args.device)
    leaves = [x, *parameters(functions)]
    runs: dict[str, Callable[[], object]] = {}
    for contestant, build in CONTESTANTS.items():
        try:
            network = build(functions)
            train(network, x, leaves, LOSSES[MEAN])  # compiles, where something is compiled
            train(network, x, leaves, LOSSES[MEAN])
        except Exception as error:
            failures[contestant] = describe(error)
            continue
        runs[contestant] = lambda network=network: train(network, x, leaves, LOSSES[MEAN])
    for number in range(args.rounds):
        for contestant in random.Random(number).sample(list(runs), len(runs)):
            seconds = timed(args.device, runs[contestant], args.repeat * work.repeat)
            times.setdefault((contestant, name), []).append(seconds)


def quotients(times: Times, contestant: str, base: str, name: str) -> list[float]:
    """Time of one contestant divided by another's in the same round."""
    return [a / b for a, b in zip(times[contestant, name], times[base, name], strict=True)]


def table(times: Times, failures: dict[str, str], workloads: Sequence[str]) -> report.Table:
    columns = [f"Momentum(gamma={GAMMA})"]
    columns += [f"{name}, x {base}" for name in workloads for base in (PLAIN, FLOAT)]
    rows = []
    for contestant in CONTESTANTS:
        cells = [contestant]
        for name in workloads:
            if (contestant, name) not in times:
                cells += [failures.get(contestant, "-")] * 2
                continue
            both = [quotients(times, contestant, base, name) for base in (PLAIN, FLOAT)]
            cells += [f"{statistics.median(q):.3f} ±{spread(q):.2f}" for q in both]
        rows.append(cells)
    return report.Table("A training step", columns, rows)


def verdicts(times: Times, workloads: Sequence[str]) -> str:
    lines = []
    for contestant, most in TARGETS.items():
        for name in workloads:
            over = statistics.median(quotients(times, contestant, FLOAT, name)) - 1
            lines.append(f"- {contestant}, {name}: {over:+.1%} over {FLOAT}; at most {most:+.0%} is wanted")
    return "\n".join(lines)


NOTES = """
## Beside the targets

{verdicts}

## How to read it

Time of one forward and backward pass, divided by that of plain backpropagation and by that of the float chain of the
same round; median over {rounds} interleaved rounds, ± half the distance between the quartiles. Timed is CPU time where
the device is the CPU. `compiled` is `FixedPoint(compile=True)`: the elementwise arithmetic of a step is one kernel
forwards and two backwards; the residual functions are eager in all rows. The float chain is right at these
depths; what exact arithmetic is for are depths where it is not.
"""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller networks and fewer rounds")
    parser.add_argument("--workloads", nargs="+", choices=sorted(TIMED), default=["conv", "mlp"])
    parser.add_argument("--rounds", type=int, help="default: 15, with --quick 5")
    parser.add_argument("--repeat", type=int, default=1, help="training steps in one timed run")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    args.rounds = args.rounds or (5 if args.quick else 15)
    return args


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore", FutureWarning)  # of the packages: names that PyTorch gives up
    times: Times = {}
    failures: dict[str, str] = {}
    for name in args.workloads:
        print(f"timing {name} ...", flush=True)
        time_workload(name, times, failures, args)
    one = table(times, failures, args.workloads)
    one.show()
    verdict = verdicts(times, args.workloads)
    print(verdict, flush=True)
    name = "exact_time_quick" if args.quick else "exact_time"
    notes = NOTES.format(verdicts=verdict, rounds=args.rounds)
    report.write(name, "What does exact arithmetic cost in time?", args.device, [one], notes, ["momentumnet"])


if __name__ == "__main__":
    main()

"""``reversa plan``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from torch import nn

from reversa.cli.fits import fitting, largest_planned
from reversa.cli.flags import OPTIMIZERS, SPEC, add_scheme_flags, add_step_flags, job_of
from reversa.cli.job import Job, explained
from reversa.cli.recipe import recipe
from reversa.cli.speeds import SPEEDS, speed_named
from reversa.cli.tables import Result
from reversa.cli.ways import Asked, is_converted, way_planned
from reversa.errors import BudgetError, ConversionError, SettingError
from reversa.memory import Plan, Speed, curve
from reversa.memory.budget import bytes_of
from reversa.memory.costs import POLICIES
from reversa.memory.pictures import draw_curve, picture_files
from reversa.words import aligned, in_bytes

SIZES = "batch", "side", "length"
POINTS = 12
"""Budgets of a curve where none are given."""


@dataclass(frozen=True)
class Task:
    """What is planned for, and from what the plan is chosen."""

    job: Job
    asked: Asked | None
    model: nn.Module
    allow: list[str] | None
    speed: Speed

    def plans(self, budgets: Iterable[str | float]) -> list[Plan | BudgetError]:
        """One for each budget, or why there is none."""
        with explained(self.job):
            inputs = self.job.network.takes(self.model, self.job.shape)
            return curve(self.model, inputs, budgets, self.allow, speed=self.speed, **self.job.step)

    def program(self, budget: str) -> str:
        """The same plan in Python."""
        return recipe(self.job, self.asked, self.model, budget, self.allow, self.speed)


def run(arguments: Sequence[str]) -> int:
    """Print, and draw, how to train a network within a memory budget."""
    settings = _parser().parse_args(arguments)
    _check(settings)
    job = _with_batch(job_of(settings.spec, settings), settings.batch)
    as_it_is = settings.as_it_is or (job.network.reversible and job.asked == Asked())
    asked = None if as_it_is else job.asked
    model = _made(job, asked)
    allow = None if settings.allow is None else [name.strip() for name in settings.allow.split(",")]
    if settings.largest:
        original = _made(job, None) if is_converted(job.network, asked) else None
        result = fitting(job, model, original, settings.largest, settings.budget, allow)
    else:
        if settings.batch == "max":
            job = _with_batch(job, str(largest_planned(job, model, "batch", settings.budget, allow)))
        task = Task(job, asked, model, allow, speed_named(settings.speed, job.network.device))
        result = _planned(task, settings)
    print(json.dumps(result.data or result.rows, indent=2) if settings.json else result.text)
    return 0


def _check(settings: argparse.Namespace) -> None:
    for budget in [settings.budget, *_budgets(settings)]:
        bytes_of(budget)
    if settings.as_it_is and (settings.exact or (settings.scheme, settings.gamma, settings.h) != (None,) * 3):
        raise SettingError("--as-it-is converts nothing: leave out --scheme, --gamma, --h and --exact, or --as-it-is")
    if settings.budgets and not settings.curve:
        raise SettingError("--budgets are those of a curve: add --curve FILE")
    if settings.largest and (settings.curve or settings.batch == "max"):
        raise SettingError("--largest looks for a size and prints it: leave out --curve and --batch max, or --largest")


def _budgets(settings: argparse.Namespace) -> list[str]:
    return settings.budgets.split(",") if settings.budgets else []


def _with_batch(job: Job, batch: str | None) -> Job:
    if batch is None or batch == "max":
        return job
    if not (batch.isascii() and batch.isdigit() and int(batch) > 0):
        raise SettingError(f"--batch takes a whole number above 0, or max for the largest that fits, got {batch!r}")
    return replace(job, shape=(int(batch), *job.shape[1:]))


def _made(job: Job, asked: Asked | None) -> nn.Module:
    """The network as it is planned for.

    Raises:
        SettingError: it cannot be made so.
    """
    spec = job.network.spec
    try:
        with explained(job):
            return way_planned(job.network, asked)(job.shape)
    except ConversionError as error:
        raise SettingError(
            f"{spec} cannot be made reversible: {error}\n`reversa plan {spec} --as-it-is` plans for the network as it "
            "is, with blocks that store or recompute."
        ) from error


def _planned(task: Task, settings: argparse.Namespace) -> Result:
    (found,) = task.plans([settings.budget])
    if isinstance(found, BudgetError):
        raise BudgetError(f"{found} `--batch max` takes the largest batch that fits.", found.least_bytes)
    program = task.program(settings.budget)
    data, parts = found.to_dict() | {"python": program}, [str(found)]
    if settings.curve:
        plans = task.plans(_budgets(settings) or _between(found))
        fitting = [plan for plan in plans if isinstance(plan, Plan)]
        draw_curve(fitting, settings.curve)
        print("\n".join(f"Wrote {file}" for file in picture_files(settings.curve)), file=sys.stderr)
        parts.append(_table(fitting))
        names = ("budget", "peak_bytes", "seconds")
        data["curve"] = [{name: getattr(plan, name) for name in names} for plan in fitting]
    parts += [f"Other ways to train it:\n\n{_memory_command(task.job)}", f"To apply this plan:\n\n{program}"]
    return Result("\n\n".join(parts), [], data)


def _between(found: Plan) -> list[int]:
    """Budgets from the least to the most that a plan makes use of."""
    least, most = found.least_bytes, max(found.least_bytes, found.ways[0].peak_bytes)
    return [least + (most - least) * i // (POINTS - 1) for i in range(POINTS)]


def _table(plans: Iterable[Plan]) -> str:
    rows = [
        (
            in_bytes(plan.budget),
            in_bytes(plan.peak_bytes),
            f"{plan.seconds:.3g} s",
            f"{plan.seconds / plan.ways[0].seconds - 1:+.1%}",
        )
        for plan in plans
    ]
    return "\n".join(aligned([("budget", "peak", "time", "over all stored"), *rows]))


def _memory_command(job: Job) -> str:
    shape = "x".join(map(str, job.shape))
    flags = [f"--input {shape}"]
    flags += [f"--optimizer {name}" for name, kind in OPTIMIZERS.items() if kind is job.step["optimizer"]]
    flags += [f"--precision {job.step['precision']}"] * (job.step["precision"] is not None)
    flags += [f"--device {job.network.device}"] * (job.network.device is not None)
    return f"reversa memory {job.network.spec} {' '.join(flags)} --compare"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="reversa plan",
        description="The way to train a network that is predicted to take the least time within a memory budget: which "
        "blocks store, recompute, invert or offload. Nothing is computed, made or downloaded. The scheme's flags make "
        "a network reversible first.",
    )
    parser.add_argument("spec", metavar="SPEC", help=SPEC)
    parser.add_argument("--budget", required=True, metavar="16GiB", help="bytes that a training step may take at most")
    parser.add_argument("--batch", metavar="64", help="instead of the batch of --input; max: the largest that fits")
    add_step_flags(parser)
    reversible = add_scheme_flags(parser)
    reversible.add_argument("--as-it-is", action="store_true", help="plan for the network without converting it")
    choice = parser.add_argument_group("to choose from")
    choice.add_argument(
        "--allow",
        metavar="store,invert",
        help=f"of {', '.join(POLICIES)}, exact (default: all that apply but exact)",
    )
    choice.add_argument("--speed", metavar="NAME", help=_speed_help())
    what = parser.add_argument_group("what to print, and to draw")
    what.add_argument("--largest", choices=SIZES, help="the largest that fits, instead of a plan")
    what.add_argument("--curve", metavar="FILE", help="draw time against budget: .png, .svg, .pdf; without ending, two")
    what.add_argument("--budgets", metavar="4GiB,6GiB", help=f"of the curve (default: {POINTS}, from the least)")
    what.add_argument("--json", action="store_true", help="print for a program")
    return parser


def _speed_help() -> str:
    names = "; ".join(
        f"{name} ({speed.flops:g},{speed.flops_16:g},{speed.bandwidth:g},{speed.host:g})"
        for name, speed in SPEEDS.items()
    )
    return (
        "of the device that will train: FLOPS,FLOPS16,BANDWIDTH,HOST, what it does in a second, or a name with the "
        f"numbers of its data sheet: {names} (default: this machine, measured)"
    )

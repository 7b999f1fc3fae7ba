"""``reversa memory``."""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from reversa.cli.job import AXES, Job, explained, shape_of, sized, times, whole_numbers
from reversa.cli.specs import network_named
from reversa.cli.ways import Asked, every_way, pair, way_asked
from reversa.errors import SettingError
from reversa.memory import MemoryReport, estimate, measure
from reversa.memory.fake import NEEDS_NUMBERS
from reversa.memory.pictures import draw_bars, draw_peaks, draw_timelines
from reversa.memory.report import aligned, in_bytes
from reversa.memory.settings import PRECISIONS
from reversa.memory.sweep import sweep
from reversa.memory.timeline import timeline
from reversa.schemes import SCHEMES
from reversa.train.config import ENGINES

OPTIMIZERS = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW, "none": None}
Row = dict[str, Any]


@dataclass(frozen=True)
class Result:
    """What a command has found: for people, as rows, and for programs where rows are not enough."""

    text: str
    rows: list[Row]
    data: Any = None


def run(arguments: Sequence[str]) -> int:
    """Print, and draw, what a training step of a network costs in memory."""
    settings = _parser().parse_args(arguments)
    if settings.out and not settings.against:
        raise SettingError("--out draws the peak against something: add --against batch, side or depth, and --values")
    if settings.values and not settings.against:
        raise SettingError("--values are sizes of something: add --against batch, side or depth")
    asked = Asked(settings.scheme, settings.gamma, settings.h, settings.exact, settings.engine)
    network = network_named(settings.spec)
    step = {"optimizer": OPTIMIZERS[settings.optimizer], "precision": settings.precision}
    job = Job(network, asked, shape_of(settings.input, network), step)
    with explained(job, settings.measure):
        result = _against(job, settings) if settings.against else _one_size(job, settings)
        _draw(job, settings)
    _print(result, settings)
    return 0


def _one_size(job: Job, settings: argparse.Namespace) -> Result:
    if settings.measure:
        return _measured(job)
    if settings.compare:
        return _compared(job)
    report = estimate(*job.made(way_asked(job.network, job.asked)), **job.step)
    rows = [
        {"kind": kind, "after_forward_bytes": held, "peak_bytes": report.peak.kinds[kind]}
        for kind, held in report.after_forward.kinds.items()
    ]
    return Result(str(report), rows, report.to_dict())


def _measured(job: Job) -> Result:
    model, inputs = job.made(way_asked(job.network, job.asked), real=True)
    measured = measure(model, inputs, **job.step)
    try:
        estimated = estimate(model, inputs, **job.step)
    except SettingError as error:
        if not isinstance(error.__cause__, NEEDS_NUMBERS):
            raise
        text = f"{measured}\n\nNo estimate beside it: {job.network.spec} needs the numbers in its tensors."
        return Result(text, [_figures(measured)], {"estimated": None, "measured": measured.to_dict()})
    rows = [
        {"what": what, "estimated": expected, "measured": found, "ratio": expected / found}
        for (what, expected), found in zip(_figures(estimated).items(), _figures(measured).values(), strict=True)
        if what.endswith("bytes")
    ]
    words = ("at the peak", "held after the forward pass")
    lines = [
        (word, in_bytes(row["estimated"]), in_bytes(row["measured"]), f"{row['ratio']:.4f}")
        for word, row in zip(words, rows, strict=True)
    ]
    table = aligned([("", "estimated", "measured", "estimated / measured"), *lines])
    data = {"estimated": estimated.to_dict(), "measured": measured.to_dict(), "ratios": rows}
    return Result("\n".join((str(measured), "", *table)), rows, data)


def _compared(job: Job) -> Result:
    reports = job.estimates(every_way(job.network, job.asked))
    rows = [{"way": name} | _figures(report) for name, report in reports.items()]
    return Result(_heading(job, job.shape) + _table(rows), rows)


def _against(job: Job, settings: argparse.Namespace) -> Result:
    if settings.values is None:
        raise SettingError("--against needs sizes, for instance --values 8,16,32")
    values = whole_numbers(settings.values, ",", "--values", "8,16,32")
    axis, at_size = sized(job, settings.against)
    ways = {name: partial(at_size, way) for name, way in pair(job.network, job.asked).items()}
    reports = sweep(ways, values, **job.step)
    rows = [
        {settings.against: value, "way": name} | _figures(report)
        for name, found in reports.items()
        for value, report in zip(values, found, strict=True)
    ]
    if settings.out:
        draw_peaks(values, reports, AXES[axis], settings.out)
        _say_written(settings.out)
    shape = {"batch": ("batch", *job.shape[1:]), "side": (*job.shape[:2], "side", "side")}.get(axis, job.shape)
    return Result(_heading(job, shape) + _table(rows), rows)


def _draw(job: Job, settings: argparse.Namespace) -> None:
    if settings.timeline:
        ways = pair(job.network, job.asked)
        draw_timelines({name: timeline(*job.made(way), **job.step) for name, way in ways.items()}, settings.timeline)
        _say_written(settings.timeline)
    if settings.bars:
        draw_bars(job.estimates(pair(job.network, job.asked)), settings.bars)
        _say_written(settings.bars)


def _print(result: Result, settings: argparse.Namespace) -> None:
    if settings.json:
        print(json.dumps(result.rows if result.data is None else result.data, indent=2))
    elif settings.csv:
        writer = csv.DictWriter(sys.stdout, list(result.rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(result.rows)
    else:
        print(result.text)


def _figures(report: MemoryReport) -> Row:
    return {
        "peak_bytes": report.peak_bytes,
        "held_bytes": report.held_bytes,
        "recomputed_share": report.flops.recomputed_share,
    }


def _heading(job: Job, shape: tuple[int | str, ...]) -> str:
    words = [f"{name} {getattr(value, '__name__', value)}" for name, value in job.step.items() if value is not None]
    return f"{job.network.spec}: a training step, estimated ({', '.join([f'inputs {times(shape)}', *words])})\n\n"


def _table(rows: list[Row]) -> str:
    sizes = [name for name in rows[0] if name in ("batch", "side", "depth")]
    heading = (*sizes, "peak", "held after the forward pass", "recomputed")
    cells = [
        (
            str(row["way"]),
            *(str(row[size]) for size in sizes),
            in_bytes(row["peak_bytes"]),
            in_bytes(row["held_bytes"]),
            f"{row['recomputed_share']:+.0%}" if row["recomputed_share"] else "",
        )
        for row in rows
    ]
    return "\n".join(aligned([("", *heading), *cells]))


def _say_written(path: str) -> None:
    print(f"Wrote {path}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="reversa memory",
        description="What a training step costs in memory: estimated without computing, without weights and without "
        "downloads; with --measure, run. The scheme's flags make a network reversible first.",
    )
    parser.add_argument(
        "spec",
        metavar="SPEC",
        help="a name of `reversa models` or of torchvision; torchvision:NAME, timm:NAME, hf:NAME, module:factory",
    )
    parser.add_argument("--input", metavar="8x3x224x224", help="shape of the inputs (default: the network's own)")
    parser.add_argument("--precision", choices=PRECISIONS, help="of autocast (default: none)")
    parser.add_argument(
        "--optimizer", choices=OPTIMIZERS, default="sgd", help="sgd (the default) is without momentum, so without state"
    )
    reversible = parser.add_argument_group("to make it reversible")
    reversible.add_argument("--scheme", metavar="NAME", help=f"one of {', '.join(SCHEMES)} (default: momentum)")
    reversible.add_argument("--gamma", type=float, help="weight of the old velocity (default: the scheme's own)")
    reversible.add_argument("--h", type=float, help="the step size (default: the scheme's own)")
    reversible.add_argument("--exact", action="store_true", help="exact arithmetic")
    reversible.add_argument("--engine", choices=ENGINES, help="where the backward pass gets the states")
    what = parser.add_argument_group("what to print")
    one = what.add_mutually_exclusive_group()
    one.add_argument("--measure", action="store_true", help="run the step, and print the estimate beside it")
    one.add_argument("--compare", action="store_true", help="stored, checkpointed, reversible, exact: a row each")
    one.add_argument("--against", choices=("batch", "side", "depth"), help="stored and reversible at several --values")
    what.add_argument("--values", metavar="8,16,32", help="the sizes for --against")
    forms = what.add_mutually_exclusive_group()
    forms.add_argument("--json", action="store_true", help="print for a program")
    forms.add_argument("--csv", action="store_true", help="print for a spreadsheet, in bytes")
    pictures = parser.add_argument_group("pictures (PNG, SVG, PDF by the file's ending), stored beside reversible")
    pictures.add_argument("--out", metavar="FILE", help="the peak --against something")
    pictures.add_argument("--timeline", metavar="FILE", help="the bytes alive over one training step")
    pictures.add_argument("--bars", metavar="FILE", help="where the bytes sit at the peak")
    return parser

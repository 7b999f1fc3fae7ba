"""``reversa memory``."""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Sequence

from reversa.cli.flags import SPEC, add_scheme_flags, add_step_flags, job_of
from reversa.cli.job import AXES, Job, sized, whole_numbers
from reversa.cli.tables import (
    Line,
    Result,
    compared,
    compared_against,
    estimates,
    found_of,
    lines_of,
    measured,
    report_of,
    reports_against,
)
from reversa.errors import SettingError
from reversa.memory.pictures import check_lines, draw_bars, draw_peaks, draw_timelines, picture_files
from reversa.memory.timeline import timeline
from reversa.train.config import ENGINES

SIZES = "batch", "side", "length", "depth"


def run(arguments: Sequence[str]) -> int:
    """Print, and draw, what a training step of networks costs in memory."""
    settings = _parser().parse_args(arguments)
    _check(settings)
    jobs = [job_of(spec, settings, settings.engine) for spec in dict.fromkeys(settings.specs)]
    lines = lines_of(jobs, settings.compare)
    if settings.out or settings.timeline:
        check_lines(len(lines))
    result, lines = _found(jobs, lines, settings)
    _print(result, settings)
    if settings.timeline:
        drawn = found_of(lines, lambda job, way: timeline(*job.made(way), **job.step), settings.compare)
        draw_timelines(drawn, settings.timeline)
        _say_written(settings.timeline)
    if settings.bars:
        draw_bars(estimates(lines, settings.compare), settings.bars)
        _say_written(settings.bars)
    return 0


def _check(settings: argparse.Namespace) -> None:
    sizes = f"--against {', '.join(SIZES[:-1])} or {SIZES[-1]}"
    if settings.out and not settings.against:
        raise SettingError(f"--out draws the peak against something: add {sizes}, and --values")
    if settings.values and not settings.against:
        raise SettingError(f"--values are sizes of something: add {sizes}")
    if settings.against and settings.values is None:
        raise SettingError("--against needs sizes, for instance --values 8,16,32")
    if settings.measure and (settings.compare or settings.against or len(settings.specs) > 1):
        raise SettingError("--measure runs one network in one way: give one SPEC, without --compare and --against")


def _found(jobs: list[Job], lines: list[Line], settings: argparse.Namespace) -> tuple[Result, list[Line]]:
    """What is printed, and the lines that there are."""
    if settings.measure:
        return measured(*jobs), lines
    if settings.against:
        return _against(lines, settings)
    if settings.compare or len(jobs) > 1:
        reports = estimates(lines, settings.compare)
        return compared(lines, reports), [line for line in lines if line.title in reports]
    return report_of(*jobs), lines


def _against(lines: list[Line], settings: argparse.Namespace) -> tuple[Result, list[Line]]:
    values = whole_numbers(settings.values, ",", "--values", "8,16,32")
    axes = {sized(line.job, settings.against)[0] for line in lines}
    if len(axes) > 1:
        raise SettingError(
            "some of these networks count the blocks of each stage, and some those of all stages: give them one by one"
        )
    reports = reports_against(lines, settings.against, values, settings.compare)
    if settings.out:
        draw_peaks(values, reports, AXES[axes.pop()], settings.out)
        _say_written(settings.out)
    result = compared_against(lines, settings.against, values, reports)
    return result, [line for line in lines if line.title in reports]


def _print(result: Result, settings: argparse.Namespace) -> None:
    if settings.json:
        print(json.dumps(result.rows if result.data is None else result.data, indent=2))
    elif settings.csv:
        writer = csv.DictWriter(sys.stdout, list(result.rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(result.rows)
    else:
        print(result.text)


def _say_written(path: str) -> None:
    print("\n".join(f"Wrote {file}" for file in picture_files(path)), file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="reversa memory",
        description="What a training step costs in memory: estimated without computing, without weights and without "
        "downloads; with --measure, run. The scheme's flags make a network reversible first. Several networks: a row "
        "and a line each.",
    )
    parser.add_argument("specs", nargs="+", metavar="SPEC", help=SPEC)
    add_step_flags(parser)
    reversible = add_scheme_flags(parser)
    reversible.add_argument("--engine", choices=ENGINES, help="where the backward pass gets the states")
    what = parser.add_argument_group("what to print")
    what.add_argument("--measure", action="store_true", help="run the step, and print the estimate beside it")
    what.add_argument(
        "--compare", action="store_true", help="stored, checkpointed, reversible, RevNet, exact: a row and a line each"
    )
    what.add_argument("--against", choices=SIZES, help="the peak at several --values; else stored and reversible")
    what.add_argument("--values", metavar="8,16,32", help="the sizes for --against")
    forms = what.add_mutually_exclusive_group()
    forms.add_argument("--json", action="store_true", help="print for a program")
    forms.add_argument("--csv", action="store_true", help="print for a spreadsheet, in bytes")
    pictures = parser.add_argument_group(
        "pictures (by the file's ending, .png, .svg, .pdf; without one, a PNG and an SVG), of what is compared"
    )
    pictures.add_argument("--out", metavar="FILE", help="the peak --against something")
    pictures.add_argument("--timeline", metavar="FILE", help="the bytes alive over one training step")
    pictures.add_argument("--bars", metavar="FILE", help="where the bytes sit at the peak")
    return parser

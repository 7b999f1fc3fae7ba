"""What ``reversa memory`` finds out: rows for programs, a table for people."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from reversa.cli.job import Job, explained, sized
from reversa.cli.ways import Way, every_way, name_asked, pair, way_asked
from reversa.errors import ConversionError, SettingError
from reversa.memory import MemoryReport, estimate, measure
from reversa.memory.fake import NEEDS_NUMBERS
from reversa.memory.sweep import sweep
from reversa.words import aligned, in_bytes

Row = dict[str, Any]
Found = TypeVar("Found")


@dataclass(frozen=True)
class Result:
    """What a command has found: for people, as rows, and for programs where rows are not enough."""

    text: str
    rows: list[Row]
    data: Any = None


@dataclass(frozen=True)
class Line:
    """A row of a table, and a line or a bar of a picture: a network in one way."""

    title: str
    name: str
    job: Job
    way: Way


def lines_of(jobs: Sequence[Job], compare: bool) -> list[Line]:
    """All networks in every way; else one stored and as it was asked for; or several, each as it was asked for."""
    several = len(jobs) > 1
    lines: list[Line] = []
    for job in jobs:
        if compare:
            ways = every_way(job.network, job.asked)
        elif several:
            ways = {name_asked(job.network, job.asked): way_asked(job.network, job.asked)}
        else:
            ways = pair(job.network, job.asked)
        spec = job.network.spec
        for name, way in ways.items():
            title = f"{spec}: {name}" if several and compare else spec if several else name
            lines.append(Line(title, name, job, way))
    return lines


def found_of(
    lines: Iterable[Line], find: Callable[[Job, Way], Found], compare: bool, against: str | None = None
) -> dict[str, Found]:
    """What is found out about each line, by title. Comparing, lines that cannot be made are left out, and it is told.

    Raises:
        SettingError: a line cannot be made, or, comparing, none can.
    """
    found: dict[str, Found] = {}
    left: dict[str, list[str]] = {}
    first: Exception | None = None
    for line in lines:
        try:
            with explained(line.job, against=against):
                found[line.title] = find(line.job, line.way)
        except (ConversionError, SettingError) as error:
            if not compare:
                raise
            first = first or error
            left.setdefault(str(error).partition("\n")[0].partition(". ")[0], []).append(line.title)
    if first is not None and not found:
        raise first
    for reason, titles in left.items():
        print(f"Left out: {', '.join(titles)}: {reason.rstrip('.')}.", file=sys.stderr)
    return found


def report_of(job: Job) -> Result:
    """The whole report of one network."""
    with explained(job):
        report = estimate(*job.made(way_asked(job.network, job.asked)), **job.step)
    rows = [
        {"kind": kind, "after_forward_bytes": held, "peak_bytes": report.peak.kinds[kind]}
        for kind, held in report.after_forward.kinds.items()
    ]
    return Result(str(report), rows, report.to_dict())


def measured(job: Job) -> Result:
    """The whole report of a step that is run, and the estimate beside it."""
    with explained(job, measures=True):
        model, inputs = job.made(way_asked(job.network, job.asked), real=True)
        report = measure(model, inputs, **job.step)
        try:
            estimated = estimate(model, inputs, **job.step)
        except SettingError as error:
            if not isinstance(error.__cause__, NEEDS_NUMBERS):
                raise
            text = f"{report}\n\nNo estimate beside it: {job.network.spec} needs the numbers in its tensors."
            return Result(text, [_figures(report)], {"estimated": None, "measured": report.to_dict()})
    rows = [
        {"what": what, "estimated": expected, "measured": found, "ratio": expected / found}
        for (what, expected), found in zip(_figures(estimated).items(), _figures(report).values(), strict=True)
        if what in ("peak_bytes", "held_bytes")
    ]
    words = ("at the peak", "held after the forward pass")
    lines = [
        (word, in_bytes(row["estimated"]), in_bytes(row["measured"]), f"{row['ratio']:.4f}")
        for word, row in zip(words, rows, strict=True)
    ]
    table = aligned([("", "estimated", "measured", "estimated / measured"), *lines])
    data = {"estimated": estimated.to_dict(), "measured": report.to_dict(), "ratios": rows}
    return Result("\n".join((str(report), "", *table)), rows, data)


def estimates(lines: Iterable[Line], compare: bool) -> dict[str, MemoryReport]:
    """One report for each line, by title."""
    return found_of(lines, lambda job, way: estimate(*job.made(way), **job.step), compare)


def compared(lines: Sequence[Line], reports: Mapping[str, MemoryReport]) -> Result:
    """A row for each line."""
    rows = {line.title: _names(line) | _figures(reports[line.title]) for line in lines if line.title in reports}
    return Result(_heading(lines) + _table(list(rows.items())), list(rows.values()))


def reports_against(
    lines: Sequence[Line], against: str, values: Sequence[int], compare: bool
) -> dict[str, list[MemoryReport]]:
    """By title, one report for each size."""

    def at_sizes(job: Job, way: Way) -> list[MemoryReport]:
        _, at_size = sized(job, against)
        return sweep({"": partial(at_size, way)}, values, **job.step)[""]

    return found_of(lines, at_sizes, compare, against)


def compared_against(
    lines: Sequence[Line], against: str, values: Sequence[int], reports: Mapping[str, Sequence[MemoryReport]]
) -> Result:
    """A row for each line and size."""
    rows = [
        (line.title, _names(line, against) | {against: value} | _figures(report))
        for line in lines
        for value, report in zip(values, reports.get(line.title, ()), strict=False)
    ]
    return Result(_heading(lines, against) + _table(rows, against), [row for _, row in rows])


def _names(line: Line, against: str | None = None) -> Row:
    return {"network": line.job.network.spec, "way": line.name, "inputs": line.job.inputs(against)}


def _figures(report: MemoryReport) -> Row:
    longest = max(report.stages, key=lambda stage: len(stage.blocks), default=None)
    return {
        "peak_bytes": report.peak_bytes,
        "held_bytes": report.held_bytes,
        "one_block_more_bytes": longest and longest.bytes_per_block,
        "recomputed_share": report.flops.recomputed_share,
    }


def _heading(lines: Sequence[Line], against: str | None = None) -> str:
    step = lines[0].job.step
    words = [
        f"{name} {getattr(value, '__name__', value)}"
        for name, value in (("device", lines[0].job.network.device), *step.items())
        if value is not None and name != "loss"
    ]
    shapes = _distinct(line.job.inputs(against) for line in lines)
    inputs = [f"inputs {shapes[0]}"] if len(shapes) == 1 else []
    specs = ", ".join(_distinct(line.job.network.spec for line in lines))
    return f"{specs}: a training step, estimated ({', '.join(inputs + words)})\n\n"


def _table(rows: Sequence[tuple[str, Row]], against: str | None = None) -> str:
    sizes = ["inputs"] if len(_distinct(row["inputs"] for _, row in rows)) > 1 else []
    sizes += [against] if against else []
    heading = (*sizes, "peak", "held after the forward pass", "one block more", "recomputed")
    cells = [
        (
            title,
            *(str(row[size]) for size in sizes),
            in_bytes(row["peak_bytes"]),
            in_bytes(row["held_bytes"]),
            "" if row["one_block_more_bytes"] is None else in_bytes(row["one_block_more_bytes"]),
            f"{row['recomputed_share']:+.0%}" if row["recomputed_share"] else "",
        )
        for title, row in rows
    ]
    return "\n".join(aligned([("", *heading), *cells]))


def _distinct(words: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(words))

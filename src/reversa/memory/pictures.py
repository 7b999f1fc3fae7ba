"""Pictures of what training costs in memory. Needs the extra ``plot``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from reversa.drawing import COLOURS, new_figure, saved, tidy
from reversa.errors import SettingError
from reversa.memory.planned import Plan
from reversa.memory.report import MemoryReport
from reversa.memory.timeline import Timeline

LINES = (("#0072b2", "o"), ("#e69f00", "s"), ("#009e73", "^"), ("#cc79a7", "D"), ("#d55e00", "v"), ("#56b4e9", "P"))
"""Colours that people tell apart who see no red or no green (Okabe and Ito), and marks for who sees none."""


def draw_timelines(timelines: Mapping[str, Timeline], path: str | Path) -> Any:
    """Draw the bytes alive over one training step, of several networks on the same axes.

    Args:
        timelines: of :func:`reversa.memory.timeline.timeline`, by name.
        path: the file to write, whose ending tells the format; without an ending a PNG and an SVG are written.

    Returns:
        The figure, of matplotlib.

    Raises:
        SettingError: more than six lines, which nobody can tell apart.
        OutputError: the file cannot be written.
        MissingExtra: matplotlib is not installed.

    >>> import tempfile, torch
    >>> from reversa.memory.timeline import timeline
    >>> lines = {"linear": timeline(torch.nn.Linear(8, 8), (4, 8))}
    >>> figure = draw_timelines(lines, Path(tempfile.mkdtemp()) / "timeline.png")
    """
    check_lines(len(timelines))
    size, unit = _unit(max(max(line.totals) for line in timelines.values()))
    figure = new_figure(7.2, 3.6)
    axes = figure.subplots()
    for (colour, _), (name, line) in zip(LINES, timelines.items(), strict=False):
        heights = [total / size for total in line.totals]
        axes.plot(range(1, len(heights) + 1), heights, color=colour, linewidth=1.2, label=name)
        turn = line.forward_moments
        axes.plot(turn, heights[turn - 1], "o", color=colour, markersize=6)
    axes.plot([], [], "o", color="0.4", label="end of the forward pass")
    axes.set(xlabel="operations of one training step", ylabel=f"bytes alive ({unit})", xlim=(0, None), ylim=(0, None))
    tidy(axes)
    axes.legend(frameon=False)
    return _written(figure, path)


def draw_bars(reports: Mapping[str, MemoryReport], path: str | Path) -> Any:
    """Draw where the bytes sit at the peak of a training step: one bar for each network, in the kinds of a report.

    Args:
        reports: of :func:`reversa.memory.estimate` or :func:`reversa.memory.measure`, by name.
        path: the file to write, whose ending tells the format; without an ending a PNG and an SVG are written.

    Returns:
        The figure, of matplotlib.

    Raises:
        OutputError: the file cannot be written.
        MissingExtra: matplotlib is not installed.

    >>> import tempfile, torch
    >>> from reversa.memory import estimate
    >>> figure = draw_bars({"linear": estimate(torch.nn.Linear(8, 8), (4, 8))}, Path(tempfile.mkdtemp()) / "bars.png")
    """
    size, unit = _unit(max(report.peak_bytes for report in reports.values()))
    figure = new_figure(6.4, 1.5 + 0.5 * len(reports))
    axes = figure.subplots()
    names = list(reports)
    left = [0.0] * len(names)
    for colour, kind in zip(COLOURS, reports[names[0]].peak.kinds, strict=True):
        widths = [report.peak.kinds[kind] / size for report in reports.values()]
        if any(widths):
            axes.barh(names, widths, left=left, height=0.6, color=colour, label=kind.replace("_", " "))
            left = [begun + width for begun, width in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set(xlabel=f"bytes alive at the peak ({unit})")
    tidy(axes)
    axes.grid(visible=False, axis="y")
    figure.legend(frameon=False, ncols=4, loc="outside upper center", fontsize="small")
    return _written(figure, path)


def draw_peaks(
    sizes: Sequence[int], peaks: Mapping[str, Sequence[MemoryReport]], against: str, path: str | Path
) -> Any:
    """Draw the peak of a training step against a size, of several networks on the same axes.

    Args:
        sizes: batches, image sides, numbers of blocks.
        peaks: of :func:`reversa.memory.sweep.sweep`: by name, one report for each size.
        against: what the sizes are, in words and with their unit: the horizontal axis says so.
        path: the file to write, whose ending tells the format; without an ending a PNG and an SVG are written.

    Returns:
        The figure, of matplotlib.

    Raises:
        SettingError: more than six lines, which nobody can tell apart.
        OutputError: the file cannot be written.
        MissingExtra: matplotlib is not installed.

    >>> import tempfile, torch
    >>> from reversa.memory import estimate
    >>> reports = [estimate(torch.nn.Linear(8, 8), (batch, 8)) for batch in (4, 8)]
    >>> figure = draw_peaks((4, 8), {"linear": reports}, "images in the batch", Path(tempfile.mkdtemp()) / "peaks.png")
    """
    check_lines(len(peaks))
    size, unit = _unit(max(report.peak_bytes for reports in peaks.values() for report in reports))
    figure = new_figure(6.8, 3.8)
    axes = figure.subplots()
    for number, ((colour, marker), (name, reports)) in enumerate(zip(LINES, peaks.items(), strict=False)):
        heights = [report.peak_bytes / size for report in reports]
        thinner = 1 - 0.12 * number  # where lines coincide, those below are seen around those above
        axes.plot(sizes, heights, marker=marker, color=colour, markersize=9 * thinner, lw=3 * thinner, label=name)
    axes.set(xlabel=against, ylabel=f"peak of a training step ({unit})", xlim=(0, None), ylim=(0, None))
    axes.xaxis.get_major_locator().set_params(integer=True)
    tidy(axes)
    _label_ends(axes)
    return _written(figure, path)


def draw_curve(plans: Sequence[Plan], path: str | Path) -> Any:
    """Draw the predicted time of a training step against the memory budget: of plans, and of the ways beside them.

    Args:
        plans: of :func:`reversa.memory.curve`, of one model.
        path: the file to write, whose ending tells the format; without an ending a PNG and an SVG are written.

    Returns:
        The figure, of matplotlib.

    Raises:
        SettingError: no plan.
        OutputError: the file cannot be written.
        MissingExtra: matplotlib is not installed.

    >>> import tempfile, torch
    >>> from reversa.memory import curve
    >>> found = curve(torch.nn.Linear(64, 64), (512, 64), ["1 MiB", "2 MiB"])
    >>> figure = draw_curve(found, Path(tempfile.mkdtemp()) / "curve.png")
    """
    figure = new_figure(7.2, 3.8)
    plot_curve(figure.subplots(), plans)
    figure.legend(frameon=False, ncols=3, loc="outside upper center", fontsize="small")
    return _written(figure, path)


def plot_curve(axes: Any, plans: Sequence[Plan]) -> None:
    """What :func:`draw_curve` shows, on axes of matplotlib: a way can be gone from its peak upwards.

    Raises:
        SettingError: no plan.
    """
    if not plans:
        raise SettingError("a curve needs a plan: none of the budgets is as large as the least that a step takes")
    plans = sorted(plans, key=lambda plan: plan.budget)
    least, ways = plans[0].least_bytes, plans[0].ways
    size, unit = _unit(most := max(plans[-1].budget, *(way.peak_bytes for way in ways)))
    end = (most + 0.05 * (most - least)) / size
    for (colour, marker), way in zip(LINES[1:], ways, strict=False):
        begin = way.peak_bytes / size
        axes.plot([begin, end], [way.seconds] * 2, color=colour, lw=1, ls=":")
        axes.plot(begin, way.seconds, marker, color=colour, markersize=8, label=way.name)
    budgets, seconds = [plan.budget / size for plan in plans], [plan.seconds for plan in plans]
    colour, marker = LINES[0]
    axes.plot(budgets, seconds, marker=marker, color=colour, markersize=4, lw=1.8, label="plan")
    left = least / size - 0.12 * (end - least / size)
    axes.axvspan(left, least / size, color="0.88", lw=0, label="no plan fits")
    axes.set(xlabel=f"memory budget ({unit})", ylabel="predicted time of a step (s)", xlim=(left, end))
    tidy(axes)


def check_lines(count: int) -> None:
    """Raise where a picture would have more lines than anybody can tell apart.

    Raises:
        SettingError: there are more than six.

    >>> check_lines(6)
    """
    if count > len(LINES):
        raise SettingError(
            f"a picture shows at most {len(LINES)} lines, and these are {count}: compare fewer networks, or in fewer "
            "ways"
        )


def picture_files(path: str | Path) -> list[Path]:
    """The files that are written for a path: itself, or where it has no ending a PNG and an SVG.

    >>> [str(file) for file in picture_files("peak.pdf") + picture_files("peak")]
    ['peak.pdf', 'peak.png', 'peak.svg']
    """
    path = Path(path)
    return [path] if path.suffix else [path.with_suffix(".png"), path.with_suffix(".svg")]


def _written(figure: Any, path: str | Path) -> Any:
    for file in picture_files(path):
        saved(figure, file)
    return figure


def _label_ends(axes: Any) -> None:
    """The lines' names beside their last points, in their colours."""
    lines = sorted(axes.get_lines(), key=lambda line: line.get_ydata()[-1])
    heights = apart([line.get_ydata()[-1] for line in lines], 0.065 * axes.get_ylim()[1])
    for line, height in zip(lines, heights, strict=True):
        beside = {"transform": axes.get_yaxis_transform(), "va": "center", "fontsize": "small"}
        axes.text(1.03, height, line.get_label(), color=line.get_color(), **beside)


def apart(heights: Sequence[float], step: float) -> list[float]:
    """Heights for labels, in ascending order: as near to those given as they can be, and a step apart.

    >>> apart([1.0, 1.0, 8.0], step=2.0)
    [0.0, 2.0, 8.0]
    """
    groups: list[list[float]] = []
    for height in heights:
        groups.append([height])
        while len(groups) > 1 and mean(groups[-1]) - mean(groups[-2]) < step * len(groups[-2] + groups[-1]) / 2:
            groups[-2:] = [groups[-2] + groups[-1]]
    return [mean(group) + step * (i - (len(group) - 1) / 2) for group in groups for i in range(len(group))]


def _unit(most: int) -> tuple[int, str]:
    """The unit in which the largest number is at least 1."""
    power = max((p for p in range(4) if most >= 1024**p), default=0)
    return 1024**power, ("B", "KiB", "MiB", "GiB")[power]

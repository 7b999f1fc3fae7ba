"""Pictures of what training costs in memory. Needs the extra ``plot``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reversa.drawing import COLOURS, new_figure, saved, tidy
from reversa.memory.report import MemoryReport
from reversa.memory.timeline import Timeline


def draw_timelines(timelines: Mapping[str, Timeline], path: str | Path) -> Any:
    """Draw the bytes alive over one training step, of several networks on the same axes.

    Args:
        timelines: of :func:`reversa.memory.timeline.timeline`, by name.
        path: the file to write, whose ending tells the format.

    Returns:
        The figure, of matplotlib.

    Raises:
        OutputError: the file cannot be written.
        MissingExtra: matplotlib is not installed.

    >>> import tempfile, torch
    >>> from reversa.memory.timeline import timeline
    >>> lines = {"linear": timeline(torch.nn.Linear(8, 8), (4, 8))}
    >>> figure = draw_timelines(lines, Path(tempfile.mkdtemp()) / "timeline.png")
    """
    size, unit = _unit(max(max(line.totals) for line in timelines.values()))
    figure = new_figure(5.8, 3.4)
    axes = figure.subplots()
    for colour, (name, line) in zip(COLOURS, timelines.items(), strict=False):
        heights = [total / size for total in line.totals]
        axes.plot(range(1, len(heights) + 1), heights, color=colour, linewidth=1.2, label=name)
        turn = line.forward_moments
        axes.plot(turn, heights[turn - 1], "o", color=colour, markersize=6)
    axes.plot([], [], "o", color="0.4", label="end of the forward pass")
    axes.set(xlabel="operations of one training step", ylabel=f"bytes alive ({unit})", xlim=(0, None), ylim=(0, None))
    tidy(axes)
    axes.legend(frameon=False)
    return saved(figure, path)


def draw_bars(reports: Mapping[str, MemoryReport], path: str | Path) -> Any:
    """Draw where the bytes sit at the peak of a training step: one bar for each network, in the kinds of a report.

    Args:
        reports: of :func:`reversa.memory.estimate` or :func:`reversa.memory.measure`, by name.
        path: the file to write, whose ending tells the format.

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
    return saved(figure, path)


def draw_peaks(
    sizes: Sequence[int], peaks: Mapping[str, Sequence[MemoryReport]], against: str, path: str | Path
) -> Any:
    """Draw the peak of a training step against a size, of several networks on the same axes.

    Args:
        sizes: batches, image sides, numbers of blocks.
        peaks: of :func:`reversa.memory.sweep.sweep`: by name, one report for each size.
        against: what the sizes are, in words and with their unit: the horizontal axis says so.
        path: the file to write, whose ending tells the format.

    Returns:
        The figure, of matplotlib.

    Raises:
        OutputError: the file cannot be written.
        MissingExtra: matplotlib is not installed.

    >>> import tempfile, torch
    >>> from reversa.memory import estimate
    >>> reports = [estimate(torch.nn.Linear(8, 8), (batch, 8)) for batch in (4, 8)]
    >>> figure = draw_peaks((4, 8), {"linear": reports}, "images in the batch", Path(tempfile.mkdtemp()) / "peaks.png")
    """
    size, unit = _unit(max(report.peak_bytes for reports in peaks.values() for report in reports))
    figure = new_figure(5.4, 3.4)
    axes = figure.subplots()
    for colour, (name, reports) in zip(COLOURS, peaks.items(), strict=False):
        axes.plot(sizes, [report.peak_bytes / size for report in reports], "o-", color=colour, markersize=4, label=name)
    axes.set(xlabel=against, ylabel=f"peak of a training step ({unit})", xlim=(0, None), ylim=(0, None))
    tidy(axes)
    axes.legend(frameon=False)
    return saved(figure, path)


def _unit(most: int) -> tuple[int, str]:
    """The unit in which the largest number is at least 1."""
    power = max((p for p in range(4) if most >= 1024**p), default=0)
    return 1024**power, ("B", "KiB", "MiB", "GiB")[power]

"""What a run leaves for people: the table at its end, the curves, and a page that holds both."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import reversa
from reversa.errors import import_extra
from reversa.train.config import TrainConfig
from reversa.train.cost import StepCost
from reversa.train.files import RunFolder, write_text, write_whole

HEADINGS = ("activations", "test accuracy", "peak activations", "time per step")
NOT_REVERSIBLE = "none"
"""In the place of an engine, for networks that have none."""
ENGINE_WORDS = {
    "invert": "computed back",
    "store": "stored",
    "recompute": "recomputed forwards",
    "offload": "kept on the host",
    NOT_REVERSIBLE: "no reversible step",
}


@dataclass(frozen=True)
class Result:
    """The outcome of a training run."""

    config: TrainConfig
    folder: Path
    rows: list[dict[str, float | int]]
    """One per epoch, as in ``metrics.csv``."""
    best: dict[str, float | int]
    """The row of the epoch that the test accuracy is of."""
    test_accuracy: float
    costs: dict[str, StepCost]
    """By engine: the run's own, and ``"store"``; :data:`NOT_REVERSIBLE` alone where the network has no chain."""
    seconds: float
    """Time of the training."""

    @property
    def table(self) -> list[tuple[str, str, str, str]]:
        """A line per engine, under :data:`HEADINGS`. The last column compares with stored activations."""
        stored = self.costs.get("store") or self.costs[NOT_REVERSIBLE]
        return [
            (
                ENGINE_WORDS[name],
                f"{self.test_accuracy:.2%}" if name in (self.config.engine, NOT_REVERSIBLE) else "(not trained)",
                f"{cost.peak_bytes / 2**20:.2f} MiB ({cost.peak_bytes / stored.peak_bytes:.1%})",
                f"{cost.seconds * 1e3:.0f} ms (x {cost.seconds / stored.seconds:.2f})",
            )
            for name, cost in self.costs.items()
        ]

    @property
    def title(self) -> str:
        """The run in a line."""
        return f"{self.config.data}: {self.config.network}"


def counted(number: int, what: str) -> str:
    """``1 epoch``, ``2 epochs``."""
    return f"{number} {what}{'s' * (number != 1)}"


def write_report(result: Result, folder: RunFolder) -> None:
    """Write ``curves.png`` and ``report.md``.

    Raises:
        OutputError: a file cannot be written.
    """
    write_whole(folder.curves, lambda file: draw_curves(result).savefig(file, format="png", dpi=150))
    write_text(folder.report, as_markdown(result))


def as_rich_table(result: Result) -> Any:
    """The table for a terminal."""
    table = import_extra("rich.table", "train").Table(title=result.title, title_justify="left")
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading == HEADINGS[0] else "right")
    for line in result.table:
        table.add_row(*line)
    return table


def as_markdown(result: Result) -> str:
    """The page ``report.md``."""
    config, best = result.config, result.best
    lines = [HEADINGS, ("---", "---:", "---:", "---:"), *result.table]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    turns = ", with\nthe engines in turn" if len(result.costs) > 1 else ""
    return f"""# {result.title}

{table}

Peak activations: most bytes alive at once in one training step of {config.batch_size} images, without parameters and
gradients. Time per step: forward and backward pass, median. Both measured after the training, on the same batch{turns}.

- Test accuracy is that of `checkpoints/best.ckpt`: epoch {best["epoch"] + 1:g}, chosen by validation loss \
(validation accuracy {best["val_accuracy"]:.2%}). The test images were used once.
- Trained for {counted(len(result.rows), "epoch")}, {result.rows[-1]["step"]:g} steps, {result.seconds:.0f} s.
- Reversa {reversa.__version__}, PyTorch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}.

![Loss and accuracy by epoch](curves.png)

The same run again: `reversa train --config {result.folder / "config.yaml"} --out ANOTHER_FOLDER`.
The trained network: `reversa.train.load_network("{result.folder / "checkpoints" / "best.ckpt"}")`.
"""


def draw_curves(result: Result) -> Any:
    """Loss and validation accuracy by epoch, as a figure of matplotlib."""
    figure = import_extra("matplotlib.figure", "plot").Figure(figsize=(9, 3.6), layout="constrained")
    losses, accuracies = figure.subplots(1, 2)
    epochs = [row["epoch"] + 1 for row in result.rows]
    losses.plot(epochs, [row["train_loss"] for row in result.rows], label="training", color="#4c72b0", marker=".")
    losses.plot(epochs, [row["val_loss"] for row in result.rows], label="validation", color="#dd8452", marker=".")
    losses.set(yscale="log", ylabel="cross-entropy")
    losses.legend(frameon=False)
    values = [100 * row["val_accuracy"] for row in result.rows]
    accuracies.plot(epochs, values, label="validation", color="#dd8452", marker=".")
    accuracies.plot(
        [result.best["epoch"] + 1],
        [100 * result.test_accuracy],
        "*",
        markersize=11,
        color="#55a868",
        label=f"test, best checkpoint: {result.test_accuracy:.2%}",
    )
    accuracies.set(ylabel="accuracy (%)")
    accuracies.legend(frameon=False, loc="lower right")
    integers = import_extra("matplotlib.ticker", "plot").MaxNLocator(integer=True, min_n_ticks=1)
    for axes in (losses, accuracies):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(integers)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(result.title, fontsize="medium")
    return figure

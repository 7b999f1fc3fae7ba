"""What all pictures share: colours, a figure that no window system knows of, and how it is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from reversa.errors import OutputError, import_extra

COLOURS = ("#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3", "#937860", "#ccb974", "#8c8c8c")


def cycled(number: int) -> list[str]:
    """So many colours."""
    return [COLOURS[i % len(COLOURS)] for i in range(number)]


def new_figure(width: float, height: float) -> Any:
    """An empty figure, in inches, that no window system knows of."""
    return import_extra("matplotlib.figure", "plot").Figure(figsize=(width, height), layout="constrained")


def tidy(axes: Any) -> None:
    """A light grid behind what is drawn, and no frame above and to the right."""
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def saved(figure: Any, path: str | Path) -> Any:
    """The figure, written to a file.

    Raises:
        OutputError: it cannot be written.
    """
    try:
        figure.savefig(path, dpi=100)
    except (OSError, ValueError) as error:  # ValueError: no such format
        raise OutputError(
            f"cannot write {path}: {error}. Choose another path, for instance one that ends in .png."
        ) from error
    return figure

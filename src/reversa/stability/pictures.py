"""Pictures of spectra and of growing perturbations. Needs the extra ``plot``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from reversa.drawing import cycled, new_figure, saved, tidy


def draw_spectrum(values: Tensor | Mapping[str, Tensor], path: str | Path) -> Any:
    """Draw eigenvalues in the complex plane, several sets beside each other on the same axes.

    Args:
        values: of :func:`reversa.stability.spectrum`, or several of them by name.
        path: the file to write, whose ending tells the format.

    Returns:
        The figure, of matplotlib.

    Raises:
        OutputError: the file cannot be written.
        MissingExtra: matplotlib is not installed.

    >>> import tempfile, torch
    >>> values = {"rotation": torch.tensor([1j, -1j]), "growth": torch.tensor([0.5, 1.0]) + 0j}
    >>> figure = draw_spectrum(values, Path(tempfile.mkdtemp()) / "spectra.png")
    """
    sets = values if isinstance(values, Mapping) else {"": values}
    figure = new_figure(2.2 * len(sets) + 0.6, 2.8)
    all_axes = figure.subplots(1, len(sets), sharex=True, sharey=True, squeeze=False)[0]
    for axes, colour, (name, numbers) in zip(all_axes, cycled(len(sets)), sets.items(), strict=True):
        numbers = numbers.detach().cpu()
        axes.axvline(0, color="0.6", linewidth=0.8, zorder=0)
        axes.plot(numbers.real, numbers.imag, ".", color=colour, markersize=5, alpha=0.7, markeredgewidth=0)
        axes.set_title(name, fontsize="medium")
        axes.set_xlabel("real part")
        tidy(axes)
    all_axes[0].set_ylabel("imaginary part")
    return saved(figure, path)


def draw_growth(curves: Tensor | Mapping[str, Tensor], path: str | Path) -> Any:
    """Draw the size of a perturbation by depth, of one chain or of several.

    Args:
        curves: of :func:`reversa.stability.growth`, or several of them by name.
        path: the file to write, whose ending tells the format.

    Returns:
        The figure, of matplotlib.

    Raises:
        OutputError: the file cannot be written.
        MissingExtra: matplotlib is not installed.

    >>> import tempfile, torch
    >>> figure = draw_growth(torch.full((10,), 0.1), Path(tempfile.mkdtemp()) / "growth.png")
    """
    sets = curves if isinstance(curves, Mapping) else {"": curves}
    figure = new_figure(5.4, 3.2)
    axes = figure.subplots()
    for colour, (name, logarithms) in zip(cycled(len(sets)), sets.items(), strict=True):
        sizes = [1.0, *logarithms.double().cumsum(0).exp().tolist()]
        axes.plot(range(len(sizes)), sizes, color=colour, label=name)
    axes.set(yscale="log", xlabel="steps", ylabel="size of the perturbation")
    tidy(axes)
    if len(sets) > 1:
        axes.legend(frameon=False)
    return saved(figure, path)

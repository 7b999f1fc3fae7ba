"""Pictures of the states of a chain: lines for states of one number, clouds of points for states of two.

They show what a scheme can do that another cannot: lines of a residual network with small steps do not cross, because
it follows a field of first order; those of a chain with a velocity may. Needs the extra ``plot``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reversa.drawing import new_figure, saved, tidy
from reversa.errors import SettingError, StateError, import_extra
from reversa.schemes import State

States = Sequence[State | Tensor]
"""What ``seq.states(x)`` gives: of each state the first stream is drawn. Or tensors, for other networks."""


def draw_lines(states: States | Mapping[str, States], path: str | Path) -> Any:
    """Draw states of one number against the depth: a line for each sample, coloured by where it begins.

    Args:
        states: of ``seq.states(x)``, with x of shape (N, 1) or (N,); or several by name, for panels beside each other.
        path: the file to write, whose ending tells the format.

    Returns:
        The figure, of matplotlib.

    Raises:
        StateError: the states have more than one number for a sample.
        OutputError: the file cannot be written.
        MissingExtra: matplotlib is not installed.

    Source: the picture is that of Sander et al., ICML 2021, arXiv:2102.07870, figure 1.

    >>> import reversa, tempfile
    >>> seq = reversa.ReversibleSequence([torch.nn.Linear(1, 1)] * 5, scheme=reversa.Momentum(0.9))
    >>> states = seq.states(torch.linspace(-1, 1, 7)[:, None])
    >>> figure = draw_lines(states, Path(tempfile.mkdtemp()) / "lines.png")
    """
    panels = states if isinstance(states, Mapping) else {"": states}
    figure = new_figure(3.0 * len(panels) + 0.4, 2.8)
    all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    colours = import_extra("matplotlib", "plot").colormaps["coolwarm"]
    for axes, (name, given) in zip(all_axes, panels.items(), strict=True):
        lines = _streams(given, 1, "draw_lines").squeeze(-1).T
        begins = lines[:, 0]
        places = (begins - begins.min()) / (begins.max() - begins.min()).clamp_min(1e-12)
        for line, place in zip(lines, places.tolist(), strict=True):
            axes.plot(range(len(line)), line, color=colours(place), linewidth=1.2)
        axes.set_title(name, fontsize="medium")
        axes.set_xlabel("steps")
        axes.xaxis.set_major_locator(import_extra("matplotlib.ticker", "plot").MaxNLocator(integer=True))
        tidy(axes)
    all_axes[0].set_ylabel("state")
    return saved(figure, path)


def draw_clouds(states: States, labels: Tensor, path: str | Path, every: int = 3) -> Any:
    """Draw states of two numbers as clouds of points, one panel for every so many steps, coloured by label.

    Args:
        states: of ``seq.states(x)``, with x of shape (N, 2).
        labels: (N,), the classes.
        path: the file to write, whose ending tells the format.
        every: steps from panel to panel; the last state is always drawn.

    Returns:
        The figure, of matplotlib.

    Raises:
        StateError: the states have not two numbers for a sample; the labels are not one for each.
        SettingError: every is not a positive whole number.
        OutputError: the file cannot be written.
        MissingExtra: matplotlib is not installed.

    Source: the picture is that of Sander et al., ICML 2021, arXiv:2102.07870, nested rings.

    >>> import reversa, tempfile
    >>> seq = reversa.ReversibleSequence([torch.nn.Linear(2, 2)] * 6, scheme=reversa.Momentum(0.9))
    >>> states = seq.states(torch.randn(50, 2))
    >>> figure = draw_clouds(states, torch.arange(50) % 2, Path(tempfile.mkdtemp()) / "clouds.png")
    """
    if not (isinstance(every, int) and every > 0):
        raise SettingError(f"every must be a positive whole number of steps, got {every!r}")
    clouds = _streams(states, 2, "draw_clouds")
    labels = labels.detach().cpu()
    if labels.shape != clouds.shape[1:2]:
        raise StateError(f"draw_clouds needs a label for each of {clouds.shape[1]} samples, got {tuple(labels.shape)}")
    drawn = sorted({*range(0, len(clouds), every), len(clouds) - 1})
    figure = new_figure(1.9 * len(drawn), 2.1)
    all_axes = figure.subplots(1, len(drawn), squeeze=False)[0]
    for axes, step in zip(all_axes, drawn, strict=True):
        axes.scatter(*clouds[step].T, c=labels, cmap="coolwarm", s=4, linewidths=0)
        axes.set_title("input" if step == 0 else f"step {step}", fontsize="medium")
        axes.set(xticks=[], yticks=[])
        axes.set_aspect("equal", adjustable="datalim")
    return saved(figure, path)


def _streams(states: States, width: int, who: str) -> Tensor:
    """The first stream of every state, (states, N, width)."""
    firsts = torch.stack([state if isinstance(state, Tensor) else state[0] for state in states]).detach().cpu()
    if width == 1 and firsts.dim() == 2:
        firsts = firsts.unsqueeze(-1)
    if firsts.dim() != 3 or firsts.shape[-1] != width:
        raise StateError(
            f"{who} draws states of shape (N, {width}), got {tuple(firsts.shape[1:])}. Choose {width} of the numbers: "
            f"[state[0][:, :{width}] for state in states]."
        )
    return firsts

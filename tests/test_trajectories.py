"""Pictures of states: they hold the numbers that were given, and say what they cannot draw."""

from __future__ import annotations

import numpy
import pytest
import torch
from torch import nn

import reversa
from reversa.errors import OutputError, SettingError, StateError
from reversa.trajectories import draw_clouds, draw_lines


def chain(width, steps=7):
    return reversa.ReversibleSequence([nn.Linear(width, width) for _ in range(steps)], scheme=reversa.Momentum(0.9))


def test_lines_are_the_first_stream_of_every_sample(tmp_path):
    x = torch.tensor([[-1.0], [0.5], [2.0]])
    seq = chain(1)
    states = seq.states(x)
    figure = draw_lines(states, tmp_path / "lines.png")
    assert (tmp_path / "lines.png").read_bytes().startswith(b"\x89PNG")
    lines = figure.axes[0].lines
    assert len(lines) == 3
    for i, line in enumerate(lines):
        assert numpy.array_equal(line.get_xdata(), range(8))
        assert numpy.allclose(line.get_ydata(), [state[0][i, 0].item() for state in states])
    assert len({line.get_color() for line in lines}) == 3
    blue, red = lines[0].get_color(), lines[2].get_color()
    assert blue[2] > blue[0]
    assert red[0] > red[2]


def test_lines_of_several_networks_stand_beside_each_other(tmp_path):
    x = torch.linspace(-1, 1, 4)
    plain = [x, x + 1, x + 3]
    figure = draw_lines({"chain": chain(1).states(x[:, None]), "other": plain}, tmp_path / "lines.png")
    assert [axes.get_title() for axes in figure.axes] == ["chain", "other"]
    assert numpy.allclose(figure.axes[1].lines[0].get_ydata(), [-1, 0, 2])


def test_samples_that_begin_at_one_place_are_drawn(tmp_path):
    assert len(draw_lines([torch.ones(2), torch.ones(2)], tmp_path / "same.png").axes[0].lines) == 2


@pytest.mark.parametrize(("every", "drawn"), [(3, [0, 3, 6, 7]), (7, [0, 7]), (1, range(8)), (100, [0, 7])])
def test_clouds_are_the_points_of_every_so_many_steps(tmp_path, every, drawn):
    x, labels = torch.randn(20, 2), torch.arange(20) % 3
    states = chain(2).states(x)
    figure = draw_clouds(states, labels, tmp_path / "clouds.png", every=every)
    assert (tmp_path / "clouds.png").stat().st_size > 0
    assert len(figure.axes) == len(drawn)
    for axes, step in zip(figure.axes, drawn, strict=True):
        points = axes.collections[0]
        assert numpy.allclose(points.get_offsets(), states[step][0].detach())
        assert numpy.array_equal(points.get_array(), labels)
        assert axes.get_title() == ("input" if step == 0 else f"step {step}")


def test_what_cannot_be_drawn_is_refused_with_what_to_do(tmp_path):
    path, labels = tmp_path / "picture.png", torch.zeros(4)
    wide = chain(3).states(torch.randn(4, 3))
    with pytest.raises(StateError, match=r"draw_lines draws states of shape \(N, 1\), got \(4, 3\).*\[:, :1\]"):
        draw_lines(wide, path)
    with pytest.raises(StateError, match=r"draw_clouds draws states of shape \(N, 2\), got \(4, 3\).*\[:, :2\]"):
        draw_clouds(wide, labels, path)
    flat = [state[0][:, :2] for state in wide]
    draw_clouds(flat, labels, path)
    with pytest.raises(StateError, match="a label for each of 4 samples"):
        draw_clouds(flat, labels[:3], path)
    for every in (0, -1, 1.5):
        with pytest.raises(SettingError, match="every must be"):
            draw_clouds(flat, labels, path, every=every)
    with pytest.raises(OutputError, match="cannot write"):
        draw_lines([torch.ones(2)], tmp_path / "missing" / "a.png")

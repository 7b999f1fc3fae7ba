"""Activation memory of converted models: flat in depth, counted in bytes."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn

from cases import no_collector
from convert_cases import (
    Block,
    Looped,
    straight,
)
from reversa import Invert, Momentum, Recompute, Store
from reversa.convert import convert
from reversa.memory import LiveBytes


def wide(depth: int) -> Looped:
    return Looped((Block(64) for _ in range(depth)), straight)


def measure(model: nn.Module, x: torch.Tensor) -> tuple[float, float, float]:
    """Live bytes of a training step in units of x: at the peak, after the forward pass, after the step."""
    model(x).mean().backward()
    with no_collector(), LiveBytes(exclude=[model, x]) as counted:
        loss = model(x).mean()
        held = counted.live
        loss.backward()
        peak = counted.peak
        del loss
    return peak / x.nbytes, held / x.nbytes, counted.live / x.nbytes


def test_memory_does_not_grow_with_depth():
    """At this gamma no depth here needs an anchor. What is the same to three digits is 0.1 % of a step."""
    x = torch.randn(2048, 64)
    shallow, deep = (measure(convert(wide(depth), Momentum(0.999)), x) for depth in (8, 64))
    assert deep[0] == pytest.approx(shallow[0], rel=1e-3)
    assert deep[1] == pytest.approx(shallow[1], rel=2e-3)
    assert deep[1] < 3.01
    assert deep[2] == 0
    one, two = (measure(wide(depth), x) for depth in (8, 64))
    assert two[1] - one[1] > 56, "the original stores an activation in each block"
    assert two[0] > 4 * deep[0]


def test_memory_of_a_resnet_does_not_grow_with_its_blocks():
    def peak(blocks: int) -> float:
        net = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, blocks, 1, 1], num_classes=3)
        return measure(convert(net, Momentum(0.999)), torch.randn(2, 3, 64, 64))[0]

    assert peak(12) == pytest.approx(peak(4), rel=0.02)  # statistics of the norms, per block, are what differs


def test_inputs_kept_for_each_tap_cost_their_states_alone():
    """A loss on every hidden state keeps the hidden states; no velocity with them."""
    x = torch.randn(2048, 64)

    def taps(blocks, x):
        return torch.stack([(x := block(x)).square().mean() for block in blocks])

    held = []
    for depth in (8, 24):
        model = convert(Looped((Block(64) for _ in range(depth)), taps), Momentum(0.999))
        held.append(measure(model, x)[1])
    assert held[1] - held[0] == pytest.approx(16, abs=0.05)


def test_storing_is_what_it_says():
    x = torch.randn(2048, 64)
    stored, inverted = (measure(convert(wide(16), Momentum(0.999), engine=engine), x) for engine in (Store(), Invert()))
    assert stored[1] > inverted[1] + 16


def test_recomputing_keeps_the_carried_tensor_of_each_block():
    """The argument of the block, and not the velocity beside it."""
    x = torch.randn(2048, 64)
    engine = Recompute()
    one, two = (measure(convert(wide(depth), Momentum(0.999), engine=engine), x) for depth in (8, 24))
    assert two[1] - one[1] == pytest.approx(16, abs=0.05)

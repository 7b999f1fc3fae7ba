"""The engine Mixed beyond the contract, which runs over it as ``cases.Parts``: settings, memory, converted models."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import reversa
from cases import assert_same, gradients, mlp
from reversa import Invert, Mixed, Recompute, Store
from reversa.errors import SettingError
from reversa.memory import LiveBytes

BATCH, WIDTH = 4096, 16
STATE = BATCH * WIDTH * 4


def chain(depth: int, engine) -> reversa.ReversibleSequence:
    return reversa.ReversibleSequence([mlp(WIDTH) for _ in range(depth)], reversa.Momentum(0.99), engine=engine)


def held(engine, depth: int = 6) -> float:
    """What is held between forward and backward pass, in states, besides the output."""
    seq, x = chain(depth, engine), torch.randn(BATCH, WIDTH)
    with LiveBytes(exclude=seq) as bytes_:
        y = seq(x)
        total = bytes_.live
        y.sum().backward()
    return (total - y.nbytes) / STATE


def test_each_part_holds_what_its_engine_holds():
    """By hand: of an MLP (Linear 2x, GELU, Linear) autograd stores the input, and what is twice as wide twice."""
    assert held(Store(), 1) == 4  # two tensors of twice the width; the input x is the caller's
    assert held(Mixed([(Store(), 2), (Recompute(), 3)]), 5) == pytest.approx(4 + 5 + 3, abs=0.1)
    invert = held(Invert())
    assert invert == pytest.approx(1, abs=0.1)  # the velocity
    one_stored = held(Mixed([(Invert(), 5), (Store(), 1)]))
    assert one_stored == pytest.approx(1 + 5, abs=0.1)  # the velocity before it, its input, and its activations
    two_runs = held(Mixed([(Invert(), 3), (Invert(group=1), 3)]))
    assert two_runs == pytest.approx(invert + 2, abs=0.1)  # x and v in between
    recomputed = held(Mixed([(Invert(), 4), (Recompute(), 2)]))
    assert recomputed == pytest.approx(1 + 2, abs=0.1)  # the velocity before them, and their inputs


def test_bad_parts():
    for parts in ([], [(Store(), 0)], [("store", 2)], [(Mixed([(Store(), 1)]), 1)], [(Store(), 1.5)]):
        with pytest.raises(SettingError, match="Mixed needs"):
            Mixed(parts)


@pytest.mark.parametrize("depth", [4, 6])
def test_a_chain_of_another_length_is_refused(depth):
    seq = chain(depth, Mixed([(Invert(), 3), (Store(), 2)]))
    with pytest.raises(SettingError, match=rf"is for 5 steps; the chain has {depth}"):
        seq(torch.randn(2, WIDTH))


def test_in_words():
    engine = Mixed([(Invert(), 3), (Store(), 2)])
    assert repr(engine) == "Mixed(3 x Invert(), 2 x Store())"
    assert engine == Mixed(((Invert(), 3), (Store(), 2)))
    assert (engine.length, engine.inverts) == (5, True)
    assert not Mixed([(Store(), 2)]).inverts
    assert "1 state; the activations of 2 steps" in repr(chain(5, engine))


def test_a_converted_model():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True, norm_first=True)
    layers = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False).double()
    model = reversa.convert(layers, scheme=reversa.Momentum(0.9), example=torch.zeros(2, 5, 16, dtype=torch.float64))
    stored = copy.deepcopy(model)
    engines = Mixed([(Invert(), 2), (Recompute(), 1), (Invert(group=1), 2), (Store(), 1)]), Store()
    results = []
    for each, engine in zip((model, stored), engines, strict=True):
        next(m for m in each.modules() if hasattr(m, "_reversa"))._reversa.stage.engine = engine
        torch.manual_seed(1)
        x = torch.linspace(-1, 1, 160, dtype=torch.float64).reshape(2, 5, 16).requires_grad_()
        y = each(x)
        y.square().sum().backward()
        results.append({"y": y.detach(), "x": x.grad} | gradients(each))
    assert_same(*results, 1e-11)

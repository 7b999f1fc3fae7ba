"""Converted models in exact arithmetic: the bits of stored activations, in other people's loops and containers."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from sklearn.datasets import load_digits
from torch import nn

from cases import assert_same, no_collector
from convert_cases import (
    Block,
    ExtraBlock,
    KeywordBlock,
    TupleBlock,
    bias_of_the_first,
    by_rule,
    leaf,
    looped,
    perturbed,
    ruled,
    straight,
    taps,
    train,
)
from copies import COPIES
from exact_cases import FIXED, assert_bit_equal
from reversa import Invert, Momentum, Offload, Recompute, Store
from reversa.convert import convert, explain, restore
from reversa.errors import SettingError, StateChanged
from reversa.exact import FixedPoint, Ratio
from reversa.memory import LiveBytes
from test_convert_changes import cloned, normalised, plus_embedding
from test_convert_loop import KEEPING, by_name, by_place

GAMMAS = pytest.mark.parametrize("gamma", [0.9, 0.5, 0.01])


def both(model: nn.Module, gamma: float, exact=True, engine=None, **settings) -> tuple[nn.Module, nn.Module]:
    """The model converted, with states computed back and with every activation stored."""
    engines = Invert() if engine is None else engine, Store()
    scheme = Momentum(gamma)
    first, second = (convert(copy.deepcopy(model), scheme, exact=exact, engine=e, **settings) for e in engines)
    return first, second


def assert_exact(model: nn.Module, *args, gamma: float = 0.9, seed: int = 5, **settings) -> nn.Module:
    """Twice, since nothing may be left over from the first step."""
    kwargs = settings.pop("kwargs", {})
    exact, stored = both(model, gamma, **settings)
    for _ in range(2):
        actual, expected = (train(m, m, *args, seed=seed, **kwargs) for m in (exact, stored))
        assert_bit_equal(actual, expected)
    assert any(g is not None and g.any() for name, g in expected.items() if name.startswith("gradient"))
    return exact


# ---------------------------------------------------------------------- loops over the blocks


@GAMMAS
@pytest.mark.parametrize("loop", KEEPING, ids=lambda f: f.__name__)
def test_a_loop_over_the_blocks(loop, gamma):
    assert_exact(looped(loop, depth=6, p=0.3), leaf(4, 6), gamma=gamma)


@pytest.mark.parametrize("loop", KEEPING, ids=lambda f: f.__name__)
def test_what_is_computed_is_the_rule(loop):
    """Held against plain autograd over the blocks; fixed point rounds at 2^-34."""
    model = looped(loop, depth=6)
    exact = convert(copy.deepcopy(model), Momentum(0.8), exact=True)
    assert_same(train(exact, exact, x := leaf(4, 6)), train(model, ruled(model, 0.8), x), 1e-7)


@pytest.mark.parametrize(
    "engine", [Invert(keep=2), Invert(anchors=2), Invert(group=3), Offload(), Recompute()], ids=str
)
@pytest.mark.parametrize("loop", [straight, taps], ids=lambda f: f.__name__)
def test_every_engine(loop, engine):
    assert_exact(looped(loop, depth=7, p=0.3), leaf(4, 6), engine=engine)


@pytest.mark.parametrize("arithmetic", [*FIXED, "ratio"])
@GAMMAS
def test_a_deep_model(gamma, arithmetic):
    """Float inversion is garbage here for every gamma below."""
    model, exact = looped(depth=200).float(), FIXED.get(arithmetic) or Ratio.of(gamma)
    assert_exact(model, torch.randn(4, 6, requires_grad=True), gamma=gamma, exact=exact)


def test_under_autocast():
    def call(blocks, x):
        with torch.autocast("cpu", torch.bfloat16):
            return straight(blocks, x)

    exact = assert_exact(looped(call, depth=30, p=0.2).float(), torch.randn(4, 6, requires_grad=True), gamma=0.5)
    assert "FixedPoint" in str(explain(exact))


# ---------------------------------------------------------------------- blocks of every kind


@GAMMAS
def test_extra_arguments(gamma):
    args = leaf(4, 6), leaf(4, 1)
    assert_exact(looped(kind=ExtraBlock), *args, gamma=gamma, kwargs={"shift": leaf(6)})


@pytest.mark.parametrize("loop", [by_name, by_place], ids=lambda f: f.__name__)
def test_the_carried_tensor_need_not_come_first(loop):
    args = leaf(4, 6), leaf(4, 6)
    assert_exact(looped(loop, kind=KeywordBlock), *args, example=args)


def test_tuples():
    def with_extras(blocks, x):
        extras = []
        for block in blocks:
            x, extra, _ = block(x)
            extras.append(extra)
        return x, extras

    assert_exact(looped(with_extras, kind=TupleBlock), leaf(4, 6))


def test_a_shared_block():
    def again_and_again(blocks, x):
        return straight([blocks[0], blocks[1], blocks[2]], x)

    model = looped(again_and_again, depth=3)
    model.blocks[2].body = model.blocks[0].body
    assert_exact(model, leaf(4, 6), gamma=0.5)


def test_frozen_blocks():
    model = looped(depth=6)
    for i in (0, 1, 3, 5):
        model.blocks[i].requires_grad_(False)
    assert_exact(model, leaf(4, 6), gamma=0.5)
    assert_exact(model, leaf(4, 6).detach(), gamma=0.5)


def test_an_argument_made_by_the_first_block_closes_no_cycle():
    model, x = assert_exact(looped(bias_of_the_first, kind=ExtraBlock), leaf(4, 6), gamma=0.5), leaf(4, 6)
    with no_collector(), LiveBytes() as counted:
        out = model(x)
        del out
        assert counted.live == 0


# ---------------------------------------------------------------------- loops that change x


@pytest.mark.parametrize("p", [0.0, 0.3], ids=["plain", "dropout"])
@pytest.mark.parametrize("loop", [plus_embedding, cloned, normalised], ids=lambda f: f.__name__)
@GAMMAS
def test_a_loop_that_changes_x_carries_the_velocity_on(loop, gamma, p):
    assert_exact(looped(loop, depth=8, p=p), leaf(4, 6), gamma=gamma, between="carry")


@pytest.mark.parametrize("loop", [plus_embedding, normalised], ids=lambda f: f.__name__)
def test_what_is_carried_on_is_the_velocity(loop):
    """Its value and its gradient, held against plain autograd."""
    model = looped(loop, depth=8)
    exact = convert(copy.deepcopy(model), Momentum(0.8), exact=True, between="carry")
    assert_same(train(exact, exact, x := leaf(4, 6)), train(model, ruled(model, 0.8), x), 1e-7)


def test_changed_again_and_again_at_a_small_gamma():
    """Each piece begins with a velocity, and spills bits of its own."""

    def scaled(blocks, x):
        for i, block in enumerate(blocks):
            x = block(x if i % 5 else x * 1.01)
        return x

    assert_exact(looped(scaled, depth=40), leaf(4, 6), gamma=0.01, between="carry")


def test_without_being_asked_it_is_an_error():
    model = convert(looped(plus_embedding), exact=True)
    with pytest.raises(StateChanged, match="between='carry'"):
        model(leaf(4, 6))


# ---------------------------------------------------------------------- the model is as it was


def test_copies_files_and_keys():
    model = looped(depth=6)
    keys, x = list(model.state_dict()), leaf(4, 6)
    exact, stored = both(model, 0.5)
    assert list(exact.state_dict()) == keys
    expected = train(stored, stored, x)
    for other in (copied(exact) for copied in COPIES.values()):
        assert_bit_equal(train(other, other, x), expected)
        assert list(other.state_dict()) == keys
    fresh = convert(looped(depth=6), Momentum(0.5), exact=True)
    fresh.load_state_dict(exact.state_dict())
    assert_bit_equal(train(fresh, fresh, x), expected)
    restored = restore(exact)
    assert_bit_equal(train(restored, restored, x), train(model, model, x))


def test_a_copy_between_forward_and_backward():
    exact, stored = both(looped(depth=6), 0.5)
    x = leaf(4, 6)
    y = exact(x)
    copied = copy.deepcopy(exact)
    y.square().sum().backward()
    assert_bit_equal(train(copied, copied, x), train(stored, stored, x))


@GAMMAS
def test_evaluation_computes_what_training_computes(gamma):
    model = convert(looped(depth=20), Momentum(gamma), exact=True)
    x = leaf(4, 6)
    trained = model(x)
    model.eval()
    assert torch.equal(model(x), trained)
    with torch.no_grad():
        assert torch.equal(model(x), trained)
    with torch.inference_mode():
        assert torch.equal(model(x.detach().clone()), trained)


def test_explain_says_the_arithmetic():
    exact = convert(looped(depth=64).float(), Momentum(0.9), exact=True)
    report = explain(exact)
    assert "Momentum(gamma=0.9, init='zero') in FixedPoint()" in report.rule
    assert "1 state and 1 byte of spilled bits" in str(report)
    assert "in FixedPoint" not in str(explain(convert(looped(), Momentum(0.9))))
    narrow = convert(looped(), Momentum(0.9), exact=FixedPoint(bits=32))
    assert "FixedPoint(bits=32)" in str(explain(narrow))


def test_settings_that_cannot_be():
    for bad in ("yes", 1.0):
        with pytest.raises(SettingError, match="exact must be True, False"):
            convert(looped(), exact=bad)
    with pytest.raises(SettingError, match="32 or 64 bits"):
        convert(looped(), exact=FixedPoint(bits=16))


# ---------------------------------------------------------------------- torchvision


def small(kind, layers) -> nn.Module:
    """Narrow, in float32, with nothing at its initial value."""
    return perturbed(torchvision.models.ResNet(kind, layers, num_classes=10, width_per_group=64)).float()


def digits(side: int) -> torch.Tensor:
    """Two real images, in three channels."""
    images = torch.tensor(load_digits().images[:2], dtype=torch.float32) / 16
    large = nn.functional.interpolate(images[:, None], side, mode="bilinear")
    return large.expand(-1, 3, -1, -1).clone().requires_grad_()


@GAMMAS
def test_resnet18(gamma):
    model = small(torchvision.models.resnet.BasicBlock, [2, 2, 2, 2])
    exact = assert_exact(model, digits(32), gamma=gamma)
    assert sum(len(stage.blocks) for stage in explain(exact).stages) == 2  # layer1; the others begin with a change
    frozen = {name: b for name, b in exact.named_buffers() if name.endswith("num_batches_tracked")}
    assert set(map(int, frozen.values())) == {2}


def test_resnet18_in_evaluation_and_with_frozen_statistics():
    exact, stored = both(small(torchvision.models.resnet.BasicBlock, [3, 2, 3, 2]), 0.5)
    exact.eval(), stored.eval()
    x = digits(32)
    assert_bit_equal(train(exact, exact, x), train(stored, stored, x))
    with torch.no_grad():
        assert torch.equal(exact(x), stored(x))


def test_resnet_channels_last():
    model = small(torchvision.models.resnet.BasicBlock, [4, 2, 2, 2]).to(memory_format=torch.channels_last)
    x = digits(32).detach().to(memory_format=torch.channels_last).requires_grad_()
    assert_exact(model, x, gamma=0.5)


@pytest.mark.slow
def test_resnet152():
    """3-8-36-3 bottlenecks, 50 of them blocks that keep the shape (46 in stages); float inversion drifts here."""
    torch.manual_seed(0)
    model = torchvision.models.resnet152(weights=None, num_classes=10)
    x = digits(64)
    exact, stored = both(model, 0.9)
    assert [len(stage.blocks) for stage in explain(exact).stages] == [2, 7, 35, 2]
    assert_bit_equal(train(exact, exact, x), train(stored, stored, x))


@pytest.mark.slow
def test_vision_transformer():
    model = torchvision.models.VisionTransformer(32, 8, 12, 4, 32, 64, num_classes=10, dropout=0.1)
    torch.nn.init.normal_(model.heads[-1].weight)
    for gamma in (0.9, 0.01):
        exact = assert_exact(model, digits(32), gamma=gamma)
        assert [len(stage.blocks) for stage in explain(exact).stages] == [12]


def test_by_rule_on_an_exact_block():
    """The oracle's rule over the blocks of an exact model restored: the same parameters in both."""
    model = looped(depth=5)
    exact = convert(copy.deepcopy(model), Momentum(0.3), exact=True)
    expected = straight(by_rule(model.blocks, 0.3), x := leaf(4, 6))
    assert (exact(x) - expected).abs().max() < 1e-8
    assert isinstance(restore(exact).blocks[0], Block)

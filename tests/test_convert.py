"""Conversion of other people's models: gradients, statistics and outputs are those of the rule, to rounding."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
import torchvision
from torch import nn

from cases import assert_same, error
from convert_cases import (
    by_hand,
    images,
    looped,
    perturbed,
    ruled,
    small,
    train,
)
from reversa import Invert, Momentum, Offload, Recompute, Store
from reversa.convert import convert, explain

# The blocks of each stage that keep the shape, written down by hand: what the oracle runs by the rule.
RESNETS: dict[str, tuple[range, ...]] = {
    "resnet18": (range(0, 2),),  # the second block of layer2 to layer4 stands alone
    "resnet34": (range(0, 3), range(1, 4), range(1, 6), range(1, 3)),
    "resnet50": (range(1, 3), range(1, 4), range(1, 6), range(1, 3)),
    "resnext50_32x4d": (range(1, 3), range(1, 4), range(1, 6), range(1, 3)),
    "wide_resnet50_2": (range(1, 3), range(1, 4), range(1, 6), range(1, 3)),
}


def resnet(name: str, **settings) -> nn.Module:
    return perturbed(getattr(torchvision.models, name)(num_classes=7, **settings))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "gamma"), [*((name, 0.9) for name in RESNETS), ("resnet34", 0.3)])
def test_gradients_and_statistics_are_those_of_the_rule_by_hand(name, gamma):
    model, x = resnet(name), images(side=48 if "50" in name else 64)
    reference = copy.deepcopy(model)
    convert(model, Momentum(gamma))
    actual = train(model, model, x)
    expected = train(reference, lambda x: by_hand(reference, x, RESNETS[name], gamma), x)
    assert any("num_batches_tracked" in key for key in expected)
    assert expected["gradient of input 0"] is not None
    assert_same(actual, expected, 1e-11)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "lengths"), [("resnet101", [2, 3, 22, 2]), ("resnet152", [2, 7, 35, 2])])
def test_the_deep_ones_train(name, lengths):
    model = convert(getattr(torchvision.models, name)(num_classes=3), Momentum(0.9))
    report = explain(model)
    assert [(s.name, len(s.blocks)) for s in report.stages] == list(zip(RESNET_LAYERS, lengths, strict=True))
    model(torch.randn(2, 3, 64, 64)).sum().backward()
    grads = [p.grad for p in model.parameters()]
    assert all(g is not None and g.isfinite().all() for g in grads)


RESNET_LAYERS = ("layer1", "layer2", "layer3", "layer4")


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode", "with gradients"])
def test_eval_computes_by_the_same_rule(mode):
    model, x = small(), images(2)
    stages = (range(1, 3), range(1, 3))
    reference = copy.deepcopy(model).eval()
    convert(model, Momentum(0.7)).eval()
    context = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}.get(mode, torch.enable_grad)
    with context():
        y = model(x)
    expected = by_hand(reference, x, stages, 0.7)
    assert error(y.detach(), expected.detach()) < 1e-13
    if mode == "with gradients":
        assert_same(train(model, model, x), train(reference, lambda x: by_hand(reference, x, stages, 0.7), x), 1e-12)


def test_without_noise_and_statistics_training_and_eval_agree():
    model, x = convert(looped(), Momentum(0.9)), torch.randn(4, 6, dtype=torch.float64)
    assert torch.equal(model.train()(x), model.eval()(x))


def moved(gamma: float) -> float:
    """How far the conversion alone moves the output of a network in evaluation mode."""
    torch.manual_seed(0)
    model, x = small().eval(), images(2)
    with torch.no_grad():
        before = model(x)
        return error(convert(model, Momentum(gamma))(x), before)


def test_the_smaller_gamma_the_nearer_the_original():
    near, nearer, far = moved(1e-3), moved(1e-5), moved(0.9)
    assert near < 0.02
    assert nearer == pytest.approx(near / 100, rel=0.2)  # to first order, the distance is proportional to gamma
    assert far > 0.2


def test_the_numbers_stay_right_over_optimiser_steps():
    model = looped(depth=6, p=0.2)
    reference = copy.deepcopy(model)
    convert(model, Momentum(0.9))
    x = torch.randn(4, 6, dtype=torch.float64)
    losses = []
    before = model(x).square().sum().item()
    for module, call in ((model, model), (reference, ruled(reference, 0.9))):
        optimiser = torch.optim.Adam(module.parameters(), lr=0.01)
        torch.manual_seed(3)
        for _ in range(10):
            optimiser.zero_grad()
            loss = call(x).square().sum()
            loss.backward()
            optimiser.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-10)
    assert losses[0] < before


@pytest.mark.parametrize(
    "engine", [Invert(keep=2), Invert(anchors=2), Invert(group=3), Store(), Recompute(), Offload()], ids=str
)
@pytest.mark.parametrize("make", [partial(looped, p=0.2, depth=7), small], ids=["mlp", "resnet"])
def test_every_engine_gives_the_same_numbers(engine, make):
    model = make()
    x = images(2, 48) if isinstance(model, torchvision.models.ResNet) else torch.randn(4, 6).double().requires_grad_()
    reference = copy.deepcopy(model)
    convert(model, Momentum(0.8), engine=engine)

    def expected(x):
        if isinstance(reference, torchvision.models.ResNet):
            return by_hand(reference, x, (range(1, 3), range(1, 3)), 0.8)
        return ruled(reference, 0.8)(x)

    assert_same(train(model, model, x), train(reference, expected, x), 1e-11)


def test_autocast_is_seen_again():
    model = looped(depth=6).float()
    reference = copy.deepcopy(model)
    convert(model, Momentum(0.9))
    x = torch.randn(4, 6, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        actual, expected = train(model, model, x), train(reference, ruled(reference, 0.9), x)
    assert_same(actual, expected, 1e-5)  # in bfloat16 without autocast's record, or in float32, it would be 1e-2

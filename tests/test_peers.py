"""The published packages compute the same: their code, our schemes, the same weights; no line is shared.

They are installed apart from everything else: ``pip install --no-deps -r tests/peers.txt``.
"""

from __future__ import annotations

import copy
import warnings
from functools import partial
from typing import Any

import pytest
import torch
import torchvision
from torch import nn

import reversa
from cases import FAMILIES, assert_same, chain, gradients, loss_of, step

SAME, FIXED_POINT = 1e-10, 1e-8
"""Relative differences: of float64 arithmetic, and of numbers that have been rounded to fixed point."""
WAYS: dict[str, tuple[dict[str, Any], float]] = {
    "invert": ({"engine": reversa.Invert()}, SAME),
    "store": ({"engine": reversa.Store()}, SAME),
    "exact": ({"exact": True}, FIXED_POINT),
}

depths = pytest.mark.parametrize("depth", [1, 4, 16])
families = pytest.mark.parametrize("family", ["mlp", "conv-bn"])
ways = pytest.mark.parametrize("way", WAYS)
pytestmark = pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")  # memcnn's way to empty a tensor


def published(name: str):
    """The package; where it is missing the test is skipped."""
    with warnings.catch_warnings():  # they import names that PyTorch gives up
        warnings.simplefilter("ignore")
        return pytest.importorskip(name, reason=f"{name} is missing: pip install --no-deps -r tests/peers.txt")


def trained(rule, fs, x):
    """One training step: the output, and the gradients of x and of all parameters, none of them missing.

    BatchNorm's statistics are left out: the packages move them twice or three times in a step.
    """
    result = {name: value for name, value in step(rule, fs, x).items() if not name.startswith(("buffer", "next"))}
    assert len(result) == 2 + len(list(nn.ModuleList(fs).parameters()))
    assert all(value is not None and value.abs().max() > 0 for value in result.values())
    return result


def assert_agrees(scheme, way: str, peer, fs, x):
    settings, tolerance = WAYS[way]
    expected = trained(peer, fs, x)
    assert_same(trained(lambda fs, x: chain(scheme, fs, **settings)(x), fs, x), expected, tolerance)


def halves_of(family: str) -> torch.Tensor:
    batch, width, *rest = FAMILIES[family].shape
    return torch.randn(batch, 2 * width, *rest, dtype=torch.float64, requires_grad=True)


# ---------------------------------------------------------------------- couplings


def pairs(fs):
    return list(zip(fs[::2], fs[1::2], strict=True))


def revtorch(fs, x):
    package = published("revtorch").revtorch
    blocks = [package.ReversibleBlock(f, g, split_along_dim=1) for f, g in pairs(fs)]
    return package.ReversibleSequence(nn.ModuleList(blocks))(x)


def memcnn(fs, x):
    package = published("memcnn")
    blocks = [package.InvertibleModuleWrapper(package.AdditiveCoupling(f, g, split_dim=1)) for f, g in pairs(fs)]
    return nn.Sequential(*blocks)(x.clone())  # it empties the tensor that it is given


def revlib(fs, x):
    return published("revlib").ReversibleSequential(*fs, split_dim=1)(x)


@ways
@families
@depths
@pytest.mark.parametrize("peer", [revtorch, memcnn, revlib], ids=lambda peer: peer.__name__)
def test_revnet(peer, depth, family, way):
    assert_agrees(reversa.RevNet(), way, peer, FAMILIES[family].functions(2 * depth), halves_of(family))


class Nothing(nn.Module):
    def forward(self, x):
        return torch.zeros_like(x)


def exchanged(x):
    return torch.cat(x.chunk(2, 1)[::-1], 1)


def memcnn_nice(fs, x):
    """A layer of NICE is RevNet's coupling with F = 0; the next layer has the halves the other way round."""
    for i, f in enumerate(fs):
        x = memcnn([Nothing(), f], exchanged(x) if i else x)
    return x if len(fs) % 2 else exchanged(x)


@ways
@families
@depths
def test_nice(depth, family, way):
    assert_agrees(reversa.AdditiveCoupling(), way, memcnn_nice, FAMILIES[family].functions(depth), halves_of(family))


@ways
@families
@depths
def test_irevnet(depth, family, way):
    """revlib's streams change places after every function, which is i-RevNet's step."""
    assert_agrees(reversa.IRevNet(), way, revlib, FAMILIES[family].functions(depth), halves_of(family))


# ---------------------------------------------------------------------- momentum


def momentumnet(gamma: float, learned: bool, use_backprop: bool, fs, x):
    """With the function that gives the first velocity behind the others, where there is one."""
    start = {"init_speed": True, "init_function": fs.pop()} if learned else {}
    return published("momentumnet").MomentumNet(fs, gamma=gamma, use_backprop=use_backprop, **start)(x)


def momentum(gamma: float, learned: bool, settings, fs, x):
    init = fs.pop() if learned else "zero"
    return chain(reversa.Momentum(gamma, init=init), fs, **settings)(x)


def both(gamma: float, learned: bool, depth: int, family: str, settings, use_backprop: bool):
    """A training step of ours, and of theirs."""
    fs = FAMILIES[family].functions(depth + learned)
    x = torch.randn(FAMILIES[family].shape, dtype=torch.float64, requires_grad=True)
    expected = trained(partial(momentumnet, gamma, learned, use_backprop), fs, x)
    return trained(partial(momentum, gamma, learned, settings), fs, x), expected


gammas = pytest.mark.parametrize("gamma", [0.5, 0.9])
starts = pytest.mark.parametrize("learned", [False, True], ids=["zero", "learned"])


@ways
@families
@depths
@starts
@gammas
def test_momentum(gamma, learned, depth, family, way):
    settings, tolerance = WAYS[way]
    assert_same(*both(gamma, learned, depth, family, settings, use_backprop=True), tolerance)


@families
@depths
@starts
@gammas
def test_momentum_without_stored_activations(gamma, learned, depth, family):
    """Their other mode has a backward pass written by hand; it rounds gamma to n / 65536, and v to float32."""
    assert_same(*both(gamma, learned, depth, family, {}, use_backprop=False), 1e-3)


def step_of_model(model: nn.Module, x):
    """The output and all gradients by place: the packages give the parameters other names, in the same order."""
    y = model(x)
    loss_of(y).backward()
    return {"output": y.detach()} | {str(i): grad for i, grad in enumerate(gradients(model).values())}


@gammas
def test_a_converted_resnet(gamma):
    """The blocks of a stage behind its first, with f(x) = block(x) - x, as ``transform_to_momentumnet`` has it."""
    package = published("momentumnet")
    model = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 3, 4, 1], num_classes=5).double()
    x = torch.randn(2, 3, 48, 48, dtype=torch.float64)
    theirs = package.transform_to_momentumnet(model, ["layer2", "layer3"], gamma=gamma, use_backprop=True)
    mine = reversa.convert(copy.deepcopy(model), reversa.Momentum(gamma), example=x)
    assert sum(len(stage.blocks) for stage in reversa.explain(mine).stages) == 2 + 3
    assert_same(step_of_model(mine, x), step_of_model(theirs, x), SAME)

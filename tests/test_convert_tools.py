"""Converted models under what people use around models: functional calls, checkpoints, parametrisations."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

from cases import assert_same, error
from convert_cases import (
    EXACTLY,
    GAMMA,
    Looped,
    leaf,
    looped,
    pair,
    ruled,
    straight,
    train,
)
from reversa.convert import convert, explain, restore
from reversa.errors import ConversionError


@pytest.mark.parametrize("used", [False, True], ids=["fresh", "after a step"])
def test_functional_call_with_other_parameters(used):
    model, reference = pair(looped())
    if used:
        model(leaf(4, 6))
    other = {name: (p.detach() * 1.1).requires_grad_() for name, p in model.named_parameters()}
    x = leaf(4, 6)
    ours = torch.autograd.grad(functional_call(model, other, x).square().sum(), list(other.values()))
    with torch.no_grad():
        for p in reference.parameters():
            p.mul_(1.1)
    theirs = torch.autograd.grad(ruled(reference, GAMMA)(x).square().sum(), list(reference.parameters()))
    assert all(error(a, b) < EXACTLY for a, b in zip(ours, theirs, strict=True))
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("used", [False, True], ids=["fresh", "after a step"])
def test_functional_gradients(used):
    model, reference = pair(looped())
    if used:
        model(leaf(4, 6))
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    x = torch.randn(4, 6, dtype=torch.float64)

    def loss(parameters, x):
        return functional_call(model, parameters, (x,)).square().sum()

    ruled(reference, GAMMA)(x).square().sum().backward()
    expected = {name: p.grad for name, p in reference.named_parameters()}
    assert_same(grad(loss)(parameters, x), expected, EXACTLY)

    each = vmap(grad(loss), in_dims=(None, 0))(parameters, x[:, None])
    assert_same({name: g.sum(0) for name, g in each.items()}, expected, EXACTLY)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_around_the_model(reentrant):
    model, reference = pair(looped(p=0.2))
    x = leaf(4, 6)
    expected = train(reference, ruled(reference, GAMMA), x)
    assert_same(train(model, lambda x: checkpoint(model, x, use_reentrant=reentrant), x), expected, EXACTLY)


def test_a_checkpoint_around_each_block():
    def loop(blocks, x):
        for block in blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return x

    model, reference = pair(looped(p=0.2))
    reference_loop, model.loop = reference.loop, loop
    assert reference_loop is straight
    x = leaf(4, 6)
    assert_same(train(model, model, x), train(reference, ruled(reference, GAMMA), x), EXACTLY)


# ---------------------------------------------------------------------- other changes of a module's class


class Double(nn.Module):
    def forward(self, weight):
        return 2 * weight


class OwnWeight(nn.Module):
    """A block with a parameter of its own, which a parametrisation can take."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6))

    def forward(self, x):
        return x + torch.tanh(x @ self.weight)


def test_a_converted_block_that_another_library_makes_a_subclass_of():
    """Parametrisations, and FSDP2 too, swap the class of an instance for a subclass of it."""
    model, reference = pair(looped(kind=OwnWeight))
    for module in (model, reference):
        for block in module.blocks:
            parametrize.register_parametrization(block, "weight", Double())
    x = leaf(4, 6)
    expected = train(reference, ruled(reference, GAMMA), x)
    assert_same(train(model, model, x), expected, EXACTLY)
    assert len(explain(model).stages[0].blocks) == 5
    with pytest.raises(ConversionError, match="converted already"):
        convert(model)
    for block in model.blocks:
        parametrize.remove_parametrizations(block, "weight")
    restore(model)
    assert type(model.blocks[0]) is OwnWeight
    assert type(model) is Looped


def test_to_restore_what_another_library_made_a_subclass_of_is_right_or_refused():
    model = convert(looped(kind=OwnWeight))
    parametrize.register_parametrization(model.blocks[2], "weight", Double())
    x = torch.randn(4, 6, dtype=torch.float64)
    plain = looped(kind=OwnWeight)
    parametrize.register_parametrization(plain.blocks[2], "weight", Double())
    plain.load_state_dict(model.state_dict())
    try:
        restore(model)
    except ConversionError as error:
        refused = str(error)
    else:
        refused = ""
        assert torch.equal(model(x), plain(x))
    assert not refused or "blocks.2" in refused


def test_spectral_norm_moves_its_vectors_once():
    model = looped()
    for block in model.blocks:
        parametrizations.spectral_norm(block.body[0])
    model, reference = pair(model)
    x = leaf(4, 6)
    actual, expected = train(model, model, x), train(reference, ruled(reference, GAMMA), x)
    assert any("_u" in name for name in expected)
    assert_same(actual, expected, EXACTLY)

"""Networks by name: their arithmetic against a plain loop, their sizes, their errors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import reversa
from reversa import models
from reversa.errors import SettingError, StateError
from reversa.schemes import SCHEMES


def small(**settings) -> nn.Module:
    torch.manual_seed(0)
    net = models.create("reversibleresnet", **({"depth": 7, "width": 4} | settings)).double()
    for module in net.modules():  # away from the first state, where residual functions are zero
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    return net


def images(number: int = 3) -> torch.Tensor:
    return torch.randn(number, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def momentum_by_hand(net, x, gamma):
    x = net.stem(x)
    for stage, chain in enumerate(net.chains):
        if stage:
            t = net.transitions[stage - 1]
            x = torch.relu(t.residual(x) + t.shortcut(x))
        v = torch.zeros_like(x)
        for f in chain.blocks:
            v = gamma * v + (1 - gamma) * f(x)
            x = x + v
    return net.head(net.norm(x).flatten(2).mean(2))


def test_momentum_network_is_the_papers_recurrence_and_so_are_its_gradients():
    net, x = small(scheme=reversa.Momentum(0.8)), images()
    for p in net.parameters():
        p.grad = None
    want = momentum_by_hand(net, x, 0.8)
    want_grads = torch.autograd.grad(want.square().sum(), list(net.parameters()))
    got = net(x)
    got_grads = torch.autograd.grad(got.square().sum(), list(net.parameters()))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    for a, b in zip(got_grads, want_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_revnet_network_moves_both_halves_in_turn():
    net, x = small(scheme=reversa.RevNet(), depth=3), images()
    y = net.stem(x)
    for stage, chain in enumerate(net.chains):
        y = net.transitions[stage - 1](y) if stage else y
        one, two = y.chunk(2, 1)
        for f, g in chain.blocks:
            one = one + f(two)
            two = two + g(one)
        y = torch.cat((one, two), 1)
    torch.testing.assert_close(net(x), net.head(net.norm(y).mean((2, 3))), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", SCHEMES)
def test_every_scheme_of_the_table_makes_a_network_that_learns_from_its_first_step(name):
    torch.manual_seed(0)
    net = models.create("reversibleresnet", num_classes=7, depth=3, width=4, channels=3, scheme=SCHEMES[name]())
    scores = net(torch.randn(2, 3, 9, 9))
    scores.square().sum().backward()
    assert scores.shape == (2, 7)
    # The last function of McCallum and Foster's chain moves the stream that is not the output.
    unused = 3 * 6 if name == "mccallumfoster" else 0
    assert sum(p.grad is None for p in net.parameters()) == unused


@pytest.mark.parametrize(("depth", "stages", "lengths"), [(54, 3, [18, 18, 18]), (50, 3, [17, 17, 16]), (5, 2, [3, 2])])
def test_depth_counts_residual_blocks(depth, stages, lengths):
    net = models.create("reversibleresnet", depth=depth, stages=stages, width=2)
    assert [len(chain.blocks) for chain in net.chains] == lengths


def test_the_default_has_at_least_fifty_blocks():
    net = models.create("reversibleresnet", width=2)
    assert sum(len(chain.blocks) for chain in net.chains) >= 50
    assert net.chains[0].scheme == reversa.Momentum(0.9)
    assert net.chains[0].engine == reversa.Invert()


def test_names_are_those_of_the_table():
    assert models.names() == sorted(models.MODELS)
    assert all(name == name.lower() and "-" not in name for name in models.names())


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: models.create("reversibleresnt"), "Did you mean: reversibleresnet"),
        (lambda: models.create("reversibleresnet", dept=3), "Did you mean: depth"),
        (lambda: models.create("reversibleresnet", depth=2), "depth >= 3"),
        (lambda: models.create("reversibleresnet", width=0), "at least 1, got 0"),
        (lambda: models.create("reversibleresnet", width=5), "even width"),
    ],
)
def test_bad_settings(call, told):
    with pytest.raises(SettingError, match=told):
        call()


@pytest.mark.parametrize(
    ("name", "settings", "told"),
    [
        ("reversibleresnet", {"scheme": "revnet"}, "scheme must be one of reversa.schemes.* got 'revnet'"),
        ("resnet32", {"survival": 2}, r"must lie in \(0, 1\], got 2$"),
        ("resnet32", {"blocks": 3}, "got blocks=3 for 3 widths"),
        ("revnet38", {"blocks": (3, 3)}, r"got blocks=\(3, 3\) for 3 widths"),
    ],
)
def test_settings_of_another_kind(name, settings, told):
    with pytest.raises(SettingError, match=told):
        models.create(name, **settings)


@pytest.mark.parametrize("side", [8, 24, 33])
def test_images_that_the_simple_network_does_not_take(side):
    net = models.create("simplehamiltonian218", blocks=1)
    with pytest.raises(StateError, match=rf"\(N, channels, 32, 32\), got \(1, 3, {side}, {side}\)"):
        net(torch.ones(1, 3, side, side))
    assert net(torch.ones(1, 3, 25, 32)).shape == (1, 10)

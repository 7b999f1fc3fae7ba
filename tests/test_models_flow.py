"""NICE and affine couplings as densities."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import reversa
from cases import assert_same, error, gradients
from reversa.errors import SettingError, StateError
from reversa.models import NICE

KINDS = pytest.mark.parametrize("coupling", ["additive", "affine"])
PRIORS = pytest.mark.parametrize("prior", ["logistic", "normal"])


def flow(dimension=2, **settings) -> NICE:
    torch.manual_seed(0)
    made = NICE(dimension, layers=4, hidden=16, depth=2, **settings).double()
    nn.init.normal_(made.log_scale, std=0.3)
    return made


@PRIORS
@KINDS
def test_a_density_has_the_integral_one(coupling, prior):
    """On a grid; the tails of a logistic density are longer."""
    net, reach = flow(coupling=coupling, prior=prior), 40.0 if prior == "logistic" else 20.0
    axis = torch.linspace(-reach, reach, 1201, dtype=torch.float64)
    points = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        total = net.log_prob(points).exp().sum() * (axis[1] - axis[0]) ** 2
    assert float(total) == pytest.approx(1, abs=1e-3)


@KINDS
def test_the_determinant_is_the_jacobians(coupling):
    net, x = flow(6, coupling=coupling), torch.randn(3, 6, dtype=torch.float64)
    _, told = net(x)
    for row, want in zip(x, told.detach(), strict=True):
        jacobian = torch.autograd.functional.jacobian(lambda r: net(r[None])[0][0], row)
        assert float(torch.linalg.slogdet(jacobian)[1]) == pytest.approx(float(want), abs=1e-12)


@PRIORS
@KINDS
def test_samples_come_from_the_density(coupling, prior):
    """The mean of log p over samples is minus the entropy: by samples, and by an integral over a grid."""
    net = flow(coupling=coupling, prior=prior)
    torch.manual_seed(1)
    x = net.sample(40_000)
    z = net(x)[0].detach()
    assert error(net.inverse(z), x) < 1e-10
    spread = math.pi**2 / 3 if prior == "logistic" else 1.0
    assert torch.allclose(z.var(0), torch.full((2,), spread, dtype=torch.float64), rtol=0.05)
    # E_p[1 / p(x)] over a box inside the support is its area.
    inside = (x.abs() < 0.5).all(1)
    with torch.no_grad():
        area = float((-net.log_prob(x[inside])).exp().sum() / len(x))
    assert area == pytest.approx(1, rel=0.1)


@KINDS
def test_it_learns_with_the_gradients_of_stored_activations(coupling):
    x, results = torch.randn(64, 2, dtype=torch.float64), []
    x[:, 1] = 0.3 * x[:, 1] + x[:, 0].square()  # a banana
    for engine in (reversa.Invert(), reversa.Store()):
        net = flow(coupling=coupling, engine=engine)
        (-net.log_prob(x).mean()).backward()
        results.append(gradients(net))
    assert_same(*results, 1e-11)
    net = flow(coupling=coupling)
    optimizer, losses = torch.optim.Adam(net.parameters(), lr=0.01), []
    for _ in range(60):
        loss = -net.log_prob(x).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.5


def test_the_papers_network():
    """MNIST: four couplings on halves of 392, five hidden layers of 1000, and 784 scales."""
    with torch.device("meta"):
        net = NICE(784)
    one = 392 * 1000 + 1000 + 4 * (1000 * 1000 + 1000) + 1000 * 392 + 392
    assert sum(p.numel() for p in net.parameters()) == 4 * one + 784


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dimension": 3}, "must be even, got 3"),
        ({"dimension": 2, "layers": 0}, "at least one layer"),
        ({"dimension": 2, "coupling": "cubic"}, "'additive' or 'affine', got 'cubic'"),
        ({"dimension": 2, "prior": "flat"}, "'logistic' or 'normal', got 'flat'"),
    ],
)
def test_settings_that_are_refused(settings, message):
    with pytest.raises(SettingError, match=message):
        NICE(**settings)


@pytest.mark.parametrize("x", [torch.ones(3, 4), torch.ones(3, 5), torch.ones(2), torch.ones(3, 2, dtype=torch.int64)])
def test_vectors_that_do_not_fit(x):
    flow = NICE(2, hidden=4)
    for call in (flow.log_prob, flow.inverse):
        with pytest.raises(StateError, match=r"vectors of floating-point numbers, \(N, 2\), got"):
            call(x)

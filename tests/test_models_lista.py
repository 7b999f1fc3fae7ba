"""LISTA: ISTA by hand, scikit-learn's Lasso, training, gradients of stored activations, bad input."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

import reversa
from reversa.errors import SettingError, StateError
from reversa.models.lista import Lista, lasso, random_problem

PENALTY = 0.1
SCHEMES = [None, reversa.Momentum(0.8), reversa.RevNet()]
schemes = pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: type(s).__name__)


def problem(samples: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    dictionary, y = random_problem(12, 6, samples, torch.Generator().manual_seed(0))
    return dictionary.double(), y.double()


def ista(dictionary, y, penalty, steps) -> torch.Tensor:
    """x' = ST(x - eta D^T (D x - y), eta lambda), sample by sample, as it is printed."""
    eta = 1 / torch.linalg.eigvalsh(dictionary.T @ dictionary).max()
    codes = []
    for sample in y:
        x = torch.zeros(dictionary.shape[1], dtype=y.dtype)
        for _ in range(steps):
            z = x - eta * dictionary.T @ (dictionary @ x - sample)
            x = z.sign() * (z.abs() - eta * penalty).clamp(min=0)
        codes.append(x)
    return torch.stack(codes)


def objective(x, y, dictionary, penalty) -> torch.Tensor:
    return torch.stack(
        [0.5 * (b - dictionary @ a).norm() ** 2 + penalty * a.norm(p=1) for a, b in zip(x, y, strict=True)]
    )


def test_the_lasso_value():
    dictionary, y = problem(5)
    x = torch.randn(5, 12, dtype=torch.float64)
    torch.testing.assert_close(lasso(x, y, dictionary, 0.3), objective(x, y, dictionary, 0.3))


def test_untrained_lista_is_ista_and_its_value_falls():
    dictionary, y = problem()
    values = []
    for depth in (1, 2, 5, 10, 40):
        x = Lista(dictionary, depth, PENALTY)(y)
        torch.testing.assert_close(x, ista(dictionary, y, PENALTY, depth), rtol=1e-11, atol=1e-11)
        values.append(objective(x, y, dictionary, PENALTY))
    for more, less in pairwise(values):
        assert (less <= more).all()
    assert values[-1].mean() < 0.8 * objective(0 * x, y, dictionary, PENALTY).mean()


def test_the_fixed_point_is_scikit_learns_lasso():
    """It divides the squares by twice the number of rows: alpha = penalty / d."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    dictionary, y = problem(4)
    x = Lista(dictionary, 3000, PENALTY)(y).detach()
    for sample, code in zip(y, x, strict=True):
        model = linear_model.Lasso(alpha=PENALTY / len(sample), fit_intercept=False, tol=1e-12, max_iter=100_000)
        want = torch.from_numpy(model.fit(dictionary.numpy(), sample.numpy()).coef_)
        assert want.count_nonzero() < 12
        torch.testing.assert_close(code, want, rtol=1e-6, atol=1e-6)


def test_momentum_and_revlista_by_hand():
    dictionary, y = problem()
    net = perturbed(Lista(dictionary, 4, PENALTY, reversa.Momentum(0.7)))
    x = v = torch.zeros(len(y), 12, dtype=torch.float64)
    for f in net.layers.blocks:
        v = 0.7 * v + 0.3 * (shrunk(f, x, y) - x)
        x = x + v
    torch.testing.assert_close(net(y), x, rtol=1e-11, atol=1e-11)
    net = perturbed(Lista(dictionary, 4, PENALTY, reversa.RevNet()))
    one = two = torch.zeros(len(y), 12, dtype=torch.float64)
    for f, g in net.layers.blocks:
        one = one + shrunk(f, two, y) - two
        two = two + shrunk(g, one, y) - one
    torch.testing.assert_close(net(y), (one + two) / 2, rtol=1e-11, atol=1e-11)


def perturbed(net: Lista) -> Lista:
    """Every layer with weights of its own."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return net


def shrunk(f: nn.Module, x, y) -> torch.Tensor:
    z = x @ f.code.T + y @ f.sample.T
    return z - z.clamp(-f.threshold, f.threshold)


def test_parameters():
    """p^2 + p d for each layer, twice for RevLISTA."""
    dictionary, _ = problem()
    counts = [sum(p.numel() for p in Lista(dictionary, 5, PENALTY, scheme).parameters()) for scheme in SCHEMES]
    assert counts == [5 * (12 * 12 + 12 * 6)] * 2 + [10 * (12 * 12 + 12 * 6)]
    assert {p.dtype for p in Lista(dictionary, 5, PENALTY).parameters()} == {torch.float64}


def test_problems_are_of_unit_norm_and_repeat():
    dictionary, y = random_problem(generator=torch.Generator().manual_seed(3))
    assert dictionary.shape == (16, 32)
    torch.testing.assert_close(dictionary.norm(dim=0), torch.ones(32))
    torch.testing.assert_close(y.norm(dim=1), torch.ones(1000))
    again = random_problem(generator=torch.Generator().manual_seed(3))
    assert torch.equal(again[0], dictionary)
    assert torch.equal(again[1], y)


@schemes
def test_training_lowers_the_value_on_samples_that_were_not_seen(scheme):
    dictionary, y = random_problem(samples=400, generator=torch.Generator().manual_seed(0))
    train, test = y[:300], y[300:]
    net = Lista(dictionary, 8, PENALTY, scheme)
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)

    def value(samples) -> torch.Tensor:
        return objective(net(samples), samples, dictionary, PENALTY).mean()

    before = value(test).item()
    for _ in range(100):
        optimizer.zero_grad()
        lasso(net(train), train, dictionary, PENALTY).mean().backward()
        optimizer.step()
    best = objective(ista(dictionary, test, PENALTY, 500), test, dictionary, PENALTY).mean().item()
    after = value(test).item()
    assert best < after < before
    assert after - best < 0.6 * (before - best)


@pytest.mark.parametrize("engine", [reversa.Invert(), reversa.Recompute()], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES[1:], ids=lambda s: type(s).__name__)
def test_gradients_are_those_of_stored_activations(scheme, engine):
    dictionary, y = problem()
    y.requires_grad_()
    net = perturbed(Lista(dictionary, 6, PENALTY, scheme))
    grads = []
    for net.layers.engine in (engine, reversa.Store()):
        value = lasso(net(y), y.detach(), dictionary, PENALTY).mean()
        grads.append(torch.autograd.grad(value, [*net.parameters(), y]))
    assert sum(not want.any() for want in grads[1]) == 1  # the first W1 has seen x = 0 only
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


def test_exact_arithmetic():
    dictionary, y = random_problem(generator=torch.Generator().manual_seed(0))
    net = Lista(dictionary, 30, PENALTY, reversa.Momentum(0.5), exact=True)
    grads = []
    for net.layers.engine in (reversa.Invert(), reversa.Store()):
        grads.append(torch.autograd.grad(lasso(net(y), y, dictionary, PENALTY).mean(), list(net.parameters())))
    assert all(torch.equal(got, want) for got, want in zip(*grads, strict=True))


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda d: Lista(d, 0, PENALTY), "depth must be at least 1"),
        (lambda d: Lista(d, 3, 0.0), "penalty must be above 0, got 0.0"),
        (lambda d: Lista(d[0], 3, PENALTY), r"the dictionary must be a matrix .* got \(12,\)"),
        (lambda d: Lista(0 * d, 3, PENALTY), "that is not zero"),
        (lambda d: Lista(d, 3, PENALTY, exact=True), "leave it out, or give a scheme"),
        (lambda d: Lista(d, 3, PENALTY, "momentum"), "scheme must be one of reversa.schemes"),
        (lambda d: random_problem(atoms=0), "atoms must be at least 1"),
    ],
)
def test_bad_settings(make, told):
    with pytest.raises(SettingError, match=told):
        make(problem()[0])


@pytest.mark.parametrize("shape", [(4, 32), (16,)])
def test_samples_that_do_not_fit(shape):
    net = Lista(random_problem()[0], 3, PENALTY)
    with pytest.raises(StateError, match=r"vectors of 16 numbers, \(N, 16\); got"):
        net(torch.ones(shape))

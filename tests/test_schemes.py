"""Schemes are formulas: the forward is the papers', the inverse undoes it, and what each declares is true."""

from __future__ import annotations

import dataclasses
import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import oracle
import reversa
from cases import CASES, Case, assert_same, error, mlp, step
from reversa.errors import SettingError, StateError
from reversa.models.runge_kutta import runge_kutta
from reversa.schemes import (
    SCHEMES,
    Leapfrog,
    Midpoint,
    Momentum,
    Scheme,
    State,
    round_trip,
    run,
    run_back,
    scheme_named,
)

every = pytest.mark.parametrize("name", CASES)


def functions(depth: int = 50, width: int = 6) -> list[nn.Module]:
    return [mlp(width).double().requires_grad_(False) for _ in range(depth)]


# Every one but those that need to evaluate f more often to find what it was evaluated at, and those of which nothing
# comes back.
inverted = pytest.mark.parametrize("name", [n for n, case in CASES.items() if case.scheme.amplification < math.inf])
direct = pytest.mark.parametrize(
    "name", [n for n, case in CASES.items() if case.share == 1 and case.scheme.amplification < math.inf]
)


def random_state(scheme: Scheme) -> State:
    return tuple(torch.randn(4, 6, dtype=torch.float64) for _ in range(scheme.num_streams))


class Times(nn.Module):
    def __init__(self, slope: float) -> None:
        super().__init__()
        self.slope = slope

    def forward(self, x):
        return self.slope * x


@every
def test_the_formula_is_the_papers(name):
    case, fs = CASES[name], functions(7 - 1)
    x = case.input(4, 6)
    torch.manual_seed(3)
    scheme = case.scheme.begun(x, 6, training=True)
    y = scheme.close(run(scheme, case.functions(fs), scheme.open(x)))
    torch.manual_seed(3)
    assert error(y, case.rule(fs, x)) < 1e-14


@pytest.mark.parametrize("init", [False, True])
@inverted
def test_round_trip(name, init):
    case = CASES[name]
    fs = case.functions(functions(50 if case.scheme.amplification < 1.2 else 14))
    state = random_state(case.scheme) if init else case.scheme.open(case.input(4, 6).detach())
    assert round_trip(case.scheme, fs, state) < 1e-11
    after = run(case.scheme, fs, state)
    assert all(not torch.equal(a, b) for a, b in zip(after, state, strict=True))  # it went somewhere


@inverted
def test_inverse_then_forward(name):
    """The inverse is defined on every state, not only on those that the forward reaches."""
    case = CASES[name]
    fs, state = case.functions(functions(10)), random_state(case.scheme)
    there_and_back = run(case.scheme, fs, run_back(case.scheme, fs, state))
    assert all(error(a, b) < 1e-12 for a, b in zip(there_and_back, state, strict=True))


@direct
def test_one_evaluation_in_each_direction(name):
    case, calls = CASES[name], []

    def f(x):
        calls.append(x)
        return x.sin()

    state = case.scheme.open(case.input(2, 4))
    after = run(case.scheme, [f] * 6, state)
    assert len(calls) == 6
    run_back(case.scheme, [f] * 6, after)
    assert len(calls) == 12
    for there, back in zip(calls[:6], reversed(calls[6:]), strict=True):
        assert error(back, there) < 1e-12


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if not case.scheme.multiplies])
def test_a_step_saves_nothing_for_the_backward_pass(name):
    """DESIGN: no operation of a scheme keeps a tensor of the state's size."""
    case, saved = CASES[name], []
    state = case.scheme.open(case.input(4, 6))
    value = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        after = case.scheme.forward(state, value, 0)
        argument, rest = case.scheme.uncover(after, 0)
        case.scheme.inverse(argument, rest, value, 0)
        case.scheme.close(after)
    assert [shape for shape in saved if shape.numel() > 1] == []


@every
def test_steps_do_not_change_what_they_are_given(name):
    case = CASES[name]
    state, value = case.scheme.open(case.input(4, 6).detach()), torch.randn(4, 6).double()
    before = [t.clone() for t in (*state, value)]
    after = case.scheme.forward(state, value, 0)
    kept = [t.clone() for t in after]
    argument, rest = case.scheme.uncover(after, 0)
    case.scheme.inverse(argument, rest, value, 0)
    assert all(map(torch.equal, (*state, value), before))
    assert all(map(torch.equal, after, kept))


@every
def test_second_derivatives_of_a_step(name):
    case = CASES[name]
    scheme = case.scheme.begun(torch.empty(2, 2), 4, training=True)

    def whole(x, w):
        return scheme.close(run(scheme, [lambda x: (x * w).tanh()] * 4, scheme.open(x)))

    x, w = case.input(2, 2), torch.randn(2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(whole, (x, w))
    assert torch.autograd.gradgradcheck(whole, (x, w))


# ---------------------------------------------------------------------- what a scheme declares


@pytest.mark.parametrize("cls", SCHEMES.values(), ids=SCHEMES)
def test_declarations(cls):
    scheme = cls()
    assert issubclass(cls, Scheme)
    assert cls.source
    assert ":math:" in cls.__doc__ or ".. math::" in cls.__doc__
    assert ">>>" in cls.__doc__
    assert cls.functions_per_block in (1, 2)
    assert len(scheme.open(torch.randn(2, 4))) == cls.num_streams
    assert scheme == cls()
    assert hash(scheme) == hash(cls())
    assert repr(scheme).startswith(cls.__name__)
    with pytest.raises(dataclasses.FrozenInstanceError):
        scheme.dim = 3


@pytest.mark.parametrize(
    ("name", "functions", "lossless"),
    [
        ("momentum", 1, False),
        ("revnet", 2, True),
        ("additive", 1, True),
        ("hamiltonian", 2, True),
        ("midpoint", 1, True),
        ("leapfrog", 1, True),
        ("irevnet", 1, True),
        ("affine", 2, False),
        ("iresnet", 1, False),
        ("reversibleheun", 1, True),
        ("mccallumfoster", 2, False),
        ("bdia", 1, False),
        ("dr2net", 1, False),
    ],
)
def test_what_families_declare(name, functions, lossless):
    scheme = SCHEMES[name]()
    assert (scheme.functions_per_block, scheme.lossless) == (functions, lossless)
    assert Momentum(1.0).lossless


@pytest.mark.parametrize("gamma", [0.3, 0.5, 0.8])
def test_amplification_is_measured(gamma):
    """A disturbance of the velocity grows by 1 / gamma in every inverse step."""
    scheme, zero = Momentum(gamma), torch.zeros(3, dtype=torch.float64)
    state = (zero, torch.full_like(zero, 1e-3))
    back = run_back(scheme, [torch.zeros_like] * 10, state)
    assert float(back[1][0] / 1e-3) == pytest.approx(scheme.amplification**10)


def test_drift_laws():
    eps = 2.0**-23
    assert Momentum(0.9).drift(64, eps) == pytest.approx(eps * 0.9**-64)
    assert Momentum(0.5).drift(10**6, eps) == math.inf
    for scheme in (reversa.RevNet(), reversa.AdditiveCoupling(), Momentum(1.0)):  # errors add up, and no more
        assert eps <= scheme.drift(1000, eps) <= 1000 * eps
    for scheme in (Momentum(0.9), reversa.RevNet()):
        laws = [scheme.drift(steps, eps) for steps in range(1, 100)]
        assert laws == sorted(laws)


# ---------------------------------------------------------------------- momentum


@pytest.mark.parametrize("gamma", [1.0, 0.999, 0.5, 1e-3, 1e-8])
def test_every_gamma_in_its_range(gamma):
    case, fs = Case(Momentum(gamma), partial(oracle.momentum, gamma=gamma)), functions(5)
    x = case.input(4, 6)
    assert error(case.sequence(fs)(x), case.rule(fs, x)) < 1e-13


@pytest.mark.parametrize("gamma", [0.0, -0.5, 1.0 + 1e-9, 2, float("nan"), float("inf")])
def test_every_gamma_outside(gamma):
    with pytest.raises(SettingError, match=r"gamma must lie in \(0, 1\], got"):
        Momentum(gamma)


def test_a_small_gamma_is_the_plain_residual_network():
    fs, x = functions(5), torch.randn(4, 6).double()
    y = x
    for f in fs:
        y = y + f(y)
    assert error(reversa.ReversibleSequence(fs, Momentum(1e-9))(x), y) < 1e-7


def test_a_learned_first_velocity():
    init, x = nn.Linear(6, 6), torch.randn(4, 6)
    scheme = Momentum(0.9, init=init)
    assert torch.equal(scheme.open(x)[1], init(x))
    assert scheme.modules() == (init,)
    with pytest.raises(SettingError, match="init must be 'zero' or a module"):
        Momentum(0.9, init="random")


# ---------------------------------------------------------------------- first steps


@pytest.mark.parametrize(
    ("scheme", "rule"),
    [(Midpoint(0.3, init), partial(oracle.midpoint, h=0.3, init=init)) for init in ("euler", "zero")]
    + [(Leapfrog(0.3, init), partial(oracle.leapfrog, h=0.3, init=init)) for init in ("rest", "zero", "euler")],
    ids=lambda case: str(case) if isinstance(case, Scheme) else "",
)
def test_every_first_step(scheme, rule):
    case, fs = Case(scheme, rule), functions(12)
    x = case.input(4, 6)
    assert error(case.sequence(fs)(x), rule(fs, x)) < 1e-13
    assert round_trip(scheme, fs, scheme.open(x.detach())) < 1e-12
    assert_same(step(case.with_engine(None), fs, x), step(rule, fs, x), 1e-11)


@pytest.mark.parametrize("kind", [reversa.Hamiltonian, Midpoint, Leapfrog])
def test_step_sizes_that_are_none(kind):
    for h in (0, -1.0, float("nan"), float("inf"), "0.1"):
        with pytest.raises(SettingError, match="step size h must be a positive number"):
            kind(h)


def test_first_steps_that_nobody_knows():
    with pytest.raises(SettingError, match="'euler' or 'zero', got 'rest'"):
        Midpoint(0.1, init="rest")
    with pytest.raises(SettingError, match="'rest', 'zero' or 'euler', got 'none'"):
        Leapfrog(0.1, init="none")


@pytest.mark.parametrize(
    ("scheme", "f"),
    [(reversa.Hamiltonian(0.5), 1.0), (Midpoint(0.5), None), (reversa.ReversibleHeun(0.5), None), (Leapfrog(0.5), 2.0)],
)
def test_linear_stability_is_as_declared(scheme, f):
    """Inside the region that the docstring names, ten thousand linear steps stay bounded; outside they do not."""
    turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)  # eigenvalues i and -i
    x = torch.randn(1, 4 if f == 1.0 else 2, dtype=torch.float64)
    for size, bounded in ((0.9, True), (4.5, False)):
        fs = [(lambda y, s=size: s * y @ turn.T) if f is None else (lambda y, s=size: s * f * y)] * 10_000
        if isinstance(scheme, Leapfrog) and not bounded:
            fs = [lambda y: -y] * 10_000
        last = run(scheme, fs, scheme.open(x))[0].abs().max()
        assert bool(last < 100 * x.abs().max()) == bounded


@pytest.mark.parametrize(
    ("scheme", "inside", "outside"),
    [
        (Momentum(0.9), [(-37.9,), (-0.01,)], [(-38.1,), (0.01,)]),
        (Momentum(0.5), [(-5.9,)], [(-6.1,)]),
        (reversa.RevNet(), [(1.9, -2.0), (-0.1, 0.1)], [(2.1, -2.0), (0.1, 0.1)]),
        (reversa.AdditiveCoupling(), [(1.9, -2.0), (-0.1, 0.1)], [(2.1, -2.0), (0.1, 0.1)]),
        (reversa.BDIA(random=False), [(-0.66,), (-0.01,)], [(-0.68,), (0.01,)]),
        (reversa.Dr2Net(0.3, 0.7), [(-0.59,), (-0.01,)], [(-0.61,), (0.01,)]),
        (reversa.IResNet(0.9), [(-0.9,)], [(0.01,)]),
    ],
    ids=str,
)
def test_stability_for_real_slopes_is_as_declared(scheme, inside, outside):
    x = torch.randn(1, 4, dtype=torch.float64)
    for slopes, bounded in [(s, True) for s in inside] + [(s, False) for s in outside]:
        fs = [lambda y, a=a: a * y for a in slopes] * (4000 // len(slopes))
        last = max(float(stream.abs().max()) for stream in run(scheme, fs, scheme.open(x)))
        assert (last < 1e3) == bounded, slopes


@pytest.mark.parametrize("coupling", [0.9, 0.5])
@pytest.mark.parametrize("method", ["euler", "heun", "rk4"])
def test_the_stability_of_mccallum_and_fosters_steps(method, coupling):
    """The declared interval, and by Euler's method its closed form."""
    one, seen = torch.ones(1, dtype=torch.float64), set()
    for slope in (-2.5, -1.9, -1.0, -0.51, -0.49, -0.11, -0.09, 0.01):
        up, down = runge_kutta(Times(slope), 1.0, method)
        product = float(-down(one) * (1 - coupling + up(one)))
        declared = 0 <= product <= 2 * (1 + coupling)
        if method == "euler":
            assert declared == (-(1 - coupling) <= slope <= 0)
        scheme = reversa.McCallumFoster(coupling)
        last = run(scheme, [up, down] * 3000, random_state(scheme))
        assert bool(max(s.abs().max() for s in last) < 1e3) == declared, slope
        seen.add(declared)
    assert seen == {True, False}


# ---------------------------------------------------------------------- couplings


@pytest.mark.parametrize("name", ["revnet", "additive", "hamiltonian", "irevnet"])
def test_odd_and_missing_dimensions(name):
    with pytest.raises(StateError, match=r"two equal streams.*\(2, 5\).*odd"):
        SCHEMES[name]().open(torch.randn(2, 5))
    with pytest.raises(StateError, match=r"dim=3.*\(2, 4\)"):
        SCHEMES[name](dim=3).open(torch.randn(2, 4))


@pytest.mark.parametrize("name", ["revnet", "additive", "hamiltonian", "irevnet"])
def test_couplings_preserve_volume(name):
    fs = functions(4, width=2)
    x = torch.randn(1, 4, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda x: CASES[name].sequence(fs)(x), x).view(4, 4)
    assert float(torch.linalg.det(jacobian).abs()) == pytest.approx(1, abs=1e-12)


def test_names():
    assert scheme_named("momentum") is Momentum
    with pytest.raises(SettingError, match=r"unknown scheme 'momentun'\. Did you mean: momentum"):
        scheme_named("momentun")
    with pytest.raises(SettingError, match=r"Known: .*momentum"):
        scheme_named("qqq")


@given(
    name=st.sampled_from(sorted(SCHEMES)),
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    depth=st.integers(1, 12),
    gamma=st.floats(0.3, 1.0),
    seed=st.integers(0, 1000),
)
def test_any_state_round_trips(name, shape, depth, gamma, seed):
    torch.manual_seed(seed)
    scheme = Momentum(gamma) if name == "momentum" else SCHEMES[name]()
    state = tuple(torch.randn(*shape, dtype=torch.float64) for _ in range(scheme.num_streams))
    share = 0.2 if name == "iresnet" else 1.0
    fs = [lambda x, w=float(w): share * (w * x).sin() for w in torch.randn(depth)]
    assert round_trip(scheme, fs, state) < 1e-12 * max(1, *(s.abs().max() for s in state)) * scheme.amplification**depth

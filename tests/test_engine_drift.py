"""Float drift: kept within bounds by default, announced or refused where the user switched that off."""

from __future__ import annotations

import math
import warnings
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import oracle
import reversa
from cases import CASES, Case, gradients, step
from reversa import Invert, Momentum
from reversa.engine.sample import Sample
from reversa.errors import DriftError, DriftWarning
from reversa.models.functions import Bias, Kernel, Symmetric

EPS = 2.0**-23  # float32


def layer(width: int = 32) -> nn.Module:
    return nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))


def total_error(actual, expected) -> float:
    """The error of all gradients together, relative to their length."""
    names = [name for name in expected if name.startswith("gradient")]
    difference = sum(float((actual[n].double() - expected[n].double()).square().sum()) for n in names)
    return math.sqrt(difference / sum(float(expected[n].double().square().sum()) for n in names))


@pytest.mark.parametrize("depth", [8, 128, 512])
@pytest.mark.parametrize("gamma", [0.5, 0.9, 0.99])
def test_anchors_keep_the_gradients_right_at_any_depth(gamma, depth):
    """Against the same float32 network with stored activations, so that what differs is the drift."""
    case = Case(Momentum(gamma), partial(oracle.momentum, gamma=gamma))
    fs, x = [layer() for _ in range(depth)], torch.randn(8, 32, requires_grad=True)
    expected, actual = step(case.rule, fs, x), step(case.with_engine(Invert()), fs, x)
    worst = max(total_error({n: actual[n]}, {n: expected[n]}) for n in expected if n.startswith("gradient"))
    assert worst < 1e-4  # for every single parameter


@pytest.mark.parametrize("gamma", [0.05, 0.3, 0.7])
def test_anchors_in_float64(gamma):
    case = Case(Momentum(gamma), partial(oracle.momentum, gamma=gamma))
    fs, x = [layer(8).double() for _ in range(64)], torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    assert total_error(step(case.with_engine(Invert()), fs, x), step(case.rule, fs, x)) < 1e-9


def test_without_anchors_the_law_is_true():
    """What the warnings say happens: the gradient is lost in about the order of magnitude that the law gives."""
    fs, x = [layer() for _ in range(64)], torch.randn(8, 32, requires_grad=True)
    for gamma, depth in ((0.5, 16), (0.5, 20), (0.8, 48), (0.9, 64)):
        case = Case(Momentum(gamma), partial(oracle.momentum, gamma=gamma))
        engine = Invert(anchors=None, accept_drift=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DriftWarning)
            found = total_error(step(case.with_engine(engine), fs[:depth], x), step(case.rule, fs[:depth], x))
        law = EPS * gamma**-depth
        assert law / 100 < found < 10 * law, (gamma, depth, found, law)


@pytest.mark.parametrize(
    ("gamma", "quiet", "warned", "refused"),
    [(0.5, 9, 12, 20), (0.9, 60, 80, 120), (0.99, 600, 800, 1400), (0.1, 2, 4, 6)],
)
def test_anchors_switched_off(gamma, quiet, warned, refused):
    """The law is eps * gamma**-steps: above 1e-4 a warning, above 1e-2 an error unless the user insists."""
    assert EPS * gamma**-quiet < 1e-4 < EPS * gamma**-warned < 1e-2 < EPS * gamma**-refused
    f, x = nn.Tanh(), torch.randn(2, 3, requires_grad=True)

    def run(steps, **settings):
        engine = Invert(anchors=None, **settings)
        return reversa.ReversibleSequence([f] * steps, Momentum(gamma), engine=engine)(x)

    run(quiet)  # warnings are errors here
    with pytest.warns(DriftWarning) as caught:
        run(warned)
    assert len(caught) == 1
    with pytest.raises(DriftError) as error:
        run(refused)
    with pytest.warns(DriftWarning):
        run(refused, accept_drift=True)
    for message in (str(caught[0].message), str(error.value)):
        for remedy in ("anchors='auto'", "gamma", "exact=True", "float64"):
            assert remedy in message
    assert str(refused) in str(error.value)
    assert "accept_drift=True" in str(error.value)


def test_nothing_to_warn_about():
    f, x = nn.Tanh(), torch.randn(2, 4, requires_grad=True)
    off = Invert(anchors=None)
    reversa.ReversibleSequence([f] * 200, Momentum(0.9), engine=off)(x.double().detach()).sum()
    reversa.ReversibleSequence([f] * 64, Momentum(0.9), engine=off).double()(x.double()).sum().backward()
    reversa.ReversibleSequence([(f, f)] * 250, reversa.RevNet(), engine=off)(x).sum().backward()
    with torch.no_grad():
        reversa.ReversibleSequence([f] * 200, Momentum(0.5), engine=off)(x)
    reversa.ReversibleSequence([f] * 200, Momentum(0.5), engine=Invert(keep=195, anchors=None))(x).sum().backward()


@pytest.mark.parametrize("name", ["momentum-0.99", "revnet", "additive"])
def test_depth_512_in_float32(name):
    case = CASES[name]
    fs = [layer(16) for _ in range(512)]
    for f in fs:
        with torch.no_grad():
            f[2].weight.mul_(0.1)
    x = case.input(4, 16, dtype=torch.float32)
    assert total_error(step(case.with_engine(Invert()), fs, x), step(case.rule, fs, x)) < 1e-4


@pytest.mark.parametrize(("gamma", "at_least", "at_most"), [(0.5, 512 // 10, 100), (0.9, 512 // 64, 20), (0.99, 2, 4)])
def test_repr_says_how_many_states_are_stored(gamma, at_least, at_most):
    import re

    seq = reversa.ReversibleSequence([layer(4) for _ in range(512)], Momentum(gamma))
    said = re.search(r"(\d+) states? \(one every (\d+) steps\)", repr(seq))
    assert said is not None, repr(seq)
    states, every = map(int, said.groups())
    assert states == math.ceil(512 / every)
    assert at_least <= states <= at_most
    assert EPS * gamma**-every < 1e-4  # what the law asks for


@given(gamma=st.floats(0.02, 0.999), depth=st.integers(1, 40), seed=st.integers(0, 99))
def test_any_gamma_in_float32(gamma, depth, seed):
    torch.manual_seed(seed)
    case = Case(Momentum(gamma), partial(oracle.momentum, gamma=gamma))
    fs, x = [layer(8) for _ in range(depth)], torch.randn(4, 8, requires_grad=True)
    assert total_error(step(case.with_engine(Invert()), fs, x), step(case.rule, fs, x)) < 1e-4


def test_gradients_are_there_for_every_parameter_at_depth():
    seq = reversa.ReversibleSequence([layer(4) for _ in range(300)], Momentum(0.9))
    seq(torch.randn(2, 4)).sum().backward()
    assert all(g is not None and torch.isfinite(g).all() for g in gradients(seq).values())


# ---------------------------------------------------------------------- drift that no law foresees


def wild(h: float, blocks: int, width: int = 16, dtype: torch.dtype = torch.float32) -> tuple[Case, list[nn.Module]]:
    """A Hamiltonian network of weights so large that neighbouring states part; the scheme itself loses nothing."""
    torch.manual_seed(0)
    fs = [Symmetric(Kernel(width, None), Bias(width)).to(dtype) for _ in range(2 * blocks)]
    for f in fs:
        nn.init.normal_(f.kernel.weight, std=width**-0.5)
    return Case(reversa.Hamiltonian(h), partial(oracle.hamiltonian, h=h)), fs


def error_of_gradients(case: Case, fs, x, **settings) -> float:
    return total_error(step(case.with_engine(Invert(**settings)), fs, x), step(case.rule, fs, x))


def test_the_gradient_is_right_or_there_is_a_warning_or_an_error():
    """From ten blocks on, which lose nothing, to a hundred, which lose everything."""
    met = set()
    for blocks in (5, 10, 14, 16, 18, 20, 22, 25, 30, 40, 100):
        (case, fs), x = wild(1.0, blocks), torch.randn(8, 32, requires_grad=True)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", DriftWarning)
            try:
                wrong = error_of_gradients(case, fs, x)
            except DriftError:
                met.add("error")
                continue
        told = any(issubclass(w.category, DriftWarning) for w in caught)
        assert wrong < (0.3 if told else 2e-2), blocks
        met.add("warning" if told else "right")
    assert met == {"right", "warning", "error"}


def test_what_the_error_advises_helps():
    (case, fs), x = wild(1.0, 40), torch.randn(8, 32, requires_grad=True)
    with pytest.raises(DriftError, match=r"recovered for step 16 \(Symmetric\) differs.*exact=True.*anchors=k"):
        step(case.with_engine(Invert()), fs, x)
    assert error_of_gradients(case, fs, x, anchors=8) < 1e-3
    (gentle, fs), x = wild(0.1, 40), torch.randn(8, 32, requires_grad=True)
    assert error_of_gradients(gentle, fs, x) < 1e-5


def test_who_accepts_drift_hears_nothing_of_it():
    (case, fs), x = wild(1.0, 40), torch.randn(8, 32, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", DriftWarning)
        assert error_of_gradients(case, fs, x, accept_drift=True) > 1e-2


@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (64, 4096), (2, 3, 70, 70), (1, 1, 1, 500_000)])
def test_a_sample_is_small_and_from_everywhere(shape):
    x = torch.randn(shape)
    sample = Sample(x, (x, x), 1e-4)
    assert 0 < sample.elements.numel() <= 8 * 1024
    sample.compare(x, "step 0")
    with pytest.raises(DriftError, match=r"differs .* by 2e\+00"):
        sample.compare(-x, "step 0")
    layout = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
    Sample(layout, (layout,), 1e-4).compare(layout.contiguous(), "step 0")
    zeros = torch.zeros(3, 5)
    Sample(zeros, (zeros, torch.ones(3, 5)), 1e-4).compare(zeros + 1e-7, "step 0")
    Sample(zeros, (zeros, zeros), 1e-4).compare(zeros, "step 0")
    with pytest.warns(DriftWarning, match="by 1e-03 of its size"):
        Sample(zeros, (zeros, torch.ones(3, 5)), 1e-4).compare(zeros + 1e-3, "step 0")

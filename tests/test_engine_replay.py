"""The second evaluation sees what the first one saw, and leaves no trace."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import reversa
from cases import CASES, DEPTH, ENGINES, INVERTERS, Function, assert_same, conv, mlp, step

NAMES = ["momentum", "revnet"]


def sequence(*besides, depth: int = DEPTH, engine=None, scheme=None):
    """A momentum chain of double functions, and its input."""
    fs = [Function(besides[i] if i < len(besides) else None).double() for i in range(depth)]
    seq = reversa.ReversibleSequence(fs, scheme or reversa.Momentum(0.9), engine=engine)
    return seq, torch.randn(4, 6, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", NAMES)
def test_two_forwards_before_one_backward_each_have_their_own_masks(case, engine):
    case, fs = CASES[case], [mlp(p=0.4).double() for _ in range(6)]
    one, two = case.input(4, 6), case.input(4, 6)

    def twice(rule):
        def run(fs, one, two):
            return rule(fs, one), rule(fs, two)

        return run

    expected = step(twice(case.rule), fs, one, two)
    assert_same(step(twice(case.with_engine(ENGINES[engine])), fs, one, two), expected, 1e-12)


@pytest.mark.parametrize("engine", INVERTERS)
def test_backward_uses_and_moves_no_random_number_of_the_caller(engine):
    seq, x = sequence(*[lambda f, x, y: torch.dropout(y, 0.5, True)] * 3, engine=ENGINES[engine])
    y = seq(x)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    y.sum().backward()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", NAMES)
def test_batch_norm_statistics_move_once_and_in_training_only(case, engine, training):
    case, fs = CASES[case], [conv().double().train(training) for _ in range(4)]
    x = case.input(3, 4, 5, 5)
    actual = step(case.with_engine(ENGINES[engine]), fs, x)
    assert_same(actual, step(case.rule, fs, x), 1e-12)
    assert {int(n) for name, n in actual.items() if "num_batches" in name} == {int(training)}


@pytest.mark.parametrize("engine", ENGINES)
def test_buffers_that_f_itself_writes_to_move_once(engine):
    class Counting(nn.Module):
        """Its output depends on the counter: a replay with another count would give another gradient."""

        def __init__(self) -> None:
            super().__init__()
            self.body = mlp()
            self.register_buffer("count", torch.ones(()))

        def forward(self, x):
            self.count += 1
            return self.body(x) * self.count

    case, fs = CASES["momentum"], [Counting().double() for _ in range(4)]
    x = case.input(4, 6)
    assert_same(step(case.with_engine(ENGINES[engine]), fs, x), step(case.rule, fs, x), 1e-12)


@pytest.mark.parametrize("engine", INVERTERS)
def test_a_module_switched_to_eval_before_backward_is_replayed_in_training_mode(engine):
    fs, x = [nn.Sequential(nn.BatchNorm1d(6), mlp(p=0.4)).double() for _ in range(5)], CASES["momentum"].input(4, 6)

    def switching(rule):
        def run(fs, x):
            y = rule(fs, x)
            for f in fs:
                f.eval()
            return y

        return run

    case = CASES["momentum"]
    assert_same(step(switching(case.with_engine(ENGINES[engine])), fs, x), step(switching(case.rule), fs, x), 1e-12)


@pytest.mark.parametrize("engine", ENGINES)
def test_autocast_is_replayed(engine):
    # Inputs on a coarse grid and outputs of 8 bits: sums are exact, so the inverse is, and no rounding may differ.
    case, fs = CASES["revnet"], [mlp() for _ in range(6)]
    x = (case.input(4, 6, dtype=torch.float32) * 64).round().div(64).detach().requires_grad_()

    def under_autocast(rule):
        def run(fs, x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return rule(fs, x)

        return run

    expected = step(under_autocast(case.rule), fs, x)
    assert_same(step(under_autocast(case.with_engine(ENGINES[engine])), fs, x), expected, 1e-6)
    with pytest.raises(AssertionError):  # the oracle tells the two apart
        assert_same(step(case.rule, fs, x), expected, 1e-6)


@pytest.mark.parametrize("engine", INVERTERS)
def test_backward_inside_autocast_replays_a_forward_outside_of_it(engine):
    case, fs = CASES["momentum"], [mlp() for _ in range(4)]
    x, seen = torch.randn(4, 6, requires_grad=True), []
    seq = case.sequence(fs, ENGINES[engine])
    for f in fs:
        f[0].register_forward_hook(lambda m, args, output: seen.append((reversa.is_replaying(), output.dtype)))
    y = seq(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y.sum().backward()
    assert {dtype for _, dtype in seen} == {torch.float32}
    assert {replaying for replaying, _ in seen} == {False, True}


def test_f_is_evaluated_once_more_and_knows_it():
    seq, x = sequence()
    calls = []
    for i, f in enumerate(seq.functions):
        f.register_forward_hook(lambda m, args, output, i=i: calls.append((i, reversa.is_replaying())))
    seq(x).sum().backward()
    assert calls == [(i, False) for i in range(DEPTH)] + [(i, True) for i in reversed(range(DEPTH))]

"""What a replay cannot see as the forward pass did is an error that names the step, never a wrong gradient."""

from __future__ import annotations

import copy
import re
import subprocess
import sys

import pytest
import torch
from torch import nn

import reversa
from cases import CASES, DEPTH, INVERTERS, Attention, Function, assert_same, conv, gradients, loss_of, mlp
from reversa.errors import ReplayError, StateError

NAMES = ["momentum", "revnet"]


def sequence(*besides, depth: int = DEPTH, engine=None, scheme=None):
    """A momentum chain of double functions, and its input."""
    fs = [Function(besides[i] if i < len(besides) else None).double() for i in range(depth)]
    seq = reversa.ReversibleSequence(fs, scheme or reversa.Momentum(0.9), engine=engine)
    return seq, torch.randn(4, 6, dtype=torch.float64, requires_grad=True)


def refused(loss, message: str) -> bool:
    """Whether forward or backward raises an error with that message; False where both run."""
    try:
        loss().backward()
    except RuntimeError as error:
        if not re.search(message, str(error)):
            raise
        return True
    return False


@pytest.mark.parametrize("what", ["weight", "bias"])
@pytest.mark.parametrize("engine", INVERTERS)
def test_a_parameter_changed_in_place_before_backward(engine, what):
    seq, x = sequence(engine=INVERTERS[engine])
    y = seq(x)
    with torch.no_grad():
        getattr(seq.functions[2].body[3 - 1], what).mul_(1.5)
    with pytest.raises(ReplayError, match=r"step 2 \(Function\).*changed in place"):
        y.sum().backward()


def test_an_optimizer_step_before_backward_is_refused_and_says_what_to_do():
    seq, x = sequence()
    optimizer = torch.optim.SGD(seq.parameters(), lr=0.1)
    y = seq(x)
    seq(x).sum().backward()
    optimizer.step()
    with pytest.raises(ReplayError, match=r"step \d.*before optimizer\.step\(\)|step \d.*changed in place"):
        y.sum().backward()


@pytest.mark.parametrize("engine", INVERTERS)
@pytest.mark.parametrize("case", NAMES)
def test_statistics_used_in_eval_changed_in_place_before_backward(case, engine):
    case, fs = CASES[case], [conv().double().eval() for _ in range(4)]
    y = case.sequence(fs, INVERTERS[engine])(case.input(3, 4, 5, 5))
    fs[1][1].running_mean.add_(1.0)
    with pytest.raises(ReplayError, match=r"step 1 .*running_mean.*changed in place"):
        y.sum().backward()


@pytest.mark.parametrize("training", [True, False])
def test_a_buffer_changed_in_place_before_backward(training):
    seq, x = sequence(None, None, None, lambda f, x, y: y * f.scale)
    seq.functions[3].register_buffer("scale", torch.tensor(2.0, dtype=torch.float64))
    seq.train(training)
    y = seq(x)
    seq.functions[3].scale.add_(1)
    with pytest.raises(ReplayError, match=r"step 3 .*'scale'.*changed in place"):
        y.sum().backward()


@pytest.mark.parametrize("engine", ["invert", "invert-one-by-one"])
def test_a_tensor_that_f_holds_by_itself_changed_in_place_before_backward(engine):
    """Neither parameter, nor buffer, nor argument: seen because its gradient needs it."""
    seq, x = sequence(None, lambda f, x, y: y * f.scale, engine=INVERTERS[engine])
    seq.functions[1].scale = torch.randn(6, dtype=torch.float64)
    y = seq(x)
    seq.functions[1].scale.add_(1)
    with pytest.raises(ReplayError, match=r"step 1 .*changed in place"):
        y.sum().backward()


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("keyword", [False, True])
@pytest.mark.parametrize("engine", INVERTERS)
def test_an_extra_input_changed_in_place_before_backward(engine, keyword, nested):
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = mlp()

        def forward(self, x, shift):
            return self.body(x + (shift[0]["a"] if nested else shift))

    fs, x = [Shifted().double() for _ in range(4)], CASES["momentum"].input(4, 6)
    shift = torch.randn(6, dtype=torch.float64)
    extra = [{"a": shift}] if nested else shift
    seq = CASES["momentum"].sequence(fs, INVERTERS[engine])
    y = seq(x, shift=extra) if keyword else seq(x, extra)
    shift.add_(1)
    with pytest.raises(ReplayError, match=r"step \d .*changed in place"):
        y.sum().backward()


@pytest.mark.parametrize("engine", INVERTERS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("what", ["output", "input"])
def test_the_ends_of_a_chain_changed_in_place_give_an_error_or_the_right_gradient(case, engine, what):
    case = CASES[case]
    for depth in (1, 2, 5):
        fs = [mlp().double() for _ in range(depth * case.scheme.functions_per_block)]
        leaf = case.input(4, 6)
        expected = copy.deepcopy(fs)
        torch.manual_seed(depth)
        case.rule(expected, leaf).sum().backward()
        x = leaf.detach().clone()  # without a gradient, so autograd itself keeps nothing of it
        torch.manual_seed(depth)
        y = case.sequence(fs, INVERTERS[engine])(x)
        with torch.no_grad():
            (y if what == "output" else x).mul_(3)
        if refused(y.sum, "changed in place|inplace operation"):
            continue
        assert_same(gradients(nn.ModuleList(fs)), gradients(nn.ModuleList(expected)), 1e-12)


def test_a_changed_output_names_the_step():
    seq, x = sequence()
    y = seq(x)
    with torch.no_grad():
        y.mul_(3)
    with pytest.raises(ReplayError, match=r"step 7 .*changed in place"):
        y.sum().backward()


def test_a_tensor_saved_inside_f_and_changed_by_f_is_refused_as_autograd_does():
    def spoil(f, x, y):
        e = y.exp()
        e.add_(1)  # exp's gradient needs its own output
        return e

    seq, x = sequence(None, spoil)
    with pytest.raises(RuntimeError, match=r"step 1 .*changed in place|inplace operation"):
        seq(x).sum().backward()


@pytest.mark.parametrize("engine", INVERTERS)
def test_a_replay_that_saves_other_tensors_than_the_forward(engine):
    def branch(f, x, y):
        f.calls = getattr(f, "calls", 0) + 1
        return y if f.calls % 2 else y.tanh().exp()

    seq, x = sequence(None, branch, engine=INVERTERS[engine])
    with pytest.raises(ReplayError, match=r"step 1 .*saved"):
        seq(x).sum().backward()


@pytest.mark.parametrize("engine", ["invert", "invert-one-by-one"])
def test_a_replay_that_saves_tensors_of_another_shape_or_type(engine):
    def shape(f, x, y):
        f.calls = getattr(f, "calls", 0) + 1
        return y * torch.ones(6 if f.calls % 2 else 1, dtype=y.dtype)

    def kind(f, x, y):
        f.calls = getattr(f, "calls", 0) + 1
        middle = y if f.calls % 2 else y.float()
        return middle.tanh().double() if f.calls % 2 == 0 else middle.tanh()

    for besides in (shape, kind):
        seq, x = sequence(None, None, besides, engine=INVERTERS[engine])
        with pytest.raises(ReplayError, match="step 2 "):
            seq(x).sum().backward()


@pytest.mark.parametrize("engine", INVERTERS)
def test_f_that_computes_a_gradient_in_its_own_forward_is_right_or_refused(engine):
    def inner(f, x, y):
        return y + torch.autograd.grad(y.sum(), x, create_graph=True)[0]

    seq, x = sequence(None, inner, engine=INVERTERS[engine])
    stored = copy.deepcopy(seq)
    stored.engine = reversa.Store()
    stored(x).sum().backward()
    expected, x.grad = {"x": x.grad, **gradients(stored)}, None
    if not refused(lambda: seq(x).sum(), r"Store\(\)"):  # the message names the remedy
        assert_same({"x": x.grad, **gradients(seq)}, expected, 1e-12)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("case", NAMES)
@pytest.mark.parametrize("engine", ["invert", "invert-one-by-one", "invert-group3"])
def test_a_value_that_is_not_finite_names_its_step(engine, case, bad):
    case = CASES[case]
    fs = [Function((lambda f, x, y: y + bad) if i == 3 else None).double() for i in range(DEPTH)]
    y = case.sequence(fs, INVERTERS[engine])(case.input(4, 6))
    with pytest.raises((StateError, ReplayError), match="step 3 "):
        y.sum().backward()


@pytest.mark.parametrize("engine", ["invert", "invert-one-by-one"])
def test_an_input_or_a_sum_that_is_not_finite(engine):
    seq, x = sequence(engine=INVERTERS[engine])
    with torch.no_grad():
        x[0, 0] = float("inf")
    with pytest.raises(StateError, match=r"step 0 \(Function\)"):
        seq(x).sum().backward()


def test_large_states_are_looked_at_too():
    fs = [Attention(16) for _ in range(5)]
    x = torch.randn(8, 128, 16, requires_grad=True)  # above the size up to which steps are replayed in groups
    fs[2].out.register_forward_hook(lambda m, args, output: output * float("nan"))
    y = reversa.ReversibleSequence(fs, reversa.Momentum(0.9))(x)
    with pytest.raises((StateError, ReplayError), match="step 2 "):
        loss_of(y).backward()


def test_after_an_error_in_the_backward_pass_python_ends_in_order():
    """Autograd leaves the rest of a graph with branches in its queue, whose end comes after Python's."""
    code = """
import torch, reversa
class Branches(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (torch.nn.Conv2d(1, 1, 1) for _ in range(3))
    def forward(self, x):
        return torch.cat([self.b(self.a(x[:, :1])), self.c(x[:, 1:]).tanh()], 1)
fs = [Branches() for _ in range(4)]
torch.nn.init.constant_(fs[1].a.weight, float("nan"))
seq = reversa.ReversibleSequence(list(zip(fs[::2], fs[1::2])), reversa.RevNet())
try:
    seq(torch.randn(2, 4, 4, 4)).square().mean().backward()
except reversa.errors.StateError:
    print("refused")
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (0, "refused\n"), ended.stderr

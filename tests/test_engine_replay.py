"""The second evaluation sees what the first one saw, leaves no trace, and refuses where it cannot."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import CASES, DEPTH, ENGINES, INVERTERS, Attention, assert_same, conv, gradients, loss_of, mlp, step
from torch import nn

import reversa
from reversa.errors import ReplayError, StateError

NAMES = ["momentum", "revnet"]


class Function(nn.Module):
    """A residual function that does something else besides."""

    def __init__(self, besides=None, width: int = 6) -> None:
        super().__init__()
        self.body, self.besides = mlp(width), besides

    def forward(self, x, *args):
        y = self.body(x)
        return y if self.besides is None else self.besides(self, x, y)


def sequence(*besides, depth: int = DEPTH, engine=None, scheme=None):
    """A momentum chain of double functions, and its input."""
    fs = [Function(besides[i] if i < len(besides) else None).double() for i in range(depth)]
    seq = reversa.ReversibleSequence(fs, scheme or reversa.Momentum(0.9), engine=engine)
    return seq, torch.randn(4, 6, dtype=torch.float64, requires_grad=True)


# ---------------------------------------------------------------------- what is put back


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


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("what", ["weight", "bias"])
@pytest.mark.parametrize("engine", INVERTERS)
def test_a_parameter_changed_in_place_before_backward(engine, what):
    seq, x = sequence(engine=ENGINES[engine])
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
    y = case.sequence(fs, ENGINES[engine])(case.input(3, 4, 5, 5))
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
    seq = CASES["momentum"].sequence(fs, ENGINES[engine])
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
        case.rule(expected, leaf).sum().backward()
        x = leaf.detach().clone()  # without a gradient, so autograd itself keeps nothing of it
        y = case.sequence(fs, ENGINES[engine])(x)
        with torch.no_grad():
            (y if what == "output" else x).mul_(3)
        try:
            y.sum().backward()
        except RuntimeError as error:
            assert isinstance(error, ReplayError) or "inplace operation" in str(error)
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

    seq, x = sequence(None, branch, engine=ENGINES[engine])
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
        seq, x = sequence(None, None, besides, engine=ENGINES[engine])
        with pytest.raises(ReplayError, match="step 2 "):
            seq(x).sum().backward()


@pytest.mark.parametrize("engine", INVERTERS)
def test_f_that_computes_a_gradient_in_its_own_forward_is_right_or_refused(engine):
    def inner(f, x, y):
        return y + torch.autograd.grad(y.sum(), x, create_graph=True)[0]

    seq, x = sequence(None, inner, engine=ENGINES[engine])
    stored = copy.deepcopy(seq)
    stored.engine = reversa.Store()
    stored(x).sum().backward()
    expected, x.grad = {"x": x.grad, **gradients(stored)}, None
    try:
        seq(x).sum().backward()
    except ReplayError as error:
        assert "Store()" in str(error)  # names the remedy
        return
    assert_same({"x": x.grad, **gradients(seq)}, expected, 1e-12)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("case", NAMES)
@pytest.mark.parametrize("engine", ["invert", "invert-one-by-one", "invert-group3"])
def test_a_value_that_is_not_finite_names_its_step(engine, case, bad):
    case = CASES[case]
    fs = [Function((lambda f, x, y: y + bad) if i == 3 else None).double() for i in range(DEPTH)]
    y = case.sequence(fs, ENGINES[engine])(case.input(4, 6))
    with pytest.raises((StateError, ReplayError), match="step 3 "):
        y.sum().backward()


@pytest.mark.parametrize("engine", ["invert", "invert-one-by-one"])
def test_an_input_or_a_sum_that_is_not_finite(engine):
    seq, x = sequence(engine=ENGINES[engine])
    with torch.no_grad():
        x[0, 0] = float("inf")
    with pytest.raises((StateError, ReplayError), match="not finite|inf or nan"):
        seq(x).sum().backward()


def test_large_states_are_looked_at_too():
    fs = [Attention(16) for _ in range(5)]
    x = torch.randn(8, 128, 16, requires_grad=True)  # above the size up to which steps are replayed in groups
    fs[2].out.register_forward_hook(lambda m, args, output: output * float("nan"))
    y = reversa.ReversibleSequence(fs, reversa.Momentum(0.9))(x)
    with pytest.raises((StateError, ReplayError), match="step 2 "):
        loss_of(y).backward()

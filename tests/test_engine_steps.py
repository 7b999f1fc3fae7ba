"""Step by step: a chain inside somebody else's loop, each step with its own arguments."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import oracle
import reversa
from cases import CASES, ENGINES, INVERTERS, Case, assert_same, gradients, loss_of, mlp
from reversa.errors import BlockError, ReversaError, SettingError

STEPWISE = {name: engine for name, engine in ENGINES.items() if name != "recompute3"}
stepwise = pytest.mark.parametrize("engine", STEPWISE)
schemes = pytest.mark.parametrize("case", CASES)
# Without those of which a part is no chain of its own: signs are drawn for the whole, or the last step is another one.
partial_schemes = pytest.mark.parametrize(
    "case", [name for name in CASES if name not in ("bdia", "reversibleheun", "mccallumfoster")]
)
lengths = pytest.mark.parametrize("known", [True, False], ids=["length known", "length unknown"])


class Shifted(nn.Module):
    """A residual function with an argument of its own for each step."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp(p=0.2)

    def forward(self, x, shift=None, *, scale=1.0):
        return self.body(x if shift is None else x + shift) * scale


def functions(depth: int = 8):
    fs = nn.ModuleList(Shifted() for _ in range(depth)).double()
    return fs, copy.deepcopy(fs)


def arguments(depth: int = 8):
    """Every step differs: a shift or none, a scale or none."""
    shifts = [torch.randn(6, dtype=torch.float64, requires_grad=True) if i % 3 else None for i in range(depth)]
    return [((shift,), {"scale": 1.0 + i / 8} if i % 2 else {}) for i, shift in enumerate(shifts)]


def run(case: Case, engine, fs, x, given, known=True, each=None):
    """The library's chain, made by hand."""
    scheme = case.scheme.begun(x, len(fs), training=True)
    steps = engine.begin(scheme, length=len(fs) if known else None)
    state, output = scheme.open(x), None
    for i, (f, (args, kwargs)) in enumerate(zip(case.functions(fs), given, strict=True)):
        state, output = steps.step(f, state, args=args, kwargs=kwargs)
        if each is not None:
            each(i, scheme.close(state))
    steps.end()
    assert isinstance(output, torch.Tensor)
    return case.scheme.close(state)


def expected_of(case: Case, fs, x, given):
    """The oracle over functions that hold their own arguments."""
    bound = [lambda x, f=f, a=args, k=kwargs: f(x, *a, **k) for f, (args, kwargs) in zip(fs, given, strict=True)]
    return case.rule(bound, x)


def everything(fs, x, given):
    extras = {f"shift {i}": args[0].grad for i, (args, _) in enumerate(given) if args[0] is not None}
    return {"x": x.grad, **extras, **gradients(fs)}


@lengths
@stepwise
@schemes
def test_each_step_has_its_own_arguments(case, engine, known):
    case, (fs, plain) = CASES[case], functions()
    x, given = case.input(4, 6), arguments()
    x2, given2 = copy.deepcopy((x, given))
    torch.manual_seed(1)
    y = run(case, STEPWISE[engine], fs, x, given, known)
    loss_of(y).backward()
    torch.manual_seed(1)
    want = expected_of(case, plain, x2, given2)
    loss_of(want).backward()
    tolerance = case.tolerance(1e-12, STEPWISE[engine])
    assert_same({"y": y, **everything(fs, x, given)}, {"y": want, **everything(plain, x2, given2)}, tolerance)


@lengths
@stepwise
@partial_schemes
def test_backward_in_between_and_more_steps_later(case, engine, known):
    case, (fs, plain) = CASES[case], functions()
    x, given = case.input(4, 6), arguments()
    x2, given2 = copy.deepcopy((x, given))

    def early(i, y):
        if i in (2, 3, 6):
            y.sin().sum().backward(retain_graph=True)

    torch.manual_seed(1)
    loss_of(run(case, STEPWISE[engine], fs, x, given, known, early)).backward()
    torch.manual_seed(1)
    even = 2 if case.scheme.functions_per_block == 2 else 1
    for i in (2, 3, 6):  # the oracle computes every prefix by itself
        torch.manual_seed(1)
        prefix = oracle_prefix(case, plain[: i + 1], x2, given2[: i + 1], even)
        prefix.sin().sum().backward()
    torch.manual_seed(1)
    loss_of(expected_of(case, plain, x2, given2)).backward()
    assert_same(everything(fs, x, given), everything(plain, x2, given2), case.tolerance(1e-12, STEPWISE[engine]))


def oracle_prefix(case: Case, fs, x, given, functions_per_block: int):
    """A chain may end in the middle of a block: the second function is then as if it returned zero."""
    bound = [lambda x, f=f, a=args, k=kwargs: f(x, *a, **k) for f, (args, kwargs) in zip(fs, given, strict=True)]
    while len(bound) % functions_per_block:
        bound.append(torch.zeros_like)
    return case.rule(bound, x)


@stepwise
@partial_schemes
def test_states_in_between_may_be_used(case, engine):
    """Taps, auxiliary heads: any state on the way takes part in the loss."""
    case, (fs, plain) = CASES[case], functions()
    x, given = case.input(4, 6), arguments()
    x2, given2 = copy.deepcopy((x, given))
    taps: list[torch.Tensor] = []
    torch.manual_seed(1)
    run(case, STEPWISE[engine], fs, x, given, each=lambda i, y: taps.append(y))
    sum(loss_of(tap) for tap in taps[1::2]).backward()
    for i in range(1, 8, 2):
        torch.manual_seed(1)
        loss_of(oracle_prefix(case, plain[: i + 1], x2, given2[: i + 1], case.scheme.functions_per_block)).backward()
    assert_same(everything(fs, x, given), everything(plain, x2, given2), case.tolerance(1e-12, STEPWISE[engine]))


@pytest.mark.parametrize("ended", [True, False])
@stepwise
def test_a_chain_that_is_left_early(engine, ended):
    case, (fs, plain) = CASES["momentum"], functions()
    x, given = case.input(4, 6), arguments()
    x2, given2 = copy.deepcopy((x, given))
    steps, state = STEPWISE[engine].begin(case.scheme, length=8), case.scheme.open(x)
    torch.manual_seed(1)
    for f, (args, kwargs) in list(zip(fs, given, strict=True))[:5]:
        state, _ = steps.step(f, state, args, kwargs)
    if ended:
        steps.end()
    loss_of(case.scheme.close(state)).backward()
    torch.manual_seed(1)
    loss_of(expected_of(case, plain[:5], x2, given2[:5])).backward()
    assert_same(everything(fs, x, given), everything(plain, x2, given2), 1e-12)


class Biased(nn.Module):
    """Makes a bias when it is given none, as T5's first block does, and hands it on."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.bias = mlp(), nn.Linear(6, 6)

    def forward(self, x, bias=None):
        bias = self.bias(x).exp() if bias is None else bias
        return self.body(x * bias), bias * 1.5


@stepwise
def test_an_extra_output_of_one_step_is_an_argument_of_the_next(engine):
    case = CASES["momentum"]
    fs = nn.ModuleList(Biased() for _ in range(6)).double()
    plain, x = copy.deepcopy(fs), case.input(4, 6)
    x2 = copy.deepcopy(x)
    steps, state, bias = STEPWISE[engine].begin(case.scheme, length=6), case.scheme.open(x), None
    for f in fs:
        state, (_, bias) = steps.step(f, state, args=(bias,))
    steps.end()
    (loss_of(case.scheme.close(state)) + loss_of(bias)).backward()
    y, v, bias = x2, torch.zeros_like(x2), None
    for f in plain:
        value, bias = f(y, bias)
        v = 0.9 * v + (1 - 0.9) * value
        y = y + v
    (loss_of(y) + loss_of(bias)).backward()
    assert_same({"x": x.grad, **gradients(fs)}, {"x": x2.grad, **gradients(plain)}, 1e-12)


@stepwise
def test_local_losses_over_a_graph_that_is_freed_part_by_part(engine):
    """Plain training may free one step's part and use another's; here that is right, or refused with the remedy."""
    case, (fs, plain) = CASES["momentum"], functions(6)
    x, given = case.input(4, 6), [((), {})] * 6
    x2, taps = copy.deepcopy(x), []
    torch.manual_seed(1)
    run(case, STEPWISE[engine], fs, x, given, each=lambda i, y: taps.append(y))
    for i in (5, 2, 4, 0):
        torch.manual_seed(1)
        want = torch.autograd.grad(
            loss_of(expected_of(case, plain[: i + 1], x2, given[: i + 1])), plain[i].parameters()
        )
        try:
            have = torch.autograd.grad(loss_of(taps[i]), fs[i].parameters())
        except ReversaError as error:
            assert "retain_graph=True" in str(error)  # noqa: PT017 - either is right
            continue
        assert_same(dict(enumerate(have)), dict(enumerate(want)), 1e-12)


@stepwise
def test_f_may_be_a_function_over_a_module(engine):
    """What conversion does: f(x) = block(x) - x, where the block's parameters and buffers are watched."""
    case = CASES["momentum"]
    fs = nn.ModuleList(nn.Sequential(nn.BatchNorm1d(6), mlp()) for _ in range(5)).double()
    plain, x = copy.deepcopy(fs), case.input(4, 6)
    x2 = copy.deepcopy(x)
    steps, state = STEPWISE[engine].begin(case.scheme), case.scheme.open(x)
    for m in fs:
        state, _ = steps.step(lambda x, m=m: m(x).tanh() - x, state, module=m)
    steps.end()
    loss_of(case.scheme.close(state)).backward()
    loss_of(oracle.momentum([lambda x, m=m: m(x).tanh() - x for m in plain], x2, gamma=0.9)).backward()
    buffers, buffers2 = dict(fs.named_buffers()), dict(plain.named_buffers())
    assert_same({"x": x.grad, **gradients(fs), **buffers}, {"x": x2.grad, **gradients(plain), **buffers2}, 1e-12)


@pytest.mark.parametrize("engine", INVERTERS)
def test_a_module_is_watched_although_f_is_not_it(engine):
    case, m = CASES["momentum"], mlp().double()
    steps, state = INVERTERS[engine].begin(case.scheme), case.scheme.open(case.input(4, 6))
    for _ in range(3):
        state, _ = steps.step(lambda x: m(x) - x, state, module=m)
    steps.end()
    with torch.no_grad():
        m[0].bias.add_(1)
    with pytest.raises(ReversaError, match=r"step \d .*changed in place"):
        state[0].sum().backward()


@stepwise
def test_a_step_that_fails_leaves_the_chain_as_it_was(engine):
    case, (fs, plain) = CASES["momentum"], functions(4)
    x, given = case.input(4, 6), arguments(4)
    x2, given2 = copy.deepcopy((x, given))
    steps, state = STEPWISE[engine].begin(case.scheme, length=4), case.scheme.open(x)

    def broken(x):
        (fs[0](x) * 2).exp()
        raise KeyError("broken")

    torch.manual_seed(1)
    for i, (f, (args, kwargs)) in enumerate(zip(fs, given, strict=True)):
        if i == 2:
            random = torch.get_rng_state()
            with pytest.raises(KeyError, match="broken"):
                steps.step(broken, state)
            with pytest.raises(BlockError, match="step 2"):
                steps.step(lambda x: None, state)
            torch.set_rng_state(random)
        state, _ = steps.step(f, state, args, kwargs)
    steps.end()
    loss_of(case.scheme.close(state)).backward()
    torch.manual_seed(1)
    loss_of(expected_of(case, plain, x2, given2)).backward()
    assert_same(everything(fs, x, given), everything(plain, x2, given2), 1e-12)


def test_recomputing_several_steps_in_one_needs_them_all():
    with pytest.raises(SettingError, match=r"Recompute\(every=3\).*Recompute\(every=1\)"):
        reversa.Recompute(every=3).begin(reversa.Momentum(0.9), length=6)

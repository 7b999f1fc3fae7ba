"""The graph is autograd's own: whatever one may ask of it in plain training, one may ask of a reversible chain."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import CASES, DEPTH, ENGINES, INVERTERS, Attention, assert_same, gradients, loss_of, mlp, step
from oracle import Plain
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import reversa

NAMES = ["momentum", "revnet"]

everywhere = pytest.mark.parametrize("engine", ENGINES)
inverting = pytest.mark.parametrize("engine", INVERTERS)
both = pytest.mark.parametrize("case", NAMES)


def pair(case: str, engine: str, depth: int = DEPTH):
    """A chain and the oracle over a copy of its functions, and one input for each."""
    found = CASES[case]
    seq = found.sequence([mlp().double() for _ in range(depth)], ENGINES[engine])
    plain = Plain(copy.deepcopy(seq.blocks), found.rule)
    x = found.input(4, 6)
    return seq, plain, x, x.detach().clone().requires_grad_()


# ---------------------------------------------------------------------- who has a gradient


FROZEN = {
    "first blocks": lambda i, name: i < 3,
    "last blocks": lambda i, name: i >= DEPTH - 3,
    "one block": lambda i, name: i == 4,
    "all but one": lambda i, name: i != 4,
    "weights": lambda i, name: "weight" in name,
    "alternating biases": lambda i, name: i % 2 == 0 and "bias" in name,
    "all": lambda i, name: True,
}


@pytest.mark.parametrize("with_input", [True, False])
@pytest.mark.parametrize("pattern", FROZEN)
@everywhere
@both
def test_frozen_parameters(case, engine, pattern, with_input):
    if pattern == "all" and not with_input:
        return  # nothing to train
    case, fs = CASES[case], [mlp().double() for _ in range(DEPTH)]
    for i, f in enumerate(fs):
        for name, p in f.named_parameters():
            p.requires_grad_(not FROZEN[pattern](i, name))
    x = case.input(4, 6).detach().requires_grad_(with_input)
    assert_same(step(case.with_engine(ENGINES[engine]), fs, x), step(case.rule, fs, x), 1e-12)


class Lora(nn.Module):
    """A frozen linear map and a trained one of low rank beside it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down, self.up = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


@everywhere
@both
def test_adapters_in_some_blocks(case, engine):
    case, fs = CASES[case], [mlp().requires_grad_(False) for _ in range(DEPTH)]
    for i in (1, 2, 5):
        fs[i][0] = Lora(fs[i][0])
    fs = [f.double() for f in fs]
    x = case.input(4, 6).detach()
    assert_same(step(case.with_engine(ENGINES[engine]), fs, x), step(case.rule, fs, x), 1e-12)


@everywhere
@pytest.mark.parametrize("case", CASES)
def test_one_function_at_every_step(case, engine):
    case, fs = CASES[case], [mlp(p=0.2).double()] * 6
    x = case.input(4, 6)
    assert_same(step(case.with_engine(ENGINES[engine]), fs, x), step(case.rule, fs, x), 1e-12)


@everywhere
@pytest.mark.parametrize("case", CASES)
def test_input_without_gradient(case, engine):
    case, fs = CASES[case], [mlp().double() for _ in range(DEPTH)]
    x = case.input(4, 6).detach()
    actual = step(case.with_engine(ENGINES[engine]), fs, x)
    assert_same(actual, step(case.rule, fs, x), 1e-12)
    assert sum(g is not None for name, g in actual.items() if name.startswith("gradient of")) == 4 * DEPTH


class Mixing(nn.Module):
    """Takes tensors as it likes: positional, by keyword, in nested containers."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()

    def forward(self, x, shift, pair=None, *, scale=None, nested=None, mask=None, flag=True, nothing=None):
        assert flag and nothing is None
        y = x * scale + shift + pair[0] * pair[1] + nested["a"][0]
        return self.body(y.masked_fill(mask, 0.0) if mask is not None else y)


@pytest.mark.parametrize("leaf", [True, False], ids=["leaf", "with a graph"])
@everywhere
@both
def test_extra_arguments_of_every_kind(case, engine, leaf):
    case, fs = CASES[case], [Mixing().double() for _ in range(6)]
    x, shift, one, two, scale, deep = case.input(4, 6), *(torch.randn(4, 6).double().requires_grad_() for _ in range(5))
    mask = torch.rand(4, 6) > 0.8

    def run(rule):
        def forward(fs, x, shift, one, two, scale, deep):
            if not leaf:
                shift, one, two, scale, deep = shift.tanh(), one * two, two.exp(), scale + 1, x.mean() * deep
            extras = {"scale": scale, "nested": {"a": [deep, None]}, "mask": mask, "flag": True, "nothing": None}
            return rule(fs, x, shift, (one, two), **extras)

        return forward

    expected = step(run(case.rule), fs, x, shift, one, two, scale, deep)
    assert_same(step(run(case.with_engine(ENGINES[engine])), fs, x, shift, one, two, scale, deep), expected, 1e-12)


@everywhere
def test_the_input_itself_as_an_extra_argument(engine):
    case, fs = CASES["momentum"], [Attention().double() for _ in range(4)]
    x = case.input(2, 3, 8)

    def run(rule):
        return lambda fs, x: rule(fs, x, memory=x)

    assert_same(step(run(case.with_engine(ENGINES[engine])), fs, x), step(run(case.rule), fs, x), 1e-12)


# ---------------------------------------------------------------------- more than one backward


@everywhere
@both
def test_gradients_of_a_subset(case, engine):
    seq, plain, x, x2 = pair(case, engine)
    for names in (["1", "5"], ["0"], [str(DEPTH - 1)], []):

        def of(module, names=names):
            return [p for i in names for p in list(module.parameters())[4 * int(i) : 4 * int(i) + 2]]

        actual = torch.autograd.grad(loss_of(seq(x)), [*of(seq), x][: len(of(seq)) or 1])
        expected = torch.autograd.grad(loss_of(plain(x2)), [*of(plain), x2][: len(of(plain)) or 1])
        assert_same(dict(enumerate(actual)), dict(enumerate(expected)), 1e-12)


@everywhere
@both
def test_subsets_one_after_another_over_one_graph(case, engine):
    seq, plain, x, x2 = pair(case, engine)
    loss, loss2 = loss_of(seq(x)), loss_of(plain(x2))
    for i in (3, 6, 0, 7, 2, 2):
        actual = torch.autograd.grad(loss, list(seq.parameters())[4 * i : 4 * i + 4], retain_graph=True)
        expected = torch.autograd.grad(loss2, list(plain.parameters())[4 * i : 4 * i + 4], retain_graph=True)
        assert_same(dict(enumerate(actual)), dict(enumerate(expected)), 1e-12)


@everywhere
@both
def test_a_second_backward_over_a_retained_graph(case, engine):
    seq, plain, x, x2 = pair(case, engine)
    for module, inp in ((seq, x), (plain, x2)):
        loss = loss_of(module(inp))
        loss.backward(retain_graph=True)
        loss.backward(retain_graph=True)
        loss.backward()
    assert_same({"x": x.grad, **gradients(seq)}, {"x": x2.grad, **gradients(plain)}, 1e-12)


@everywhere
@both
def test_a_second_backward_over_a_freed_graph_raises(case, engine):
    seq, _, x, _ = pair(case, engine)
    loss = loss_of(seq(x))
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@everywhere
@both
def test_two_losses_of_one_output(case, engine):
    seq, plain, x, x2 = pair(case, engine)
    for module, inp in ((seq, x), (plain, x2)):
        y = module(inp)
        y[:, :3].sin().sum().backward(retain_graph=True)
        (y**3).sum().backward()
    assert_same({"x": x.grad, **gradients(seq)}, {"x": x2.grad, **gradients(plain)}, 1e-12)


@everywhere
@both
def test_two_backwards_taking_turns(case, engine):
    """A backward pass inside another one: a hook of the outer pass runs the inner one over the same graph."""
    seq, plain, x, x2 = pair(case, engine)
    results = []
    for module, inp in ((seq, x), (plain, x2)):
        y = module(inp)
        inner = []
        weight = list(module.parameters())[12]
        weight.register_hook(
            lambda g, s=y.sum(), inp=inp, inner=inner: inner.append(
                torch.autograd.grad(s, inp, retain_graph=True)[0]
            )
        )
        y.sin().sum().backward(retain_graph=True)
        results.append({"x": inp.grad, "inner": inner[0], "count": torch.tensor(len(inner)), **gradients(module)})
    assert_same(*results, 1e-12)


@everywhere
@both
def test_double_backward(case, engine):
    seq, plain, x, x2 = pair(case, engine, 4)
    for module, inp in ((seq, x), (plain, x2)):
        (g,) = torch.autograd.grad(loss_of(module(inp)), inp, create_graph=True)
        (g**2).sum().backward()
    assert_same({"x": x.grad, **gradients(seq)}, {"x": x2.grad, **gradients(plain)}, 1e-11)


@everywhere
@both
def test_against_finite_differences(case, engine):
    case = CASES[case]
    fs = [nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)).double() for _ in range(4)]
    seq, x = case.sequence(fs, ENGINES[engine]), case.input(2, 2)
    parameters = list(seq.parameters())[:4]
    assert torch.autograd.gradcheck(lambda x, *_: seq(x), (x, *parameters))
    assert torch.autograd.gradgradcheck(lambda x, *_: seq(x), (x, *parameters))


# ---------------------------------------------------------------------- chains among others


class Inner(nn.Module):
    """A residual function that is a chain itself."""

    def __init__(self, case: str, engine: str) -> None:
        super().__init__()
        self.seq = CASES[case].sequence([mlp(4, p=0.2).double() for _ in range(4)], ENGINES[engine])

    def forward(self, x):
        return self.seq(x)


class InnerPlain(Inner):
    def forward(self, x):
        return Plain(self.seq.blocks, CASES["revnet"].rule)(x)


@pytest.mark.parametrize("inner", ["invert", "invert-anchors3", "store", "recompute1"])
@everywhere
@both
def test_a_chain_of_chains(case, engine, inner):
    case, fs = CASES[case], [Inner("revnet", inner) for _ in range(4)]
    plain = copy.deepcopy(fs)
    for f in plain:
        f.__class__ = InnerPlain
    x = case.input(4, 8)
    assert_same(step(case.with_engine(ENGINES[engine]), fs, x), step(case.rule, plain, x), 1e-12)


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.body, self.reentrant, self.on = mlp(p=0.3), reentrant, True

    def forward(self, x):
        return checkpoint(self.body, x, use_reentrant=self.reentrant) if self.on else self.body(x)


@everywhere
@both
def test_a_checkpoint_inside_f(case, engine):
    case, fs = CASES[case], [Checkpointed(reentrant=False).double() for _ in range(5 + 1)]
    plain = copy.deepcopy(fs)
    for f in plain:
        f.on = False
    x = case.input(4, 6)
    assert_same(step(case.with_engine(ENGINES[engine]), fs, x), step(case.rule, plain, x), 1e-12)


@pytest.mark.parametrize("reentrant", [True, False])
@everywhere
@both
def test_a_chain_inside_a_checkpoint(case, engine, reentrant):
    case, fs, x = CASES[case], [mlp(p=0.3).double() for _ in range(6)], CASES[case].input(4, 6)
    rule = case.with_engine(ENGINES[engine])

    def run(fs, x):
        return checkpoint(lambda x: rule(fs, x.sin()), x, use_reentrant=reentrant).cos()

    expected = step(lambda fs, x: case.rule(fs, x.sin()).cos(), fs, x)
    assert_same(step(run, fs, x), expected, 1e-12)


@everywhere
def test_chains_one_after_another(engine):
    rules = [CASES[name] for name in ("momentum", "revnet", "additive")]
    fs, x = [mlp().double() for _ in range(6)], torch.randn(4, 12, dtype=torch.float64, requires_grad=True)
    fs[:2] = [mlp(12).double() for _ in range(2)]

    def through(which):
        def run(fs, x):
            for i, rule in enumerate(which):
                x = rule(fs[2 * i : 2 * i + 2], x).tanh()
            return x

        return run

    expected = step(through([case.rule for case in rules]), fs, x)
    assert_same(step(through([case.with_engine(ENGINES[engine]) for case in rules]), fs, x), expected, 1e-12)


# ---------------------------------------------------------------------- functional calls, errors


@everywhere
@both
def test_functional_call_with_backward_outside_of_it(case, engine):
    seq, plain, x, x2 = pair(case, engine)
    results = []
    for module, inp in ((seq, x), (plain, x2)):
        leaves = {n: (p.detach() * 0.7).requires_grad_() for n, p in module.named_parameters()}
        y = functional_call(module, {n: p * 1.1 for n, p in leaves.items()}, (inp,))
        loss_of(y).backward()
        assert all(p.grad is None for p in module.parameters())
        results.append({"x": inp.grad, **{n: p.grad for n, p in leaves.items()}})
    assert_same(*results, 1e-12)


@everywhere
@both
def test_function_transforms(case, engine):
    seq, plain, x, x2 = pair(case, engine)
    results = []
    for module, inp in ((seq, x.detach()), (plain, x2.detach())):
        parameters = {n: p.detach() for n, p in module.named_parameters()}
        results.append(torch.func.grad(lambda ps, m=module, i=inp: functional_call(m, ps, (i,)).sin().sum())(parameters))
    assert_same(*results, 1e-12)


@everywhere
@both
@pytest.mark.parametrize("where", ["gradient", "replay"])
def test_an_exception_in_the_backward_pass_and_another_try(case, engine, where):
    seq, plain, x, x2 = pair(case, engine)
    calls = []

    def boom(*_):
        calls.append(1)
        if where == "gradient" or reversa.is_replaying():
            raise KeyError("boom")

    f = seq.functions[3]
    handle = f[0].weight.register_hook(boom) if where == "gradient" else f.register_forward_hook(boom)
    y, random = seq(x), torch.get_rng_state()
    raises = where == "gradient" or engine in INVERTERS and engine != "invert-keep2" or engine in INVERTERS
    if raises:
        with pytest.raises(KeyError, match="boom"):
            loss_of(y).backward(retain_graph=True)
    assert calls
    assert torch.equal(torch.get_rng_state(), random)
    assert not reversa.is_replaying()
    assert torch.is_grad_enabled()
    handle.remove()
    for inp, module in ((x, seq), (x2, plain)):
        inp.grad = None
        module.zero_grad()
    loss_of(y).backward() if raises else loss_of(seq(x)).backward()
    loss_of(plain(x2)).backward()
    assert_same({"x": x.grad, **gradients(seq)}, {"x": x2.grad, **gradients(plain)}, 1e-12)


@inverting
def test_an_exception_in_the_forward_pass_leaves_no_hooks_behind(engine):
    seq, plain, x, x2 = pair("momentum", engine)
    handle = seq.functions[3].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        seq(x)
    handle.remove()
    z = (x * x).sum()  # saved tensors of others stay tensors
    assert isinstance(z.grad_fn.next_functions[0][0]._saved_self, torch.Tensor)
    loss_of(seq(x)).backward()
    loss_of(plain(x2)).backward()
    assert_same({"x": x.grad, **gradients(seq)}, {"x": x2.grad, **gradients(plain)}, 1e-12)


# ---------------------------------------------------------------------- hooks


@everywhere
@both
def test_hooks_fire_once_and_in_plain_order(case, engine):
    seq, plain, x, x2 = pair(case, engine)
    logs = []
    for module, inp in ((seq, x), (plain, x2)):
        log = []
        for name, p in module.named_parameters():
            p.register_hook(lambda g, log=log, name=name: log.append(("hook", name)))
            p.register_post_accumulate_grad_hook(lambda p, log=log, name=name: log.append(("accumulated", name)))
        for name, m in module.named_modules():
            if isinstance(m, (nn.Linear, nn.GELU)):
                m.register_full_backward_hook(lambda m, a, b, log=log, name=name: log.append(("module", name)))
        inp.register_hook(lambda g, log=log: log.append(("hook", "x")))
        y = module(inp)
        y.register_hook(lambda g, log=log: log.append(("hook", "y")))
        loss_of(y).backward()
        logs.append(log)
    assert logs[0] == logs[1]
    assert len(set(logs[0])) == len(logs[0])
    assert_same({"x": x.grad, **gradients(seq)}, {"x": x2.grad, **gradients(plain)}, 1e-12)


@everywhere
def test_a_hook_that_changes_the_gradient(engine):
    seq, plain, x, x2 = pair("revnet", engine)
    for module, inp in ((seq, x), (plain, x2)):
        for p in module.parameters():
            p.register_hook(lambda g: g.clamp(-0.1, 0.1))
        for f in (f for block in module.blocks for f in block):
            f[2].register_full_backward_hook(lambda m, a, b: (a[0] * 2,))
        loss_of(module(inp)).backward()
    assert_same({"x": x.grad, **gradients(seq)}, {"x": x2.grad, **gradients(plain)}, 1e-12)

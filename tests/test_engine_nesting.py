"""Chains in chains, in checkpoints and around them, one after another; functional calls; errors on the way."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import reversa
from cases import CASES, ENGINES, INVERTERS, assert_same, gradients, loss_of, mlp, step
from engine_cases import both, everywhere, inverting, pair
from oracle import Plain

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
        results.append(
            torch.func.grad(lambda ps, m=module, i=inp: functional_call(m, ps, (i,)).sin().sum())(parameters)
        )
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
    raises = where == "gradient" or engine in INVERTERS  # the other engines know no replay
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

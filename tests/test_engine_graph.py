"""The graph is autograd's own: several backward passes, subsets, second derivatives."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cases import CASES, DEPTH, ENGINES, assert_same, gradients, loss_of
from engine_cases import both, everywhere, pair


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
        total = y.sum()
        weight.register_hook(
            lambda g, t=total, inp=inp, inner=inner: inner.append(torch.autograd.grad(t, inp, retain_graph=True)[0])
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

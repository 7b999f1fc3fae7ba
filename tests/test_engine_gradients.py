"""Who has a gradient, and when: frozen, shared and adapted modules, extra arguments, hooks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import reversa
from cases import CASES, DEPTH, ENGINES, Attention, assert_same, gradients, loss_of, mlp, step
from engine_cases import both, everywhere, pair

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
    unused = 4 if isinstance(case.scheme, reversa.McCallumFoster) else 0  # its last function moves the other stream
    assert sum(g is not None for name, g in actual.items() if name.startswith("gradient of")) == 4 * DEPTH - unused


class Mixing(nn.Module):
    """Takes tensors as it likes: positional, by keyword, in nested containers."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()

    def forward(self, x, shift, pair=None, *, scale=None, nested=None, mask=None, flag=True, nothing=None):
        assert flag
        assert nothing is None
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

"""torch.compile: on residual functions one graph serves forward and replay; on whole models the numbers are right."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

import reversa
from cases import CASES, INVERTERS, Attention, assert_same, conv, gradients, loss_of, mlp
from oracle import Plain

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),  # Dynamo looks at it
]
NAMES = ["momentum", "revnet"]


class Counting:
    """A backend that counts the graphs that it is given, and runs them as they are."""

    def __init__(self) -> None:
        self.forwards = self.backwards = 0
        self._compile = aot_autograd(fw_compiler=self._forward, bw_compiler=self._backward)

    def __call__(self, graph, inputs):
        return self._compile(graph, inputs)

    def _forward(self, graph, inputs):
        self.forwards += 1
        return make_boxed_func(graph)

    def _backward(self, graph, inputs):
        self.backwards += 1
        return make_boxed_func(graph)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def trained(module, x, *, seed: int = 3, **kwargs):
    module.zero_grad()
    x = x.detach().clone().requires_grad_()
    torch.manual_seed(seed)
    y = module(x, **kwargs)
    loss_of(y).backward()
    buffers = {name.replace("_orig_mod.", ""): b.clone() for name, b in module.named_buffers()}
    return {"y": y, "x": x.grad, **{n.replace("_orig_mod.", ""): g for n, g in gradients(module).items()}, **buffers}


@pytest.mark.parametrize("engine", ["invert", "invert-one-by-one", "invert-keep2"])
@pytest.mark.parametrize("case", NAMES)
def test_replay_needs_no_graph_of_its_own(case, engine):
    """One graph serves forward and replay of every step, since all arguments are laid out alike; never more than the
    oracle's chain over compiled functions needs (whose first streams are views of the input)."""
    found, ours, plains = CASES[case], Counting(), Counting()
    fs = [mlp().double() for _ in range(6)]
    x = found.input(4, 6)
    plain = found.sequence([torch.compile(f, backend=plains, dynamic=False) for f in copy.deepcopy(fs)])
    expected = trained(Plain(plain.blocks, found.rule), x)
    torch.compiler.reset()
    seq = found.sequence([torch.compile(f, backend=ours, dynamic=False) for f in fs], INVERTERS[engine])
    for _ in range(2):
        assert_same(trained(seq, x), expected, 1e-12)
    assert (ours.forwards, ours.backwards) == (1, 1)
    assert plains.forwards >= 1
    assert plains.backwards >= 1


@pytest.mark.parametrize(
    ("case", "make", "in_place"),
    [("momentum", mlp, True), ("revnet", conv, True), ("momentum", conv, False), ("revnet", Attention, False)],
)
def test_compiled_functions(case, in_place, make):
    found = CASES[case]
    fs = [make().double() for _ in range(4)]
    x = found.input(*{mlp: (4, 6), conv: (3, 4, 5, 5), Attention: (2, 3, 8)}[make])
    expected = trained(Plain(found.sequence(copy.deepcopy(fs)).blocks, found.rule), x)
    if in_place:
        for f in fs:
            f.compile(backend="aot_eager")
    else:
        fs = [torch.compile(f, backend="aot_eager") for f in fs]
    assert_same(trained(found.sequence(fs), x), expected, 1e-12)


def test_compiled_functions_with_extra_arguments():
    found, fs = CASES["momentum"], [Attention().double() for _ in range(4)]
    x = found.input(2, 3, 8)
    memory, memory2 = (torch.linspace(-1, 1, 2 * 7 * 8).double().view(2, 7, 8).requires_grad_() for _ in range(2))
    expected = trained(Plain(found.sequence(copy.deepcopy(fs)).blocks, found.rule), x, memory=memory)
    actual = trained(found.sequence([torch.compile(f, backend="aot_eager") for f in fs]), x, memory=memory2)
    assert_same({**actual, "memory": memory2.grad}, {**expected, "memory": memory.grad}, 1e-12)


def test_some_functions_compiled_and_some_not():
    found, fs = CASES["revnet"], [mlp().double() for _ in range(6)]
    x = found.input(4, 6)
    expected = trained(Plain(found.sequence(copy.deepcopy(fs)).blocks, found.rule), x)
    fs = [torch.compile(f, backend="aot_eager") if i % 3 else f for i, f in enumerate(fs)]
    assert_same(trained(found.sequence(fs), x), expected, 1e-12)


class Model(nn.Module):
    """A stem, a chain and a head."""

    def __init__(self, chain: nn.Module, width: int) -> None:
        super().__init__()
        self.stem, self.chain, self.head = nn.Linear(width, width), chain, nn.Linear(width, 3)

    def forward(self, x):
        return self.head(self.chain(self.stem(x).relu()))


def models(case: str, engine, dtype=torch.float64):
    found = CASES[case]
    seq = found.sequence([mlp() for _ in range(4)], engine)
    model = Model(seq, 6 * (1 + found.halves)).to(dtype)
    plain = copy.deepcopy(model)
    plain.chain = Plain(plain.chain.blocks, found.rule)
    return model, plain, found.input(4, 6, dtype=dtype)


@pytest.mark.parametrize(("case", "engine"), [("momentum", "invert"), ("revnet", "invert-keep2")])
def test_a_whole_model(case, engine):
    model, plain, x = models(case, INVERTERS[engine])
    compiled = torch.compile(model, backend="aot_eager")
    expected = trained(plain, x)
    for _ in range(2):
        assert_same(trained(compiled, x), expected, 1e-12)
    with torch.no_grad():
        assert_same({"y": compiled(x)}, {"y": plain(x)}, 1e-12)


def test_a_whole_model_with_dropout_and_statistics():
    def make():
        return nn.Sequential(nn.BatchNorm1d(6), mlp(p=0.3))

    found = CASES["momentum"]
    seq = found.sequence([make().double() for _ in range(4)])
    stored = copy.deepcopy(seq)
    stored.engine = reversa.Store()
    x = found.input(4, 6)
    compiled = torch.compile(seq, backend="aot_eager")
    expected = trained(Plain(stored.blocks, found.rule), x)
    assert_same(trained(compiled, x), expected, 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("whole", [False, True], ids=["functions", "whole model"])
def test_inductor(whole):
    model, plain, x = models("revnet", reversa.Invert(), torch.float32)
    expected = trained(plain, x)
    if whole:
        model = torch.compile(model)
    else:
        for f in model.chain.functions:
            f.compile()
    assert_same(trained(model, x), expected, 1e-5)

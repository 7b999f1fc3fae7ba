"""ReversibleSequence as a module among modules: modes, copies, states, representation."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import reversa
from cases import CASES, DEPTH, ENGINES, WithExtra, assert_same, conv, error, gradients, loss_of, mlp
from copies import COPIES, pickled
from oracle import Plain
from reversa.schemes import SCHEMES

NAMES = ["momentum", "revnet", "additive"]
everywhere = pytest.mark.parametrize("engine", ENGINES)
schemes = pytest.mark.parametrize("case", NAMES)


def pair(case: str, engine: str = "invert", make=mlp, depth: int = DEPTH):
    found = CASES[case]
    seq = found.sequence([make().double() for _ in range(depth)], ENGINES[engine])
    return seq, Plain(copy.deepcopy(seq.blocks), found.rule)


def train_alike(seq, plain, x, tolerance: float = 1e-12) -> None:
    """Three steps of SGD with momentum leave both with the same parameters and buffers."""
    for module in (seq, plain):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9)
        for seed in range(3):
            torch.manual_seed(seed)
            optimizer.zero_grad()
            loss_of(module(x)).backward()
            optimizer.step()
    state, want = seq.state_dict(), plain.state_dict()
    assert_same({name: state[name] for name in want}, dict(want), tolerance)


@everywhere
@schemes
def test_training(case, engine):
    seq, plain = pair(case, engine, conv, 4)
    train_alike(seq, plain, CASES[case].input(3, 4, 4, 4).detach(), 1e-10)


# ---------------------------------------------------------------------- modes


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("training", [True, False])
@everywhere
@schemes
def test_without_gradients(case, engine, training, mode):
    seq, plain = pair(case, engine, lambda: nn.Sequential(nn.BatchNorm1d(6), mlp(p=0.3)))
    seq.train(training)
    plain.train(training)
    x = CASES[case].input(4, 6)
    results = []
    for module in (seq, plain):
        torch.manual_seed(3)
        with mode():
            y = module(x)
        assert not y.requires_grad
        results.append({"y": y.clone(), "next": torch.rand(2), **{n: b.clone() for n, b in module.named_buffers()}})
    assert_same(*results, 1e-12)
    train_alike(seq.train(), plain.train(), x.detach(), 1e-10)


@everywhere
@schemes
def test_eval_mode_with_gradients(case, engine):
    seq, plain = pair(case, engine, conv, 4)
    x = CASES[case].input(3, 4, 4, 4)
    x2 = copy.deepcopy(x)
    before = copy.deepcopy(seq.state_dict())
    for module, inp in ((seq.eval(), x), (plain.eval(), x2)):
        loss_of(module(inp)).backward()
    assert_same({"x": x.grad, **gradients(seq)}, {"x": x2.grad, **gradients(plain)}, 1e-12)
    assert_same(dict(seq.state_dict()), before, 0)


@everywhere
def test_a_frozen_chain_over_a_plain_input_builds_no_graph(engine):
    seq, _ = pair("momentum", engine)
    assert not seq.requires_grad_(False)(torch.randn(4, 6).double()).requires_grad


# ---------------------------------------------------------------------- copies and files


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("when", ["before", "after a step", "between forward and backward"])
@everywhere
@schemes
def test_copies(case, engine, when, copied):
    seq, plain = pair(case, engine)
    x, y = CASES[case].input(4, 6), None
    if when != "before":
        y = seq(x)
        if when == "after a step":
            loss_of(y).backward()
            x.grad = None
            seq.zero_grad()
    twin = COPIES[copied](seq)
    assert repr(twin) == repr(seq)
    assert twin.engine == seq.engine
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in seq.parameters()}
    x2 = copy.deepcopy(x)
    loss_of(plain(x2)).backward()
    expected = {"x": x2.grad, **gradients(plain)}
    for module in (twin, seq):
        loss_of(module(x)).backward()
        assert_same({"x": x.grad, **gradients(module)}, expected, 1e-12)
        x.grad = None
        module.zero_grad()
    if when == "between forward and backward":
        loss_of(y).backward()
        assert_same({"x": x.grad, **gradients(seq)}, expected, 1e-12)


@schemes
def test_state_dict_travels(case):
    one, _ = pair(case)
    two, _ = pair(case)
    x = CASES[case].input(4, 6)
    assert not torch.equal(one(x), two(x))
    two.load_state_dict(one.state_dict())
    assert torch.equal(one(x), two(x))
    assert all(name.startswith("blocks.") for name in one.state_dict())


def test_a_learned_opening_is_registered_copied_and_moved_with_the_module():
    init = nn.Linear(6, 6)
    seq = reversa.ReversibleSequence([mlp() for _ in range(3)], reversa.Momentum(0.9, init=init))
    assert {"openers.0.weight", "openers.0.bias"} <= set(seq.state_dict())
    for twin in (copy.deepcopy(seq), pickled(seq)):
        x = torch.randn(4, 6)
        with torch.no_grad():
            for p in init.parameters():
                p.add_(1)
        before = twin(x)
        for p in twin.openers.parameters():  # the copy's scheme uses the copy's module
            p.data.zero_()
        assert not torch.equal(twin(x), before)
        assert torch.equal(init.weight, seq.openers[0].weight)
    seq.double()
    x = torch.randn(4, 6).double()
    seq(x).sum().backward()
    assert init.weight.grad is not None


# ---------------------------------------------------------------------- states


@schemes
def test_states(case):
    seq, plain = pair(case)
    x = CASES[case].input(4, 6).detach()
    states = seq.states(x)
    assert len(states) == DEPTH + 1
    assert error(seq.scheme.close(states[0]), x) == 0
    n = seq.scheme.functions_per_block
    for k in range(n, DEPTH + 1, n):
        part = Plain(plain.blocks[: k // n], plain.rule)
        assert error(seq.scheme.close(states[k]), part(x)) < 1e-14
    last = seq.forward_state(states[0])
    assert all(error(a, b) < 1e-14 for a, b in zip(last, states[-1], strict=True))
    first = seq.inverse_state(last)
    for stream, want in zip(first, seq.scheme.open(x), strict=True):
        assert (stream - want).abs().max() < 1e-12
    assert seq.inverse_state(last)[0].shape == states[0][0].shape


@everywhere
@schemes
def test_inverse_state_moves_no_statistics_and_forward_state_trains(case, engine):
    seq, plain = pair(case, engine, conv, 4)
    x = CASES[case].input(3, 4, 4, 4)
    x2 = copy.deepcopy(x)
    last = seq.forward_state(seq.scheme.open(x))
    before = {name: b.clone() for name, b in seq.named_buffers()}
    with torch.no_grad():
        seq.inverse_state(tuple(stream.detach() for stream in last))
    assert_same(dict(seq.named_buffers()), before, 0)
    loss_of(seq.scheme.close(last)).backward()
    loss_of(plain(x2)).backward()
    assert_same({"x": x.grad, **gradients(seq)}, {"x": x2.grad, **gradients(plain)}, 1e-12)


@everywhere
def test_tuples_come_out_as_the_last_function_made_them(engine):
    seq, plain = pair("momentum", engine, WithExtra, 3)
    x = torch.randn(4, 6).double()
    y, side, nothing, seven = seq(x)
    want = plain(x)
    assert nothing is None
    assert seven == 7
    assert error(y, want[0]) < 1e-14
    assert error(side, want[1]) < 1e-14


@everywhere
def test_lists_and_named_tuples_keep_their_kind(engine):
    class Listed(nn.Linear):
        def forward(self, x):
            return [super().forward(x), x.sum()]

    class Named(nn.Linear):
        def forward(self, x):
            return torch.return_types.max((super().forward(x), x.argmax()))

    x = torch.randn(2, 4, requires_grad=True)
    for cls, kind in ((Listed, list), (Named, torch.return_types.max)):
        y = reversa.ReversibleSequence([cls(4, 4)] * 3, reversa.Momentum(0.9), engine=ENGINES[engine])(x)
        assert type(y) is kind
        y[0].sum().backward()


# ---------------------------------------------------------------------- the engine, and what it says


@schemes
def test_the_engine_may_be_changed_at_any_time(case):
    seq, plain = pair(case)
    x = CASES[case].input(4, 6)
    x2 = copy.deepcopy(x)
    loss_of(plain(x2)).backward()
    outputs = []
    for engine in ENGINES.values():
        seq.engine = engine
        assert seq.engine is engine
        outputs.append(seq(x))
        seq.engine = reversa.Store()  # between forward and backward: the forward's engine stays in charge
        loss_of(outputs[-1]).backward()
        assert_same({"x": x.grad, **gradients(seq)}, {"x": x2.grad, **gradients(plain)}, 1e-12)
        x.grad = None
        seq.zero_grad()
    assert all(torch.equal(y, outputs[0]) for y in outputs)


@pytest.mark.parametrize("name", SCHEMES)
@everywhere
def test_repr(name, engine):
    n = SCHEMES[name].functions_per_block
    blocks = [mlp() if n == 1 else (mlp(), mlp()) for _ in range(4)]
    text = repr(reversa.ReversibleSequence(blocks, SCHEMES[name](), engine=ENGINES[engine]))
    for part in (repr(SCHEMES[name]()), repr(ENGINES[engine]), f"{4 * n} steps", "kept for the backward pass"):
        assert part in text


def test_equal_engines_are_equal_and_say_what_was_changed():
    assert reversa.Invert(keep=2) == reversa.Invert(keep=2) != reversa.Invert()
    assert repr(reversa.Invert(keep=2, anchors=None)) == "Invert(keep=2, anchors=None)"
    assert repr(reversa.Recompute(every=3)) == "Recompute(every=3)"


def test_blocks_may_be_modules_lists_or_shared():
    f, g = mlp(), mlp()
    seq = reversa.ReversibleSequence([(f, g), [g, f], (f, f)], reversa.RevNet())
    assert seq.functions == [f, g, g, f, f, f]
    assert len(list(seq.parameters())) == 8
    assert reversa.ReversibleSequence(nn.Sequential(f, g), reversa.Momentum(0.9)).functions == [f, g]
    assert reversa.ReversibleSequence((m for m in (f, g)), reversa.Momentum(0.9)).functions == [f, g]

"""Nothing is held that is not needed: by storages that stay alive, with the garbage collector switched off."""

from __future__ import annotations

import gc
import re
import weakref

import pytest
import torch
from torch import nn

import reversa
from cases import CASES, INVERTERS, Storages, loss_of, mlp, no_collector
from engine_cases import both, inverting, sample_bytes

BATCH, WIDTH = 64, 32
STREAM = BATCH * WIDTH * 4  # bytes of one tensor of the state


class Shifted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = mlp(WIDTH, p=0.1)

    def forward(self, x, shift):
        return self.body(x + shift)


def chain(case: str, engine, depth: int = 12):
    found = CASES[case]
    seq = found.sequence([Shifted() for _ in range(depth)], engine)
    return seq, found.input(BATCH, WIDTH, dtype=torch.float32)


def train(seq, x) -> None:
    # The shift has a graph of its own: recorded as it is, it would close a cycle through autograd's nodes.
    shift = torch.randn(WIDTH, requires_grad=True)
    loss_of(seq(x, shift.tanh())).backward()
    x.grad = None
    seq.zero_grad()


@inverting
@both
def test_nothing_is_held_after_a_step(case, engine):
    seq, x = chain(case, INVERTERS[engine])
    train(seq, x)
    with no_collector(), Storages() as storages:
        train(seq, x)
        assert storages.alive() == 0


@inverting
@both
def test_nothing_is_held_after_a_forward_without_backward(case, engine):
    seq, x = chain(case, INVERTERS[engine])
    with no_collector(), Storages() as storages:
        y = seq(x, torch.randn(WIDTH, requires_grad=True).tanh())
        assert storages.alive() > 0
        del y
        assert storages.alive() == 0


@inverting
@both
def test_nothing_is_held_after_partial_backwards(case, engine):
    seq, x = chain(case, INVERTERS[engine])
    weights = [f.body[0].weight for f in seq.functions]
    with no_collector(), Storages() as storages:
        for i in (11, 5, 0, 7, 3):
            y = seq(x, torch.randn(WIDTH, requires_grad=True).tanh())
            torch.autograd.grad(loss_of(y), [weights[i]])
            del y
        assert storages.alive() == 0


@inverting
@both
def test_partial_backwards_over_one_graph_do_not_pile_up(case, engine):
    seq, x = chain(case, INVERTERS[engine])
    weights = [f.body[0].weight for f in seq.functions]
    with no_collector(), Storages() as storages:
        loss = loss_of(seq(x, torch.randn(WIDTH, requires_grad=True).tanh()))
        held = []
        for i in (6, 6, 6, 6, 6, 6):
            torch.autograd.grad(loss, [weights[i]], retain_graph=True)
            held.append(storages.alive())
        assert len(set(held[1:])) == 1
        del loss
        assert storages.alive() == 0


def held_after_an_exception(seq, x, where: str) -> int:
    def boom(*_):
        if where != "replay" or reversa.is_replaying():
            raise KeyError("boom")

    f = seq.functions[4]
    f.body[0].weight.register_hook(boom) if where == "gradient" else f.register_forward_hook(boom)
    with no_collector(), Storages() as storages:
        try:
            loss_of(seq(x, torch.randn(WIDTH, requires_grad=True).tanh())).backward()
        except KeyError as error:
            error.__traceback__ = None
        else:
            pytest.fail("the hook did not run")
        x.grad = None
        seq.zero_grad()
        return storages.alive()


@inverting
@both
@pytest.mark.parametrize("where", ["forward", "replay", "gradient"])
def test_nothing_is_held_after_an_exception(case, engine, where):
    held = held_after_an_exception(*chain(case, INVERTERS[engine]), where)
    if where != "gradient":
        assert held == 0
    else:  # PyTorch itself keeps some tensors of a backward pass that a tensor hook broke off
        assert held <= held_after_an_exception(*chain(case, reversa.Store()), where)


@both
def test_every_tensor_of_f_dies_at_once(case):
    seq, x = chain(case, reversa.Invert())
    seen: list[weakref.ref[torch.Tensor]] = []
    for f in seq.functions:
        f.body.register_forward_hook(lambda m, args, output: seen.extend([weakref.ref(args[0]), weakref.ref(output)]))
    with no_collector():
        train(seq, x)
        assert len(seen) == 2 * 2 * 12
        assert not [ref for ref in seen if ref() is not None]


class Biased(nn.Module):
    """Makes a bias when it is given none, as T5's first block does, and hands it on."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.bias = mlp(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x, bias=None):
        bias = self.bias(x).exp() if bias is None else bias
        return self.body(x * bias), bias


@inverting
def test_an_extra_argument_made_by_an_earlier_step_closes_no_cycle(engine):
    scheme, fs = reversa.Momentum(0.9), [Biased() for _ in range(6)]

    def once(backward: bool) -> None:
        x = torch.randn(BATCH, WIDTH, requires_grad=True)
        steps, state, bias = INVERTERS[engine].begin(scheme, length=6), scheme.open(x), None
        for f in fs:
            state, (_, bias) = steps.step(f, state, args=(bias,))
        steps.end()
        if backward:
            loss_of(state).backward()
            for p in (p for f in fs for p in f.parameters()):
                p.grad = None

    once(True)
    for backward in (True, False):
        with no_collector(), Storages() as storages:
            once(backward)
            assert storages.alive() == 0


@both
def test_a_graph_with_a_double_backward_is_freed(case):
    seq, x = chain(case, reversa.Invert(), depth=4)
    with no_collector(), Storages() as storages:
        y = seq(x, torch.randn(WIDTH, requires_grad=True).tanh())
        (g,) = torch.autograd.grad(loss_of(y), x, create_graph=True)
        (g**2).sum().backward()
        x.grad = None
        seq.zero_grad()
        del y, g
        assert storages.alive() == 0


@both
def test_objects_do_not_pile_up_over_steps(case):
    def ours():
        kinds = map(type, gc.get_objects())
        return sum(issubclass(kind, torch.Tensor) or str(kind.__module__).startswith("reversa") for kind in kinds)

    seq, x = chain(case, reversa.Invert())
    with no_collector():
        train(seq, x)
        before = ours()
        for _ in range(5):
            train(seq, x)
        assert ours() == before


# ---------------------------------------------------------------------- what is held between forward and backward


@pytest.mark.parametrize("depth", [8, 32])
@pytest.mark.parametrize("group", [1, 8])
@both
def test_one_state_is_held_after_the_forward_pass(case, group, depth):
    case = CASES["momentum-0.99"] if case == "momentum" else CASES[case]
    seq = case.sequence([mlp(WIDTH) for _ in range(depth)], reversa.Invert(group=group))
    x = case.input(BATCH, WIDTH, dtype=torch.float32)
    with Storages() as storages:
        y = seq(x)
        # Room for 64 numbers, one for each step, or with a group the state before the first; a sample of its argument.
        allowed = 2 * STREAM + (4 * 64 if group == 1 else 2 * STREAM)
        assert storages.alive(y) <= allowed + sample_bytes(case.scheme, x, depth)


@pytest.mark.parametrize("gamma", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("engine", [reversa.Invert(), reversa.Invert(anchors=5), reversa.Invert(anchors=40)])
def test_repr_says_how_many_states_are_held(gamma, engine):
    depth = 100
    seq = reversa.ReversibleSequence([mlp(WIDTH) for _ in range(depth)], reversa.Momentum(gamma), engine=engine)
    said = re.search(r"(\d+) states?\b", repr(seq))
    assert said is not None
    x = torch.randn(BATCH, WIDTH, requires_grad=True)
    with Storages() as storages:
        y = seq(x)
        held = storages.alive() / (2 * STREAM)
    assert round(held) == int(said[1])
    assert y.grad_fn is not None


@pytest.mark.parametrize("scheme", [reversa.Momentum(0.999), reversa.RevNet()], ids=["momentum", "revnet"])
def test_the_peak_of_a_step_does_not_grow_with_depth(scheme):
    peaks = []
    for depth in (8, 64):
        fs = [mlp(WIDTH) for _ in range(depth)]
        blocks = fs if scheme.functions_per_block == 1 else list(zip(fs[::2], fs[1::2], strict=True))
        seq = reversa.ReversibleSequence(blocks, scheme, engine=reversa.Invert(group=1))
        x = torch.randn(BATCH, WIDTH * seq.scheme.functions_per_block, requires_grad=True)
        with Storages() as storages:
            seen: list[int] = []

            def look(p, *_, seen=seen, storages=storages):
                if isinstance(p, nn.Parameter):
                    p.grad = None
                seen.append(storages.alive())

            for f in fs:
                f[0].register_forward_hook(look)
                for p in f.parameters():
                    p.register_post_accumulate_grad_hook(look)
            loss_of(seq(x)).backward()
        peaks.append(max(seen))
    assert peaks[1] - peaks[0] <= (64 - 8) * 64, peaks  # one small sum for each step

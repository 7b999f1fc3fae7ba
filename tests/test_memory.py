"""Activation memory of a training step: flat in depth where states are computed back, growing where they are stored.

Live bytes of tensors, parameters and their gradients aside; the unit is the state's first tensor.
"""

from __future__ import annotations

import gc
import tracemalloc
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from engine_cases import sample_bytes
from reversa import Invert, Momentum, Recompute, ReversibleSequence, RevNet, Store
from reversa.memory import LiveBytes

# At gamma = 0.999 the drift over 512 steps is below 1e-6: no state is kept in between.
MOMENTUM, REVNET = Momentum(0.999), RevNet()
SHALLOW, DEEP = 8, 512


@dataclass(frozen=True)
class Memory:
    """In units of the input: the largest amount, after the forward pass, and after the backward pass."""

    peak: float
    held: float
    left: float


def mlp(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))


def conv(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
    )


# Half a megabyte each, so that the state outweighs the few bytes that every step costs.
INPUTS = {mlp: (2048, 64), conv: (4, 4, 96, 96)}


def sequence(f, scheme, depth, engine) -> ReversibleSequence:
    width = INPUTS[f][1]
    if isinstance(scheme, RevNet):
        blocks = [(f(width // 2), f(width // 2)) for _ in range(depth // 2)]  # a block is two steps
    else:
        blocks = [f(width) for _ in range(depth)]
    return ReversibleSequence(blocks, scheme, engine=engine)


def measure(f, scheme, depth, engine) -> Memory:
    model = sequence(f, scheme, depth, engine)
    x = torch.randn(INPUTS[f])
    gc.collect()
    gc.disable()  # what a cycle keeps alive must be seen
    try:
        with LiveBytes(exclude=model) as counted:
            loss = model(x).mean()
            held = counted.live
            loss.backward()
    finally:
        gc.enable()
    return Memory(*(count / x.nbytes for count in (counted.peak, held, counted.live - loss.nbytes)))


chains = pytest.mark.parametrize("f", [mlp, conv], ids=lambda f: f.__name__)
schemes = pytest.mark.parametrize("scheme", [MOMENTUM, REVNET], ids=lambda s: type(s).__name__)


@pytest.mark.slow
@chains
@schemes
@pytest.mark.filterwarnings("ignore::reversa.errors.DriftWarning")  # 512 convolutions with BN drift by 1e-3
def test_depth_512_takes_what_depth_8_takes(f, scheme):
    shallow, deep = (measure(f, scheme, depth, Invert()) for depth in (SHALLOW, DEEP))
    x = torch.ones(INPUTS[f])
    samples = (sample_bytes(scheme, x, DEEP) - sample_bytes(scheme, x, SHALLOW)) / x.nbytes
    assert deep.peak - samples == pytest.approx(shallow.peak, rel=1e-3)
    bytes_per_step = (deep.held - shallow.held) * torch.ones(INPUTS[f]).nbytes / (DEEP - SHALLOW)
    assert bytes_per_step <= 8, "a number for each step, never a tensor of the state's size"


@chains
@schemes
@pytest.mark.parametrize("recording", [True, False])
@pytest.mark.parametrize("engine", [Invert(), Store()], ids=str)
def test_the_forward_pass_holds_one_state_between_two_steps(f, scheme, recording, engine):
    """The first state is let go as the others are: in a stored chain, where autograd keeps more, without a graph."""
    if recording and isinstance(engine, Store):
        pytest.skip("autograd stores every activation")
    model, x, held = sequence(f, scheme, 8, engine), torch.ones(INPUTS[f]), []
    with LiveBytes(exclude=model) as counted, torch.set_grad_enabled(recording):
        for function in model.functions:
            function.register_forward_pre_hook(lambda *_: held.append(counted.live / x.nbytes))
        model(x)
    state = 1 if isinstance(scheme, RevNet) else 2  # two halves; x and v
    assert held[2:] == pytest.approx([state] * 6, abs=0.01)


@chains
@schemes
def test_after_the_forward_pass_at_most_three_states_are_held(f, scheme):
    assert measure(f, scheme, 64, Invert()).held <= 3


@chains
@schemes
@pytest.mark.parametrize("engine", [Invert(), Invert(keep=3), Store(), Recompute()], ids=str)
def test_nothing_is_held_after_the_backward_pass(f, scheme, engine):
    assert measure(f, scheme, 16, engine).left == 0


def held_by_a_plain_loop(f, scheme, depth) -> float:
    """The published formula written down as a loop: what autograd keeps for it, as :func:`measure` counts."""
    functions = sequence(f, scheme, depth, Store()).functions
    x = torch.ones(INPUTS[f])
    unit = x.nbytes
    with LiveBytes() as counted:
        if isinstance(scheme, RevNet):
            a, b = x.chunk(2, 1)
            for first, second in zip(functions[::2], functions[1::2], strict=True):
                a = a + first(b)
                b = b + second(a)
            loss = torch.cat((a, b), 1).mean()
            del a, b
        else:
            v = torch.zeros_like(x)
            for function in functions:
                v = scheme.gamma * v + (1 - scheme.gamma) * function(x)
                x = x + v
            loss = x.mean()
            del v, x
        assert loss.requires_grad
        return counted.live / unit


@chains
@schemes
def test_stored_activations_grow_with_every_step_as_in_a_plain_loop(f, scheme):
    one, two = (measure(f, scheme, depth, Store()) for depth in (16, 32))
    plain = held_by_a_plain_loop(f, scheme, 32) - held_by_a_plain_loop(f, scheme, 16)
    assert plain >= 16, "each step stores the half at the least that a RevNet step moves, and an activation inside"
    assert two.held - one.held == pytest.approx(plain, rel=0.001)
    assert two.peak - one.peak == pytest.approx(plain, rel=0.01)
    assert two.peak > 3 * measure(f, scheme, 32, Invert()).peak


@chains
def test_recomputing_holds_one_state_for_each_step(f):
    one, two = (measure(f, REVNET, depth, Recompute()) for depth in (16, 32))
    assert two.held - one.held == pytest.approx(16 / 2, rel=0.02)  # each step makes one new stream: half of x
    sparse_one, sparse_two = (measure(f, REVNET, depth, Recompute(every=4)) for depth in (16, 32))
    assert sparse_two.held - sparse_one.held == pytest.approx(16 / 4, rel=0.02)  # and a state is two of them


@pytest.mark.parametrize("anchors", [4, 8, 16])
def test_anchors_cost_exactly_the_states_that_they_keep(anchors):
    """A state of Momentum is two tensors; of ``64 / anchors`` kept states the last is there without anchors, too."""
    without = measure(mlp, MOMENTUM, 64, Invert())
    with_anchors = measure(mlp, MOMENTUM, 64, Invert(anchors=anchors))
    x = torch.ones(INPUTS[mlp])
    kept = 64 // anchors - 1
    samples = 64 // anchors * sample_bytes(MOMENTUM, x, anchors) - sample_bytes(MOMENTUM, x, 64)
    numbers = 4 * 64 * kept  # each chain has room for one of each of 64 steps: whether its value was finite
    more = kept * 2 + (samples + numbers) / x.nbytes
    assert with_anchors.held - without.held == more
    # The end of the chain behind is kept until the backward pass has left the chain before it.
    assert more - 2 <= with_anchors.peak - without.peak <= more


def test_automatic_anchors_are_those_that_the_drift_law_asks_for():
    scheme = Momentum(0.9)
    interval = Invert().interval(scheme, 128, torch.float32, torch.float32)
    assert interval is not None
    assert scheme.drift(interval, torch.finfo(torch.float32).eps) <= 1e-4
    states = -(-128 // interval)
    more = measure(mlp, scheme, 128, Invert()).held - measure(mlp, MOMENTUM, 128, Invert()).held
    assert more == pytest.approx(2 * (states - 1), abs=0.01)
    assert f"{states} states" in repr(sequence(mlp, scheme, 128, Invert()))


@pytest.mark.parametrize("keep", [1, 4, 8])
def test_kept_steps_cost_their_stored_activations(keep):
    """Autograd keeps the input and tanh's output of Linear-Tanh-Linear; the first input is the chain's own end."""
    without, stored = (measure(mlp, MOMENTUM, 64, engine) for engine in (Invert(), Invert(keep=keep)))
    assert stored.held - without.held == pytest.approx(2 * keep - 1, abs=0.01)
    assert stored.peak <= without.peak + 2 * keep


def test_small_states_are_replayed_in_groups_without_growing():
    """The default groups steps of small states; the group bounds what is alive at once."""
    peaks = []
    for depth in (64, 256):
        model, x = ReversibleSequence([mlp(8) for _ in range(depth)], MOMENTUM), torch.ones(8, 8)
        with LiveBytes(exclude=model) as counted:
            model(x).mean().backward()
        peaks.append(counted.peak)
    assert peaks[1] - peaks[0] <= 8 * (256 - 64)


@pytest.mark.slow
def test_python_objects_stay_small_beside_the_states():
    """Tensors are not all: what the engine itself records must stay within a few kilobytes for each step."""
    depth = 256
    model = ReversibleSequence([mlp(8) for _ in range(depth)], MOMENTUM)
    x = torch.ones(8, 8)
    model(x).mean().backward()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        loss = model(x).mean()
        held = tracemalloc.get_traced_memory()[0] - before
        loss.backward()
        del loss
        gc.collect()
        left = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert held < 8192 * depth
    assert left < 256 * depth


def test_an_input_kept_by_the_caller_is_not_copied():
    """With ``x`` alive outside, the first state costs a velocity at most."""
    model = ReversibleSequence([mlp(64)], MOMENTUM)
    x = torch.ones(INPUTS[mlp], requires_grad=True)
    with LiveBytes(exclude=[model, x]) as counted:
        y = model(x)
        numbers = 4 * 64  # room for one of each of 64 steps: whether its value was finite
        assert counted.live <= 2 * x.nbytes + numbers + sample_bytes(MOMENTUM, x)  # y and the velocity behind it
        y.mean().backward()
        assert counted.live == y.nbytes

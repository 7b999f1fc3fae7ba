"""The elementwise kernels of exact arithmetic: their sums in Python's integers, compiled and eager, and the range."""

from __future__ import annotations

import math
import subprocess
import sys
import warnings
from fractions import Fraction

import pytest
import torch
from torch import nn

import reversa
from cases import chain, input_for
from exact_cases import assert_bit_equal, step
from reversa.errors import StateError
from reversa.exact import FixedPoint, compiled, kernels
from reversa.exact.watch import Linear, Range

TYPES = {64: torch.int64, 32: torch.int32}


def wrapped(number: int, bits: int) -> int:
    """The number modulo 2**bits, as a signed integer."""
    return (number + (1 << (bits - 1))) % (1 << bits) - (1 << (bits - 1))


def integers(bits, n=64, edge=0):
    torch.manual_seed(n)
    high = 1 << (bits - 1 - edge)
    return torch.randint(-high, high - 1, (n,), dtype=TYPES[bits])


@pytest.mark.parametrize("bits", TYPES)
def test_sums_are_those_of_integers_modulo_their_range(bits):
    """float32 values times a power of two are exact, so Python's fractions are rounded alike: 64 bits towards zero,
    32 to the nearest, half to even.
    """
    to_integer = math.trunc if bits == 64 else round
    V, X = integers(bits), integers(bits, 64)
    f = torch.randn(64) * 10
    push, move = 2.0 ** (bits // 2), 2.0**-2
    X1, V1, x = kernels.advanced(X, V, f, push, move, 2.0**-20)
    expected = [
        wrapped(v + to_integer(Fraction(a) * Fraction(push)), bits) for v, a in zip(V.tolist(), f.tolist(), strict=True)
    ]
    assert V1.tolist() == expected
    floats = kernels.floating(V1, torch.float32).tolist()
    expected = [
        wrapped(a + to_integer(Fraction(b) * Fraction(move)), bits) for a, b in zip(X.tolist(), floats, strict=True)
    ]
    assert X1.tolist() == expected
    assert torch.allclose(x.double(), X1.double() * 2.0**-20, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("bits", TYPES)
def test_what_was_added_is_taken_away(bits, dtype):
    """Over the whole range, wrap-around included; what is given is not written to."""
    V, X = integers(bits), integers(bits, 65)[:64]
    f = torch.randn(64).to(dtype)
    given = [t.clone() for t in (X, V, f)]
    X1, V1, _ = kernels.advanced(X, V, f, 3.7e5, 0.37, 1e-6)
    back, _ = kernels.retreated(X1, V1, 0.37, 1e-6, dtype)
    assert torch.equal(back, X)
    assert torch.equal(kernels.decreased(V1, f, 3.7e5), V)
    assert all(torch.equal(now, then) for now, then in zip((X, V, f), given, strict=True))


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_layout_is_the_integers(compile):
    """Whatever a function returns: it is given the same layout, so the same bits, both times."""
    V, X = (integers(64, 120 + i)[:120].reshape(2, 3, 4, 5) for i in range(2))
    f = torch.randn(2, 5, 3, 4).permute(0, 2, 3, 1)
    X1, V1, x = compiled.kernel(kernels.advanced, compile)(X, V, f, 3.7e5, 0.37, 1e-6)
    back, x0 = compiled.kernel(kernels.retreated, compile)(X1, V1, 0.37, 1e-6, f.dtype)
    start = compiled.kernel(kernels.decreased, compile)(V1, f, 3.7e5)
    assert {t.stride() for t in (X1, V1, x, back, x0, start)} == {X.stride()}
    assert torch.equal(back, X)
    assert torch.equal(start, V)


def sequence(exact, depth=12, width=16, scheme=None):
    torch.manual_seed(0)
    fs = [nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(depth)]
    return chain(scheme or reversa.Momentum(0.9), fs, exact)


@pytest.mark.slow
@pytest.mark.parametrize("bits", TYPES)
@pytest.mark.parametrize("scheme", [reversa.Momentum(0.9), reversa.Momentum(0.3), reversa.RevNet()], ids=str)
def test_compiled_has_the_bits_of_eager(scheme, bits):
    """Compiled and computed back, against eager with stored activations."""
    x = input_for(scheme, 5, 16)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*could not be compiled")
        got = step(sequence(FixedPoint(bits=bits, compile=True), scheme=scheme), x, reversa.Invert())
    assert_bit_equal(got, step(sequence(FixedPoint(bits=bits), scheme=scheme), x, reversa.Store()))


@pytest.mark.slow
def test_inside_a_transform_kernels_are_eager():
    x = torch.randn(5, 16)
    of = {c: torch.func.grad(lambda x, c=c: sequence(FixedPoint(compile=c))(x).sin().sum())(x) for c in (True, False)}
    assert torch.equal(of[True], of[False])


@pytest.mark.slow
def test_forward_compiled_and_back_in_eager():
    state = torch.randn(5, 16), torch.randn(5, 16)
    last = sequence(FixedPoint(compile=True), depth=100).forward_state(state)
    back = sequence(FixedPoint(), depth=100).inverse_state(last)
    assert all(torch.equal(b, s) for b, s in zip(back[:2], state, strict=True))
    expected = sequence(FixedPoint(), depth=100).forward_state(state)
    assert all(torch.equal(a, b) for a, b in zip(last, expected, strict=True))


@pytest.mark.slow
def test_512_steps_are_a_handful_of_graphs(monkeypatch):
    monkeypatch.setattr(compiled, "_COMPILED", {})
    step(sequence(FixedPoint(compile=True), depth=512, width=4), torch.randn(3, 4), reversa.Invert())
    graphs = [len(kernel.graphs) for kernel in compiled._COMPILED.values()]
    assert len(graphs) == 3
    assert max(graphs) <= 2  # the velocity at rest has a layout of its own


@pytest.mark.slow
def test_shapes_that_change_all_the_time_share_a_graph(monkeypatch):
    monkeypatch.setattr(compiled, "_COMPILED", {})
    monkeypatch.setattr(compiled, "SHAPES", 2)
    compiling, asked = torch.compile, []
    monkeypatch.setattr(
        torch, "compile", lambda *given, **settings: asked.append(given) or compiling(*given, **settings)
    )
    seq = sequence(FixedPoint(compile=True), depth=4)
    for batch in range(2, 7):
        x = torch.randn(batch, 16, requires_grad=True)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*could not be compiled")
            got = step(seq, x, reversa.Invert())
        assert_bit_equal(got, step(sequence(FixedPoint(), depth=4), x, reversa.Store()))
    assert len(asked) == 3  # once for each kernel


def test_where_compilation_fails_eager_has_the_same_bits(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no compiler here\nand more")

    monkeypatch.setattr(compiled, "compile_graph", broken)
    monkeypatch.setattr(compiled, "_COMPILED", {})
    seq, x = sequence(FixedPoint(compile=True)), torch.randn(5, 16, requires_grad=True)
    with pytest.warns(UserWarning, match="could not be compiled.*RuntimeError: no compiler here$") as caught:
        got = step(seq, x, reversa.Invert())
    assert len([w for w in caught if "could not be compiled" in str(w.message)]) == 3  # one for each kernel
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*could not be compiled")
        step(seq, x, reversa.Invert())
    assert_bit_equal(got, step(sequence(FixedPoint()), x, reversa.Store()))


def test_nothing_is_compiled_unasked():
    code = (
        "import sys, torch; before = 'torch._dynamo' in sys.modules; import reversa\n"
        "seq = reversa.ReversibleSequence([torch.nn.Tanh()], reversa.Momentum(0.9), exact=True)\n"
        "seq(torch.ones(2, 3, requires_grad=True)).sum().backward()\n"
        "assert before or 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ------------------------------------------------------------------ the range


class Constant(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))

    def forward(self, x):
        return self.value.expand(x.shape)


@pytest.mark.parametrize("scheme", [reversa.Momentum(0.9), reversa.RevNet()], ids=str)
def test_the_sum_that_leaves_the_range_is_the_one_reported(scheme):
    """Every step adds the same, so the step at which the limit of 1024 is reached is known."""
    fs = [Constant(100.0) for _ in range(64)]
    x, v, last = 0.0, 0.0, -1
    while x < 1024:
        last += 1
        v = 0.9 * v + 10 if scheme.functions_per_block == 1 else 50.0  # RevNet's streams take turns
        x += v
    with pytest.raises(StateError, match=rf"step {last}: the state( x)? reaches .*radix=16"):
        chain(scheme, fs, FixedPoint(bits=32))(torch.zeros(2, 4))


def test_a_bound_is_no_refusal():
    """Values that cancel: the bound on x passes the limit again and again, x itself never does."""
    fs = [Constant(200.0 * (-1) ** i) for i in range(200)]
    y = reversa.ReversibleSequence(fs, reversa.Momentum(0.5), exact=FixedPoint(bits=32))(torch.zeros(2, 4))
    assert y.abs().max() < 1024


def test_bounds_hold_for_the_state_that_they_were_made_of():
    """Two runs that take turns: a step that does not follow the one before is looked at, not judged by its bound."""
    looked = []
    watch = Range(32, ("x", "f"), ("a", "b"))
    form, limits = Linear(((1,),), (1,)), (10.0, 10.0)
    states = [(torch.tensor([i]),) for i in range(4)]

    def see(before, after, value, stream):
        given = torch.tensor([value])
        watch.see(0, form, limits, before, after, given, lambda i: (looked.append(1), torch.tensor([stream]))[1])

    see(states[0], states[1], 1.0, 1.0)
    assert len(looked) == 1  # nothing was known
    see(states[1], states[2], 1.0, 2.0)
    assert len(looked) == 1  # at most 2
    see(states[0], states[3], 1.0, 1.0)
    assert len(looked) == 2  # another run
    see(states[3], states[2], 9.0, 3.0)
    assert len(looked) == 3  # at most 10, in truth 3
    with pytest.raises(
        StateError, match=r"step 0: x reaches 11; 32-bit fixed point holds magnitudes below 10 there. a"
    ):
        see(states[2], states[1], 8.0, 11.0)


@pytest.mark.parametrize("after", ["close", "uncover"])
def test_numbers_of_an_accelerator_are_read_at_the_end(monkeypatch, after):
    from reversa.exact import watch
    from reversa.exact.momentum import IntegratingFactor

    peak = watch.peak
    monkeypatch.setattr(watch, "peak", lambda x: torch.tensor(peak(x)))
    scheme = IntegratingFactor(reversa.Momentum(0.9), FixedPoint(bits=32))
    state = scheme.open(torch.zeros(2, 4))
    for number, value in enumerate((1.0, 1e6, 1.0)):
        state = scheme.forward(state, torch.full((2, 4), value), number)  # nothing is raised here
    with pytest.raises(StateError, match=r"step 1: what f returned reaches 1e\+06"):
        scheme.close(state) if after == "close" else scheme.uncover(state, 2)

"""What holds for any shape, gamma, depth and value: the integers come back, and the formula is the one that is stated.

The models here are Python's own integers and fractions, and numpy's float32.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import reversa
from reversa.exact import FixedPoint
from reversa.exact import exact_scheme as exactly

BITS = st.sampled_from([32, 64])
SEEDS = st.integers(0, 2**31)
SHAPES = st.lists(st.integers(0, 5), min_size=1, max_size=4).map(tuple)
# Short and long binary expansions; so small that two words go at every step; so near 1 that none ever goes.
GAMMAS = st.one_of(
    st.sampled_from([1.0, 0.5, 0.25, 0.9, 0.95, 0.99, 0.999, 1 / 3, 0.1, 1e-3, 1e-5, 2.0**-8, 2.0**-16, 1 - 2.0**-53]),
    st.floats(1e-6, 1.0, exclude_min=True),
    st.floats(0.9, 1.0),
)
SPLIT = [reversa.RevNet(), reversa.AdditiveCoupling()]


def functions(seed: int, depth: int, size: float, special=()):
    """Any functions whatever, as long as they compute the same twice; some elements of some values are special."""

    def f(x, a, b):
        value = size * torch.sin(a * x + b)
        for i, number in enumerate(special):
            value = torch.where(torch.sin(3 * a * x + i) > 0.8, torch.full_like(value, number), value)
        return value

    draw = torch.Generator().manual_seed(seed)
    numbers = torch.randn(depth, 2, generator=draw).tolist()
    return [lambda x, a=a, b=b: f(x, a, b) for a, b in numbers]


def integers_come_back(scheme, fs, state) -> None:
    """Forwards by hand, then back from the integers alone: every state, and what f was given."""
    met = []
    for step, f in enumerate(fs):
        argument = scheme.argument(state, step)
        met.append((scheme.told(state), argument))
        state = scheme.forward(state, f(argument), step)
    state = (*(s.new_empty(0) for s in state[: scheme.num_streams]), *scheme.told(state))
    for step, (told, argument) in reversed(list(enumerate(met))):
        found, rest = scheme.uncover(state, step)
        assert torch.equal(found, argument), step
        assert found.stride() == argument.stride(), step  # or a layer may compute in another order
        state = scheme.inverse(found, rest, fs[step](found), step)
        found = scheme.told(state)
        assert len(found) == len(told), step
        assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(found, told, strict=True)), step


def input_of(shape, seed: int, size: float, dtype=torch.float32):
    """Normal numbers, and some at the very edge."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=draw, dtype=dtype).clamp(-1, 1)
    edge = torch.rand(shape, generator=draw) < 0.2
    return size * torch.where(edge, x.sign(), x)


# ---------------------------------------------------------------------- within the range


@given(shape=SHAPES, gamma=GAMMAS, depth=st.integers(1, 40), bits=BITS, seed=SEEDS, double=st.booleans())
def test_momentum_comes_back(shape, gamma, depth, bits, seed, double):
    fixed, dtype = FixedPoint(bits=bits), torch.float64 if double else torch.float32
    scheme = exactly(reversa.Momentum(gamma), fixed)
    x = input_of(shape, seed, 0.9 * fixed.limit, dtype)
    integers_come_back(scheme, functions(seed, depth, fixed.limit / 500 / depth), scheme.open(x))


@given(
    scheme=st.sampled_from(SPLIT),
    shape=SHAPES,
    depth=st.integers(1, 40),
    bits=st.sampled_from([16, 32, 64]),
    seed=SEEDS,
)
def test_additive_schemes_come_back(scheme, shape, depth, bits, seed):
    fixed = FixedPoint(bits=bits)
    exact = exactly(scheme, fixed)
    x = input_of((3, 2 * (1 + len(shape)), *shape), seed, 0.9 * fixed.limit)
    integers_come_back(exact, functions(seed, 2 * depth, fixed.limit / 40 / depth), exact.open(x))


@given(radix=st.integers(1, 29), velocity_radix=st.integers(1, 21), gamma=GAMMAS, seed=SEEDS)
def test_any_radix(radix, velocity_radix, gamma, seed):
    fixed = FixedPoint(bits=32, radix=radix, velocity_radix=velocity_radix)
    scheme = exactly(reversa.Momentum(gamma), fixed)
    size = min(fixed.limit, 2.0 ** (30 - velocity_radix) / 256)
    integers_come_back(scheme, functions(seed, 20, size / 40), scheme.open(input_of((3, 4), seed, size / 2)))


@given(gamma=GAMMAS, seed=SEEDS)
def test_a_first_velocity(gamma, seed):
    scheme = exactly(reversa.Momentum(gamma), FixedPoint())
    first = (input_of((3, 4), seed, 10), input_of((3, 4), seed + 1, 3))
    integers_come_back(scheme, functions(seed, 20, 1.0), scheme.quantized(first))


LAYOUTS = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(1, 3).contiguous().transpose(1, 3),
    "a part": lambda x: x.repeat(1, 2, 1, 1)[:, ::2],
    "expanded": lambda x: x[:1].expand(x.shape),
}


@pytest.mark.parametrize("value", LAYOUTS)
@pytest.mark.parametrize("given_as", LAYOUTS)
@pytest.mark.parametrize("scheme", [reversa.Momentum(0.5), *SPLIT], ids=["momentum", "revnet", "additive"])
def test_any_layout(scheme, given_as, value):
    exact = exactly(scheme, FixedPoint())
    x = LAYOUTS[given_as](input_of((3, 4, 5, 6), 1, 2.0))
    fs = [lambda x, f=f: LAYOUTS[value](f(x)) for f in functions(1, 6, 1.0)]
    integers_come_back(exact, fs, exact.open(x))


# ---------------------------------------------------------------------- beyond it

EDGE = {16: 2.0**5, 32: 2.0**11, 64: 2.0**23}  # the integers' range, by the default radix
SPECIAL = st.lists(st.sampled_from([float("inf"), -float("inf"), float("nan"), 3e38, -3e38, 1e-45]), max_size=3)


@given(shape=SHAPES, gamma=GAMMAS, depth=st.integers(1, 40), bits=BITS, seed=SEEDS, special=SPECIAL)
@example(shape=(5, 7), gamma=0.9, depth=40, bits=64, seed=0, special=[float("inf")])
@example(shape=(5, 7), gamma=0.5, depth=40, bits=32, seed=0, special=[float("nan"), -float("inf")])
def test_momentum_comes_back_through_wrap_around(shape, gamma, depth, bits, seed, special):
    """No value is too large, and not even inf: integers wrap around, and wrap back."""
    scheme = exactly(reversa.Momentum(gamma), FixedPoint(bits=bits, watch=False))
    x = input_of(shape, seed, 4 * EDGE[bits])
    integers_come_back(scheme, functions(seed, depth, 8 * EDGE[bits], special), scheme.open(x))


@given(
    scheme=st.sampled_from(SPLIT),
    depth=st.integers(1, 40),
    bits=st.sampled_from([16, 32, 64]),
    seed=SEEDS,
    special=SPECIAL,
)
@example(scheme=SPLIT[0], depth=40, bits=16, seed=0, special=[float("inf"), float("nan")])
def test_additive_schemes_come_back_through_wrap_around(scheme, depth, bits, seed, special):
    exact = exactly(scheme, FixedPoint(bits=bits, watch=False))
    x = input_of((3, 10, 7), seed, 4 * EDGE[bits])
    integers_come_back(exact, functions(seed, 2 * depth, 8 * EDGE[bits], special), exact.open(x))


@pytest.mark.parametrize("bits", [32, 64])
def test_it_did_wrap_around(bits):
    """The tests above would prove nothing if nothing left the range."""
    scheme = exactly(reversa.RevNet(), FixedPoint(bits=bits, watch=False))
    x, fs = input_of((3, 10), 0, 0.9 * EDGE[bits]), functions(0, 20, EDGE[bits])
    state, real = scheme.open(x), list(x.double().chunk(2, 1))
    for step, f in enumerate(fs):
        value = f(scheme.argument(state, step))
        real[step % 2] = real[step % 2] + value.double()
        state = scheme.forward(state, value, step)
    for wrapped, value in zip(state[:2], real, strict=True):
        turns = (value - wrapped.double()) / (2 * EDGE[bits])
        assert turns.abs().max() > 0.5
        assert (turns - turns.round()).abs().max() < 1e-4


# ---------------------------------------------------------------------- storage


def words_in_theory(gamma: float, steps: int) -> int:
    """floor(steps * log2(1/gamma) / 8), in integers."""
    p, q = Fraction(gamma).as_integer_ratio()
    return ((q**steps // p**steps).bit_length() - 1) // 8


@given(gamma=GAMMAS, depth=st.integers(1, 120), bits=BITS)
def test_words_go_at_steps_known_from_the_depth_alone(gamma, depth, bits):
    scheme = exactly(reversa.Momentum(gamma), FixedPoint(bits=bits))
    state = scheme.open(torch.zeros(2, 3))
    for step in range(depth):
        state = scheme.forward(state, torch.ones(2, 3), step)
        spilled = scheme.split(state)[2]
        assert all(word.dtype == torch.uint8 and word.shape == (2, 3) for word in spilled)
        assert len(spilled) == scheme.spilled_bytes(step + 1) == words_in_theory(gamma, step + 1)


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("gamma", [0.5, 0.9, 0.95, 0.99])
def test_storage_at_512_is_what_theory_says(gamma, bits):
    depth = 512
    seq = reversa.ReversibleSequence([torch.nn.Tanh()] * depth, reversa.Momentum(gamma), exact=FixedPoint(bits=bits))
    state = seq.forward_state((torch.randn(2, 3), torch.zeros(2, 3)))
    spilled = 8 * sum(word.numel() * word.element_size() for word in state[4:] if word.dtype == torch.uint8) / 6
    theory = -depth * float(np.log2(gamma))
    assert theory - 8 < spilled <= 1.05 * theory + 8
    assert spilled == 8 * words_in_theory(gamma, depth)


# ---------------------------------------------------------------------- the formula, in Python's integers


def signed(integer: int, bits: int) -> int:
    """What is left of an integer in so many bits."""
    return (integer + 2 ** (bits - 1)) % 2**bits - 2 ** (bits - 1)


class Element:
    """One element of a momentum state: V as one integer that loses nothing, whose low end is what was spilled."""

    def __init__(self, x: float, v: float, gamma: float, fixed: FixedPoint, real=np.float32) -> None:
        self.real = real  # in which X and V are read; f and its increments are float32
        self.gamma, self.bits = Fraction(gamma), fixed.bits
        self.rx, self.rv = fixed.fraction, fixed.velocity_fraction
        self.X, self.V = self.integer(x, 2.0**self.rx), self.integer(v, 2.0**self.rv)
        self.words: list[int] = []
        self.t = 0

    def integer(self, x: float, scale: float) -> int:
        return self.rounded(np.float32(x) * np.float32(scale))

    def rounded(self, product: np.floating) -> int:
        towards_zero = self.bits == 64 and isinstance(product, np.float32)
        return int(product if towards_zero else np.rint(product))

    def step(self, value: float) -> None:
        self.t += 1
        while len(self.words) < words_in_theory(float(self.gamma), self.t):
            self.words.append(self.V % 256)
            self.V //= 256
        c = self.gamma**self.t * 256 ** len(self.words)
        self.V = signed(self.V + self.integer(value, float((1 - self.gamma) * 2**self.rv / c)), self.bits)
        move = self.real(self.V) * self.real(float(c * 2**self.rx / 2**self.rv))
        self.X = signed(self.X + self.rounded(move), self.bits)

    @property
    def x(self) -> float:
        return float(np.float32(self.real(self.X) * self.real(2.0**-self.rx)))

    @property
    def v(self) -> Fraction:
        return self.V * self.gamma**self.t * 256 ** len(self.words) / 2**self.rv


VALUES = st.lists(st.floats(-4, 4, width=32), min_size=1, max_size=60)


@given(x=st.floats(-9, 9, width=32), v=st.floats(-3, 3, width=32), values=VALUES, gamma=GAMMAS, bits=BITS)
def test_the_integrating_factor_step_by_step(x, v, values, gamma, bits):
    """Every integer and every word, in float32 or, where a device is faster with it, float64 throughout."""
    fixed = FixedPoint(bits=bits)
    scheme = exactly(reversa.Momentum(gamma), fixed)
    elements = [Element(x, v, gamma, fixed, real) for real in (np.float32, np.float64)]
    state = scheme.quantized((torch.tensor([x]), torch.tensor([v])))
    for step, value in enumerate(values):
        state = scheme.forward(state, torch.tensor([value]), step)
        (shown, _), (X, V), words = scheme.split(state)
        found = X.item(), V.item(), [word.item() for word in words], shown.item()
        for element in elements:
            element.step(value)
        expected = [(element.X, element.V, element.words, element.x) for element in elements]
        elements = [element for element, want in zip(elements, expected, strict=True) if want == found]
        assert elements, (step, found, expected)


@given(x=st.floats(-9, 9, width=32), v=st.floats(-3, 3, width=32), values=VALUES, gamma=GAMMAS)
def test_the_model_is_momentum(x, v, values, gamma):
    """The oracle's oracle: without rounding it is v' = gamma v + (1 - gamma) f, x' = x + v'."""
    element, g = Element(x, v, gamma, FixedPoint()), Fraction(gamma)
    real_x, real_v = Fraction(x), Fraction(v)
    for value in values:
        element.step(value)
        real_v = g * real_v + (1 - g) * Fraction(value)
        real_x += real_v
        assert abs(element.v - real_v) < 1e-5
        assert abs(element.X / Fraction(2**40) - real_x) < 1e-5 * element.t

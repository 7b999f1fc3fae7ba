"""Multiplication by a ratio with an information buffer: against Python's integers, and bit for bit at any depth."""

from __future__ import annotations

import math
from contextlib import suppress
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import reversa
from cases import FAMILIES, chain
from exact_cases import assert_bit_equal, step
from reversa.errors import SettingError, StateError
from reversa.exact import FixedPoint, Ratio, exact_scheme
from reversa.exact import ratio as module

# Depth 1000: the words that leave the buffer, as published for this recipe.
WORDS = {(1, 2): 30, (9, 10): 3, (99, 100): 0, (999, 1000): 0}
RATIOS = {f"{n}-{d}": Ratio(n, d) for n, d in WORDS}
ratios = pytest.mark.parametrize("ratio", RATIOS.values(), ids=RATIOS)


class Element:
    """One element in integers without bound: x, v, the buffer, what left it, and the largest that any data makes it."""

    def __init__(self, ratio: Ratio, x: float, v: float, spilling: bool = True) -> None:
        self.ratio, self.spilling = ratio, spilling
        self.x, self.v = round(x * 2**ratio.radix), round(v * 2**ratio.radix)
        self.buffer, self.worst, self.words = 0, 0, []

    def step(self, f: float) -> None:
        n, d = self.ratio.n, self.ratio.d
        if self.spilling and (self.worst + 1) * d > 2**62:
            self.words.append(self.buffer % 2**32)
            self.buffer, self.worst = self.buffer // 2**32, self.worst // 2**32
            assert (self.worst + 1) * d <= 2**62
        self.buffer = self.buffer * d + self.v % d
        self.v = self.v // d * n + self.buffer % n
        self.buffer //= n
        self.worst = (self.worst * d + d - 1) // n
        assert 0 <= self.buffer <= self.worst
        self.v += round(f * ((1 - n / d) * 2.0**self.ratio.radix))
        self.x += self.v

    def told(self) -> list[int]:
        return [self.x, self.v, self.buffer, *self.words]


def scheme_of(ratio: Ratio, init="zero"):
    return exact_scheme(reversa.Momentum(ratio.n / ratio.d, init), ratio)


def forwards(scheme, streams, values):
    """The state before the first step and after every step, from values of f that are given."""
    states = [scheme.quantized(streams)]
    for number, value in enumerate(values):
        states.append(scheme.forward(states[-1], value, number))
    return states


def backwards(scheme, last, values):
    """The integers before every step and after the last, last first, from those after the last step alone."""
    state = (last[0].new_empty(0), last[1].new_empty(0), *scheme.told(last))
    told = [scheme.told(state)]
    for number, value in reversed(list(enumerate(values))):
        argument, rest = scheme.uncover(state, number)
        state = scheme.inverse(argument, rest, value, number)
        told.append(scheme.told(state))
    return told


def come_back(scheme, states, values) -> bool:
    """Words that stay spilled are handed on, not made again."""
    expected = [scheme.told(state) for state in reversed(states)]
    found = backwards(scheme, states[-1], values)
    return all(
        len(f) == len(e) and all(a is b or torch.equal(a, b) for a, b in zip(f, e, strict=True))
        for f, e in zip(found, expected, strict=True)
    )


def functions(depth: int, family: str = "mlp") -> list[nn.Module]:
    return FAMILIES[family].functions(depth, torch.float32)


# ---------------------------------------------------------------------- against integers without bound


@ratios
def test_a_thousand_steps_are_those_of_integers_without_bound(ratio):
    starts = [(0.0, 0.0), (3.0, -5.0), (-1e6, 1e5), (2.0**28, -(2.0**20)), (1e-9, -1e-9)]
    values = torch.randn(1000, len(starts), dtype=torch.float64) * torch.tensor([1, 9, 1e5, 1e-7, 1e-9])
    x, v = torch.tensor(starts, dtype=torch.float64).T
    scheme = scheme_of(ratio)
    states = forwards(scheme, (x, v), values)
    for e, start in enumerate(starts):
        element, unbounded = Element(ratio, *start), Element(ratio, *start, spilling=False)
        for number in range(1000):
            element.step(float(values[number, e]))
            unbounded.step(float(values[number, e]))
            found = [int(t[e]) for t in scheme.told(states[number + 1])]
            assert [*found[:3], *(word % 2**32 for word in found[3:])] == element.told(), number
            assert scheme.words(number + 1) or found == unbounded.told(), number
    assert come_back(scheme, states, values)


@ratios
def test_the_velocity_stays_near_that_of_real_numbers(ratio):
    values = torch.randn(200, 1, dtype=torch.float64) - 1
    scheme = scheme_of(ratio)
    states = forwards(scheme, (torch.zeros(1).double(), torch.full((1,), -2.0).double()), values)
    v, gamma = Fraction(-2 * 2**32), Fraction(ratio.n, ratio.d)
    for value, state in zip(values, states[1:], strict=True):
        v = gamma * v + round(float(value) * ((1 - ratio.n / ratio.d) * 2.0**32))
        assert abs(int(state[3]) - v) < ratio.n / (1 - gamma)


@pytest.mark.parametrize(("n", "d"), WORDS)
def test_as_many_words_leave_the_buffer_as_its_bound_says(n, d):
    seq = chain(reversa.Momentum(n / d), [nn.Tanh()] * 1000, Ratio(n, d))
    _, _, *integers = seq.forward_state((torch.zeros(2, 3), torch.ones(2, 3)))
    assert [t.dtype for t in integers] == [torch.int64] * 3 + [torch.int32] * WORDS[n, d]
    # Information is neither lost nor kept at twice its size.
    lost = 1000 * math.log2(d / n)
    assert lost - 62 <= 32 * WORDS[n, d] <= lost
    bytes_ = 8 + 4 * WORDS[n, d]
    assert f"1 state and {bytes_} bytes of spilled bits for each of its elements" in repr(seq)


# ---------------------------------------------------------------------- every bit comes back


@ratios
def test_the_first_state_comes_back_from_depth_1000(ratio):
    seq = chain(reversa.Momentum(ratio.n / ratio.d), functions(1000), ratio)
    first = tuple(torch.randn(4, 6) * 10.0 ** torch.randint(-9, 3, (4, 6)) for _ in range(2))
    last = seq.forward_state(first)
    back = seq.inverse_state(last)
    assert all(torch.equal(b, f) for b, f in zip(back[:2], first, strict=True))


@ratios
@pytest.mark.parametrize("sign", [-1, 1])
def test_the_edge_of_the_range_and_beyond(ratio, sign):
    scheme = scheme_of(ratio)
    edge = torch.full((3,), sign * (2.0**29 - 1), dtype=torch.float64)
    values = torch.rand(100, 3).double() * -sign
    assert come_back(scheme, forwards(scheme, (edge, values[0]), values), values)
    # Sums wrap around; the greatest and the least integer are multiplied too.
    scheme = scheme_of(Ratio(ratio.n, ratio.d, watch=False))
    last = torch.iinfo(torch.int64).min if sign < 0 else torch.iinfo(torch.int64).max
    integers = torch.full((3,), last), torch.tensor([last, last - sign, last // 2]), torch.zeros(3, dtype=torch.int64)
    states = [(edge, edge, *integers)]
    values = torch.randn(100, 3).double() * 2.0**31
    for number, value in enumerate(values):
        states.append(scheme.forward(states[-1], value, number))
    assert come_back(scheme, states, values)


@given(
    st.integers(1, 2**31 - 1).flatmap(lambda d: st.tuples(st.integers(1, d), st.just(d)))
    | st.integers(1, 100).flatmap(lambda d: st.tuples(st.integers(1, d), st.just(d))),
    st.integers(1, 300),
    st.integers(0, 99),
    st.integers(-40, 31),
)
def test_any_ratio_depth_and_magnitude(ratio, depth, seed, power):
    torch.manual_seed(seed)
    ratio = Ratio(*ratio, watch=False)
    scheme = scheme_of(ratio)
    x, v, *values = torch.randn(depth + 2, 5).double() * 2.0**power
    states = forwards(scheme, (x, v), values)
    assert come_back(scheme, states, values)
    element = Element(ratio, 0.0, 0.0)
    for number in range(depth):
        element.step(0.0)
        assert scheme.words(number + 1) == len(element.words)


@given(st.sampled_from([*RATIOS.values(), Ratio(1, 1), Ratio(1, 2**31 - 1)]), st.integers(0, 99), st.integers(26, 30))
def test_what_the_watch_lets_pass_did_not_wrap_around(ratio, seed, power):
    torch.manual_seed(seed)
    x, v, *values = (torch.rand(22, 1).double() * 2 - 1) * 2.0**power
    scheme, element = scheme_of(ratio), Element(ratio, float(x), float(v))
    with suppress(StateError):
        state = scheme.quantized((x, v))
        for number, value in enumerate(values):
            state = scheme.forward(state, value, number)
            element.step(float(value))
            assert [int(t) for t in scheme.told(state)[:2]] == [element.x, element.v]


def cut(integer, by):
    """Division that rounds towards zero, as C does it."""
    quotient = torch.div(integer, by, rounding_mode="trunc")
    return quotient, integer - quotient * by


def test_without_rounding_down_or_without_words_it_would_be_wrong(monkeypatch):
    values = torch.randn(100, 3)
    for name, fault in (("divided", cut), ("_words", lambda n, d, length: (0,) * length)):
        scheme, first = scheme_of(Ratio(1, 2)), (torch.randn(3), -torch.rand(3))
        assert come_back(scheme, forwards(scheme, first, values), values)
        with monkeypatch.context() as patch:
            patch.setattr(module, name, fault)
            assert not come_back(scheme, forwards(scheme, first, values), values), name


# ---------------------------------------------------------------------- gradients


ENGINES = [
    reversa.Invert(verify=True, group=1),
    reversa.Invert(verify=True, group=8),
    reversa.Invert(anchors=7),
    reversa.Invert(keep=3),
    reversa.Recompute(every=5),
    reversa.Offload(),
]


@pytest.mark.parametrize("engine", ENGINES, ids=map(repr, ENGINES))
def test_every_engine_past_the_first_words(engine):
    seq = chain(reversa.Momentum(0.5, init=nn.Linear(6, 6)), functions(130, "dropout"), Ratio(1, 2))
    assert seq.scheme_for(torch.zeros(1)).words(130) == 3
    x = torch.randn(4, 6, requires_grad=True)
    assert_bit_equal(step(seq, x, engine), step(seq, x, reversa.Store()))


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize("numbers", [(0, 1), (-1, 2), (11, 10), (1, 2**31), (1, -2)])
def test_ratios_outside_their_range(numbers):
    with pytest.raises(SettingError, match=r"0 < n <= d < 2\*\*31, got n="):
        Ratio(*numbers)


def test_what_a_ratio_cannot_be():
    for numbers in ((0.9, 1), (True, 2), ("9", 10), (9, 10, 32.0)):
        with pytest.raises(SettingError, match=r"Ratio needs whole numbers.*Ratio\.of"):
            Ratio(*numbers)
    for radix in (0, 61):
        with pytest.raises(SettingError, match=f"0 < radix < 61, got {radix}"):
            Ratio(9, 10, radix=radix)
    for gamma in (0, 1.5, -0.5, 1e-4, float("nan"), float("inf")):
        with pytest.raises(SettingError, match=r"gamma must lie in \(0, 1\]"):
            Ratio.of(gamma)


@pytest.mark.parametrize("gamma", [0.5, 0.9, 0.95, 0.99, 0.999, 1 / 3, 1.0, 1, 0.001])
def test_the_nearest_ratio_fits_its_gamma(gamma):
    ratio = Ratio.of(gamma)
    assert ratio.d <= 1000
    x = torch.randn(2, 3)
    assert chain(reversa.Momentum(gamma), [nn.Tanh()] * 3, ratio)(x).shape == x.shape


def test_schemes_that_a_ratio_is_not_for():
    with pytest.raises(SettingError, match=r"Ratio\(9, 10\) multiplies a velocity.*RevNet.*Use exact=True"):
        chain(reversa.RevNet(), [nn.Tanh()] * 2, Ratio(9, 10))
    for gamma in (0.99, 0.9 + 1e-9):
        with pytest.raises(SettingError, match=r"needs Momentum\(gamma=9/10\), got gamma=0\.9"):
            chain(reversa.Momentum(gamma), [nn.Tanh()], Ratio(9, 10))
    with pytest.raises(SettingError, match=r"such as FixedPoint\(bits=32\) or Ratio\(9, 10\); got 0\.9"):
        chain(reversa.Momentum(0.9), [nn.Tanh()], 0.9)


def test_states_that_no_chain_returned():
    seq = chain(reversa.Momentum(0.5), functions(70), Ratio(1, 2))
    x = torch.randn(4, 6)
    last = seq.forward_state((x, x))
    for bad in (last[:2], last[:5], (*last[:2], *(t.int() for t in last[2:]))):
        with pytest.raises(StateError, match=r"Ratio\(1, 2\) needs the state that forward_state returned.*1 words"):
            seq.inverse_state(bad)
    fixed = chain(reversa.Momentum(0.5), functions(70), FixedPoint())
    with pytest.raises(StateError, match="needs the state that forward_state returned"):
        seq.inverse_state(fixed.forward_state((x, x)))


@pytest.mark.parametrize(
    ("bias", "what"),
    [(1e11, r"step 3: what f returned reaches 1e\+11"), (5e9, r"step \d+: the state x reaches")],
)
def test_a_state_outside_the_range_names_step_value_and_radix(bias, what):
    fs = functions(30)
    fs[3:] = [nn.Linear(6, 6) for _ in fs[3:]]
    for f in fs[3:]:
        nn.init.zeros_(f.weight)
        nn.init.constant_(f.bias, bias)
    with pytest.raises(StateError, match=rf"{what}.*64-bit.*below.*Use Ratio\(9, 10, radix=28\)"):
        chain(reversa.Momentum(0.9), fs, Ratio(9, 10))(torch.randn(4, 6))
    chain(reversa.Momentum(0.9), fs, Ratio(9, 10, radix=16))(torch.randn(4, 6))


def test_it_says_what_it_is():
    assert repr(Ratio(9, 10)) == "Ratio(9, 10)"
    assert repr(Ratio(9, 10, radix=28, watch=False)) == "Ratio(9, 10, radix=28, watch=False)"
    assert repr(Ratio.of(0.9)) in repr(chain(reversa.Momentum(0.9), [nn.Tanh()], Ratio.of(0.9)))

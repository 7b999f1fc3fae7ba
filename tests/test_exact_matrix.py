"""Schemes x arithmetic x depth x residual functions x data types: every state and every gradient, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import reversa
from cases import FAMILIES
from reversa.exact import FixedPoint
from reversa.exact import exact_scheme as exactly
from test_exact import assert_bit_equal, chain, step

SCHEMES = {f"momentum-{gamma}": reversa.Momentum(gamma) for gamma in (0.9, 0.5, 0.99, 0.001, 1.0)}
SCHEMES |= {"revnet": reversa.RevNet(), "additive": reversa.AdditiveCoupling()}
ADDITIVE = ["revnet", "additive"]
ARITHMETIC = {"int64": FixedPoint(), "int32": FixedPoint(bits=32)}
# Channels, or the length of a sentence, lie along dim 1; so do the halves of schemes that split their input.
SHAPES = {"mlp": (4, 6), "conv-bn": (3, 4, 5, 5), "attention": (2, 3, 8)}

schemes = pytest.mark.parametrize("scheme", SCHEMES)
additive = pytest.mark.parametrize("scheme", ADDITIVE)
families = pytest.mark.parametrize("family", SHAPES)
arithmetics = pytest.mark.parametrize("arithmetic", ARITHMETIC)
precisions = pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bf16"])


class Small(nn.Module):
    """A tenth of a function: hundreds of them stay in the range of a few bits."""

    def __init__(self, f: nn.Module) -> None:
        super().__init__()
        self.f = f

    def forward(self, x):
        return 0.1 * self.f(x)


def case(scheme: str, family: str, depth: int, dtype: torch.dtype = torch.float32):
    """Residual functions, whole blocks of them, and an input."""
    batch, width, *rest = SHAPES[family]
    width *= 1 if SCHEMES[scheme].carries_input else 2
    fs = FAMILIES[family].functions(depth + depth % SCHEMES[scheme].functions_per_block, dtype)
    return fs, torch.randn(batch, width, *rest, dtype=dtype, requires_grad=True)


def there(scheme, fs, x):
    """Forwards by hand: the state after the last step; before each step, the integers with what was spilled, and x."""
    state, met = scheme.open(x), []
    for number, f in enumerate(fs):
        argument = scheme.argument(state, number)
        met.append((scheme.told(state), argument))
        state = scheme.forward(state, f(argument).to(argument.dtype), number)
    return state, met


def same_bits(actual, expected) -> bool:
    """Words that stay spilled are handed on, not made again."""
    return len(actual) == len(expected) and all(
        a is b or (a.dtype == b.dtype and torch.equal(a, b)) for a, b in zip(actual, expected, strict=True)
    )


@torch.no_grad()
def assert_states_come_back(scheme, fs, x) -> None:
    """Every state that was, from the integers after the last step alone."""
    state, met = there(scheme, fs, x.detach())
    state = (*(x.new_empty(0) for _ in range(scheme.num_streams)), *scheme.told(state))
    for number, (told, argument) in reversed(list(enumerate(met))):
        found, rest = scheme.uncover(state, number)
        assert torch.equal(found, argument), number
        state = scheme.inverse(found, rest, fs[number](found).to(found.dtype), number)
        assert same_bits(scheme.told(state), told), number


def assert_all_right(scheme: str, arithmetic: FixedPoint, fs, x, autocast: bool = False, **engine) -> None:
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert_states_come_back(exactly(SCHEMES[scheme], arithmetic), fs, x)
        seq = chain(SCHEMES[scheme], fs, arithmetic)
        expected = step(seq, x, reversa.Store())
        assert_bit_equal(step(seq, x, reversa.Invert(**engine)), expected)
    assert all(g is not None and g.isfinite().all() for g in expected.values() if g is not None)
    assert expected["x"].any()


# ---------------------------------------------------------------------- the matrix


@precisions
@families
@arithmetics
@pytest.mark.parametrize("depth", [1, 10])
@schemes
def test_few_steps(scheme, depth, arithmetic, family, autocast):
    assert_all_right(scheme, ARITHMETIC[arithmetic], *case(scheme, family, depth), autocast, group=1)


@precisions
@arithmetics
@schemes
def test_a_hundred_steps(scheme, arithmetic, autocast):
    assert_all_right(scheme, ARITHMETIC[arithmetic], *case(scheme, "mlp", 100), autocast)


# Each data type in the arithmetic that is its default.
DEFAULTS = pytest.mark.parametrize(("arithmetic", "autocast"), [("int64", False), ("int32", True)])


@DEFAULTS
@pytest.mark.parametrize("family", ["conv-bn", "attention"])
@schemes
def test_a_hundred_steps_of_convolutions_and_attention(scheme, family, arithmetic, autocast):
    assert_all_right(scheme, ARITHMETIC[arithmetic], *case(scheme, family, 100), autocast)


def tame(scheme: str, family: str, depth: int):
    fs, x = case(scheme, family, depth)
    return [Small(f) for f in fs], x


def long(scheme: str, depth: int):
    """Of the smallest functions, since hundreds of them are run six times."""
    x = torch.randn(4, 4 if SCHEMES[scheme].carries_input else 8, requires_grad=True)
    return [Small(nn.Sequential(nn.Linear(4, 4), nn.Tanh())) for _ in range(depth)], x


@pytest.mark.parametrize(("arithmetic", "autocast"), [("int64", False), ("int32", False), ("int32", True)])
@schemes
def test_512_steps(scheme, arithmetic, autocast):
    assert_all_right(scheme, ARITHMETIC[arithmetic], *long(scheme, 512), autocast)


@DEFAULTS
@schemes
def test_1000_steps(scheme, arithmetic, autocast):
    assert_all_right(scheme, ARITHMETIC[arithmetic], *long(scheme, 1000), autocast)


@pytest.mark.slow
@DEFAULTS
@pytest.mark.parametrize("family", ["conv-bn", "attention"])
@pytest.mark.parametrize("scheme", ["momentum-0.9", "momentum-0.5", "revnet", "additive"])
def test_1000_steps_of_convolutions_and_attention(scheme, family, arithmetic, autocast):
    assert_all_right(scheme, ARITHMETIC[arithmetic], *tame(scheme, family, 1000), autocast)


@arithmetics
@families
@schemes
def test_float64(scheme, family, arithmetic):
    assert_all_right(scheme, ARITHMETIC[arithmetic], *case(scheme, family, 10, torch.float64))


@schemes
def test_a_hundred_steps_in_float64(scheme):
    assert_all_right(scheme, ARITHMETIC["int64"], *case(scheme, "mlp", 100, torch.float64))


@pytest.mark.parametrize("depth", [1, 10, 100])
@families
@additive
def test_16_bits(scheme, family, depth):
    assert_all_right(scheme, FixedPoint(bits=16), *tame(scheme, family, depth))


@additive
def test_1000_steps_in_16_bits(scheme):
    assert_all_right(scheme, FixedPoint(bits=16), *long(scheme, 1000))


@families
@additive
def test_16_bits_under_autocast(scheme, family):
    assert_all_right(scheme, FixedPoint(bits=16), *tame(scheme, family, 10), autocast=True)


# ---------------------------------------------------------------------- by the sequence's own methods


def spread(shape, dtype: torch.dtype) -> torch.Tensor:
    """Values of every magnitude, most of which no fixed point holds without a remainder."""
    return torch.randn(shape, dtype=dtype) * 10.0 ** torch.randint(-9, 2, shape)


@precisions
@families
@arithmetics
@schemes
def test_inverse_state_gives_the_input_back(scheme, arithmetic, family, autocast):
    fs, x = case(scheme, family, 10)
    seq, n = chain(SCHEMES[scheme], fs, ARITHMETIC[arithmetic]), SCHEMES[scheme].num_streams
    first = tuple(spread(s.shape, s.dtype) for s in SCHEMES[scheme].open(x))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            with mode():
                back = seq.inverse_state(seq.forward_state(first))
            assert all(torch.equal(b, f) for b, f in zip(back[:n], first, strict=True)), mode


@families
@schemes
def test_every_state_that_states_shows_leads_back_to_the_first(scheme, family):
    fs, x = case(scheme, family, 12)
    scheme = SCHEMES[scheme]
    states = chain(scheme, fs, True).states(x)
    per_block = scheme.functions_per_block
    for depth in range(per_block, 13, per_block):
        back = chain(scheme, fs[:depth], True).inverse_state(states[depth])
        assert same_bits(back[: len(states[0])], states[0]), depth


@schemes
def test_the_last_of_the_states_is_the_output(scheme):
    fs, x = case(scheme, "mlp", 20)
    seq = chain(SCHEMES[scheme], fs, True)
    states, exact = seq.states(x), exactly(SCHEMES[scheme], FixedPoint())
    assert torch.equal(exact.close(states[-1]), seq(x))
    assert same_bits(states[-1], seq.forward_state(states[0])[: len(states[-1])])


# ---------------------------------------------------------------------- the values


@arithmetics
@families
@schemes
def test_values_and_gradients_are_those_of_float64(scheme, family, arithmetic):
    """Fixed point rounds; it does not compute something else."""
    fs, x = case(scheme, family, 20, torch.float64)
    store = reversa.Store()
    exact = step(chain(SCHEMES[scheme], fs, ARITHMETIC[arithmetic]), x, store)
    for name, want in step(chain(SCHEMES[scheme], fs, False), x, store).items():
        if want is not None and want.is_floating_point():
            assert (exact[name] - want).norm() <= (1e-9 if arithmetic == "int64" else 1e-3) * (want.norm() + 1), name

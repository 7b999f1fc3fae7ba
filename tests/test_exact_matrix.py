"""Schemes x arithmetic x gamma x depth x residual functions x data types: every state and gradient, bit for bit."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import reversa
from cases import FAMILIES, Family, chain, input_for
from exact_cases import FIXED, assert_bit_equal, same_bits, trained
from reversa import BDIA, Dr2Net, Hamiltonian, IRevNet, Leapfrog, McCallumFoster, Midpoint, ReversibleHeun
from reversa.errors import DriftError
from reversa.exact import ExactScheme, FixedPoint, Ratio, exact_scheme

SCHEMES = {f"momentum-{gamma}": reversa.Momentum(gamma) for gamma in (0.9, 0.5, 0.99, 0.001, 1.0)}
ADDITIVE = {"revnet": reversa.RevNet(), "additive": reversa.AdditiveCoupling()}
SCHEMES |= ADDITIVE
OTHERS = (Hamiltonian(), Midpoint(), Leapfrog(), IRevNet(), BDIA(random=False), Dr2Net(), McCallumFoster(0.9))
SCHEMES |= {str(s).partition("(")[0].lower(): s for s in OTHERS}
SCHEMES |= {"dr2net-1-0": Dr2Net(1, 0)}
# What begins anew in every run: random signs, a last step that is another one.
BEGUN = {"bdia-drawn": BDIA(), "reversibleheun": ReversibleHeun()}
RATIOS = [Ratio(1, 2), Ratio(9, 10), Ratio(99, 100), Ratio(999, 1000)]
# Every scheme in every arithmetic that it has; a ratio is that of one gamma.
ROWS = {f"{name}-{kind}": (scheme, fixed) for name, scheme in SCHEMES.items() for kind, fixed in FIXED.items()}
ROWS |= {f"momentum-{ratio.n}:{ratio.d}": (reversa.Momentum(ratio.gamma), ratio) for ratio in RATIOS}
BEGUN_ROWS = {f"{name}-{kind}": (scheme, fixed) for name, scheme in BEGUN.items() for kind, fixed in FIXED.items()}
NAMES = ["mlp", "conv-bn", "attention"]

all_rows = pytest.mark.parametrize(
    ("scheme", "arithmetic"), [*ROWS.values(), *BEGUN_ROWS.values()], ids=[*ROWS, *BEGUN_ROWS]
)
rows = pytest.mark.parametrize(("scheme", "arithmetic"), ROWS.values(), ids=ROWS)
schemes = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
additive = pytest.mark.parametrize("scheme", ADDITIVE.values(), ids=ADDITIVE)
families = pytest.mark.parametrize("family", NAMES)
precisions = pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bf16"])


# ---------------------------------------------------------------------- functions so small that a thousand are quick


class TinyMlp(nn.Sequential):
    """A tenth of a function, as the others below: hundreds of them stay in the range of a few bits."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))

    def forward(self, input):
        return 0.1 * super().forward(input)


def tiny_conv() -> nn.Module:
    norm = nn.BatchNorm2d(2)
    nn.init.constant_(norm.weight, 0.1)
    return nn.Sequential(nn.Conv2d(2, 2, 3, padding=1, bias=False), norm, nn.ReLU())


class TinyAttention(nn.Module):
    """One head, behind a normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(4), nn.Linear(4, 12, bias=False), nn.Linear(4, 4)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        return 0.1 * self.out(F.scaled_dot_product_attention(q, k, v))


TINY = {
    "mlp": Family(TinyMlp, (2, 4)),
    "conv-bn": Family(tiny_conv, (2, 2, 2, 2)),
    "attention": Family(TinyAttention, (2, 2, 4)),
}


# ---------------------------------------------------------------------- what is held against what


class Witness:
    """Notes every state that a scheme makes on the way forth, and which of them it recovers on the way back."""

    def __init__(self, scheme: ExactScheme) -> None:
        self.scheme, self.before, self.right = scheme, {}, {}
        self.forward, self.inverse = scheme.forward, scheme.inverse
        scheme.forward, scheme.inverse = self.forth, self.back

    def forth(self, state, value, step):
        # The integers are copied, so that nobody else's memory is compared with itself; words are only handed on.
        told = (t.clone() if t.dtype == self.scheme.dtype else t for t in self.scheme.told(state))
        self.before.setdefault(step, (self.scheme.argument(state, step).detach().clone(), *told))
        return self.forward(state, value, step)

    def back(self, argument, rest, value, step):
        state = self.inverse(argument, rest, value, step)
        found, was = (argument, *self.scheme.told(state)), self.before[step]
        self.right[step] = len(found) == len(was) and all(map(handed_on_or_same_bits, found, was))
        return state


def handed_on_or_same_bits(actual, expected) -> bool:
    return actual.data_ptr() == expected.data_ptr() or same_bits(actual, expected)


def made(scheme, arithmetic, family, depth: int, dtype=torch.float32, engine=None):
    """A chain and its input: the same ones every time."""
    torch.manual_seed(0)
    fs = family.functions(
        depth + depth % max(scheme.functions_per_block, 1 + isinstance(scheme, ReversibleHeun)), dtype
    )
    return chain(scheme, fs, arithmetic, engine), input_for(scheme, *family.shape, dtype=dtype)


def assert_all_right(scheme, arithmetic, family, depth: int, dtype=torch.float32, autocast: bool = False) -> None:
    """One step of training: every state that the engine recovers, and every gradient beside that of ``Store()``."""

    def under():
        return torch.autocast("cpu", torch.bfloat16, enabled=autocast)

    engine = reversa.Invert(group=1 if depth <= 10 else None)
    seq, x = made(scheme, arithmetic, family, depth, dtype, engine)
    scheme_for, witnesses = seq.scheme_for, []
    seq.scheme_for = lambda x: witnesses.append(Witness(scheme_for(x))) or witnesses[0].scheme
    found = trained(seq, x, under())
    (witness,) = witnesses
    expected = trained(*made(scheme, arithmetic, family, depth, dtype, reversa.Store()), under())
    assert witness.right == dict.fromkeys(range(len(seq.functions)), True)
    assert_bit_equal(found, expected)
    assert all(g.isfinite().all() for g in expected.values() if g is not None)
    assert expected["x"].any()


# ---------------------------------------------------------------------- the matrix


@precisions
@families
@pytest.mark.parametrize("depth", [1, 10, 100, 512, 1000])
@all_rows
def test_matrix(scheme, arithmetic, depth, family, autocast):
    # BDIA takes f as it is, or more of it: a hundred functions of random weights leave the range of 32 bits.
    most = 10 if isinstance(scheme, BDIA) else 100
    assert_all_right(scheme, arithmetic, (FAMILIES if depth <= most else TINY)[family], depth, autocast=autocast)


@families
@all_rows
def test_float64(scheme, arithmetic, family):
    assert_all_right(scheme, arithmetic, FAMILIES[family], 10, torch.float64)


@rows
def test_a_hundred_steps_in_float64(scheme, arithmetic):
    assert_all_right(scheme, arithmetic, FAMILIES["mlp"], 100, torch.float64)


@precisions
@families
@pytest.mark.parametrize("depth", [1, 10, 100])
@additive
def test_16_bits(scheme, depth, family, autocast):
    assert_all_right(scheme, FixedPoint(bits=16), TINY[family], depth, autocast=autocast)


@additive
def test_1000_steps_in_16_bits(scheme):
    assert_all_right(scheme, FixedPoint(bits=16), TINY["mlp"], 1000)


def one_bit_of(integers):
    wrong = integers.clone()
    wrong.view(-1)[0] ^= 1
    return wrong


@pytest.mark.parametrize("position", [2, 3], ids=["X", "V"])
@rows
def test_one_wrong_bit_would_be_seen(scheme, arithmetic, position, monkeypatch):
    kind = type(exact_scheme(scheme, arithmetic))
    inverse = kind.inverse

    def faulty(self, argument, rest, value, step):
        state = inverse(self, argument, rest, value, step)
        return tuple(one_bit_of(t) if step == 4 and i == position else t for i, t in enumerate(state))

    monkeypatch.setattr(kind, "inverse", faulty)
    with pytest.raises((AssertionError, DriftError), match=r"4: False|has not the bits"):  # here, or by the chain
        assert_all_right(scheme, arithmetic, TINY["mlp"], 10)


# ---------------------------------------------------------------------- by the sequence's own methods


def spread(shape, dtype: torch.dtype) -> torch.Tensor:
    """Values of every magnitude, most of which no fixed point holds without a remainder."""
    return torch.randn(shape, dtype=dtype) * 10.0 ** torch.randint(-9, 2, shape)


@precisions
@families
@rows
def test_inverse_state_gives_the_input_back(scheme, arithmetic, family, autocast):
    seq, x = made(scheme, arithmetic, FAMILIES[family], 10)
    first = tuple(spread(s.shape, s.dtype) for s in scheme.open(x))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            with mode():
                back = seq.inverse_state(seq.forward_state(first))
            assert all(map(same_bits, back[: len(first)], first)), mode


@families
@rows
def test_every_state_that_states_shows_leads_back_to_the_first(scheme, arithmetic, family):
    seq, x = made(scheme, arithmetic, FAMILIES[family], 12)
    states, fs, per_block = seq.states(x), seq.functions, scheme.functions_per_block
    for depth in range(per_block, 13, per_block):
        back = chain(scheme, fs[:depth], arithmetic).inverse_state(states[depth])
        assert all(map(same_bits, back[: len(states[0])], states[0])), depth


@rows
def test_the_last_of_the_states_is_the_output(scheme, arithmetic):
    seq, x = made(scheme, arithmetic, FAMILIES["mlp"], 20)
    states = seq.states(x)
    assert torch.equal(exact_scheme(scheme, arithmetic).close(states[-1]), seq(x))
    assert all(map(same_bits, states[-1], seq.forward_state(states[0])))


# ---------------------------------------------------------------------- the values


def tolerance(arithmetic) -> float:
    """A ratio holds the velocity in multiples of d; BatchNorm makes errors larger."""
    if isinstance(arithmetic, Ratio):
        return 100 * arithmetic.d * 2.0**-arithmetic.radix
    return 1e-9 if arithmetic.bits == 64 else 1e-3


@families
@all_rows
def test_values_and_gradients_are_those_of_float64(scheme, arithmetic, family):
    """Integers round; they do not compute something else."""
    family, store = FAMILIES[family], reversa.Store()
    exact = trained(*made(scheme, arithmetic, family, 20, torch.float64, store))
    for name, want in trained(*made(scheme, False, family, 20, torch.float64, store)).items():
        if want is not None and want.is_floating_point():
            assert (exact[name] - want).norm() <= tolerance(arithmetic) * (want.norm() + 1), name

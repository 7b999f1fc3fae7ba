"""Exact arithmetic: the backward pass sees the very bits of the forward pass."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import reversa
from cases import FAMILIES, chain, input_for
from exact_cases import assert_bit_equal, step
from reversa.errors import ReplayError, SettingError, StateError
from reversa.exact import FixedPoint, Ratio, exact_scheme

SCHEMES = {
    "momentum-0.9": reversa.Momentum(0.9),
    "momentum-0.5": reversa.Momentum(0.5),
    "momentum-0.001": reversa.Momentum(0.001),
    "momentum-1": reversa.Momentum(1.0),
    "revnet": reversa.RevNet(),
    "additive": reversa.AdditiveCoupling(),
}


def case(scheme, family, dtype=torch.float32, depth=10):
    torch.manual_seed(0)
    family = FAMILIES[family]
    return family.functions(depth, dtype), input_for(SCHEMES[scheme], *family.shape, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_first_state_comes_back_bit_for_bit(scheme, dtype):
    fs, _ = case(scheme, "mlp", dtype, depth=100)
    seq = chain(SCHEMES[scheme], fs, True)
    n = SCHEMES[scheme].num_streams
    first = tuple(torch.randn(4, 6, dtype=dtype) * 10.0 ** torch.randint(-9, 3, (4, 6)) for _ in range(n))
    back = seq.inverse_state(seq.forward_state(first))
    assert all(torch.equal(b, f) for b, f in zip(back[:n], first, strict=True))


@pytest.mark.parametrize("exact", [True, Ratio(9, 10)], ids=str)
def test_values_are_those_of_the_float_chain(exact):
    fs, x = case("momentum-0.9", "mlp", depth=512)
    exact = chain(SCHEMES["momentum-0.9"], fs, exact)(x)
    expected = chain(SCHEMES["momentum-0.9"], fs, False, reversa.Store())(x)
    assert (exact - expected).norm() <= 1e-5 * expected.norm()


def test_a_state_outside_the_range_names_step_value_and_radix():
    fs, x = case("momentum-0.9", "mlp", depth=4)
    seq = chain(SCHEMES["momentum-0.9"], [*fs, nn.Linear(6, 6)], FixedPoint(bits=32))
    with torch.no_grad():
        seq.blocks[4].bias.fill_(1e6)
    with pytest.raises(StateError, match=r"step 4: what f returned reaches 1e\+06; 32-bit.*velocity_radix=12"):
        seq(x)


def test_a_step_that_was_refused_can_be_made_again():
    fs, x = case("momentum-0.9", "mlp", depth=3)
    scheme = exact_scheme(reversa.Momentum(0.9), FixedPoint(bits=32))

    def run(steps, refused):
        state = scheme.open(x)
        for i, f in enumerate(fs):
            if i == 1 and refused:
                with pytest.raises(StateError, match="step 1"):
                    steps.step(lambda x: f(x) + 1e6, state, module=f)  # noqa: B023
            state, _ = steps.step(f, state)
        steps.end()
        return torch.autograd.grad(scheme.close(state).square().sum(), [x, *fs[1].parameters()])

    again = run(reversa.Invert().begin(scheme, 3), refused=True)
    assert all(map(torch.equal, again, run(reversa.Store().begin(scheme, 3), refused=False)))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("scheme", "exact"), [("momentum-0.9", True), ("revnet", True), ("momentum-0.9", Ratio(9, 10))]
)
def test_what_is_not_finite_is_reported(scheme, exact, value):
    fs, x = case(scheme, "mlp", depth=4)
    fs[2].register_forward_hook(lambda module, args, output: output + value)
    with pytest.raises(StateError, match="step 2: what f returned is not finite"):
        chain(SCHEMES[scheme], fs, exact)(x)


def test_autocast_runs_in_32_bits():
    fs, x = case("momentum-0.9", "mlp", depth=64)
    seq = chain(SCHEMES["momentum-0.9"], fs, True)
    with torch.autocast("cpu", torch.bfloat16):
        state = seq.forward_state((x, torch.zeros_like(x)))
        results = [step(seq, x, engine) for engine in (reversa.Invert(), reversa.Store())]
    assert {t.dtype for t in state} == {torch.float32, torch.int32, torch.uint8}
    assert_bit_equal(*results)


def test_what_cannot_be_exact():
    for bad in (3, "yes"):
        with pytest.raises(SettingError, match="exact must be True, False"):
            chain(reversa.Momentum(0.9), [nn.Tanh()], bad)
    with pytest.raises(SettingError, match="velocity needs 32 or 64 bits"):
        chain(reversa.Momentum(0.9), [nn.Tanh()], FixedPoint(bits=16))
    with pytest.raises(SettingError, match="16, 32 or 64"):
        FixedPoint(bits=8)
    with pytest.raises(SettingError, match="0 < radix < 30"):
        FixedPoint(bits=32, radix=30)
    with pytest.raises(StateError, match="needs the state that forward_state returned"):
        chain(reversa.Momentum(0.5), [nn.Tanh()] * 9, True).inverse_state((torch.zeros(2, 3), torch.zeros(2, 3)))


# ---------------------------------------------------------------------- proof on the way back


@pytest.mark.parametrize("group", [1, 8])
@pytest.mark.parametrize("scheme", ["momentum-0.5", "revnet"])
def test_hashes_prove_that_every_state_comes_back(scheme, group):
    fs, x = case(scheme, "dropout", depth=20)
    seq = chain(SCHEMES[scheme], fs, True)
    assert_bit_equal(step(seq, x, reversa.Invert(verify=True, group=group)), step(seq, x, reversa.Store()))


@pytest.mark.parametrize("group", [1, 8])
def test_a_function_that_computes_other_bits_the_second_time_is_named(group):
    fs, x = case("momentum-0.5", "mlp", depth=20)
    fs[7].register_forward_hook(lambda f, args, y: y * (1 + 1e-6) if reversa.is_replaying() else y)
    seq = chain(SCHEMES["momentum-0.5"], fs, True, reversa.Invert(verify=True, group=group))
    y = seq(x)
    with pytest.raises(ReplayError, match=r"step 7 .*not recovered bit for bit"):
        y.sum().backward()


def test_hashes_need_exact_arithmetic():
    fs, x = case("momentum-0.5", "mlp", depth=4)
    with pytest.raises(SettingError, match=r"Invert\(verify=True\) compares bits.*exact=True"):
        chain(SCHEMES["momentum-0.5"], fs, False, reversa.Invert(verify=True))(x)


@pytest.mark.parametrize(("scheme", "exact"), [("momentum-0.5", True), ("revnet", True), ("momentum-0.5", Ratio(1, 2))])
def test_check_finds_no_difference_at_all(scheme, exact):
    fs, x = case(scheme, "mlp", depth=80)
    report = reversa.check(chain(SCHEMES[scheme], fs, exact), x.detach())
    assert report.ok
    states = next(row for row in report.rows if row.what.startswith("states of"))
    assert set(states.errors.values()) == {0.0}

"""Schemes whose steps differ (by number, by sample, by what they wipe out), and the engines over them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import reversa
from cases import Share, assert_same, error, gradients, mlp, step
from convert_cases import looped
from reversa import BDIA, Dr2Net, Hamiltonian, Invert, IResNet, Leapfrog, Midpoint, Momentum, ReversibleHeun, Store
from reversa.engine.sample import Samples
from reversa.errors import DriftError, DriftWarning, StateError

DOUBLE = torch.float64


def chain(scheme, depth=6, dtype=DOUBLE, **settings):
    return reversa.ReversibleSequence([mlp().to(dtype) for _ in range(depth)], scheme, **settings)


# ---------------------------------------------------------------------- where a pass goes on with another tensor


def stretched(blocks, x):
    for i, block in enumerate(blocks):
        x = block(1.5 * x if i == 3 else x)
    return x


def by_number(scheme, fs, x):
    """The formula, every step under its own number, with the output stretched before step 3."""
    state = scheme.open(x)
    for number, f in enumerate(fs):
        state = (1.5 * state[0], *state[1:]) if number == 3 else state
        state = scheme.forward(state, f(scheme.argument(state, number)), number)
    return scheme.close(state)


NUMBERED = [
    BDIA(),
    BDIA(random=False),
    Dr2Net(),
    Midpoint(0.3),
    Leapfrog(0.3, init="euler"),
    Momentum(0.5),
]


@pytest.mark.parametrize("exact", [False, True], ids=["float", "exact"])
@pytest.mark.parametrize("scheme", NUMBERED, ids=str)
def test_a_carried_state_goes_on_with_the_next_number(scheme, exact):
    model = looped(stretched, depth=6)
    fs = [copy.deepcopy(block.body) for block in model.blocks]
    reversa.convert(model, scheme=scheme, exact=exact, between="carry")
    x = torch.randn(4, 6, dtype=DOUBLE)
    torch.manual_seed(1)
    ours = model(x)
    torch.manual_seed(1)
    expected = by_number(scheme.begun(x, 6, training=True), fs, x)
    assert error(ours, expected) < (1e-8 if exact else 1e-13)


@pytest.mark.parametrize("exact", [False, True], ids=["float", "exact"])
@pytest.mark.parametrize("scheme", [BDIA()], ids=str)
def test_a_carried_state_has_the_gradients_of_stored_activations(scheme, exact):
    model, x, results = looped(stretched, depth=6, p=0.2), torch.randn(4, 6, dtype=DOUBLE), []
    for engine in (Invert(), Store()):
        twin = reversa.convert(copy.deepcopy(model), scheme=scheme, engine=engine, exact=exact, between="carry")
        torch.manual_seed(1)
        twin(x).square().sum().backward()
        results.append(gradients(twin))
    ours, stored = results
    assert_same(ours, stored, 0 if exact else 1e-11)


@pytest.mark.parametrize("exact", [False, True], ids=["float", "exact"])
def test_bdia_in_eval_is_the_original_wherever_the_loop_puts_another_tensor(exact):
    model, x = looped(stretched, depth=6), torch.randn(4, 6, dtype=DOUBLE)
    expected = model.eval()(x)
    reversa.convert(model, scheme=BDIA(), exact=exact, between="carry")
    assert error(model(x), expected) < (1e-10 if exact else 1e-14)


# ---------------------------------------------------------------------- how far a backward pass comes


class Folding(nn.Module):
    """No contraction: several x have one x + f(x)."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(-0.9, dtype=DOUBLE))

    def forward(self, x):
        return self.scale * torch.tanh(3 * x)


@pytest.mark.parametrize("engine", [Invert(group=1), Invert(group=8)], ids=str)
def test_drift_is_seen_although_the_first_functions_are_frozen(engine):
    """A backward pass ends at the first function with a gradient, and the comparison stands there."""
    fs = [Folding() for _ in range(3)]
    fs[0].requires_grad_(False)
    fs[1].requires_grad_(False)
    x = 0.2 * torch.randn(64, 6, dtype=DOUBLE)
    with pytest.raises(DriftError, match=r"recovered for step 2 \(Folding\) differs"):
        reversa.ReversibleSequence(fs, IResNet(0.5), engine=engine)(x).sin().sum().backward()


def test_lost_digits_are_seen_although_the_first_functions_are_frozen():
    fs = [nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)) for _ in range(160)]
    for p in (p for f in fs for p in f.parameters()):
        p.data.mul_(3)
    for f in fs[:3]:
        f.requires_grad_(False)
    blocks = list(zip(fs[::2], fs[1::2], strict=True))
    seq = reversa.ReversibleSequence(blocks, Hamiltonian(1.0), engine=Invert(group=1))
    with pytest.raises(DriftError, match="recovered for step 3"):
        seq(torch.randn(64, 16)).sin().sum().backward()


# ---------------------------------------------------------------------- what a step wipes out


@pytest.mark.parametrize(("scheme", "training"), [(Dr2Net(1, 0), True), (BDIA(), False)], ids=str)
def test_check_asks_for_nothing_that_was_wiped_out(scheme, training):
    report = reversa.check(chain(scheme, dtype=torch.float32).train(training), torch.randn(4, 6))
    assert report.ok, str(report)


@pytest.mark.parametrize("known", [False, True])
def test_who_insists_on_no_anchors_has_them_where_nothing_comes_back(known):
    """accept_drift is about digits that are lost; here all are."""
    fs, x = [mlp().double() for _ in range(6)], torch.randn(4, 6, dtype=DOUBLE, requires_grad=True)

    def run(engine, fs, x):
        steps, state = engine.begin(Dr2Net(1, 0), len(fs) if known else None), Dr2Net(1, 0).open(x)
        for f in fs:
            state, _ = steps.step(f, state)
        steps.end()
        return state[0]

    with pytest.warns(reversa.errors.DriftWarning) if known else torch.enable_grad():
        ours = step(lambda fs, x: run(Invert(anchors=None, accept_drift=True), fs, x), fs, x)
    assert_same(ours, step(lambda fs, x: run(Store(), fs, x), fs, x), 1e-12)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("scheme", [Momentum(0.5), Dr2Net(), Dr2Net(1, 0), BDIA()], ids=str)
def test_padding_in_eval_may_be_nested_away(scheme):
    """PyTorch's encoder hands its layers nested tensors then; they compute what padded ones give."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = reversa.convert(nn.TransformerEncoder(layer, 3), scheme=scheme).eval()
    x, padding = torch.randn(2, 5, 16), torch.zeros(2, 5, dtype=torch.bool)
    padding[0, 3:] = True
    expected = model(x, src_key_padding_mask=padding).detach()
    with torch.no_grad():
        assert error(model(x, src_key_padding_mask=padding)[~padding], expected[~padding]) < 1e-5


# ---------------------------------------------------------------------- a coefficient for each sample, in integers


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("gamma", [0.5, 0.3])
def test_signs_in_integers_give_the_formula_in_narrow_types(dtype, gamma):
    """A unit of the integers is beyond the largest number of float16."""
    seq, x = chain(BDIA(gamma), depth=8, dtype=dtype), torch.randn(4, 6).to(dtype)
    outputs = []
    for exact in (True, False):
        seq.exact = exact
        torch.manual_seed(1)
        outputs.append(seq(x))
    assert error(*outputs) < 16 * torch.finfo(dtype).eps


@pytest.mark.parametrize("scheme", [BDIA(), IResNet(0.5)], ids=str)
@pytest.mark.parametrize("kind", ["empty", "fake", "meta"])
def test_no_number_is_read_where_there_is_none(scheme, kind):
    exact = isinstance(scheme, BDIA)
    seq = reversa.ReversibleSequence([Share(mlp(), 0.1) for _ in range(4)], scheme, exact=exact)
    if kind == "fake":
        with FakeTensorMode(allow_non_fake_inputs=True):
            x = torch.zeros(4, 6, requires_grad=True)
            copy.deepcopy(seq)(x).sum().backward()
    else:
        device, batch = ("meta", 4) if kind == "meta" else ("cpu", 0)
        x = torch.zeros(batch, 6, device=device, requires_grad=True)
        seq.to(device)(x).sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("scheme", [BDIA(0.3), BDIA(random=False), Dr2Net(), ReversibleHeun()], ids=str)
def test_magnitudes_are_those_of_the_coefficients(scheme):
    begun = scheme.begun(torch.zeros(64, 3, dtype=DOUBLE), 5, training=True)
    for number in range(5):
        largest = [float(torch.as_tensor(c, dtype=DOUBLE).abs().max()) for c in begun.coefficients(number)]
        assert begun.magnitudes(number) == pytest.approx(largest, abs=1e-12)


def test_a_carried_state_beyond_the_range_is_refused():
    def far(blocks, x):
        for i, block in enumerate(blocks):
            x = block(x + 1e9 if i == 3 else x)
        return x

    model = reversa.convert(looped(far, depth=6), scheme=Dr2Net(), exact=True, between="carry")
    with pytest.raises(StateError, match="step 3: the input reaches"):
        model(torch.randn(4, 6, dtype=DOUBLE))


def test_a_backward_pass_that_stops_early_sees_drift_too():
    """It never comes back to the first step; a later sample tells."""
    torch.manual_seed(0)
    fs = [nn.Sequential(nn.Linear(32, 32), nn.Tanh()) for _ in range(60)]
    for f in fs:
        f[0].weight.data *= 16
    pairs = [*zip(fs[::2], fs[1::2], strict=True)]
    seq = reversa.ReversibleSequence(pairs, reversa.Hamiltonian(1.0), engine=Invert(group=1))
    y = seq(torch.randn(64, 64))
    with pytest.warns(DriftWarning, match="recovered for step 16"):
        torch.autograd.grad(y.sin().sum(), list(fs[3].parameters()))


def test_samples_are_few():
    samples = Samples(1e-4)
    x = torch.ones(4, 4)
    for number in range(5, 2000):
        samples.note(x, (x,), number)
    assert [number for number in range(2000) if number in samples] == [5, 21, 133, 1029]


def test_integers_that_wrap_around_are_noticed():
    """A value far beyond the range, whose integer comes out small: the real sum tells."""
    fixed = reversa.exact.FixedPoint(bits=32)
    seq = reversa.ReversibleSequence([nn.Identity()] * 40, Dr2Net(1.5, 0.9), exact=fixed)
    with pytest.raises(StateError, match=r"step \d+: (the state|what f returned) reaches"):
        seq(torch.full((2, 3), 1.0))

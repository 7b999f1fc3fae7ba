"""What exact chains hold, in live bytes: one state, and words only where somebody goes back."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

import reversa
from cases import chain
from convert_cases import Block, looped
from exact_cases import assert_bit_equal, step
from reversa import Invert, Momentum, Offload, Recompute, ReversibleSequence, RevNet, Store
from reversa.errors import StateError
from reversa.exact import FixedPoint, Ratio, exact_scheme, watch
from reversa.memory import LiveBytes

SHAPE = (512, 64)
UNIT = 512 * 64 * 4  # bytes of one float32 stream; its integers take two of them in 64 bits


def functions(depth: int, width: int = 64) -> list[nn.Module]:
    return [nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width)) for _ in range(depth)]


def momentum(gamma: float, depth: int, exact=True, engine=None) -> ReversibleSequence:
    return chain(Momentum(gamma), functions(depth), exact, engine)


GAMMAS = 0.01, 0.999


def words(steps: int) -> int:
    """Whole bytes among the bits that a gamma of 0.01 takes; 0.999 takes none of any chain here."""
    return int(6.6438 * steps / 8)


def at_each_step(seq, x, recording: bool = True) -> list[float]:
    """Units alive when each residual function begins."""
    held: list[float] = []
    with LiveBytes(exclude=seq) as counted, torch.set_grad_enabled(recording):
        hooks = [f.register_forward_pre_hook(lambda *_: held.append(counted.live / UNIT)) for f in seq.functions]
        seq(x)
    for hook in hooks:
        hook.remove()
    return held


def training_peak(seq, x) -> float:
    with LiveBytes(exclude=seq) as counted:
        seq(x).mean().backward()
    return counted.peak / UNIT


# ---------------------------------------------------------------------- the first state

STATES = {
    "momentum, 64 bits": (Momentum(0.999), True, 1 + 2 + 2),  # x, X, V
    "momentum, 32 bits": (Momentum(0.999), FixedPoint(bits=32), 1 + 1 + 1),
    "momentum, ratio": (Momentum(0.999), Ratio(999, 1000), 1 + 2 + 2 + 2),  # and the buffer
    "revnet, 64 bits": (RevNet(), True, 1 + 2),  # halves
    "revnet, 32 bits": (RevNet(), FixedPoint(bits=32), 1 + 1),
}


@pytest.mark.parametrize("recording", [True, False])
@pytest.mark.parametrize("case", STATES)
def test_the_forward_pass_holds_one_state_between_two_steps(case, recording):
    scheme, exact, state = STATES[case]
    seq = chain(scheme, functions(8, 64 if scheme.carries_input else 32), exact)
    assert at_each_step(seq, torch.randn(SHAPE), recording)[2:] == pytest.approx([state] * 6, abs=0.01)


def test_a_short_chain_peaks_no_higher_than_a_step():
    """A step of 64 bits has the state before it and after it, and half of one in temporaries."""
    x = torch.randn(SHAPE)
    one, eight = (training_peak(momentum(0.999, depth), x) for depth in (2, 8))
    assert one == pytest.approx(eight, abs=0.01)
    assert eight <= 14.01


@pytest.mark.parametrize("engine", [Invert(group=8), Invert(anchors=4)], ids=str)
def test_a_first_state_that_is_kept_on_purpose_stays(engine):
    """A group keeps the state before its first step, an anchor that between two chains."""
    held = at_each_step(momentum(0.999, 8, engine=engine), torch.randn(SHAPE))
    assert held[-1] == pytest.approx(5 + 5, abs=0.01)


# ---------------------------------------------------------------------- words


def forward_peak(seq, x, mode) -> float:
    with LiveBytes(exclude=seq) as counted, mode():
        seq(x)
    return counted.peak / UNIT


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("engine", [Invert(), Store(), Recompute(every=3), Offload()], ids=str)
@pytest.mark.parametrize("exact", [FixedPoint(), FixedPoint(bits=32), Ratio(1, 100)], ids=str)
def test_inference_keeps_no_words(exact, engine, mode):
    """Its peak does not grow with depth, though a hundredth takes 6.6 bits in each step."""
    seq, x = momentum(0.01, 64, exact, engine), torch.randn(SHAPE)
    short = ReversibleSequence(seq.functions[:16], Momentum(0.01), exact, engine)
    assert forward_peak(seq, x, mode) == pytest.approx(forward_peak(short, x, mode), abs=0.01)
    assert words(64) == 53


@pytest.mark.parametrize("engine", [Store(), Recompute(), Recompute(every=4), Offload()], ids=str)
def test_engines_that_do_not_invert_keep_no_words(engine):
    """With depth their activations alone become more: as many at every gamma, and at 0.999 there are no words."""
    x = torch.randn(SHAPE)
    peaks = {
        (g, n): forward_peak(momentum(g, n, engine=engine), x, torch.enable_grad) for g in GAMMAS for n in (16, 32)
    }
    small, none = (peaks[gamma, 32] - peaks[gamma, 16] for gamma in GAMMAS)
    assert small == pytest.approx(none, abs=0.01)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_converted_models_keep_none_in_inference(mode):
    peaks = []
    for depth in (16, 64):
        model = looped(depth=depth, kind=partial(Block, width=64))
        model = reversa.convert(model.float(), Momentum(0.01), exact=True)
        peaks.append(forward_peak(model, torch.randn(SHAPE), mode))
    assert peaks[0] == pytest.approx(peaks[1], abs=0.01)


def test_inverting_keeps_them():
    """A word is a byte for each element, a fourth of a unit."""
    x, held = torch.randn(SHAPE), []
    for seq in (momentum(gamma, 32) for gamma in GAMMAS):
        with LiveBytes(exclude=seq) as counted:
            y = seq(x)
            assert y.requires_grad
            held.append(counted.live / UNIT)
    assert held[0] - held[1] == pytest.approx(words(32) / 4, abs=0.01)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("engine", [Invert(), Invert(keep=3), Store(), Recompute(every=3), Offload()], ids=str)
@pytest.mark.parametrize("exact", [FixedPoint(), Ratio(1, 100)], ids=str)
def test_a_state_that_is_asked_for_has_its_words(exact, engine, mode):
    seq, first = momentum(0.01, 24, exact, engine), (torch.randn(4, 64), torch.randn(4, 64))
    with mode():
        for last in (seq.forward_state(first), seq.states(first[0])[-1]):
            assert sum(t.dtype in (torch.uint8, torch.int32) for t in last) >= 2
        back = seq.inverse_state(seq.forward_state(first))
    assert all(torch.equal(b, f) for b, f in zip(back[:2], first, strict=True))


@pytest.mark.parametrize("exact", [FixedPoint(), FixedPoint(bits=32), Ratio(1, 100)], ids=str)
def test_values_do_not_depend_on_words(exact):
    """Each engine and mode, with words and without, against the state that has them."""
    seq, x = momentum(0.01, 40, exact), torch.randn(4, 64)
    expected = seq.forward_state((x, torch.zeros_like(x)))[0]
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        for seq.engine in (Invert(), Store(), Recompute(every=3)):
            with mode():
                assert torch.equal(seq(x), expected)


# ---------------------------------------------------------------------- layouts


def images(layout) -> torch.Tensor:
    return torch.randn(2, 8, 32, 32).contiguous(memory_format=layout)


@pytest.mark.parametrize("exact", [FixedPoint(), FixedPoint(bits=32), Ratio(9, 10)], ids=str)
def test_the_first_velocity_is_laid_out_as_x(exact):
    x = images(torch.channels_last)
    assert exact_scheme(Momentum(0.9), exact).open(x)[3].stride() == x.stride()


def test_steps_over_channels_last_are_made_in_place():
    """They take no byte more than steps over the contiguous layout, forwards and backwards."""
    seq = chain(Momentum(0.9), [nn.Tanh() for _ in range(4)], True, Invert(group=1))
    peaks = []
    for layout in (torch.contiguous_format, torch.channels_last):
        x = images(layout).requires_grad_()
        with LiveBytes(exclude=x) as counted:
            seq(x).mean().backward()
        peaks.append(counted.peak)
    assert peaks[0] == peaks[1]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_layout_of_a_velocity_changes_no_bit(layout):
    scheme, x = exact_scheme(Momentum(0.5), FixedPoint()), images(torch.channels_last)
    fs = [nn.Conv2d(8, 8, 3, padding=1).to(memory_format=torch.channels_last) for _ in range(6)]

    def run(state):
        for i, f in enumerate(fs):
            state = scheme.forward(state, f(scheme.argument(state, i)), i)
        return scheme.close(state)

    state = scheme.open(x)
    other = (*state[:3], state[3].contiguous(memory_format=layout))
    assert torch.equal(run(state), run(other))
    seq, x = chain(Momentum(0.5), fs, True), x.requires_grad_()
    assert_bit_equal(step(seq, x, Invert()), step(seq, x, Store()))


class Constant(nn.Module):
    """A first velocity that is learned: one for the whole batch."""

    def __init__(self) -> None:
        super().__init__()
        self.v = nn.Parameter(torch.linspace(-1, 1, 64))

    def forward(self, x):
        return self.v.expand_as(x)


@pytest.mark.parametrize("exact", [FixedPoint(), Ratio(9, 10)], ids=str)
def test_an_expanded_velocity_has_its_value(exact):
    x, init = torch.randn(4, 64), Constant()
    seq = ReversibleSequence(functions(6), Momentum(0.9, init), exact)
    plain = ReversibleSequence(seq.functions, Momentum(0.9, init), engine=Store())
    torch.testing.assert_close(seq(x), plain(x), rtol=1e-5, atol=1e-5)
    v = init.v.detach().expand(4, 64)
    states = [seq.forward_state((x, velocity)) for velocity in (v, v.clone())]
    assert all(map(torch.equal, *states))
    assert torch.equal(seq.inverse_state(states[0])[1], v)
    with pytest.raises(StateError, match="the first velocity reaches"):
        seq.forward_state((x, torch.tensor(1e15).expand(4, 64)))


# ---------------------------------------------------------------------- numbers that are read later


@pytest.mark.parametrize("read", ["forward_state", "states", "output"])
@pytest.mark.parametrize(
    ("scheme", "exact"),
    [(Momentum(0.9), FixedPoint(bits=32)), (Momentum(0.9), Ratio(9, 10)), (RevNet(), FixedPoint(bits=32))],
    ids=str,
)
def test_nobody_reads_a_state_out_of_range(monkeypatch, scheme, exact, read):
    """On accelerators numbers are collected, and judged before a state is handed out."""
    peak = watch.peak
    monkeypatch.setattr(watch, "peak", lambda x: torch.tensor(peak(x)))
    seen: list[int] = []
    fs = functions(4, 8)
    nn.init.constant_(fs[1][2].bias, 1e12)
    for i, f in enumerate(fs):
        f.register_forward_hook(lambda *_, i=i: seen.append(i))
    seq, x = chain(scheme, fs, exact), torch.randn(2, 8 if scheme.carries_input else 16)
    with pytest.raises(StateError, match=r"step 1: what f returned reaches 1e\+12"):
        {
            "forward_state": lambda: seq.forward_state((torch.zeros(2, 8), torch.zeros(2, 8))),
            "states": lambda: seq.states(x),
            "output": lambda: seq(x),
        }[read]()
    assert seen == [0, 1, 2, 3]  # nothing waited for a number in between


# ---------------------------------------------------------------------- within a compiled model


class Model(nn.Module):
    def __init__(self, seq: nn.Module) -> None:
        super().__init__()
        self.stem, self.seq, self.head = nn.Linear(8, 8), seq, nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.seq(self.stem(x).relu()))


@pytest.fixture
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo looks at it
@pytest.mark.parametrize("compiled", [False, True], ids=["eager f", "compiled f"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("scheme", "exact"), [(Momentum(0.5), True), (Momentum(0.5), Ratio(1, 2)), (RevNet(), True)], ids=str
)
def test_a_chain_is_one_break_in_a_compiled_model(scheme, exact, training, compiled):
    whole, inside = [], []

    def backend(graphs):
        return lambda graph, inputs: (graphs.append(graph), graph)[1]

    fs = functions(4, 8 if scheme.carries_input else 4)
    model = Model(chain(scheme, fs, exact))
    x = torch.randn(4, 8)
    if compiled:
        for f in fs:
            f.compile(backend=backend(inside))
    with torch.set_grad_enabled(training):
        expected = model(x)
        made = len(inside)
        found = torch.compile(model, backend=backend(whole))(x)
    assert torch.equal(found, expected)
    assert len(whole) == 2, "the stem and the head"
    assert bool(made) == compiled
    assert len(inside) == made, "the functions' own graphs serve here, too"
    if training:
        gradients = [torch.autograd.grad(y.square().sum(), list(model.parameters())) for y in (found, expected)]
        assert all(map(torch.equal, *gradients))


def test_reversa_check_goes_back_over_a_chain_that_keeps_no_words():
    """It undoes every step itself, whatever the engine keeps."""
    for engine in (Invert(), Store()):
        report = reversa.check(Model(chain(Momentum(0.01), functions(6, 8), True, engine)), torch.randn(4, 8))
        assert report.ok, report

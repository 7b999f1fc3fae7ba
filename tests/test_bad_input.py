"""Bad input gets one of our errors: what was needed, what came, what to do."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

import reversa
from cases import CASES, ENGINES, mlp
from reversa import errors
from reversa.errors import BlockError, MissingExtra, ReversaError, SettingError, StateError

everywhere = pytest.mark.parametrize("engine", ENGINES)


class Function(nn.Module):
    """A residual function made of a plain one."""

    def __init__(self, function) -> None:
        super().__init__()
        self.linear, self.function = nn.Linear(4, 4), function

    def forward(self, x):
        return self.function(self.linear(x), x)


def momentum(function, engine="invert", at: int = 1, depth: int = 3):
    fs = [Function(function if i == at else lambda y, x: y) for i in range(depth)]
    return reversa.ReversibleSequence(fs, reversa.Momentum(0.9), engine=ENGINES[engine])


def refused(kind: type[Exception], *parts: str):
    """An error of ours whose message has all these parts."""
    assert issubclass(kind, ReversaError)
    return pytest.raises(kind, match="(?s)" + ".*".join(parts))


# ---------------------------------------------------------------------- what residual functions return


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@everywhere
def test_a_function_that_changes_the_shape(engine, mode):
    with mode(), refused(BlockError, r"\(2, 3\)", r"\(2, 4\)", "keeps the shape"):
        momentum(lambda y, x: y[:, :3], engine)(torch.randn(2, 4))


@everywhere
def test_a_function_whose_shape_would_broadcast(engine):
    with refused(BlockError, r"\(2, 1\)", r"\(2, 4\)"):
        momentum(lambda y, x: y[:, :1], engine)(torch.randn(2, 4))


@everywhere
def test_a_function_that_changes_the_dtype(engine):
    with refused(BlockError, "float64", "float32", "data type"):
        momentum(lambda y, x: y.double(), engine)(torch.randn(2, 4))


@pytest.mark.parametrize("returned", [None, (), [], (None, 1), "text", 3.0, {"a": 1}], ids=repr)
@everywhere
def test_a_function_that_returns_no_tensor(engine, returned):
    with refused(BlockError, "returned", "tensor of shape"):
        momentum(lambda y, x: returned, engine)(torch.randn(2, 4))


@pytest.mark.parametrize("graph", [True, False])
@everywhere
def test_a_function_that_modifies_its_input_in_place(engine, graph):
    x = torch.randn(2, 4) if not graph else torch.randn(2, 4, requires_grad=True) * 1
    with refused(BlockError, "in place", "ordinary"):
        momentum(lambda y, x: x.mul_(0.5), engine)(x)


@everywhere
def test_an_in_place_relu_at_the_entry(engine):
    fs = [nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4)) for _ in range(3)]
    with refused(BlockError, "in place", "inplace=True"):
        reversa.ReversibleSequence(fs, reversa.Momentum(0.9), engine=ENGINES[engine])(torch.randn(2, 4))


@pytest.mark.parametrize("name", ["invert", "invert-anchors3", "store", "offload"])
def test_the_step_is_named(name):
    for at in (0, 2, 4):
        with refused(BlockError, rf"step {at} \(Function\)"):
            momentum(lambda y, x: None, name, at=at, depth=5)(torch.randn(2, 4))


@pytest.mark.parametrize("name", ["recompute1", "recompute3"])
def test_the_step_is_named_when_recomputed(name):
    with refused(BlockError, r"step 4 \(Function\)"):
        momentum(lambda y, x: None, name, at=4, depth=5)(torch.randn(2, 4))


@pytest.mark.parametrize("training", [True, False])
def test_a_function_that_writes_to_its_own_parameter(training):
    class Writing(nn.Linear):
        def forward(self, x):
            with torch.no_grad():
                self.weight.mul_(0.9)
            return super().forward(x)

    seq = reversa.ReversibleSequence([Writing(4, 4)] * 2, reversa.Momentum(0.9)).train(training)
    with refused(ReversaError, "in place", "weight"):
        seq(torch.randn(2, 4, requires_grad=True)).sum().backward()


def test_a_first_velocity_of_another_shape():
    seq = reversa.ReversibleSequence([nn.Linear(4, 4)], reversa.Momentum(0.9, init=nn.Linear(4, 1)))
    with refused(ReversaError, r"\(2, 1\)"):
        seq(torch.randn(2, 4))


# ---------------------------------------------------------------------- states


@pytest.mark.parametrize("scheme", [reversa.RevNet(), reversa.AdditiveCoupling()], ids=str)
def test_an_odd_dimension(scheme):
    block = (mlp(2), mlp(2)) if scheme.functions_per_block == 2 else mlp(2)
    with refused(StateError, "two equal streams", r"\(3, 5\)", "odd", "even width"):
        reversa.ReversibleSequence([block], scheme)(torch.randn(3, 5))


@pytest.mark.parametrize("dim", [2, -3])
def test_a_dimension_that_is_not_there(dim):
    seq = reversa.ReversibleSequence([(mlp(2), mlp(2))], reversa.RevNet(dim=dim))
    with refused(StateError, rf"dim={dim}", r"\(3, 4\)"):
        seq(torch.randn(3, 4))


def test_a_state_of_the_wrong_form():
    seq = momentum(lambda y, x: y)
    x = torch.randn(2, 4)
    for state in ((x,), (x, x, x), (x, x[:1])):
        for use in (seq.forward_state, seq.inverse_state):
            with refused(StateError, "2 streams of one shape", r"scheme\.open"):
                use(state)


# ---------------------------------------------------------------------- settings


@pytest.mark.parametrize("gamma", [0, 0.0, -1, 1.5, float("nan")])
def test_gamma_outside_its_range(gamma):
    with refused(SettingError, r"gamma must lie in \(0, 1\]", "got"):
        reversa.Momentum(gamma)


@pytest.mark.parametrize("gamma", ["0.9", None, torch.nn.Linear(1, 1)])
def test_gamma_that_is_no_number(gamma):
    with refused(SettingError, "gamma"):
        reversa.Momentum(gamma)


def test_a_class_where_a_scheme_is_wanted():
    for scheme in (reversa.Momentum, "momentum", None, 0.9):
        with refused(SettingError, "scheme must be", r"reversa\.Momentum\(0\.9\)", "got"):
            reversa.ReversibleSequence([mlp()], scheme)


def test_unknown_scheme_names_list_the_nearest():
    with refused(SettingError, "unknown scheme 'momentm'", "Did you mean: momentum"):
        reversa.schemes.scheme_named("momentm")


def test_blocks_that_are_no_modules():
    for block in (torch.tanh, None, 3, "linear", (torch.tanh,)):
        with refused(SettingError, "block 1", "modules", "got"):
            reversa.ReversibleSequence([mlp(), block], reversa.Momentum(0.9))


def test_tuples_where_the_scheme_takes_single_functions_and_the_reverse():
    with refused(SettingError, "Momentum", "a module for each block", "got 2", "block 1"):
        reversa.ReversibleSequence([mlp(), (mlp(), mlp())], reversa.Momentum(0.9))
    with refused(SettingError, "RevNet", r"\(F, G\)", "got 1", "block 0"):
        reversa.ReversibleSequence([mlp(), mlp()], reversa.RevNet())
    with refused(SettingError, "RevNet", r"\(F, G\)", "got 3", "block 1"):
        reversa.ReversibleSequence([(mlp(), mlp()), (mlp(), mlp(), mlp())], reversa.RevNet())


def test_no_blocks():
    with refused(SettingError, "at least one block"):
        reversa.ReversibleSequence([], reversa.Momentum(0.9))


def test_engines_of_another_kind():
    seq = momentum(lambda y, x: y)
    for engine in ("invert", reversa.Invert, 3):
        with refused(SettingError, r"engine must be Invert\(\)", "got"):
            seq.engine = engine
        with refused(SettingError, r"engine must be Invert\(\)", "got"):
            reversa.ReversibleSequence([mlp()], reversa.Momentum(0.9), engine=engine)
    assert seq.engine == ENGINES["invert"]


@pytest.mark.parametrize(
    "make",
    [
        lambda: reversa.Invert(keep=-1),
        lambda: reversa.Invert(anchors=0),
        lambda: reversa.Invert(anchors="often"),
        lambda: reversa.Invert(anchors=2.5),
        lambda: reversa.Invert(group=0),
        lambda: reversa.Recompute(every=0),
    ],
)
def test_engine_settings_outside_their_range(make):
    with refused(SettingError, "needs", "got"):
        make()


# ---------------------------------------------------------------------- errors themselves


def test_every_error_is_a_reversa_error():
    ours = [e for e in vars(errors).values() if isinstance(e, type) and e.__module__ == errors.__name__]
    assert all(issubclass(e, (ReversaError, Warning)) for e in ours)
    assert reversa.ReversaError is ReversaError


def test_an_extra_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with refused(MissingExtra, "torchvision", r"pip install 'reversa\[vision\]'"):
        errors.import_extra("torchvision", "vision")


def test_a_wrong_input_raises_what_the_scheme_says_before_any_function_runs():
    calls = []
    seq = CASES["revnet"].sequence([Function(lambda y, x: calls.append(1) or y) for _ in range(2)])
    with pytest.raises(StateError):
        seq(torch.randn(2, 7))
    assert not calls

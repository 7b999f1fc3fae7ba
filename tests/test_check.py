"""The check finds nothing where nothing is wrong, calls each deliberate fault by its name, and leaves no trace."""

from __future__ import annotations

import copy
import json
import random
from collections import OrderedDict
from dataclasses import dataclass
from dataclasses import field as dataclass_field

import numpy
import pytest
import torch
from torch import Tensor, nn

import reversa
from cases import ENGINES, Attention, conv, mlp
from reversa import Invert, Momentum, ReversibleSequence, RevNet, Store
from reversa.check import CheckReport, check
from reversa.errors import BlockError, ConversionError, SettingError

INVERTER = Invert()


def sequence(
    *blocks: nn.Module, gamma: float = 0.9, engine=INVERTER, depth: int = 6, at: int = 3
) -> ReversibleSequence:
    """A chain of ordinary blocks, with the given ones from place ``at`` on."""
    fs: list[nn.Module] = [mlp() for _ in range(depth)]
    fs[at : at + len(blocks)] = blocks
    return ReversibleSequence(fs, Momentum(gamma), engine=engine)


def row(report: CheckReport, what: str):
    (found,) = [row for row in report.rows if row.what.startswith(what)]
    return found


def x(*shape: int) -> Tensor:
    return torch.randn(*(shape or (4, 6)))


# ---------------------------------------------------------------------- right


@pytest.mark.parametrize("name", ENGINES)
def test_a_chain_with_dropout_is_right_with_every_engine(name):
    engine = ENGINES[name].of(6) if name == "mixed" else ENGINES[name]  # check puts other engines in its parts
    report = check(sequence(mlp(p=0.5), mlp(p=0.5), engine=engine), x())
    assert report.ok, report
    assert row(report, "gradients").errors["float64"] < 1e-12
    assert row(report, "gradients").errors["float32"] < 1e-5
    assert row(report, "slope").errors["float64"] < 1e-5
    inverted = name.startswith("invert") or name == "mixed"
    assert bool(row(report, "states").errors) == inverted


def test_two_streams_and_two_functions_in_a_block():
    seq = ReversibleSequence([(conv(2), conv(2)) for _ in range(3)], RevNet())
    report = check(seq, x(3, 4, 5, 5).requires_grad_())
    assert report.ok, report
    assert row(report, "states").where in ("", "worst: before step 0 (blocks.0.0)")
    assert row(report, "buffers").status == "right"


@pytest.mark.slow
def test_a_converted_resnet_is_right():
    torchvision = pytest.importorskip("torchvision", reason="needs the extra vision")
    model = reversa.convert(torchvision.models.resnet18(num_classes=5))
    report = check(model, x(2, 3, 32, 32))
    assert report.ok, report
    assert row(report, "states of layer1 (2 steps)").errors["float32"] < 1e-5
    assert row(report, "gradients").errors["float64"] < 1e-12
    assert "Momentum(gamma=0.9" in report.verdict
    assert not report.notes


def test_eval_mode_is_left_as_it_is():
    seq = sequence(nn.Sequential(nn.BatchNorm1d(6), mlp(p=0.5))).eval()
    report = check(seq, x())
    assert report.ok, report
    assert any("eval mode" in note for note in report.notes)
    assert row(report, "buffers").errors["float64"] == 0


def test_keyword_arguments_extra_inputs_and_a_loss():
    seq = ReversibleSequence([Attention(p=0.2) for _ in range(3)], Momentum(0.7))
    memory = x(2, 7, 8).requires_grad_()
    mask = torch.rand(3, 7) > 0.3
    mask[:, 0] = True
    asked = []

    def loss(output):
        asked.append(output.dtype)
        return (output[:, 0] * 3).sum()

    assert check(seq, x(2, 3, 8), memory=memory, mask=mask, loss=loss).ok
    assert {torch.float32, torch.float64} == set(asked)


@dataclass
class Output:
    """An output of a kind that PyTorch's pytree does not know."""

    logits: Tensor
    extra: dict = dataclass_field(default_factory=dict)


def test_outputs_of_any_kind():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.chain = sequence()

        def forward(self, x):
            y = self.chain(x)
            return OrderedDict(a=(y.argmax(), [y.sin()]), b=Output(y, {"c": None, "d": y.cos()}))

    assert check(Model(), x()).ok


def test_a_normalised_output_has_a_gradient_too():
    """The squares of a layer norm's output add up to a constant: the default loss must not be that."""
    model = nn.Sequential(sequence(), nn.LayerNorm(6))
    report = check(model, x())
    assert report.ok, report
    model.zero_grad()
    from reversa.check.step import default_loss

    default_loss(model(x())).backward()
    assert max(float(p.grad.abs().max()) for p in model[0].parameters()) > 1e-3


def test_a_chain_called_twice_and_a_chain_within_a_chain():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.chain = sequence(mlp(p=0.3))

        def forward(self, x):
            return self.chain(self.chain(x).sin())

    assert check(Twice(), x()).ok
    report = check(sequence(sequence(mlp(p=0.3))), x())
    assert report.ok, report
    assert [r.what for r in report.rows if r.what.startswith("states")] == [
        "states of ReversibleSequence (6 steps)",
        "states of blocks.3 (6 steps)",
    ]


def test_autocast_and_narrow_types():
    with torch.autocast("cpu", torch.bfloat16):
        report = check(sequence(), x())
    assert report.ok, report
    assert report.dtypes == ("float64", "float32 (autocast to bfloat16)")
    report = check(sequence().bfloat16(), x().bfloat16())
    assert report.ok, report
    assert report.dtypes == ("float64", "bfloat16")
    assert check(sequence().double(), x().double()).dtypes == ("float64",)


class OnlyFloat32(nn.Linear):
    def forward(self, x):
        if x.dtype != torch.float32:
            raise TypeError("float32 only")
        return super().forward(x)


def test_a_model_that_cannot_run_in_float64():
    report = check(sequence(OnlyFloat32(6, 6)), x())
    assert report.ok, report
    assert any("float64 was left out" in note and "float32 only" in note for note in report.notes)
    assert "float64" not in row(report, "gradients").errors


def test_an_ill_conditioned_batch_is_no_false_alarm():
    """Batch normalisation over two values is a step function: in float32 the gradients are rounding in any engine."""
    torch.manual_seed(1)
    seq = ReversibleSequence([conv(8) for _ in range(12)], Momentum(0.9))
    report = check(seq, x(2, 8, 1, 1))
    assert report.ok, report
    assert row(report, "gradients").errors["float32"] > 1e-3 > 1e-9 > row(report, "gradients").errors["float64"]
    assert any("also with stored activations" in note for note in report.notes)
    assert "more rounding than usual in: gradients" in report.verdict


# ---------------------------------------------------------------------- wrong


class Counter(nn.Module):
    """A function that knows how often it was called."""

    def __init__(self):
        super().__init__()
        self.body, self.calls = mlp(), 0

    def forward(self, x):
        self.calls += 1
        return self.body(x) * self.calls


class PythonDice(nn.Module):
    """Random numbers from a generator that no replay restores."""

    def __init__(self):
        super().__init__()
        self.body = mlp()

    def forward(self, x):
        return self.body(x) * random.random()


class NumpyDice(PythonDice):
    def forward(self, x):
        return self.body(x) * numpy.random.rand()


class Cache(nn.Module):
    """Remembers its first answer."""

    def __init__(self):
        super().__init__()
        self.body, self.kept = mlp(), None

    def forward(self, x):
        fresh = self.body(x)
        if self.kept is None:
            self.kept = fresh.detach() + 1
            return fresh
        return fresh + self.kept


@pytest.mark.parametrize("fault", [Counter, PythonDice, NumpyDice, Cache])
def test_a_function_that_computes_something_else_the_second_time(fault):
    report = check(sequence(fault()), x())
    assert not report.ok
    assert report.verdict.startswith("Do NOT train: step 3 (blocks.3) computes something else")
    assert "Store()" in report.verdict
    assert row(report, "functions, evaluated again").status == "wrong"
    assert row(report, "gradients").status == "wrong"
    assert row(report, "slope").status == "right"  # the fault lies in the second evaluation alone
    assert check(sequence(fault(), engine=Store()), x()).ok


def test_a_fault_behind_a_weight_that_is_zero_is_found():
    """Fresh networks often begin with residual functions that return zero: right or wrong, nothing would be seen."""

    class Gated(nn.Module):
        def __init__(self, body):
            super().__init__()
            self.body, self.gate = body, nn.Parameter(torch.zeros(()))

        def forward(self, x):
            return self.gate * self.body(x)

    model = sequence(*(Gated(mlp()) for _ in range(3)), Gated(Counter()), at=0, depth=4)
    report = check(model, x())
    assert "step 3 (blocks.3) computes something else" in report.verdict
    assert not any(block.gate.any() for block in model.blocks)


def test_dice_move_the_generator():
    assert row(check(sequence(PythonDice()), x()), "random generators").status == "wrong"
    assert row(check(sequence(Counter()), x()), "random generators").status == "right"


def test_the_last_function_and_a_converted_block_are_named_too():
    report = check(sequence(Counter(), at=5), x())
    assert "step 5 (blocks.5) computes something else" in report.verdict

    class Block(nn.Module):
        def __init__(self, counts):
            super().__init__()
            self.body, self.counts, self.calls = mlp(), counts, 0

        def forward(self, x):
            self.calls += self.counts
            return x + self.body(x) * (1 + self.calls)

    model = nn.Sequential(nn.Linear(6, 6), nn.Sequential(*(Block(i == 2) for i in range(4))))
    reversa.convert(model, example=x())
    report = check(model, x())
    assert "step 2 (1.2) computes something else" in report.verdict, report


def test_another_number_of_saved_tensors_is_reported_not_raised():
    class Grows(Counter):
        def forward(self, x):
            self.calls += 1
            return self.body(x) if self.calls == 1 else self.body(x).sin()

    report = check(sequence(Grows()), x())
    assert not report.ok
    assert "must compute the same thing twice" in report.verdict


def test_an_exception_in_the_second_evaluation_is_reported_not_raised():
    class Breaks(Counter):
        def forward(self, x):
            self.calls += 1
            if self.calls > 1:
                raise KeyError("gone")
            return self.body(x)

    report = check(sequence(Breaks()), x())
    assert not report.ok
    assert "KeyError" in report.verdict
    assert "evaluate" in report.verdict or "same thing twice" in report.verdict


class SlightlyOff(Momentum):
    def inverse(self, argument, rest, value, step):
        x, v = super().inverse(argument, rest, value, step)
        return x, v * 1.001


class WrongArgument(RevNet):
    def uncover(self, state, step):
        argument, rest = super().uncover(state, step)
        return argument * (1 + 1e-4), rest


def test_a_scheme_whose_inverse_is_a_little_wrong():
    report = check(ReversibleSequence([mlp() for _ in range(6)], SlightlyOff(0.9)), x())
    assert not report.ok
    assert "the scheme's inverse does not undo its forward" in report.verdict
    assert row(report, "functions").status == "right"
    report = check(ReversibleSequence([(mlp(), mlp()) for _ in range(3)], WrongArgument()), x(4, 12))
    assert "the scheme's inverse does not undo its forward" in report.verdict


def test_float_drift_is_told_from_a_wrong_scheme():
    """The drift law: 2.0**40 roundings of float32 are all of a number, of float64 a part in ten thousand."""
    engine = Invert(anchors=None, accept_drift=True)
    report = check(sequence(gamma=0.5, depth=40, engine=engine), x())  # the warning would be an error here
    assert not report.ok
    assert "states are not recovered in ReversibleSequence" in report.verdict
    assert "anchors='auto'" in report.verdict
    assert row(report, "steps, undone").status == "right"
    drift = row(report, "states").errors
    assert drift["float32"] > 1 > 1e-2 > drift["float64"] > 1e-6
    assert check(sequence(gamma=0.5, depth=40), x()).ok


def test_an_engine_that_refuses():
    report = check(sequence(gamma=0.5, depth=40, engine=Invert(anchors=None)), x())
    assert not report.ok
    assert "accept_drift=True" in report.verdict


class WrongBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return 3 * grad


def test_a_wrong_backward_is_wrong_with_stored_activations_too():
    class Doubles(nn.Module):
        def forward(self, x):
            return WrongBackward.apply(x).tanh()

    report = check(sequence(Doubles()), x())
    assert not report.ok
    assert "another slope of the loss" in report.verdict
    assert row(report, "gradients").status == "right"
    assert row(report, "slope").errors["float64"] > 1e-2


def test_a_buffer_that_moves_twice():
    """Written to behind the engine's back: the buffer is no part of the function that writes to it."""

    class Counts(nn.Module):
        def __init__(self, meter):
            super().__init__()
            self.body, self.meter = mlp(), [meter]

        def forward(self, x):
            self.meter[0].seen += 1
            return self.body(x)

    def model(**settings):
        meter = nn.Module()
        meter.register_buffer("seen", torch.zeros((), dtype=torch.long))
        return nn.ModuleDict({"chain": sequence(Counts(meter), **settings), "meter": meter})

    class Model(nn.Module):
        def __init__(self, **settings):
            super().__init__()
            self.parts = model(**settings)

        def forward(self, x):
            return self.parts["chain"](x)

    report = check(Model(), x())
    assert not report.ok
    assert "the buffer parts.meter.seen is not what stored activations leave" in report.verdict
    assert [r.what for r in report.rows if r.status == "wrong"] == ["buffers after the step"]
    assert check(Model(engine=Store()), x()).ok


def test_something_outside_the_model_that_changes_from_run_to_run():
    calls = [0]

    class Global(nn.Module):
        def forward(self, x):
            calls[0] += 1
            return x.tanh() * calls[0]

    report = check(sequence(Global()), x())
    assert not report.ok
    assert "another loss from the same weights" in report.verdict


def test_nothing_to_train():
    report = check(sequence().requires_grad_(False), x())
    assert not report.ok
    assert "every parameter is frozen" in report.verdict
    assert check(sequence().requires_grad_(False), x().requires_grad_()).ok  # the input's gradient is one
    report = check(sequence(), x(), loss=lambda y: y.detach().sum())
    assert not report.ok
    assert "depends on no parameter" in report.verdict


def test_frozen_parts_are_told():
    seq = sequence(mlp(), mlp())
    seq.register_parameter("idle", nn.Parameter(torch.ones(2)))
    seq.blocks[0].requires_grad_(False)
    report = check(seq, x())
    assert report.ok, report
    assert any("1 of" in note and "idle" in note for note in report.notes)


def test_a_loss_that_is_not_finite():
    model = sequence()
    with torch.no_grad():
        model.blocks[2][0].weight[0, 0] = float("nan")
    report = check(model, x())
    assert not report.ok
    assert "nan" in report.verdict


def test_a_chain_that_does_not_run():
    class Choice(nn.Module):
        def __init__(self):
            super().__init__()
            self.chain, self.head, self.other = sequence(), nn.Linear(6, 6), sequence()

        def forward(self, x, use):
            return self.head(self.other(x) if use else x)

    report = check(Choice(), x(), use=True)
    assert report.ok, report
    assert any("chain did not run" in note for note in report.notes)
    report = check(Choice(), x(), use=False)
    assert not report.ok
    assert "no reversible chain ran" in report.verdict


# ---------------------------------------------------------------------- bad input


def test_bad_input():
    with pytest.raises(ConversionError, match=r"Linear has none.*reversa\.convert"):
        check(nn.Linear(2, 2), x(1, 2))
    with pytest.raises(SettingError, match=r"needs a torch\.nn\.Module"):
        check("resnet18")  # type: ignore[arg-type]
    with pytest.raises(SettingError, match="one number"):
        check(sequence(), x(), loss=lambda y: y)
    with pytest.raises(SettingError, match="no floating tensor"):
        check(nn.Sequential(sequence(), _ArgMax()), x())
    model = sequence()
    model.kept = model(x())
    with pytest.raises(SettingError, match="deepcopy"):
        check(model, x())
    with pytest.raises(BlockError, match="changes its input in place"):
        check(sequence(nn.ReLU(inplace=True)), x())


class _ArgMax(nn.Module):
    def forward(self, x):
        return x.argmax()


# ---------------------------------------------------------------------- the report, and what is left behind


def test_the_report_in_words_and_as_data():
    for report in (check(sequence(mlp(p=0.3)), x()), check(sequence(Breaking()), x()), check(sequence(Counter()), x())):
        said, data = str(report), json.loads(json.dumps(report.to_dict(), allow_nan=False))
        assert said.splitlines()[-1] == report.verdict == data["verdict"]
        assert data["ok"] is report.ok is not report.verdict.startswith("Do NOT train")
        assert [entry["what"] for entry in data["rows"]] == [r.what for r in report.rows]
        for r in report.rows:
            assert r.what in said
            assert r.status in said


class Breaking(Counter):
    def forward(self, x):
        raise_now = self.calls > 0
        self.calls += 1
        return self.body(x) if not raise_now else self.body(x)[:2]


@pytest.mark.parametrize("fault", [None, Counter, Breaking])
def test_nothing_is_touched(fault):
    model = nn.Sequential(nn.BatchNorm1d(6), sequence(*([fault()] if fault else [mlp(p=0.5)])), nn.BatchNorm1d(6))
    model[2].eval()
    model[1].engine = Store()
    model(x()).sum().backward()
    model[1].engine = INVERTER
    if fault:
        model[1].blocks[3].calls = 0
    given = x().requires_grad_()
    engine, scheme = model[1].engine, model[1].scheme
    before = copy.deepcopy(model.state_dict())
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    held = dict(model.named_parameters())
    random_states = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tobytes()
    with torch.no_grad():
        report = check(model, given)
        assert not torch.is_grad_enabled()
    assert report.ok == (fault is None)
    assert model[1].engine is engine
    assert model[1].scheme is scheme
    assert not vars(scheme).keys() - {"gamma", "init"}
    assert [m.training for m in model] == [True, True, False]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for name, p in model.named_parameters():
        assert p is held[name]
        assert p.dtype == torch.float32
        assert torch.equal(p.grad, gradients[name])
    assert given.grad is None
    assert torch.equal(torch.get_rng_state(), random_states[0])
    assert random.getstate() == random_states[1]
    assert numpy.random.get_state()[1].tobytes() == random_states[2]
    if fault:
        assert model[1].blocks[3].calls == 0


def test_the_errors_are_those_that_training_has():
    """The figure in the report, against a training step made by hand."""
    model, given = sequence(Counter()), x()

    def gradients(engine):
        used = copy.deepcopy(model).double()
        used.engine = engine
        from reversa.check.step import default_loss

        default_loss(used(given.double())).backward()
        return {name: p.grad for name, p in used.named_parameters()}

    want, have = gradients(Store()), gradients(Invert(accept_drift=True))
    largest = max(float((have[n] - want[n]).norm() / want[n].norm()) for n in want)
    report = check(model, given)
    assert row(report, "gradients").errors["float64"] == pytest.approx(largest, rel=1e-6)

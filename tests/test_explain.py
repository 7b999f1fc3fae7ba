"""What `explain` says of a model: per stage what was converted, what was not and why, and what training keeps."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from torch import nn

from convert_cases import Block, looped
from reversa import BDIA, Dr2Net, Invert, Momentum, Offload, Recompute, Store
from reversa.convert import convert, explain, restore
from reversa.errors import ConversionError, SettingError
from reversa.memory import LiveBytes


@pytest.fixture(scope="module")
def resnet50() -> nn.Module:
    return torchvision.models.resnet50()


def test_of_a_model_that_is_not_converted(resnet50):
    modules = [(name, type(m), sorted(vars(m))) for name, m in resnet50.named_modules()]
    statistics = resnet50.bn1.running_mean.clone()
    report = explain(resnet50)
    assert not report.converted
    assert [(s.name, len(s.blocks)) for s in report.stages] == [
        ("layer1", 2), ("layer2", 3), ("layer3", 5), ("layer4", 2),
    ]  # fmt: skip
    text = str(report)
    assert text.startswith("12 blocks in 4 stages could be made reversible")
    assert "Momentum(gamma=0.9" in text.splitlines()[0], "what the bytes are told for"
    assert "42.88 MiB" in text, "what the plain model keeps"
    assert [(name, type(m), sorted(vars(m))) for name, m in resnet50.named_modules()] == modules
    assert torch.equal(resnet50.bn1.running_mean, statistics)


def test_of_a_converted_model(resnet50):
    model = convert(copy.deepcopy(resnet50), Momentum(0.5))
    report = explain(model)
    assert report.converted
    lines = str(report).splitlines()
    assert lines[0].startswith("12 blocks in 4 stages are reversible: Momentum(gamma=0.5")
    assert "Invert()" in lines[0]
    rows = {line.split()[0]: line for line in lines if line.startswith("  layer")}
    assert "3 (1 to 3)" in next(line for line in lines if line.startswith("  layer2 "))
    assert "Bottleneck" in str(report)
    assert "512 x 28 x 28" in str(report), "the carried tensor at 224 pixels"
    for i, change in enumerate(
        ("(64, 56, 56) -> (256, 56, 56)", "(256, 56, 56) -> (512, 28, 28)", "(512, 28, 28) -> (1024, 14, 14)"), 1
    ):
        assert f"layer{i}.0" in rows
        assert f"changes the shape {change}" in rows[f"layer{i}.0"]
    assert "relu after its residual addition" in str(report)
    assert "fine-tuning" in str(report)


def test_a_block_that_stands_alone(resnet50):
    left = dict(explain(torchvision.models.resnet18()).left)
    assert "one block" in left["layer2.1"]
    assert "changes the shape" in left["layer2.0"]
    assert "layer1.0" not in left


def test_the_smaller_gamma_the_more_states_are_kept():
    """float32, 128 blocks; rounding errors grow as gamma**-k, and may reach 1e-4."""
    kept = {}
    for gamma in (0.999, 0.9, 0.5, 0.01):
        report = explain(convert(looped(depth=128).float(), Momentum(gamma)))
        kept[gamma] = report.stages[0].kept
        assert kept[gamma] in str(report)
    assert kept[0.999] == "1 state"
    assert kept[0.9] == "3 states (one every 43 steps)"
    assert kept[0.5].startswith("15 states (one every 9")
    assert int(kept[0.01].split()[0]) >= 64


@pytest.mark.parametrize("gamma", [0.9, 0.5, 0.01])
def test_kept_states_are_the_states_that_are_kept(gamma):
    """What the report says, counted in bytes: a state of Momentum is two tensors."""
    model = convert(looped(depth=64, width=64).float(), Momentum(gamma))
    plain = convert(looped(depth=64, width=64).float(), Momentum(0.999))
    x = torch.randn(512, 64)

    def held(model: nn.Module) -> float:
        with LiveBytes(exclude=model) as counted:
            loss = model(x).mean()
            held = counted.live
            loss.backward()
        return held / x.nbytes

    def kept(model: nn.Module) -> int:
        return int(explain(model).stages[0].kept.split()[0])

    assert kept(plain) == 1
    assert kept(model) > 1
    held(model), held(plain)  # the first call may look at the blocks
    assert held(model) - held(plain) == pytest.approx(2 * (kept(model) - 1), abs=1.1)


@pytest.mark.parametrize(
    ("scheme", "exact", "engine"),
    [
        (Momentum(0.9), False, Invert(group=1)),
        (Momentum(0.5), False, Invert(group=1)),
        (Momentum(0.5), True, Invert(group=1)),
        (Momentum(0.9), False, Invert(keep=3, group=1)),
        (Momentum(0.9), False, Recompute()),
        (Momentum(0.9), False, Store()),
    ],
    ids=str,
)
def test_the_bytes_that_it_tells_of_are_those_that_live(scheme, exact, engine):
    """Counted on a real step, after the forward pass: of the model as it is, and of the converted one."""
    depth, x = 40, torch.randn(64, 128)

    def held(model: nn.Module) -> int:
        model(x).mean().backward()  # the first call may look at the blocks
        with LiveBytes(exclude=model) as counted:
            loss = model(x).mean()
            held = counted.live
            loss.backward()
        return held

    plain = looped(depth=depth, width=128).float()
    (report,) = explain(plain, x).stages
    assert report.stored_bytes == pytest.approx(held(plain), rel=0.05)
    model = convert(plain, scheme, exact=exact, engine=engine, example=x)
    (report,) = explain(model).stages
    assert report.stored_bytes is not None
    assert report.kept_bytes is not None
    assert report.kept_bytes == pytest.approx(held(model), rel=0.05, abs=1.5 * x.nbytes)  # the output is there, too
    assert report.saved_bytes == report.stored_bytes - report.kept_bytes
    assert f"{explain(model).saved_bytes / 2**20:.2f} MiB" in str(explain(model)) or report.saved_bytes < 2**20


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_states_of_16_bits_are_held_in_integers(dtype):
    """A bfloat16 state that is computed back drifts; by default none does, and the table says so."""
    torch.manual_seed(0)
    model = looped(depth=24, width=32).to(dtype)
    x = torch.randn(16, 32, dtype=dtype)
    gradients = {}
    for engine in (Invert(), Store()):
        converted = convert(copy.deepcopy(model), Momentum(0.9), engine=engine)
        report = explain(converted)
        assert "FixedPoint(bits=32, radix=16)" in report.rule
        assert any("states of 16 bits" in note for note in report.stages[0].notes)
        converted(x).float().square().mean().backward()
        gradients[repr(engine)] = torch.cat([p.grad.flatten() for p in converted.parameters()])
    assert torch.equal(*gradients.values())
    asked = explain(convert(model, Momentum(0.9), exact=False))
    assert "FixedPoint" not in asked.rule
    assert not any("16 bits" in note for note in asked.stages[0].notes)
    assert "FixedPoint" not in explain(convert(looped())).rule, "wider states as ever"


def test_kept_states_depend_on_the_data_type():
    model = convert(looped(depth=128).float(), Momentum(0.9))
    assert explain(model).stages[0].kept.startswith("3 states")
    assert explain(model.double()).stages[0].kept.startswith("2 states"), "asked anew, not remembered"


@pytest.mark.parametrize(
    ("engine", "words"),
    [
        (Invert(keep=2), "1 state and the activations of 2 steps"),
        (Invert(anchors=2), "3 states (one every 2 steps)"),
        (Store(), "the activations of 5 steps"),
        (Recompute(), "5 arguments of f"),
        (Offload(), "the activations of 5 steps, in the host's memory"),
    ],
    ids=str,
)
def test_every_engine_says_what_it_keeps(engine, words):
    report = explain(convert(looped(depth=5), Momentum(0.99), engine=engine))
    assert report.stages[0].kept == words
    assert repr(engine) in report.rule


class TwoStages(nn.Module):
    """A block that looks like the others and is not residual, between two stages; and one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(Block(6), Block(6), Block(6))
        self.widen = nn.Linear(6, 8)
        self.second = nn.Sequential(Block(8), Block(8))
        self.spare = Block(8)

    def forward(self, x):
        return self.second(self.widen(self.first(x)))


def test_a_home_made_model():
    model = TwoStages()
    example = torch.zeros(2, 6)
    before = explain(model, example)
    assert [(s.name, s.blocks, s.kind, s.shape) for s in before.stages] == [
        ("first", ("first.0", "first.1", "first.2"), "Block", (2, 6)),
        ("second", ("second.0", "second.1"), "Block", (2, 8)),
    ]
    assert dict(before.left) == {"spare": "is not called in the forward pass"}
    after = explain(convert(model, example=example))
    assert [s.blocks for s in after.stages] == [s.blocks for s in before.stages]
    assert after.left == before.left
    assert all(s.kept == "1 state" for s in after.stages)
    assert all(not any("after its residual addition" in note for note in s.notes) for s in after.stages)
    assert explain(restore(model), example) == before


def test_without_an_example_the_shape_is_not_known_yet():
    report = explain(convert(looped()))
    assert report.stages[0].shape is None
    assert "seen at the first call" in str(report)


def test_stages_that_were_not_asked_for_are_listed_as_left():
    model = convert(TwoStages(), stages=["second"], example=torch.zeros(2, 6))
    report = explain(model)
    assert [s.name for s in report.stages] == ["second"]
    assert dict(report.left)["first"] == "not among the stages asked for"


def test_a_part_of_a_converted_model():
    """The user asks about the backbone of a larger model, or a larger model around a converted one."""
    model = convert(looped(depth=4))
    around = nn.Sequential(model, nn.Linear(6, 2))
    assert "4 blocks in 1 stage" in str(explain(around))


def test_a_model_with_nothing_to_convert():
    report = explain(torchvision.models.vgg11(init_weights=False))
    assert not report.stages
    assert "0 blocks" in str(report)
    assert "a residual addition" in str(report)
    assert dict(report.left)["features"] == "changes the shape (3, 224, 224) -> (512, 7, 7)"
    with pytest.raises(ConversionError, match="Pass example="):
        explain(nn.Linear(2, 2))


def test_what_changes_is_told_for_each_scheme():
    example = torch.zeros(2, 6)

    def told(scheme) -> str:
        return str(explain(convert(TwoStages(), scheme, example=example)))

    assert "the less the smaller gamma is" in told(Momentum(0.9))
    assert "in eval() the function that is computed is the original" in told(BDIA())
    assert "is the original, up to rounding" in told(Dr2Net(1, 0))
    assert "Pretrained weights need fine-tuning" in told(Dr2Net(0.3, 0.7))
    resnet = convert(torchvision.models.resnet18(), BDIA())
    assert "after its residual addition" not in str(explain(resnet)), "BDIA's rule has it as the original has"


def test_a_guess_is_told_until_it_is_verified():
    model = convert(looped())
    assert "found by structure alone" in str(explain(model))
    assert explain(model).saved_bytes is None
    model(torch.randn(4, 6).double()).sum().backward()
    assert "found by structure alone" not in str(explain(model))


def test_stages_with_schemes_of_their_own_have_a_column_for_it():
    schemes = {"first": Momentum(0.5), "second": Momentum(0.9)}
    text = str(explain(convert(TwoStages(), schemes, example=torch.zeros(2, 6))))
    rows = {line.split()[0]: line for line in text.splitlines() if line.startswith("  ")}
    assert "gamma=0.5" in rows["first"]
    assert "gamma=0.9" in rows["second"]


@pytest.mark.parametrize("ask", [explain, restore])
def test_what_is_no_module(ask):
    with pytest.raises(SettingError, match=r"needs a torch.nn.Module, got int"):
        ask(3)

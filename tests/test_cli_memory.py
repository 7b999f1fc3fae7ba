"""``reversa memory``: what it prints and draws, against steps that are run, numbers by hand, and plain autograd."""

from __future__ import annotations

import copy
import csv
import io
import json
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import reversa
from reversa.cli import main
from reversa.cli.specs import network_named
from reversa.cli.ways import REVNETS
from reversa.errors import ConversionError, OutputError, SettingError
from reversa.memory import estimate, measure
from reversa.memory.pictures import draw_bars, draw_peaks, draw_timelines
from reversa.memory.sweep import checkpointed, sweep
from reversa.memory.timeline import timeline

BATCH, WIDTH, DEPTH = 256, 8, 6
STATE = BATCH * WIDTH * 4

SOURCE = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return x + self.linear(x).tanh()

class Deciding(Block):
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else x + self.linear(x)

def chain():
    return nn.Sequential(*(Block() for _ in range(6)))

def wider():
    return nn.Sequential(*(Block() for _ in range(9)))

def deciding():
    return nn.Sequential(*(Deciding() for _ in range(6)))

def wide(width):
    return nn.Linear(width, width)

def number():
    return 3
"""


@pytest.fixture
def nets(users_module):
    return users_module("usersnets", SOURCE)


def printed(capsys, *arguments: str) -> str:
    assert main(["memory", *arguments]) == 0
    return capsys.readouterr().out


def rows_of(capsys, *arguments: str) -> dict[str, dict]:
    return {row["way"]: row for row in json.loads(printed(capsys, *arguments, "--json"))}


def last(output: torch.Tensor) -> torch.Tensor:
    return output.sum()


# ---------------------------------------------------------------------- timeline and sweep


def test_timeline_by_hand():
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False), nn.Tanh())
    line = timeline(model, (BATCH, WIDTH), loss=last)
    kinds = [(m.when, m.activations, m.temporary, m.gradients) for m in line.moments]
    weights = WIDTH * WIDTH * 4
    # W.t() is a view; x W; its tanh beside it (and a view of that for the graph); the sum, when x W is gone; the end.
    assert [kind[1:] for kind in kinds if kind[0] == "forward"] == [
        (0, 0, 0),
        (STATE, 0, 0),
        (2 * STATE, 0, 0),
        (2 * STATE, 0, 0),
        (STATE + 4, 0, 0),
        (STATE + 4, 0, 0),
    ]
    assert line.forward_moments == 6
    assert ("backward", STATE + 4, STATE + 4, 0) in kinds  # the gradient through tanh, beside what tanh returned
    assert ("backward", 4, STATE + weights + 4, 0) in kinds  # that of the weights, beside it
    assert kinds[-1][0] == "optimizer step"
    assert kinds[-1][3] == weights
    assert all(m.parameters == weights and m.inputs == STATE for m in line.moments)


@pytest.mark.parametrize("optimizer", [None, torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("exact", [False, True])
def test_timeline_has_the_peak_that_is_measured(optimizer, exact):
    blocks = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(DEPTH)]
    model = reversa.ReversibleSequence(blocks, scheme=reversa.Momentum(0.9), exact=exact)
    report = measure(model, (BATCH, WIDTH), optimizer=optimizer, repeats=1)
    line = timeline(model, (BATCH, WIDTH), optimizer=optimizer)
    assert max(line.totals) == pytest.approx(report.peak_bytes, rel=0.01)
    assert line.moments[line.forward_moments - 1].activations == pytest.approx(report.held_bytes, rel=0.01)
    assert {moment.optimizer_state for moment in line.moments} == {report.peak.optimizer_state}


def test_checkpointed_blocks_keep_their_inputs_and_their_gradients(nets):
    model = nets.chain().double()
    x = torch.randn(BATCH, WIDTH, dtype=torch.float64)
    want = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    with_checkpoints = checkpointed(copy.deepcopy(model), x)
    have = torch.autograd.grad(with_checkpoints(x).square().sum(), list(with_checkpoints.parameters()))
    assert all(map(torch.equal, have, want))
    report = estimate(checkpointed(nets.chain(), x.float()), (BATCH, WIDTH), loss=last)
    assert report.held_bytes == (DEPTH - 1) * STATE + 4  # of the first one it is the model's own, and the loss
    assert report.flops.recomputed == DEPTH * 2 * BATCH * WIDTH * WIDTH


def test_sweep_asks_every_way_for_every_size():
    made = []

    def way(depth):
        made.append(depth)
        return nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(depth))), (BATCH, WIDTH)

    reports = sweep({"one": way, "two": way}, (1, 3), last)
    assert made == [1, 3, 1, 3]
    assert [report.held_bytes for report in reports["two"]] == [STATE + 4, 3 * STATE + 4]


# ---------------------------------------------------------------------- what is printed


class Checkpointed(nn.Module):
    """By hand, with PyTorch's function."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        for block in self.model:
            x = checkpoint(block, x, use_reentrant=False)
        return x


def test_compare_against_networks_made_by_hand_and_run(capsys, nets):
    rows = rows_of(capsys, "usersnets:chain", "--input", f"{BATCH}x{WIDTH}", "--compare")
    by_hand = {
        "plain": nets.chain(),
        "checkpoint each block": Checkpointed(nets.chain()),
        "Momentum(0.9)": reversa.convert(nets.chain(), reversa.Momentum(0.9), example=torch.zeros(BATCH, WIDTH)),
        "Momentum(0.9), exact": reversa.convert(
            nets.chain(), reversa.Momentum(0.9), exact=True, example=torch.zeros(BATCH, WIDTH)
        ),
    }
    assert list(rows) == list(by_hand)
    for name, model in by_hand.items():
        report = measure(model, (BATCH, WIDTH), optimizer=torch.optim.SGD, repeats=1)
        assert rows[name]["peak_bytes"] == pytest.approx(report.peak_bytes, rel=0.01), name
        assert rows[name]["held_bytes"] == pytest.approx(report.held_bytes, rel=0.01), name
    assert rows["plain"]["recomputed_share"] == 0
    # Forward 1, weights 1, inputs 1 of each block but the first, whose input needs no gradient; and forward again.
    assert rows["Momentum(0.9)"]["recomputed_share"] == pytest.approx(DEPTH / (3 * DEPTH - 1))


def test_a_scheme_converts_first(capsys, nets):
    flags = ("--scheme", "momentum", "--gamma", "0.5", "--engine", "recompute", "--input", f"{BATCH}x{WIDTH}")
    told = json.loads(printed(capsys, "usersnets:chain", *flags, "--json"))
    assert told["stages"][0]["rule"] == "Momentum(gamma=0.5, init='zero'), Recompute()"
    plain = json.loads(printed(capsys, "usersnets:chain", *flags[-2:], "--json"))
    assert plain["stages"][0]["rule"] == "as it is"


def test_step_is_made_of_what_is_asked_for(capsys):
    flags = ("revnet38", "--input", "2x3x8x8", "--optimizer", "adamw", "--precision", "bf16", "--json")
    told = json.loads(printed(capsys, *flags))
    assert (told["optimizer"], told["precision"], told["inputs"]) == ("AdamW", "bf16", "2 x 3 x 8 x 8")
    parameters = list(reversa.models.create("revnet38").parameters())
    state = sum(2 * p.nbytes + 4 for p in parameters)  # two moments, and a number of steps
    assert told["peak"]["optimizer_state"] == state


def test_measure_prints_the_estimate_beside_it(capsys):
    text = printed(capsys, "resnet32", "--input", "2x3x16x16", "--measure")
    assert "a training step, measured" in text
    ratios = [float(line.split()[-1]) for line in text.splitlines()[-2:]]
    assert ratios == pytest.approx([1, 1], abs=0.01)
    assert "estimated / measured" in text


def test_a_network_that_needs_numbers_can_be_measured(capsys, nets):
    shape = ("usersnets:deciding", "--input", f"{BATCH}x{WIDTH}")
    assert main(["memory", *shape]) == 2
    assert "`reversa memory usersnets:deciding --measure` runs a step" in capsys.readouterr().err
    told = json.loads(printed(capsys, *shape, "--measure", "--json"))
    assert told["estimated"] is None
    assert told["measured"]["peak"]["parameters"] == DEPTH * (WIDTH + 1) * WIDTH * 4


def test_reversible_networks_are_flat_in_depth(capsys):
    arguments = ("revnet38", "--against", "depth", "--values", "2,6", "--input", "2x3x8x8", "--json")
    held = {(row["way"], row["depth"]): row["held_bytes"] for row in json.loads(printed(capsys, *arguments))}
    assert held["Store()", 6] > 2 * held["Store()", 2]
    assert held["Invert()", 6] == pytest.approx(held["Invert()", 2], rel=0.01)


def test_a_reversible_network_is_compared_by_its_engines(capsys):
    rows = rows_of(capsys, "revnet38", "--compare", "--input", "2x3x8x8")
    assert list(rows) == ["Store()", "Recompute()", "Invert()", "Invert(), exact"]
    for name, engine in (("Store()", reversa.Store()), ("Recompute()", reversa.Recompute())):
        model = reversa.models.create("revnet38", engine=engine)
        report = measure(model, (2, 3, 8, 8), optimizer=torch.optim.SGD, repeats=1)
        assert rows[name]["peak_bytes"] == pytest.approx(report.peak_bytes, rel=0.01)
    assert rows["Store()"]["held_bytes"] > rows["Recompute()"]["held_bytes"] > rows["Invert()"]["held_bytes"]


def test_own_settings_reach_a_reversible_network(capsys):
    told = json.loads(
        printed(capsys, "momentumresnet18", "--input", "2x3x32x32", "--gamma", "0.5", "--exact", "--json")
    )
    assert any("gamma=0.5" in stage["rule"] and "exact" in stage["rule"] for stage in told["stages"])


def test_csv_has_a_row_for_each_way_and_size(capsys):
    text = printed(capsys, "resnet32", "--against", "side", "--values", "8,16", "--input", "2x3x8x8", "--csv")
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [(row["way"], row["side"]) for row in rows] == [
        (way, side) for way in ("plain", "Momentum(0.9)") for side in ("8", "16")
    ]
    model = reversa.models.create("resnet32")
    assert int(rows[1]["peak_bytes"]) == measure(model, (2, 3, 16, 16), optimizer=torch.optim.SGD, repeats=1).peak_bytes


def test_residual_networks_have_a_revnet_beside_them(capsys):
    arguments = ("resnet32", "--compare", "--against", "depth", "--values", "2,3", "--input", "2x3x8x8", "--json")
    rows = {(row["way"], row["depth"]): row for row in json.loads(printed(capsys, *arguments))}
    ways = ["plain", "checkpoint each block", "Momentum(0.9)", "RevNet (revnet38)", "Momentum(0.9), exact"]
    assert list(dict.fromkeys(way for way, _ in rows)) == ways
    for depth, pairs in ((2, 1), (3, 2)):  # a RevNet's block has two residual functions
        model = reversa.models.create("revnet38", blocks=(pairs,) * 3)
        report = measure(model, (2, 3, 8, 8), optimizer=torch.optim.SGD, repeats=1)
        assert rows["RevNet (revnet38)", depth]["peak_bytes"] == report.peak_bytes
        assert rows["RevNet (revnet38)", depth]["held_bytes"] == report.held_bytes


def test_pairs_of_networks_have_as_many_parameters():
    for name, other in REVNETS.items():
        one, two = (sum(p.numel() for p in network_named(spec).build().parameters()) for spec in (name, other))
        assert one == pytest.approx(two, rel=0.05), name


def test_vision_transformers_are_reversible_by_their_trunk(capsys):
    assert main(["memory", "vit", "--compare", "--input", "2x3x8x8", "--json"]) == 0
    out, err = capsys.readouterr()
    rows = {row["way"]: row for row in json.loads(out)}
    assert err.startswith("Left out: checkpoint each block: no residual block was found to put a checkpoint around")
    trunks = {"plain": {}, "RevNet": {"trunk": "revnet"}, "Momentum(0.9)": {"trunk": "momentum", "gamma": 0.9}}
    assert list(rows) == ["plain", "Momentum(0.9)", "RevNet", "Momentum(0.9), exact"]
    for way, settings in trunks.items():
        model = reversa.models.create("vit", **settings)
        report = measure(model, (2, 3, 8, 8), optimizer=torch.optim.SGD, repeats=1)
        assert (rows[way]["peak_bytes"], rows[way]["held_bytes"]) == (report.peak_bytes, report.held_bytes)


def test_what_does_not_convert_is_left_out_with_the_reason(capsys):
    assert main(["memory", "heunnet32", "--compare", "--input", "2x3x8x8", "--csv"]) == 0
    out, err = capsys.readouterr()
    assert [row["way"] for row in csv.DictReader(io.StringIO(out))] == ["plain"]
    assert "Left out: Momentum(0.9), Momentum(0.9), exact: no convertible stage was found.\n" in err


def test_checkpoints_need_a_block():
    with pytest.raises(ConversionError, match="no residual block was found"):
        checkpointed(nn.Sequential(nn.Linear(4, 4)), torch.zeros(2, 4))


def test_one_block_more_is_what_a_block_more_holds(capsys):
    arguments = ("resnet32", "--against", "depth", "--values", "4,5", "--input", "2x3x8x8", "--optimizer", "none")
    four, five = (row for row in json.loads(printed(capsys, *arguments, "--json")) if row["way"] == "plain")
    first = 2 * (16 * 8 * 8) * 4  # one tensor of the first stage; in the second there are half, in the third a quarter
    tensors, statistics = 4, 4 * (16 + 32 + 64) * 4  # two inputs of a BN and two of a convolution; a mean, a deviation
    assert five["held_bytes"] - four["held_bytes"] == tensors * first * 7 // 4 + statistics
    assert four["one_block_more_bytes"] == pytest.approx(tensors * first + 4 * 16 * 4, rel=0.01)


def test_several_networks_have_a_row_each(capsys, nets):
    specs, flags = ("usersnets:chain", "usersnets:wider"), ("--input", "2x8", "--optimizer", "none")
    singles = [json.loads(printed(capsys, spec, *flags, "--json")) for spec in specs]
    rows = json.loads(printed(capsys, *specs, *specs, *flags, "--json"))  # who is named twice is one
    assert [(row["network"], row["way"]) for row in rows] == [(spec, "as it is") for spec in specs]
    assert [row["peak_bytes"] for row in rows] == [single["peak_bytes"] for single in singles]
    lines = printed(capsys, *specs, "--compare", *flags).splitlines()
    assert lines[0] == "usersnets:chain, usersnets:wider: a training step, estimated (inputs 2 x 8)"
    names = [line.split("  ")[0] for line in lines[3:]]
    assert names[0] == "usersnets:chain: plain"
    assert names[-1] == "usersnets:wider: Momentum(0.9), exact"
    assert len(names) == 2 * 4


def test_networks_of_different_inputs_say_so(capsys):
    lines = printed(capsys, "revnet38", "reversibleresnet").splitlines()
    assert lines[0] == "revnet38, reversibleresnet: a training step, estimated (optimizer SGD)"
    assert lines[2].split()[0] == "inputs"
    assert ["32 x 3 x 32 x 32" in lines[3], "32 x 1 x 32 x 32" in lines[4]] == [True, True]


def test_the_cpu_is_where_a_step_is_made_unless_told(capsys):
    flags = ("revnet38", "--input", "2x3x8x8", "--json")
    assert printed(capsys, *flags, "--device", "cpu") == printed(capsys, *flags)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_step_on_cuda(capsys):
    flags = ("vit", "--input", "2x3x8x8", "--scheme", "revnet", "--device", "cuda", "--json")
    assert json.loads(printed(capsys, *flags))["device"].startswith("cuda")
    told = json.loads(printed(capsys, *flags, "--measure"))
    kinds = {
        side: {k: v for k, v in told[side]["after_forward"].items() if k != "unseen"}
        for side in told
        if side != "ratios"
    }
    assert kinds["measured"] == pytest.approx(kinds["estimated"], rel=0.01)


def test_networks_are_made_without_memory():
    pytest.importorskip("torchvision.models")
    for spec in ("revnet38", "torchvision:resnet18", "resnet18"):
        model = network_named(spec).build()
        assert all(p.is_meta for p in model.parameters())
        assert model.training
    assert type(network_named("resnet50").build()).__module__ == "reversa.models.resnet"
    assert type(network_named("torchvision:resnet50").build()).__module__ == "torchvision.models.resnet"


@pytest.mark.parametrize(
    ("package", "spec", "shape"), [("timm", "timm:resnet18", "2x3x32x32"), ("transformers", "hf:gpt2", "2x4x768")]
)
def test_networks_of_other_packages(capsys, package, spec, shape):
    pytest.importorskip(package)
    rows = rows_of(capsys, spec, "--input", shape, "--compare")
    assert rows["Momentum(0.9)"]["held_bytes"] < rows["plain"]["held_bytes"]


# ---------------------------------------------------------------------- pictures


def test_pictures_show_the_numbers(tmp_path):
    pytest.importorskip("matplotlib.figure")
    models = {name: nn.Sequential(nn.Linear(64, 64), kind()) for name, kind in (("a", nn.Tanh), ("b", nn.GELU))}
    reports = {name: [estimate(model, (batch, 64)) for batch in (64, 256)] for name, model in models.items()}
    peaks = draw_peaks((64, 256), reports, "batch", tmp_path / "peaks.png").axes[0]
    assert [line.get_label() for line in peaks.get_lines()] == ["a", "b"]
    assert peaks.get_ylabel() == "peak of a training step (KiB)"
    for line, found in zip(peaks.get_lines(), reports.values(), strict=True):
        assert [y * 1024 for y in line.get_ydata()] == [report.peak_bytes for report in found]
    bars = draw_bars({name: found[1] for name, found in reports.items()}, tmp_path / "bars.png").axes[0]
    ends = [max(bar.get_x() + bar.get_width() for group in bars.containers for bar in group[i : i + 1]) for i in (0, 1)]
    assert [end * 1024 for end in ends] == pytest.approx([found[1].peak_bytes for found in reports.values()])
    lines = {name: timeline(model, (256, 64)) for name, model in models.items()}
    drawn = draw_timelines(lines, tmp_path / "timeline.png").axes[0].get_lines()
    assert max(drawn[0].get_ydata()) * 1024 == reports["a"][1].peak_bytes
    assert list(drawn[1].get_xdata()) == [lines["a"].forward_moments]
    with pytest.raises(OutputError, match=r"cannot write .*none"):
        draw_timelines(lines, tmp_path / "none" / "timeline.png")


def test_pictures_are_written(capsys, tmp_path, nets):
    pytest.importorskip("matplotlib.figure")
    files = {
        name: str(tmp_path / f"{name}.{kind}") for name, kind in (("out", "svg"), ("timeline", "png"), ("bars", "png"))
    }
    flags = [word for name, path in files.items() for word in (f"--{name}", path)]
    shape = ("--input", f"{BATCH}x{WIDTH}", "--against", "batch", "--values", "4,8")
    assert main(["memory", "usersnets:chain", *shape, *flags]) == 0
    assert capsys.readouterr().err.splitlines() == [f"Wrote {path}" for path in files.values()]
    assert "<svg" in (tmp_path / "out.svg").read_text()
    assert all((tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in ("timeline", "bars"))


def test_lines_are_named_in_their_colours_and_apart(capsys, nets):
    pytest.importorskip("matplotlib.figure")
    shape = ("--input", "2x8", "--against", "batch", "--values", "2,4")
    assert main(["memory", "usersnets:chain", "--compare", *shape, "--out", "peak"]) == 0
    assert "Wrote peak.png\nWrote peak.svg" in capsys.readouterr().err
    assert Path("peak.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in Path("peak.svg").read_text()

    reports = [estimate(nn.Linear(64, 64), (batch, 64)) for batch in (4, 8)]
    axes = draw_peaks((4, 8), dict.fromkeys("abcdef", reports), "batch", "same.svg").axes[0]
    heights = sorted(text.get_position()[1] for text in axes.texts)
    gaps = [high - low for low, high in pairwise(heights)]
    assert min(gaps) == pytest.approx(0.065 * axes.get_ylim()[1])  # six names of one point, and none on another
    assert {t.get_text(): t.get_color() for t in axes.texts} == {
        line.get_label(): line.get_color() for line in axes.get_lines()
    }
    with pytest.raises(SettingError, match="at most 6 lines, and these are 7"):
        draw_peaks((4, 8), dict.fromkeys("abcdefg", reports), "batch", "many.svg")


# ---------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["revnet39"], "Did you mean: revnet38"),
        (["torchvision:resnet51"], "Did you mean: resnet"),
        (["revnet38", "--input", "8x3xa"], "--input takes whole numbers above 0, such as 8x3x224x224, got '8x3xa'"),
        (["revnet38", "--input", "8x0x8x8"], "got '8x0x8x8'"),
        (["revnet38", "--against", "batch"], "--against needs sizes"),
        (["revnet38", "--against", "batch", "--values", "8,many"], "--values takes whole numbers above 0"),
        (["revnet38", "--values", "8"], "add --against"),
        (["revnet38", "--out", "x.png"], "add --against"),
        (["torchvision:resnet18", "--against", "depth", "--values", "2"], "torchvision:resnet18 takes no depth"),
        (["usersnets:chain", "--against", "side", "--values", "8", "--input", "4x8"], "needs images"),
        (["revnet38", "--scheme", "momentum"], "revnet38 is reversible, by a scheme of its own"),
        (["vit", "--scheme", "dr2net"], "vit has a trunk for --scheme momentum and for revnet, got dr2net"),
        (["heunnet32", "--against", "batch", "--values", "2"], "no convertible stage was found"),
        (
            ["heunnet32", "--compare", "--input", "2x4x8x8"],
            "cannot make a training step with these inputs (2 x 4 x 8 x 8)",
        ),
        (["revnet38", "--compare", "--measure"], "--measure runs one network in one way"),
        (["revnet38", "resnet32", "--measure"], "give one SPEC"),
        (["revnet38", "--device", "gpu"], "--device takes cpu, cuda, cuda:1, mps or the like, got 'gpu'"),
        (["revnet38", "--device", "cuda:99"], "PyTorch sees no such device here"),
        (["resnet32", "reversibleresnet", "--against", "depth", "--values", "3"], "give them one by one"),
        (["resnet32", "vit", "--compare", "--timeline", "x"], "at most 6 lines, and these are 10"),
        (["revnet38", "--gamma", "0.5"], "revnet38 has no setting gamma"),
        (["resnet32", "--scheme", "momentums"], "Did you mean: momentum"),
        (["resnet32", "--scheme", "revnet"], "RevNet needs pre-norm transformer blocks"),
        (["resnet32", "--gamma", "7"], "(0, 1], got 7"),
        (["torchvision:vit_b_16", "--input", "2x3x64x64"], "Expected 224 but got 64"),
        (["usersnets:chain", "--input", "4x9"], "cannot make a training step with these inputs (4 x 9)"),
        (["usersnets:chain"], "nothing tells which inputs usersnets:chain takes"),
        (["usersnets:chains", "--input", "4x8"], "Did you mean: chain"),
        (["usersnets:number", "--input", "4x8"], "must make a torch.nn.Module, got int"),
        (["usersnets:wide", "--input", "4x8"], "missing 1 required positional argument: 'width'"),
        (["nosuchmodule:net", "--input", "4x8"], "nosuchmodule:net cannot be imported"),
        ([":net"], "cannot be imported"),
    ],
)
def test_mistakes_are_a_message_and_status_2(capsys, nets, arguments, message):
    if any("torchvision" in word for word in arguments) or arguments == ["revnet39"]:
        pytest.importorskip("torchvision.models")
    assert main(["memory", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("reversa: ")
    assert "Traceback" not in err
    assert message in err


@pytest.mark.parametrize(
    ("arguments", "module", "extra"),
    [
        (["torchvision:resnet18"], "torchvision.models", "vision"),
        (["timm:resnet18"], "timm", "timm"),
        (["hf:gpt2"], "transformers", "hf"),
        (["revnet38", "--input", "2x3x8x8", "--bars", "x.png"], "matplotlib.figure", "plot"),
    ],
)
def test_a_missing_extra_is_a_message_and_status_2(capsys, monkeypatch, arguments, module, extra):
    monkeypatch.setitem(sys.modules, module, None)
    assert main(["memory", *arguments]) == 2
    assert f"pip install 'reversa[{extra}]'" in capsys.readouterr().err

"""``reversa plan``: what it prints runs, and is what steps that are run show; sizes against steps that are run."""

from __future__ import annotations

import json
import re

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import reversa
from reversa.check.trace import chains
from reversa.cli import main
from reversa.errors import SettingError
from reversa.memory import Plan, Speed, Way, measure
from reversa.memory.pictures import draw_curve

BATCH, WIDTH, DEPTH = 64, 8, 6
SCALARS = 256  # what a plan allows for on top of the bytes of its step
A100 = {"flops": 19.5e12, "flops_16": 312e12, "bandwidth": 2.039e12, "host": 32e9}
CHAIN = ("usersplans:chain", "--input", f"{BATCH}x{WIDTH}", "--speed", "a100")

SOURCE = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 64)
        self.out = nn.Linear(64, 8)

    def forward(self, x):
        return x + self.out(self.linear(x).tanh())

class Deciding(Block):
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else x

def chain():
    return nn.Sequential(*(Block() for _ in range(6)))

def deciding():
    return nn.Sequential(*(Deciding() for _ in range(6)))

def images():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(4, 4, 3))

def short():
    return chain()[:3]

def single():
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
"""


@pytest.fixture
def nets(users_module):
    return users_module("usersplans", SOURCE)


@pytest.fixture
def small_gpt2(tmp_path):
    settings = {"n_layer": 2, "n_embd": 16, "n_head": 2, "n_positions": 12, "vocab_size": 50}
    pytest.importorskip("transformers").GPT2Config(**settings).save_pretrained(tmp_path / "gpt2")
    return f"hf:{tmp_path / 'gpt2'}"


def printed(capsys, *arguments: str) -> str:
    assert main(["plan", *arguments]) == 0
    return capsys.readouterr().out


def told(capsys, *arguments: str):
    return json.loads(printed(capsys, *arguments, "--json"))


def complaint(capsys, *arguments: str) -> str:
    assert main(["plan", *arguments]) == 2
    return capsys.readouterr().err


def executed(text: str) -> dict:
    """What the printed program leaves behind."""
    names: dict = {}
    exec(compile(text.partition("To apply this plan:\n\n")[2], "printed", "exec"), names)
    return names


def peak(model: nn.Module, inputs, **step) -> int:
    """Of a step that is run."""
    return measure(model, inputs, **{"optimizer": torch.optim.SGD, "repeats": 1} | step).peak_bytes


# ---------------------------------------------------------------------- the plan, and the program that applies it


def test_the_program_trains_what_was_converted_by_hand_within_the_budget(capsys):
    torchvision = pytest.importorskip("torchvision")
    shape, budget = (8, 3, 64, 64), 100 * 2**20
    text = printed(
        capsys, "torchvision:resnet18", "--input", "2x3x64x64", "--batch", "8", "--budget", "100MiB", "--speed", "a100"
    )
    names = executed(text)
    model, found = names["model"], names["found"]
    assert text.startswith(str(found))
    assert (found.budget, found.inputs, vars(found.speed)) == (budget, "8 x 3 x 64 x 64", A100)
    assert found.peak_bytes <= budget < found.ways[0].peak_bytes
    assert 0 <= found.peak_bytes - peak(model, torch.randn(shape)) <= SCALARS
    by_hand = reversa.convert(torchvision.models.resnet18(), scheme=reversa.Momentum(0.9), engine=reversa.Store())
    by_hand.load_state_dict(model.state_dict())
    x = torch.randn(shape)
    outputs = [net.double()(x.double()) for net in (model, by_hand)]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-12, atol=0)
    for output in outputs:
        output.square().sum().backward()
    for p, q in zip(model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-6, atol=1e-9)


@pytest.fixture
def asked_for(monkeypatch):
    """What the command and its program ask a plan for; planning itself is left out."""
    seen: list[tuple] = []

    def curve(model, inputs, budgets, allow=None, speed=None, **step):
        return [plan(model, inputs, budget, allow, speed, **step) for budget in budgets]

    def plan(model, inputs, budget, allow=None, speed=None, loss=None, optimizer=None, precision=None):
        modules = [(name, type(module)) for name, module in model.named_modules()]
        rules = [(name, str(holder.scheme), holder.exact) for name, holder, _ in chains(model)]
        if isinstance(inputs, dict):
            inputs = {name: getattr(value, "shape", value) for name, value in inputs.items()}
        seen.append((modules, rules, model.training, inputs, budget, allow, speed, optimizer, precision))
        return handmade(2**30, 2**30, 1.0)

    monkeypatch.setattr("reversa.cli.plan.curve", curve)
    monkeypatch.setattr(reversa.memory, "plan", plan)
    monkeypatch.setattr(Plan, "apply", lambda self, model: model)
    return seen


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        (("usersplans:chain", "--input", "64x8", "--gamma", "0.95", "--exact"), "Momentum(gamma=0.95, init='zero')"),
        (("usersplans:chain", "--input", "64x8", "--as-it-is", "--optimizer", "none"), None),
        (("resnet32", "--batch", "4", "--precision", "bf16"), "Momentum(gamma=0.9, init='zero')"),
        (("reversibleresnet", "--scheme", "midpoint", "--h", "0.2"), "Midpoint(h=0.2, init='euler')"),
        (("reversibleresnet",), "Momentum(gamma=0.9, init='zero')"),
        (("revnet38", "--optimizer", "adamw"), "RevNet(dim=1)"),
        (("vit", "--allow", "recompute, invert"), "Momentum(gamma=0.9, init='zero')"),
        (("vit", "--scheme", "revnet", "--exact"), "RevNet(dim=-1)"),
        (("vit", "--as-it-is"), None),
        (("torchvision:resnet18", "--scheme", "bdia"), "BDIA(gamma=0.5, random=True)"),
        (("gpt2", "--batch", "3"), "Momentum(gamma=0.9, init='zero')"),
    ],
)
def test_the_program_asks_for_what_the_command_asked_for(capsys, nets, small_gpt2, asked_for, arguments, rule):
    spec, *flags = arguments
    text = printed(capsys, small_gpt2 if spec == "gpt2" else spec, *flags, "--budget", "1GiB", "--speed", "1,2,3e9,4")
    assert "loss=lambda output: output.loss" in text or spec != "gpt2"
    executed(text)
    command, program = asked_for
    assert command == program
    assert {found for _, found, _ in program[1]} == ({rule} if rule else set())
    assert all(bool(exact) for _, _, exact in program[1]) == ("--exact" in flags or not rule)
    assert program[2]


def test_a_language_model_takes_no_more_tokens_than_it_has_positions_for(capsys, small_gpt2):
    text = printed(capsys, small_gpt2, "--budget", "1GiB", "--largest", "length", "--allow", "store")
    assert re.findall(r" +(\d+)$", text, re.M) == ["12"] * 4
    assert "It has positions for 12 tokens: no more were tried." in text


def test_json_has_the_plan_and_the_program(capsys, nets):
    plan = told(capsys, *CHAIN, "--budget", "1 MB", "--as-it-is", "--allow", "store")
    model = nn.Sequential(*(nets.Block() for _ in range(DEPTH)))
    assert plan["budget"] == 10**6
    assert 0 <= plan["peak_bytes"] - peak(model, torch.randn(BATCH, WIDTH)) <= SCALARS
    assert [stage["engines"] for stage in plan["stages"]] == [["Store()"] * DEPTH]
    assert plan["speed"] == A100
    assert "reversa.convert" not in plan["python"]
    assert told(capsys, *CHAIN, "--budget", "1 MB", "--allow", "store")["stages"][0]["reversible"]


def test_the_speed_of_this_machine_is_in_the_program(capsys, nets, monkeypatch):
    seen = []
    given = Speed(1.23456e11, 2.34567e11, 3.45678e10, 4.56789e9)
    monkeypatch.setattr(Speed, "measured", staticmethod(lambda device: seen.append(str(device)) or given))
    text = printed(capsys, *CHAIN[:3], "--budget", "1MiB", "--as-it-is", "--allow", "store")
    assert seen == ["cpu"]
    assert "Speed(flops=1.23e+11, flops_16=2.35e+11, bandwidth=3.46e+10, host=4.57e+09)" in text
    assert text.startswith(str(executed(text)["found"]))


def test_the_command_for_other_ways_runs(capsys, nets):
    text = printed(
        capsys, *CHAIN, "--budget", "1MiB", "--optimizer", "adamw", "--precision", "bf16", "--allow", "store"
    )
    command = re.search(r"^reversa (memory .*)$", text, re.M)
    assert command
    assert main(command.group(1).split()) == 0
    assert "inputs 64 x 8, optimizer AdamW, precision bf16" in capsys.readouterr().out


# ---------------------------------------------------------------------- the largest size


class Checkpointed(nn.Sequential):
    def forward(self, x):
        for block in self:
            x = checkpoint(block, x, use_reentrant=False)
        return x


def largest_that_runs(make, budget: int, batch: int) -> bool:
    """Whether a batch fits, and one more does not, in steps that are run."""
    return all(
        (peak(make(), torch.randn(size, WIDTH)) <= budget) == fits for size, fits in ((batch, True), (batch + 1, False))
    )


def test_largest_batch_of_a_network_as_it_is(capsys, nets):
    arguments = ("usersplans:short", "--input", "64x8", "--budget", "100KB", "--largest", "batch", "--as-it-is")
    rows = {row["way"]: row["batch"] for row in told(capsys, *arguments)}
    assert list(rows) == ["plan of least memory", "checkpoint each block", "all stored"]
    assert largest_that_runs(lambda: Checkpointed(*nets.short()), 100_000, rows["checkpoint each block"])
    assert largest_that_runs(nets.short, 100_000, rows["all stored"])


def test_batch_max_is_the_largest_that_fits(capsys, nets):
    budget = 200_000
    arguments = (*CHAIN, "--budget", f"{budget}B", "--as-it-is", "--allow", "store")
    batch = int(told(capsys, *arguments, "--batch", "max")["inputs"].partition(" x ")[0])
    assert largest_that_runs(nets.chain, budget, batch)


def test_largest_side_in_steps_that_the_network_takes(capsys, nets):
    budget = 2**20
    arguments = ("usersplans:images", "--input", "2x3x48x48", "--largest", "side", "--as-it-is", "--allow", "store")
    text = printed(capsys, *arguments, "--budget", "1MiB")
    assert text.startswith("usersplans:images: the largest side that fits into 1.00 MiB (inputs 2 x 3 x side x side)\n")
    assert text.endswith("Tried in steps of 16.\n")
    side = int(re.findall(r"^all stored +(\d+)$", text, re.M)[0])
    assert side % 16 == 0
    assert peak(nets.images(), torch.randn(2, 3, side, side)) <= budget
    assert peak(nets.images(), torch.randn(2, 3, side + 16, side + 16)) > budget


def test_a_way_in_which_nothing_fits(capsys, nets):
    arguments = (
        "usersplans:short",
        "--input",
        "1x4096x8",
        "--budget",
        "4MiB",
        "--largest",
        "batch",
        "--allow",
        "recompute",
    )
    text = printed(capsys, *arguments)
    assert re.search(r"^plan of least memory +1$", text, re.M)
    assert re.search(r"^the original, all stored +none$", text, re.M)
    assert peak(nets.short(), torch.randn(1, 4096, 8)) > 4 * 2**20


# ---------------------------------------------------------------------- the curve


def handmade(budget: int, peak_bytes: int, seconds: float) -> Plan:
    ways = (Way("all stored", 8 * 2**30, 1.0), Way("checkpoint each block", 3 * 2**30, 1.5))
    return Plan("Net", "8 x 3", budget, peak_bytes, seconds, 2 * 2**30, (), (), ways, Speed(1, 1, 1, 1))


def test_the_picture_shows_plans_baselines_and_where_none_fits(tmp_path):
    plans = [handmade(6 * 2**30, 5 * 2**30, 1.1), handmade(4 * 2**30, 4 * 2**30, 1.25)]
    axes = draw_curve(plans, tmp_path / "curve").axes[0]
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()}
    assert lines["plan"] == [[4, 1.25], [6, 1.1]]
    assert lines["all stored"] == [[8, 1]]
    assert lines["checkpoint each block"] == [[3, 1.5]]
    starts = [line.get_xydata()[0].tolist() for line in axes.get_lines() if line.get_linestyle() == ":"]
    assert starts == [[8, 1], [3, 1.5]]
    (shaded,) = axes.patches
    assert shaded.get_bbox().x1 == 2
    assert axes.get_xlabel() == "memory budget (GiB)"
    assert (tmp_path / "curve.png").stat().st_size > 5000
    assert (tmp_path / "curve.svg").read_text().startswith("<?xml")


def test_a_curve_from_the_least_to_all_stored(capsys, nets, tmp_path, monkeypatch):
    monkeypatch.setattr("reversa.cli.plan.POINTS", 4)
    arguments = (*CHAIN, "--budget", "1MiB", "--curve", str(tmp_path / "curve.svg"))
    plan = told(capsys, *arguments)
    budgets = [point["budget"] for point in plan["curve"]]
    assert len(budgets) == 4
    assert (budgets[0], budgets[-1]) == (plan["least_bytes"], plan["ways"][0]["peak_bytes"])
    assert all(point["peak_bytes"] <= point["budget"] for point in plan["curve"])
    assert "memory budget" in (tmp_path / "curve.svg").read_text()
    text = printed(capsys, *arguments, "--budgets", "1KiB,200KiB, 1MiB", "--allow", "store,recompute")
    assert re.findall(r"^(\S+ \S+) .*%$", text.partition("\nbudget ")[2], re.M) == ["200.00 KiB", "1.00 MiB"]


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--budget", "16 parsecs"), "'16 parsecs': unknown unit 'parsecs'. Known: B, KB, MB, GB"),
        (("--budget", "much"), "budget must be bytes above 0|unknown unit"),
        (("--budget", "1MiB", "--batch", "0"), "--batch takes a whole number above 0, or max .*got '0'"),
        (("--budget", "1MiB", "--batch", "8,8"), "--batch takes a whole number above 0, or max .*got '8,8'"),
        (("--budget", "1MiB", "--allow", "stor"), "unknown policy 'stor'. Did you mean: store"),
        (("--budget", "1MiB", "--allow", "offload"), "offload frees no memory .* leave it out"),
        (("--budget", "1MiB", "--speed", "a10"), "--speed takes a name, or four numbers .*Known: a100, h100"),
        (("--budget", "1MiB", "--speed", "1e12,2e12"), "--speed takes a name, or four numbers"),
        (("--budget", "1MiB", "--speed", "0,1,1,1"), "Speed needs numbers above 0"),
        (("--budget", "1MiB", "--as-it-is", "--gamma", "0.9"), "--as-it-is converts nothing: leave out --scheme"),
        (("--budget", "1MiB", "--budgets", "1MiB,2MiB"), "--budgets are those of a curve: add --curve FILE"),
        (("--budget", "1MiB", "--curve", "x", "--budgets", "1MiB,2 lots"), "unknown unit 'lots'"),
        (
            ("--budget", "1MiB", "--curve", "x", "--budgets", "1KiB", "--allow", "store"),
            "a curve needs a plan: none of the budgets",
        ),
        (("--budget", "1MiB", "--curve", "x", "--largest", "batch"), "--largest looks for a size and prints it"),
        (("--budget", "1MiB", "--batch", "max", "--largest", "side"), "--largest looks for a size and prints it"),
        (("--budget", "1MiB", "--largest", "side"), "--largest side needs images, .*got 64 x 8"),
        (("--budget", "1MiB", "--largest", "length"), "--largest length needs sequences, .*got 64 x 8"),
        (("--budget", "1KiB", "--largest", "batch", "--allow", "store"), "not even size 1 fits into 1.00 KiB"),
    ],
)
def test_bad_input(capsys, nets, arguments, message):
    assert re.search(message, complaint(capsys, *CHAIN, *arguments))


def test_a_budget_below_the_least_says_the_least(capsys, nets):
    arguments = (*CHAIN, "--as-it-is", "--allow", "store")
    error = complaint(capsys, *arguments, "--budget", "9KB")
    least = told(capsys, *arguments, "--budget", "1MiB")["least_bytes"]
    assert 0 <= least - peak(nets.chain(), torch.randn(BATCH, WIDTH)) <= SCALARS
    assert f"takes less than {least / 1024:.2f} KiB; the budget is 8.79 KiB" in error
    assert "`--batch max` takes the largest batch that fits" in error
    assert main(["plan", *arguments, "--budget", f"{least}B"]) == 0
    assert main(["plan", *arguments, "--budget", f"{least - 1}B"]) == 2


def test_16Gb_is_16_GB(capsys, nets):
    assert told(capsys, *CHAIN, "--budget", "16Gb", "--as-it-is", "--allow", "store")["budget"] == 16 * 10**9


@pytest.mark.parametrize(
    ("spec", "shape", "message"),
    [
        ("usersplans:single", "4x8", "cannot be made reversible: no convertible stage .*--as-it-is` plans for"),
        ("usersplans:deciding", "4x8", "needs the numbers in its tensors.*`reversa memory usersplans:deciding --meas"),
        ("usersplans:chain", "4x9", "usersplans:chain cannot be made reversible: .* could not be run on these inputs"),
    ],
)
def test_networks_that_cannot_be_planned_for(capsys, nets, spec, shape, message):
    error = complaint(capsys, spec, "--input", shape, "--budget", "1GiB", "--speed", "a100")
    assert re.search(message, error, re.S)


def test_inputs_that_do_not_fit_the_model(capsys, nets):
    arguments = ("usersplans:chain", "--input", "4x9", "--budget", "1GiB", "--speed", "a100")
    error = complaint(capsys, *arguments, "--as-it-is")
    assert "usersplans:chain cannot make a training step with these inputs (4 x 9): RuntimeError: " in error
    assert "Choose another --input." in error
    deciding = ("usersplans:deciding", "--input", "4x8", "--budget", "1GiB", "--speed", "a100", "--as-it-is")
    assert "`reversa memory usersplans:deciding --measure` runs a step" in complaint(capsys, *deciding)


def test_a_curve_of_no_plans(tmp_path):
    with pytest.raises(SettingError, match="none of the budgets"):
        draw_curve([], tmp_path / "curve.png")

"""reversa.memory.plan: against every other choice, against what is measured, and what it must not change."""

from __future__ import annotations

import copy
import itertools
import json
import pickle

import pytest
import torch
from torch import nn

import reversa
from cases import assert_same, conv, mlp
from reversa.engine.modules import put_under
from reversa.errors import BudgetError, SettingError
from reversa.memory import Speed, curve, estimate, largest_size, measure, plan
from reversa.memory.costs import Costs
from reversa.memory.largest import batch_of, largest, with_batch
from reversa.memory.plan import _prepared
from reversa.memory.settings import Settings

SPEED = Speed(flops=20e12, flops_16=300e12, bandwidth=2e12, host=25e9)
SGD = torch.optim.SGD
MIB = 2**20


def around(chain: nn.Module, width: int = 32) -> nn.Module:
    return nn.Sequential(nn.Linear(width, width), nn.Tanh(), chain, nn.Linear(width, 10))


def chain(depth: int, scheme=None, exact=False) -> reversa.ReversibleSequence:
    scheme = scheme or reversa.Momentum(0.99)
    return reversa.ReversibleSequence([mlp(32) for _ in range(depth)], scheme, exact=exact)


def revnet(depth: int) -> nn.Module:
    blocks = [(conv(8), conv(8)) for _ in range(depth)]
    return nn.Sequential(nn.Conv2d(3, 16, 1), reversa.ReversibleSequence(blocks, reversa.RevNet()), nn.Flatten(1))


def resnet(layers: tuple[int, ...] = (3, 3), convert: bool = True) -> nn.Module:
    models = pytest.importorskip("torchvision.models")
    model = models.ResNet(models.resnet.BasicBlock, [*layers, *[1] * (4 - len(layers))], num_classes=10)
    return reversa.convert(model, scheme=reversa.Momentum(0.9)) if convert else model


def vit() -> nn.Module:
    models = pytest.importorskip("torchvision.models")
    return models.VisionTransformer(32, 4, 4, 4, 32, 64, num_classes=10)


CASES = {
    "momentum": (lambda: around(chain(6)), (2048, 32)),
    "momentum, gamma 0.1": (lambda: around(chain(8, reversa.Momentum(0.1))), (2048, 32)),
    "momentum, exact": (lambda: around(chain(6, reversa.Momentum(0.5), exact=True)), (2048, 32)),
    "revnet": (lambda: revnet(4), (16, 3, 32, 32)),
    "bdia": (lambda: around(chain(6, reversa.BDIA())), (2048, 32)),
    "resnet, converted": (resnet, (8, 3, 64, 64)),
    "resnet as it is": (lambda: resnet(convert=False), (8, 3, 64, 64)),
    "vit, converted": (lambda: reversa.convert(vit(), scheme=reversa.Momentum(0.9)), (16, 3, 32, 32)),
    "vit as it is": (vit, (16, 3, 32, 32)),
}


# ---------------------------------------------------------------------- it fits, as predicted


@pytest.mark.parametrize("case", CASES)
def test_what_is_measured_is_what_was_planned_and_fits(case):
    make, inputs = CASES[case]
    model = make()
    error, most = curve(model, inputs, [1, "1 TiB"], optimizer=SGD, speed=SPEED)
    least = error.least_bytes
    stored = estimate(model_with(make(), "store"), inputs, optimizer=SGD).peak_bytes
    assert most.peak_bytes == pytest.approx(stored, abs=512)
    budgets = [int(least + share * (most.peak_bytes - least)) for share in (0.0, 0.4)]
    for budget, found in zip(budgets, curve(model, inputs, budgets, optimizer=SGD, speed=SPEED), strict=True):
        measured = measure(found.apply(copy.deepcopy(model)), inputs, optimizer=SGD, repeats=1)
        assert measured.peak_bytes == pytest.approx(found.peak_bytes, rel=0.03)
        assert measured.peak_bytes <= budget
        assert found.seconds >= most.seconds
        assert found.least_bytes == pytest.approx(least, abs=512)


def _least(model, inputs) -> int:
    with pytest.raises(BudgetError) as caught:
        plan(model, inputs, 1, optimizer=SGD, speed=SPEED)
    return caught.value.least_bytes


def model_with(model: nn.Module, action: str) -> nn.Module:
    """Every chain of a model under one engine; what is outside of chains is as it was."""
    for module in model.modules():
        if isinstance(module, reversa.ReversibleSequence):
            module.engine = {"store": reversa.Store(), "invert": reversa.Invert()}[action]
        place = getattr(module, "_reversa", None)
        if place is not None:
            place.stage.engine = {"store": reversa.Store(), "invert": reversa.Invert()}[action]
    return model


# ---------------------------------------------------------------------- against every other choice


BRUTE = {
    "momentum": (lambda: around(chain(3)), (2048, 32), ("store", "recompute", "invert")),
    "revnet": (lambda: revnet(3), (16, 3, 32, 32), ("store", "recompute", "invert")),
    "exact": (lambda: chain(4, reversa.Momentum(0.5), exact=True), (2048, 32), ("store", "invert")),
    "as it is": (vit, (16, 3, 32, 32), ("store", "recompute")),
}


@pytest.mark.parametrize("case", BRUTE)
def test_no_other_choice_takes_less_time(case):
    """Every choice for every block is made in turn: none that fits takes 1 % less, and none fits where no plan does."""
    make, inputs, allow = BRUTE[case]
    settings = Settings(make(), inputs, None, SGD, None)
    with _prepared(settings):
        costs = Costs(settings, allow, SPEED)
        every = [costs.trial(actions) for actions in itertools.product(allow, repeat=len(costs.places))]
    peaks = sorted({trial.peak for trial in every})
    budgets = [int(peak * 1.001) for peak in peaks[:: max(1, len(peaks) // 12)]]
    for budget, found in zip(
        budgets, curve(settings.model, inputs, budgets, allow, optimizer=SGD, speed=SPEED), strict=True
    ):
        fastest = min(trial.seconds for trial in every if trial.peak <= budget)
        assert not isinstance(found, BudgetError), budget
        assert found.peak_bytes <= budget
        assert found.seconds <= 1.01 * fastest


@pytest.mark.parametrize("case", ["momentum", "resnet, converted", "vit, converted"])
def test_ours_is_never_above_the_usual_ways(case):
    make, inputs = CASES[case]
    model = make()
    (anything,) = curve(model, inputs, ["1 TiB"], optimizer=SGD, speed=SPEED)
    budgets = [way.peak_bytes for way in anything.ways]
    plans = curve(model, inputs, budgets, optimizer=SGD, speed=SPEED)
    for way, found in zip(anything.ways, plans, strict=True):
        assert found.seconds <= way.seconds * (1 + 1e-9), way
    by_budget = [found.seconds for _, found in sorted(zip(budgets, plans, strict=True), key=lambda pair: pair[0])]
    assert by_budget == sorted(by_budget, reverse=True)


# ---------------------------------------------------------------------- the numbers stay the same


@pytest.mark.parametrize("case", ["momentum", "revnet", "resnet, converted", "resnet as it is", "vit as it is"])
def test_a_plan_changes_no_number(case):
    make, (_, *shape) = CASES[case]
    torch.manual_seed(0)
    plain = model_with(make().double(), "store")
    x = torch.randn(2, *shape, dtype=torch.float64)
    inputs = (2, *shape)
    found = plan(plain, inputs, _least(plain, inputs), optimizer=SGD, speed=SPEED)
    planned = found.apply(copy.deepcopy(plain))
    assert_same(after_a_step(planned, x), after_a_step(plain, x), 1e-10)


def after_a_step(model: nn.Module, x) -> dict[str, torch.Tensor]:
    x = x.clone().requires_grad_()
    y = model(x)
    y.square().mean().backward()
    gradients = {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": x.grad} | gradients | dict(model.named_buffers())


def test_a_plan_can_be_applied_again_copied_and_pickled():
    model, inputs = vit(), (16, 3, 32, 32)
    keys = list(model.state_dict())
    lean = plan(model, inputs, _least(model, inputs), optimizer=SGD, speed=SPEED)
    lean = pickle.loads(pickle.dumps(lean))
    lean.apply(model)
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert list(copied.state_dict()) == keys
    want = estimate(model, inputs, optimizer=SGD).peak_bytes
    assert estimate(copied, inputs, optimizer=SGD).peak_bytes == want == pytest.approx(lean.peak_bytes, abs=512)
    plan(model, inputs, "1 TiB", optimizer=SGD, speed=SPEED).apply(model)
    assert estimate(model, inputs, optimizer=SGD).peak_bytes > want
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_module_is_recomputed_once_and_its_statistics_move_once():
    torch.manual_seed(1)
    layer = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5))
    plain, x = copy.deepcopy(layer), torch.randn(2, 3, 8, 8)
    calls: list[int] = []
    layer[0].register_forward_hook(lambda *_: calls.append(1))
    put_under(layer, reversa.Recompute())
    results = []
    for each in (layer, plain):
        torch.manual_seed(2)
        each(x).sum().backward()
        results.append([each[1].running_mean, each[1].num_batches_tracked, each[0].weight.grad, torch.rand(1)])
    assert all(map(torch.equal, *results))
    assert len(calls) == 2
    with torch.no_grad():
        layer(x)
    assert len(calls) == 3


def test_a_module_is_offloaded():
    layer = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    plain, x = copy.deepcopy(layer), torch.randn(2, 4)
    put_under(layer, reversa.Offload())
    for each in (layer, plain):
        each(x).sum().backward()
    assert torch.equal(layer[0].weight.grad, plain[0].weight.grad)


def test_what_cannot_be_put_under_a_policy():
    layer = nn.Linear(2, 2)
    with pytest.raises(SettingError, match=r"no part of a reversible chain: use Store\(\)"):
        put_under(layer, reversa.Invert())
    layer.forward = lambda x: x
    with pytest.raises(SettingError, match="set by another library"):
        put_under(layer, reversa.Recompute())


# ---------------------------------------------------------------------- the largest that fits


def test_the_largest_batch_fits_and_the_next_does_not():
    model, inputs = around(chain(5)), (64, 32)
    found = plan(model, inputs, "1 MiB", batch="max", optimizer=SGD, speed=SPEED)
    batch = int(found.inputs.split(" x ")[0])
    assert found.peak_bytes <= MIB < _least(model, (batch + 1, 32))
    assert plan(model, inputs, "1 MiB", batch=batch, optimizer=SGD, speed=SPEED).peak_bytes == found.peak_bytes


def test_the_largest_side_is_found():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Tanh(), nn.Conv2d(8, 3, 3))
    side = largest_size(model, lambda side: (2, 3, side, side), "1 MiB", start=60, optimizer=SGD)
    assert _least(model, (2, 3, side, side)) <= MIB < _least(model, (2, 3, side + 1, side + 1))


@pytest.mark.parametrize("start", [1, 7, 500, 100_000])
@pytest.mark.parametrize("curve", [lambda n: 5 * n, lambda n: 900 + n, lambda n: n * n, lambda n: 10 * (n // 7)])
def test_the_search_ends_at_the_edge(curve, start):
    asked: list[int] = []

    def least(size: int) -> int:
        asked.append(size)
        return curve(size)

    found = largest(least, 1000, start)
    assert curve(found) <= 1000 < curve(found + 1)
    assert len(asked) == len(set(asked)) < 40


def test_not_even_one_fits():
    with pytest.raises(BudgetError, match="not even size 1 fits into 10 B: it takes 12 B") as caught:
        largest(lambda size: 12 * size, 10, 8)
    assert caught.value.least_bytes == 12


def test_another_batch():
    x, mask = torch.zeros(4, 5), torch.zeros(5, 5)
    assert batch_of({"flag": True, "x": x}) == 4
    resized = with_batch({"x": x, "mask": mask, "flag": True, "sizes": (4, 7)}, 9)
    assert resized["x"].shape == (9, 5)
    assert resized["mask"] is mask
    assert (resized["flag"], resized["sizes"]) == (True, (9, 7))
    with pytest.raises(SettingError, match="needs inputs with a first dimension"):
        batch_of({"flag": True})


# ---------------------------------------------------------------------- what it says


def test_a_plan_in_words_and_for_programs():
    model = around(chain(6))
    found = plan(model, (2048, 32), "4 MiB", optimizer=SGD, speed=SPEED)
    text = str(found)
    for part in (
        "within 4.00 MiB (inputs 2048 x 32)",
        "all stored",
        "all inverted",
        "No choice of these policies takes less than",
        "Note:",
    ):
        assert part in text
    told = json.loads(json.dumps(found.to_dict()))
    assert told["peak_bytes"] == found.peak_bytes
    assert [len(stage["engines"]) for stage in told["stages"]] == [6]
    assert [way["name"] for way in told["ways"]][:2] == ["all stored", "checkpoint each block"]


# ---------------------------------------------------------------------- bad input


def fails(match: str, *args, error: type[Exception] = SettingError, model=None, **settings) -> None:
    model = model or nn.Sequential(mlp(32), mlp(32))
    with pytest.raises(error, match=match):
        plan(model, *(args or ((8, 32), "1 GiB")), speed=SPEED, **settings)


@pytest.mark.parametrize("budget", ["", "much", "-1 GiB", "0", "nan", "inf GB", 0, -5])
def test_a_budget_that_is_none(budget):
    fails("budget must be bytes above 0", (8, 32), budget)


def test_unknown_units_and_policies():
    fails("unknown unit 'parsec'.*Known: B, KB", (8, 32), "16 parsec")
    fails("unknown policy 'invrt'. Did you mean: invert", allow=["store", "invrt"])
    fails("allow needs a list", allow="store")
    fails("allow needs a list", allow=[])
    fails("offload frees no memory", allow=["offload"])
    fails("batch must be a whole number", batch=0)
    fails("batch must be a whole number", batch="most")


def test_a_budget_below_the_least_says_what_the_least_is():
    model, inputs = around(chain(6)), (2048, 32)
    least = _least(model, inputs)
    with pytest.raises(BudgetError, match=r"takes less than .* MiB; the budget is .* MiB\. Take smaller") as caught:
        plan(model, inputs, least - 512, optimizer=SGD, speed=SPEED)
    assert caught.value.least_bytes == pytest.approx(least, abs=512)
    assert plan(model, inputs, least, optimizer=SGD, speed=SPEED).peak_bytes <= least
    assert pickle.loads(pickle.dumps(caught.value)).least_bytes == caught.value.least_bytes
    fails("Convert the model first", (8, 32), 10, error=BudgetError)
    fails("Allow 'invert'", inputs, 10, error=BudgetError, model=model, allow=["store"])


def test_a_plan_for_another_model():
    found = plan(around(chain(6)), (2048, 32), "1 GiB", optimizer=SGD, speed=SPEED)
    with pytest.raises(SettingError, match=r"with the stages 2 \(6\); the model has 2 \(5\)"):
        found.apply(around(chain(5)))


class Deciding(nn.Module):
    def forward(self, x):
        return x * 2 if x.sum() > 0 else x


def test_a_model_that_needs_numbers_and_inputs_that_do_not_fit():
    fails("Use reversa.memory.measure", model=nn.Sequential(nn.Linear(32, 32), Deciding()))
    with pytest.raises(RuntimeError) as caught:
        plan(nn.Linear(32, 3), (8, 31), "1 GiB", speed=SPEED)
    assert "inputs of shape 8 x 31" in "".join(caught.value.__notes__)


def test_a_speed_that_is_none():
    with pytest.raises(SettingError, match="above 0"):
        Speed(1e12, 0, 1e9, 1e9)
    assert all(value > 0 for value in vars(Speed.measured(size=64)).values())


# ---------------------------------------------------------------------- exact arithmetic


def test_exact_is_chosen_where_drift_asks_for_many_states():
    """With gamma = 0.1 every third state or so is kept in float; exact arithmetic keeps 3.3 bits of a step."""
    model, inputs = around(chain(24, reversa.Momentum(0.1))), (2048, 32)
    allow = ["store", "invert", "exact"]
    floats, both = curve(model, inputs, [1], allow[:2], optimizer=SGD, speed=SPEED) + curve(
        model, inputs, [1], allow, optimizer=SGD, speed=SPEED
    )
    assert both.least_bytes < 0.95 * floats.least_bytes
    found, roomy = curve(model, inputs, [both.least_bytes, "1 TiB"], allow, optimizer=SGD, speed=SPEED)
    assert (found.exact, roomy.exact) == (True, False)
    assert "exact arithmetic" in str(found)
    assert found.to_dict()["exact"] is True
    planned = found.apply(copy.deepcopy(model))
    assert (planned[2].exact, model[2].exact) == (True, False)
    measured = measure(planned, inputs, optimizer=SGD, repeats=1).peak_bytes
    assert measured <= both.least_bytes
    assert measured == pytest.approx(found.peak_bytes, rel=0.03)


def test_a_scheme_without_exact_arithmetic():
    model = reversa.ReversibleSequence([mlp(8), mlp(8)], reversa.IResNet())
    fails("IResNet", (4, 8), "1 GiB", model=model, allow=["exact"])


# ---------------------------------------------------------------------- compiled


@pytest.mark.parametrize(
    ("make", "inputs"), [(vit, (16, 3, 32, 32)), (lambda: resnet((1, 1), convert=False), (32, 3, 64, 64))]
)
def test_a_compiled_model_is_compared_with_pytorchs_own_budget(make, inputs):
    model = make()
    plain = plan(model, inputs, "1 GiB", optimizer=SGD, speed=SPEED)
    model.compile()
    found = plan(model, inputs, "1 GiB", optimizer=SGD, speed=SPEED)
    assert [way.name for way in found.ways][:-1] == [way.name for way in plain.ways]
    stored, compiled = found.ways[0], found.ways[-1]
    assert compiled.name == "compiled, activation_memory_budget=0.5"
    assert compiled.seconds > stored.seconds  # half of what is kept is computed again
    assert found.least_bytes <= compiled.peak_bytes
    if make is vit:  # a graph has no ReLU in place: without fusion, a ResNet's takes more than its eager step
        assert compiled.peak_bytes < 0.8 * stored.peak_bytes

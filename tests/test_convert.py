"""Conversion of other people's models: right to rounding, and nothing about the model changes but its rule."""

from __future__ import annotations

import copy
import inspect
import io
import pickle

import pytest
import torch
import torchvision
from torch import nn

from cases import assert_same, error
from convert_cases import Block, looped, perturbed, ruled, straight, train
from reversa import AdditiveCoupling, Invert, Momentum, Offload, Recompute, RevNet, Store
from reversa.convert import convert, explain, restore
from reversa.errors import ConversionError, SettingError

# The blocks of each stage that keep the shape, written down by hand: what the oracle runs by the rule.
RESNETS: dict[str, tuple[range, ...]] = {
    "resnet18": (range(0, 2),),  # the second block of layer2 to layer4 stands alone
    "resnet34": (range(0, 3), range(1, 4), range(1, 6), range(1, 3)),
    "resnet50": (range(1, 3), range(1, 4), range(1, 6), range(1, 3)),
    "resnext50_32x4d": (range(1, 3), range(1, 4), range(1, 6), range(1, 3)),
    "wide_resnet50_2": (range(1, 3), range(1, 4), range(1, 6), range(1, 3)),
}


def resnet(name: str, **settings) -> nn.Module:
    return perturbed(getattr(torchvision.models, name)(num_classes=7, **settings))


def by_hand(model, x, stages, gamma):
    """A torchvision ResNet's forward pass once more, with the rule in the blocks of the stages."""
    x = model.maxpool(model.relu(model.bn1(model.conv1(x))))
    for i, layer in enumerate((model.layer1, model.layer2, model.layer3, model.layer4)):
        inside = stages[i] if i < len(stages) else ()
        v = torch.zeros(())
        for k, block in enumerate(layer):
            if k in inside:
                v = gamma * v + (1 - gamma) * (block(x) - x)
                x = x + v
            else:
                x = block(x)
    return model.fc(torch.flatten(model.avgpool(x), 1))


def images(batch: int = 3, side: int = 64) -> torch.Tensor:
    return torch.randn(batch, 3, side, side, dtype=torch.float64, requires_grad=True)


def small() -> nn.Module:
    """A ResNet-32 of narrow bottlenecks: a stage in layer1 and layer2, and lone blocks behind."""
    net = torchvision.models.ResNet(
        torchvision.models.resnet.Bottleneck, [3, 3, 2, 2], num_classes=7, width_per_group=16
    )
    return perturbed(net)


# ---------------------------------------------------------------------- the numbers


@pytest.mark.slow
@pytest.mark.parametrize(("name", "gamma"), [*((name, 0.9) for name in RESNETS), ("resnet34", 0.3)])
def test_gradients_and_statistics_are_those_of_the_rule_by_hand(name, gamma):
    model, x = resnet(name), images()
    reference = copy.deepcopy(model)
    convert(model, Momentum(gamma))
    actual = train(model, model, x)
    expected = train(reference, lambda x: by_hand(reference, x, RESNETS[name], gamma), x)
    assert any("num_batches_tracked" in key for key in expected)
    assert expected["gradient of input 0"] is not None
    assert_same(actual, expected, 1e-11)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "lengths"), [("resnet101", [2, 3, 22, 2]), ("resnet152", [2, 7, 35, 2])])
def test_the_deep_ones_train(name, lengths):
    model = convert(getattr(torchvision.models, name)(num_classes=3), Momentum(0.9))
    report = explain(model)
    assert [(s.name, len(s.blocks)) for s in report.stages] == list(zip(RESNET_LAYERS, lengths, strict=True))
    model(torch.randn(2, 3, 64, 64)).sum().backward()
    grads = [p.grad for p in model.parameters()]
    assert all(g is not None and g.isfinite().all() for g in grads)


RESNET_LAYERS = ("layer1", "layer2", "layer3", "layer4")


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode", "with gradients"])
def test_eval_computes_by_the_same_rule(mode):
    model, x = small(), images(2)
    stages = (range(1, 3), range(1, 3))
    reference = copy.deepcopy(model).eval()
    convert(model, Momentum(0.7)).eval()
    context = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}.get(mode, torch.enable_grad)
    with context():
        y = model(x)
    expected = by_hand(reference, x, stages, 0.7)
    assert error(y.detach(), expected.detach()) < 1e-13
    if mode == "with gradients":
        assert_same(train(model, model, x), train(reference, lambda x: by_hand(reference, x, stages, 0.7), x), 1e-12)


def test_without_noise_and_statistics_training_and_eval_agree():
    model, x = convert(looped(), Momentum(0.9)), torch.randn(4, 6, dtype=torch.float64)
    assert torch.equal(model.train()(x), model.eval()(x))


def moved(gamma: float) -> float:
    """How far the conversion alone moves the output of a network in evaluation mode."""
    torch.manual_seed(0)
    model, x = small().eval(), images(2)
    with torch.no_grad():
        before = model(x)
        return error(convert(model, Momentum(gamma))(x), before)


def test_the_smaller_gamma_the_nearer_the_original():
    near, nearer, far = moved(1e-3), moved(1e-5), moved(0.9)
    assert near < 0.02
    assert nearer == pytest.approx(near / 100, rel=0.2)  # to first order, the distance is proportional to gamma
    assert far > 0.2


def test_the_numbers_stay_right_over_optimiser_steps():
    model = looped(depth=6, p=0.2)
    reference = copy.deepcopy(model)
    convert(model, Momentum(0.9))
    x = torch.randn(4, 6, dtype=torch.float64)
    losses = []
    before = model(x).square().sum().item()
    for module, call in ((model, model), (reference, ruled(reference, 0.9))):
        optimiser = torch.optim.Adam(module.parameters(), lr=0.01)
        torch.manual_seed(3)
        for _ in range(10):
            optimiser.zero_grad()
            loss = call(x).square().sum()
            loss.backward()
            optimiser.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-10)
    assert losses[0] < before


@pytest.mark.parametrize(
    "engine", [Invert(keep=2), Invert(anchors=2), Invert(group=3), Store(), Recompute(), Offload()], ids=str
)
@pytest.mark.parametrize("model", [looped(p=0.2, depth=7), small()], ids=["mlp", "resnet"])
def test_every_engine_gives_the_same_numbers(engine, model):
    x = images(2, 48) if isinstance(model, torchvision.models.ResNet) else torch.randn(4, 6).double().requires_grad_()
    model = copy.deepcopy(model)
    reference = copy.deepcopy(model)
    convert(model, Momentum(0.8), engine=engine)

    def expected(x):
        if isinstance(reference, torchvision.models.ResNet):
            return by_hand(reference, x, (range(1, 3), range(1, 3)), 0.8)
        return ruled(reference, 0.8)(x)

    assert_same(train(model, model, x), train(reference, expected, x), 1e-11)


def test_autocast_is_seen_again():
    model = looped(depth=6).float()
    reference = copy.deepcopy(model)
    convert(model, Momentum(0.9))
    x = torch.randn(4, 6, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        actual, expected = train(model, model, x), train(reference, ruled(reference, 0.9), x)
    assert_same(actual, expected, 1e-5)  # in bfloat16 without autocast's record, or in float32, it would be 1e-2


# ---------------------------------------------------------------------- what must not change


def anatomy(model: nn.Module) -> dict[str, object]:
    """Of every module: its class and the names of what the instance holds."""
    return {name: (type(m), sorted(vars(m))) for name, m in model.named_modules()}


def test_modules_parameters_and_keys_are_the_same_objects_as_before():
    model = small()
    modules, parameters = list(model.named_modules()), list(model.named_parameters())
    buffers, keys = list(model.named_buffers()), list(model.state_dict())
    converted = convert(model)
    assert converted is model
    assert all(a == b and m is n for (a, m), (b, n) in zip(modules, model.named_modules(), strict=True))
    assert all(a == b and p is q for (a, p), (b, q) in zip(parameters, model.named_parameters(), strict=True))
    assert all(a == b and p is q for (a, p), (b, q) in zip(buffers, model.named_buffers(), strict=True))
    assert list(model.state_dict()) == keys


def test_checkpoints_travel_both_ways():
    plain, x = small().eval(), images(2, 48)
    converted = convert(small(), Momentum(1e-9)).eval()
    assert list(converted.load_state_dict(plain.state_dict())) == [[], []]
    assert error(converted(x).detach(), plain(x).detach()) < 1e-7, "at this gamma both are the same function"
    other = small().eval()
    other.load_state_dict(converted.state_dict())
    assert torch.equal(other(x), plain(x))


def test_restore_leaves_nothing_behind():
    model, x = small(), images(2, 48)
    untouched, before = copy.deepcopy(model), anatomy(model)
    convert(model)
    assert anatomy(model) != before
    assert restore(model) is model
    assert anatomy(model) == before
    assert_same(train(model, model, x), train(untouched, untouched, x), 0)
    convert(model, Momentum(0.5))  # and once more


def test_classes_look_like_the_originals():
    model = convert(small())
    block = model.layer1[1]
    assert isinstance(model, torchvision.models.ResNet)
    assert isinstance(block, torchvision.models.resnet.Bottleneck)
    for converted, original in ((model, torchvision.models.ResNet), (block, torchvision.models.resnet.Bottleneck)):
        kind = type(converted)
        assert (kind.__name__, kind.__qualname__, kind.__module__) == (
            original.__name__, original.__qualname__, original.__module__,
        )  # fmt: skip
        assert inspect.signature(converted.forward) == inspect.signature(original.forward.__get__(converted))
    text = repr(model)
    assert "(1): Bottleneck(\n      reversible: stage layer1, block 0" in text
    assert text.count("reversible: stage") == 4
    assert type(model.layer1[0]) is torchvision.models.resnet.Bottleneck, "it changes the shape"
    assert isinstance(model.layer1[1:], nn.Sequential)


def through_deepcopy(model):
    return copy.deepcopy(model)


def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


def through_a_file(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


copies = pytest.mark.parametrize("duplicate", [through_deepcopy, through_pickle, through_a_file])


@copies
@pytest.mark.parametrize("used", [False, True])
def test_a_copy_is_a_converted_model_of_its_own(duplicate, used):
    model, x = convert(small(), Momentum(0.6)), images(2, 48)
    if used:
        model(x).sum().backward()
    twin = duplicate(model)
    assert type(twin.layer1[1]) is type(model.layer1[1])
    expected = train(model, model, x)  # moves the statistics of the one ...
    assert_same(train(twin, twin, x), expected, 0)  # ... and not of the other
    assert twin.layer1[1]._reversa.stage is twin.layer1[2]._reversa.stage
    assert twin.layer1[1]._reversa.stage is not model.layer1[1]._reversa.stage
    assert str(explain(twin)) == str(explain(model))
    restore(twin)
    assert type(twin) is torchvision.models.ResNet
    with pytest.raises(ConversionError, match="converted already"):
        convert(model)


def test_a_copy_taken_in_the_middle_of_a_step_does_not_disturb_it():
    model, x = convert(looped()), torch.randn(4, 6, dtype=torch.float64)
    expected = train(model, model, x)
    model.zero_grad()
    loss = (y := model(x)).sum()
    twin = copy.deepcopy(model)
    loss.backward()
    assert torch.equal(y, expected["output 0"])
    assert all(p.grad is None for p in twin.parameters())


def test_hooks_fire_once_and_see_the_carried_tensor():
    model, x = looped(depth=3), torch.randn(4, 6, dtype=torch.float64)
    seen: list[tuple[str, torch.Tensor]] = []
    convert(model, Momentum(0.9))
    for name, block in model.blocks.named_children():
        block.register_forward_hook(lambda _m, args, out, n=name: seen.append((n, args[0], out)))
        block.body[0].weight.register_post_accumulate_grad_hook(lambda _p, n=name: seen.append((n, None, None)))
    y = model(x)
    assert [n for n, _, _ in seen] == ["0", "1", "2"]
    assert seen[0][1] is x
    assert seen[1][1] is seen[0][2]
    assert seen[2][2] is y
    y.sum().backward()
    assert [n for n, _, _ in seen[3:]] == ["2", "1", "0"]


def test_stages_can_be_chosen():
    model = convert(small(), stages=["layer2"])
    assert "reversible" not in repr(model.layer1)
    assert "reversible" in repr(model.layer2)
    assert [stage.name for stage in explain(model).stages] == ["layer2"]
    assert ("layer1", "not among the stages asked for") in explain(model).left


def test_conversion_draws_no_random_number_and_moves_no_statistics():
    model = small()
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    convert(model)
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert model.training


# ---------------------------------------------------------------------- what is refused


def test_settings_that_cannot_be():
    model = looped()
    before = anatomy(model)
    x = torch.randn(2, 6).double()
    for scheme in (RevNet(), AdditiveCoupling(), Momentum(0.9, init=nn.Linear(6, 6))):
        with pytest.raises(SettingError, match=r"cannot take over another model's blocks.*Use Momentum"):
            convert(model, scheme)
    with pytest.raises(SettingError, match="exact=True is not in this version"):
        convert(model, exact=True)
    with pytest.raises(SettingError, match="between must be 'error' or 'carry', got 'reset'"):
        convert(model, between="reset")  # type: ignore[arg-type]
    with pytest.raises(SettingError, match=r"needs a torch.nn.Module, got list"):
        convert([nn.Linear(2, 2)])  # type: ignore[type-var]
    with pytest.raises(SettingError, match="needs a scheme and an engine"):
        convert(model, 0.9)  # type: ignore[arg-type]
    with pytest.raises(SettingError, match="needs a scheme and an engine"):
        convert(model, engine="invert")  # type: ignore[arg-type]
    with pytest.raises(SettingError, match=r"example must be a tensor, a tuple .* got list"):
        convert(model, example=[x])
    assert anatomy(model) == before


def test_recomputing_several_steps_needs_them_at_once():
    with pytest.raises(SettingError, match=r"Recompute\(every=2\).*one by one.*Recompute\(every=1\)"):
        convert(looped(), engine=Recompute(every=2))


def test_an_unknown_stage_lists_the_nearest():
    model = small()
    before = anatomy(model)
    with pytest.raises(
        SettingError, match=r"unknown stage 'layr2'. Did you mean: layer2.*Known: layer1, layer2"
    ) as caught:
        convert(model, stages=["layer1", "layr2"])
    assert "layer9" not in str(caught.value)
    assert anatomy(model) == before


@pytest.mark.parametrize("stages", ["layer2", []], ids=["a name that is no list", "an empty list"])
def test_stages_that_are_no_list_of_names(stages):
    with pytest.raises(SettingError, match=r"stages"):
        convert(small(), stages=stages)


def test_a_model_without_residual_blocks():
    with pytest.raises(ConversionError, match="no convertible stage was found"):
        convert(torchvision.models.vgg11(init_weights=False))
    mlp = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(4)))
    with pytest.raises(ConversionError, match="no convertible stage was found"):
        convert(mlp, example=torch.zeros(2, 4))
    with pytest.raises(ConversionError, match="Pass example="):
        convert(nn.Sequential(nn.Linear(4, 4), nn.Tanh()))


@pytest.mark.slow
def test_reasons_are_given_where_blocks_were_looked_at():
    with pytest.raises(ConversionError, match="no convertible stage was found") as caught:
        convert(torchvision.models.densenet121())
    assert "denselayer1" in str(caught.value) or "denseblock1" in str(caught.value)
    assert len(str(caught.value).splitlines()) < 15, "a few reasons, not hundreds"


class Feedforward(nn.Module):
    """Keeps the shape and adds nothing to its input: no residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 6), nn.Tanh())

    def forward(self, x):
        return self.body(x)


def test_blocks_that_add_nothing_to_their_input_are_not_guessed_to_be_residual():
    """No example, a list of equal blocks: whatever is guessed must be refused at the latest when it is called."""
    model = nn.Sequential(*(Feedforward() for _ in range(4)))
    with pytest.raises(ConversionError):
        convert(model)(torch.randn(2, 6))


def test_converted_already():
    model = convert(looped())
    with pytest.raises(ConversionError, match=r"converted already. Call reversa.restore\(model\) first"):
        convert(model, Momentum(0.5))
    with pytest.raises(ConversionError, match="converted already"):
        convert(nn.Sequential(model, nn.Linear(6, 6)))
    with pytest.raises(ConversionError, match="restore needs a converted model, got a Looped"):
        restore(looped())


def test_a_block_with_a_forward_of_its_own_is_refused_and_nothing_is_left_half_done():
    model = looped()
    model.blocks[3].forward = model.blocks[3].forward
    before = anatomy(model)
    with pytest.raises(ConversionError, match=r"blocks.3: this instance has a forward of its own"):
        convert(model)
    assert anatomy(model) == before


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
def test_script_modules_are_refused():
    model = looped(depth=3)
    for i in range(3):
        model.blocks[i] = torch.jit.script(model.blocks[i])
    with pytest.raises(ConversionError, match="ScriptModule"):
        convert(model)


class Shared(nn.Module):
    """One block used at every place, as ALBERT does."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()
        self.blocks = nn.ModuleList([self.block] * 4)

    def forward(self, x):
        return straight(list(self.blocks), x)


def test_a_block_that_is_used_several_times_is_no_stage():
    with pytest.raises(ConversionError):
        convert(Shared(), example=torch.zeros(2, 6))

"""What a conversion must not change: modules, parameters, names, classes, checkpoints, copies, hooks."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
import torchvision
from torch import nn

from cases import assert_same, error
from convert_cases import (
    anatomy,
    images,
    looped,
    small,
    train,
)
from copies import COPIES
from reversa import Momentum
from reversa.convert import convert, explain, restore
from reversa.errors import ConversionError, SettingError


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


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("used", [False, True])
def test_a_copy_is_a_converted_model_of_its_own(copied, used):
    model, x = convert(small(), Momentum(0.6)), images(2, 48)
    if used:
        model(x).sum().backward()
    twin = COPIES[copied](model)
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
    assert [stage.name for stage in explain(convert(small(), stages=["layer[13]", "*2"])).stages] == [
        "layer1",
        "layer2",
    ]


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


def test_a_scheme_for_each_stage():
    model = small()
    convert(model, {"layer1": Momentum(0.5), "layer[23]": Momentum(0.9)})
    report = explain(model)
    assert [stage.name for stage in report.stages] == ["layer1", "layer2"]
    assert report.rule.split("; ")[0].startswith("Momentum(gamma=0.5")
    x = torch.randn(2, 3, 32, 32).double()
    moved = model.eval()(x)
    for name, gamma in (("layer1", 0.5), ("layer2", 0.9)):
        blocks = [b for b in getattr(model, name) if "_reversa" in vars(b)]
        assert {b._reversa.stage.scheme.gamma for b in blocks} == {gamma}
    assert not torch.equal(convert(restore(model), Momentum(0.5))(x), moved)
    one = convert(small(), {"layer2": Momentum(0.5)})
    assert [stage.name for stage in explain(one).stages] == ["layer2"]
    with pytest.raises(SettingError, match="layer1"):
        convert(small(), {"layr1": Momentum(0.5)})
    wanted = {"*": Momentum(0.5), "layer2": Momentum(0.9)}
    named = {stage.name: stage.rule for stage in explain(convert(small(), wanted)).stages}
    assert "0.5" in named["layer1"], "a pattern for all others"
    assert "0.9" in named["layer2"], "a name goes before it"
    for bad, says in (
        ({"scheme": {"layer2": Momentum(0.5)}, "stages": ["layer1"]}, "leave out stages="),
        ({"scheme": {"layer*": Momentum(0.5), "*": Momentum(0.9)}}, "decides no stage"),
        ({"scheme": {}}, "names no stage"),
    ):
        model = small()
        with pytest.raises(SettingError, match=says):
            convert(model, **bad)
        assert not any("reversible" in repr(part) for part in model.children())

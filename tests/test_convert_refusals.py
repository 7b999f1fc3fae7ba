"""What cannot be converted, and settings that cannot be: an error that says what to do, and an untouched model."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn

from convert_cases import (
    Block,
    anatomy,
    looped,
    small,
    straight,
)
from reversa import AdditiveCoupling, Hamiltonian, Momentum, Recompute
from reversa.convert import convert, restore
from reversa.errors import ConversionError, SettingError


def test_settings_that_cannot_be():
    model = looped()
    before = anatomy(model)
    x = torch.randn(2, 6).double()
    for scheme in (Hamiltonian(), AdditiveCoupling(), Momentum(0.9, init=nn.Linear(6, 6))):
        with pytest.raises(SettingError, match=r"cannot take over another model's blocks.*Use Momentum"):
            convert(model, scheme)
    with pytest.raises(SettingError, match=r"exact must be True, False, or an arithmetic.*got 64"):
        convert(model, exact=64)  # type: ignore[arg-type]
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

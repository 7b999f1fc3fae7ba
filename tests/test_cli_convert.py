"""``reversa convert``: what it prints is what the library finds, and its Python makes the same model."""

from __future__ import annotations

import json

import pytest
import torch

import reversa
from reversa.cli import main

SOURCE = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return x + self.linear(x).tanh()

def net():
    return nn.Sequential(*(Block() for _ in range(4)), nn.Linear(8, 5), nn.Linear(5, 8), *(Block() for _ in range(3)))

def plain():
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
"""


@pytest.fixture
def nets(users_module):
    return users_module("usersconverted", SOURCE)


def printed(capsys, *arguments: str) -> str:
    assert main(["convert", *arguments]) == 0
    return capsys.readouterr().out


def program_of(text: str) -> str:
    return text.partition("In Python:")[2]


def rules_after(program: str):
    made: dict = {}
    exec(program, made)
    return reversa.explain(made["model"])


@pytest.mark.parametrize(
    ("spec", "lengths", "says"),
    [
        ("torchvision:resnet101", [2, 3, 22, 2], "layer4.0  changes the shape (1024, 14, 14) -> (2048, 7, 7)"),
        ("timm:vit_base_patch16_224", [12], "197 x 768"),
        ("hf:gpt2", [12], "transformer.h"),
    ],
)
def test_libraries_models(capsys, spec, lengths, says):
    text = printed(capsys, spec)
    assert f"{sum(lengths)} blocks in {len(lengths)} stage" in text
    assert "Momentum(gamma=0.9" in text
    assert says in text
    assert "conversion saves" in text
    told = json.loads(printed(capsys, spec, "--json"))
    assert [len(stage["blocks"]) for stage in told["stages"]] == lengths
    assert told["saved_bytes"] == sum(s["stored_bytes"] - s["kept_bytes"] for s in told["stages"]) > 2**20


@pytest.mark.parametrize(
    "flags",
    [
        ["torchvision:resnet18"],
        ["torchvision:resnet18", "--exact", "--gamma", "0.1", "--stages", "layer1", "--input", "2x3x64x64"],
        ["usersconverted:net", "--input", "16x8", "--scheme", "bdia"],
    ],
    ids=" ".join,
)
def test_the_program_that_is_printed_converts_the_same(capsys, nets, flags):
    text = printed(capsys, *flags)
    told = json.loads(printed(capsys, *flags, "--json"))
    made = rules_after(program_of(text))
    assert made.rule == told["rule"]
    assert [list(stage.blocks) for stage in made.stages] == [stage["blocks"] for stage in told["stages"]]
    assert [stage.saved_bytes for stage in made.stages] == [
        stage["stored_bytes"] - stage["kept_bytes"] for stage in told["stages"]
    ]


def test_a_larger_batch_saves_more(capsys, nets):
    one, four = (json.loads(printed(capsys, "usersconverted:net", "--input", f"{n}x8", "--json")) for n in (16, 64))
    assert four["saved_bytes"] == 4 * one["saved_bytes"] > 0


def test_without_weights_and_random_numbers(capsys):
    state = torch.get_rng_state()
    printed(capsys, "timm:vit_base_patch16_224")
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["usersconverted:plain", "--input", "2x8"], "cannot be made reversible: no convertible stage"),
        (["torchvision:vgg11"], "cannot be made reversible"),
        (["torchvision:resnet18", "--stages", "layer11"], "Did you mean: layer1"),
        (["torchvision:resnet18", "--scheme", "hamiltonian"], "cannot take over another model's blocks"),
        (["revnet38"], "is reversible as it is made"),
        (["torchvision:resnet19"], "resnet18"),
        (["usersconverted:plain"], "Here --input gives their shape."),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input(capsys, nets, flags, says):
    assert main(["convert", *flags]) == 2
    assert says in capsys.readouterr().err

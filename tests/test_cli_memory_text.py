"""``reversa memory`` with models of text, against closed formulas, plain autograd and steps that are run."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from reversa.cli import main
from reversa.cli.specs import network_named
from reversa.cli.text import own_loss
from reversa.memory import measure

SOURCE = """
from types import SimpleNamespace
from torch import nn

class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(50, 8)
        self.scores = nn.Linear(8, 50, bias=False)

    def forward(self, ids):
        return SimpleNamespace(loss=self.scores(self.embedding(ids)).sum())

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return x + self.linear(x).tanh()

def chain():
    return nn.Sequential(*(Block() for _ in range(3)))
"""
SMALL = {
    "gpt2": {"n_layer": 2, "n_embd": 16, "n_head": 2, "n_positions": 12, "vocab_size": 50},
    "roberta": {
        "num_hidden_layers": 2,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 14,
        "vocab_size": 50,
    },
    "opt": {
        "num_hidden_layers": 2,
        "hidden_size": 16,
        "word_embed_proj_dim": 16,
        "num_attention_heads": 2,
        "ffn_dim": 32,
        "max_position_embeddings": 12,
        "vocab_size": 50,
    },
    "t5": {"num_layers": 2, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_heads": 2, "vocab_size": 50},
    "vit": {
        "num_hidden_layers": 2,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "image_size": 16,
        "patch_size": 4,
    },
}


@pytest.fixture
def nets(users_module):
    return users_module("textnets", SOURCE)


@pytest.fixture
def folder(tmp_path):
    """A folder with the configuration of a small model."""
    pytest.importorskip("transformers")

    def made(kind: str) -> str:
        (tmp_path / kind).mkdir(exist_ok=True)
        (tmp_path / kind / "config.json").write_text(json.dumps(SMALL[kind] | {"model_type": kind}))
        return f"hf:{tmp_path / kind}"

    return made


def told(capsys, *arguments: str):
    assert main(["memory", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def bytes_that_autograd_saves(model: nn.Module, *args, **kwargs) -> int:
    """Storages of the graph's saved tensors, but for those that were there before: what a loss holds, by PyTorch."""
    given = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
    there = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), *given)}
    saved: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = own_loss(model(*args, **kwargs))
    saved[loss.untyped_storage().data_ptr()] = loss
    return sum(t.untyped_storage().nbytes() for where, t in saved.items() if where not in there)


def test_token_ids_of_an_embedding_by_hand(capsys, nets):
    report = told(capsys, "textnets:Words", "--input", "4x6", "--optimizer", "none")
    tokens, weights = 4 * 6, 50 * 8 * 4
    assert report["peak"]["parameters"] == 2 * weights
    assert report["after_forward"]["inputs"] == tokens * 8  # numbers of 64 bits
    assert report["held_bytes"] == tokens * 8 * 4 + 4  # what the scores are made of, and the loss
    scores = tokens * 50 * 4
    assert report["peak_bytes"] == 2 * weights + tokens * (8 + 8 * 4) + scores + 4  # when their sum is there, too
    assert bytes_that_autograd_saves(nets.Words(), torch.zeros(4, 6, dtype=torch.long)) == report["held_bytes"]


def test_a_language_model_is_estimated_with_its_own_loss(capsys, folder):
    import transformers

    config = transformers.GPT2Config(**SMALL["gpt2"])
    model = transformers.GPT2LMHeadModel(config)
    ids = torch.randint(50, (1, 7))  # of one sequence, a cache of keys and values would change what is held
    report = told(capsys, folder("gpt2"), "--input", "1x7")
    assert report["model"] == "GPT2LMHeadModel"
    # A tied weight counts once: its rows are in the embedding and in the scores.
    assert report["peak"]["parameters"] == 4 * sum(p.numel() for p in model.parameters())
    given = {"input_ids": ids, "labels": ids.clone(), "use_cache": False}
    run = measure(model, given, loss=lambda output: output.loss, optimizer=torch.optim.SGD, repeats=1)
    assert (report["peak_bytes"], report["held_bytes"]) == (run.peak_bytes, run.held_bytes)
    by_autograd = bytes_that_autograd_saves(model.train(), input_ids=ids, labels=ids.clone(), use_cache=False)
    assert report["held_bytes"] == pytest.approx(by_autograd, rel=0.01)


def test_embeddings_stay_a_shape_of_three_numbers(capsys, folder):
    spec = folder("gpt2")
    ids, embeddings = (told(capsys, spec, "--input", shape) for shape in ("3x7", "3x7x16"))
    assert embeddings["after_forward"]["inputs"] - ids["after_forward"]["inputs"] == 3 * 7 * (16 * 4 - 8)


@pytest.mark.parametrize(("kind", "room"), [("gpt2", 12), ("roberta", 12), ("opt", 12)])
def test_no_more_tokens_than_there_are_positions(capsys, folder, kind, room):
    network = network_named(folder(kind))
    assert network.shape == (1, room)
    model = network.build(real=True)
    model(input_ids=torch.full((1, room), 2))  # as long as it takes
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, room + 1), 2))
    assert main(["memory", network.spec, "--input", f"1x{room + 1}"]) == 2
    assert f"learned positions for {room} tokens, got a length of {room + 1}" in capsys.readouterr().err


def test_default_inputs_and_two_sequences(capsys, folder):
    assert network_named(folder("t5")).shape == (1, 1024)  # nothing limits it
    assert network_named(folder("vit")).shape == (8, 3, 16, 16)
    assert told(capsys, folder("vit"))["model"] == "ViTModel"
    assert told(capsys, folder("t5"), "--input", "2x5", "--measure")["ratios"][0]["ratio"] == pytest.approx(1, abs=0.01)


def test_against_length(capsys, nets, folder):
    spec = folder("gpt2")
    arguments = (spec, "--against", "length", "--values", "5,9", "--input", "3x4")
    held = {(row["way"], row["length"]): row["held_bytes"] for row in told(capsys, *arguments)}
    model = network_named(spec).build(real=True)
    for length in (5, 9):
        ids = torch.zeros(3, length, dtype=torch.long)
        by_autograd = bytes_that_autograd_saves(model, input_ids=ids, labels=ids.clone(), use_cache=False)
        assert held["plain", length] == pytest.approx(by_autograd, rel=0.01)
        assert held["Momentum(0.9)", length] < held["plain", length] / 1.5
    arguments = ("textnets:chain", "--against", "length", "--values", "5,9", "--input", "3x4x8")
    for row in told(capsys, *arguments):
        if row["way"] == "plain":
            state = 3 * row["length"] * 8 * 4
            # Of every block tanh, of all but the first the input, and of the loss the distance.
            assert row["held_bytes"] == (3 + 2 + 1) * state + 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["hf:SMALL", "--input", "2x5x5x5"], "takes --input BATCHxLENGTH of token ids, or BATCHxLENGTHxWIDTH"),
        (
            ["hf:SMALL", "--against", "length", "--values", "5,13"],
            "learned positions for 12 tokens, got a length of 13",
        ),
        (["textnets:chain", "--input", "4x8", "--against", "length", "--values", "8"], "needs sequences"),
        (
            ["revnet38", "--against", "length", "--values", "8"],
            "BATCHxLENGTHxWIDTH of embeddings, got 32 x 3 x 32 x 32",
        ),
    ],
)
def test_mistakes(capsys, nets, folder, arguments, message):
    spec = folder("gpt2") if arguments[0] == "hf:SMALL" else arguments[0]
    assert main(["memory", spec, *arguments[1:]]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err

"""The zoo: models of others, a quarter of the rows of ``benchmarks/zoo.py``; and that a row fails where it must."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
import torch

import reversa

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"

ROWS = [  # every kind of stage, container, argument and output once
    "torchvision regnet_y",
    "torchvision swin_v2",
    "torchvision mobilenet_v2",
    "torchvision mvit_v1",
    "torchvision densenet",
    "timm nf_resnet50",
    "timm beit_base_patch16_224",
    "timm cait_xxs24_224",
    "timm regnety_004",
    "transformers BertForMaskedLM",
    "transformers GPT2LMHeadModel",
    "transformers LlamaForCausalLM",
    "transformers Gemma3ForCausalLM",
    "transformers Dinov2ForImageClassification",
    "transformers T5ForConditionalGeneration",
    "transformers WhisperForConditionalGeneration",
    "torch.nn TransformerEncoder, post-norm",
    "torch.nn Transformer",
]
VIT = "torchvision vit"
PAGE = ROOT / "docs" / "conversion.md"


@pytest.fixture
def zoo(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("zoo")


@pytest.fixture
def vit(zoo):
    return zoo.all_cases()[VIT]


@pytest.mark.parametrize("name", ROWS)
def test_a_row(zoo, name):
    row = zoo.run(name, zoo.all_cases()[name])
    assert not row.wrong, row.wrong


def test_the_zoo_has_every_library_and_at_least_45_models(zoo):
    cases = zoo.all_cases()
    numbers = [sum(bool(case.stages) for case in make()) for make in zoo.LIBRARIES.values()]
    assert all(have >= wanted for have, wanted in zip(numbers, (18, 15, 12, 4), strict=True)), numbers
    assert len(cases) == sum(len(make()) for make in zoo.LIBRARIES.values()), "a name is there twice"


def test_the_oracle_is_the_rule_written_out(zoo, vit):
    """Two blocks by hand: v1 = (1 - g) f(x0), v2 = g v1 + (1 - g) f(x1)."""
    model, x = vit.make(0).double().eval(), torch.randn(2, 17, 16, dtype=torch.float64)
    first, second = names = ["encoder.layers.encoder_layer_0", "encoder.layers.encoder_layer_1"]
    blocks = [model.get_submodule(name) for name in names]
    v = 0.1 * (blocks[0](x) - x)
    by_hand = x + v
    by_hand = by_hand + 0.9 * v + 0.1 * (blocks[1](by_hand) - by_hand)
    plain = blocks[1](blocks[0](x))
    with importlib.import_module("zoo_oracle").ruled(model, [[first, second]]):
        torch.testing.assert_close(blocks[1](blocks[0](x)), by_hand, rtol=1e-14, atol=1e-14)
    assert torch.equal(blocks[1](blocks[0](x)), plain), "the blocks are as they were"


def lossy(self, argument, rest, value, step):
    """An inverse that is off by a millionth."""
    return argument, torch.lerp(rest[0], value, 1 - 1 / self.gamma) * (1 + 1e-6)


def nothing(model):
    return model


FAULTS = {
    "error": (reversa.Momentum, "inverse", lossy),
    "restored": (reversa, "restore", nothing),
}


@pytest.mark.filterwarnings("ignore::reversa.errors.DriftWarning")
@pytest.mark.parametrize("column", FAULTS)
def test_a_row_fails_where_the_library_is_wrong(zoo, vit, monkeypatch, column):
    monkeypatch.setattr(*FAULTS[column])
    row = zoo.run(VIT, vit)
    assert row.cells["verdict"] == "FAILS"
    assert column in row.wrong


def test_a_row_fails_where_bytes_grow_with_depth(zoo, vit, monkeypatch):
    """A chain that stores."""
    monkeypatch.setattr(zoo.Probe, "convert", lambda self, model: reversa.convert(model, engine=reversa.Store()))
    row, probe = zoo.Row({}), zoo.Probe(vit)
    probe.convert(probe.model)
    probe.bytes_for_a_block(row)
    assert row.wrong == ["bytes a block"]
    assert int(row.cells["bytes a block"].replace(",", "")) > 1000


def test_the_command_exits_with_1_where_a_row_fails(zoo, vit, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["zoo.py", "--only", "wrong"])
    broken = type(vit)("wrong", vit.make, vit.inputs, (3,))
    monkeypatch.setattr(zoo, "LIBRARIES", {"a library": lambda: [broken]})
    assert zoo.main() == 1
    assert "stages (4,) instead of (3,)" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["zoo.py", "--only", "nobody"])
    with pytest.raises(SystemExit):
        zoo.main()
    assert "wrong" in capsys.readouterr().err, "which there are"


def test_the_page_has_the_table_of_the_latest_results(zoo):
    latest = sorted((BENCHMARKS / "results").glob("zoo_cpu_*.md"))[-1].read_text()
    table = PAGE.read_text().partition(zoo.BEGIN)[2].partition(zoo.END)[0]
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(zoo.all_cases())
    assert "\n".join(rows) in latest


def test_the_page_shows_what_explain_prints(capsys):
    code, said = re.search(
        r"```python\n([^`]*print\(reversa.explain[^`]*)```\n\n```text\n([^`]*)```", PAGE.read_text()
    ).groups()
    exec(compile(code, str(PAGE), "exec"), {})
    assert capsys.readouterr().out == said


def test_a_table_goes_into_the_page_between_its_marks(zoo, monkeypatch, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{zoo.BEGIN}\nold\n{zoo.END}\nafter\n")
    monkeypatch.setattr(zoo, "PAGE", page)
    zoo.into_page(zoo.report.Table("One model", ("model", "verdict"), [("a", "right")]))
    text = page.read_text()
    assert text.startswith(f"before\n{zoo.BEGIN}\n")
    assert text.endswith(f"{zoo.END}\nafter\n")
    assert "| a | right |" in text
    assert "old" not in text

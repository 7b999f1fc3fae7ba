"""What does conversion save on models of real size? Predicted: plain, checkpointed, converted, converted in integers.

``python benchmarks/conversion_memory.py`` computes nothing and needs no memory: every number is an estimate
(reversa.memory.estimate), which agrees with live bytes on the CPU to the byte. It takes three minutes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import report
import reversa
from reversa.errors import import_extra
from reversa.memory import MemoryReport, estimate
from reversa.memory.sweep import checkpointed

GIB = 2**30
KINDS = {"parameters": "#999999", "gradients": "#56b4e9", "activations": "#0072b2", "temporary": "#e69f00"}

NOTES = """
## How to read it

One training step without an optimizer's state: parameters, gradients, activations, temporary tensors, as the CPU makes
them; an allocator's and cuDNN's own come on top on a GPU. Activations after the forward pass are what it leaves for the
backward pass. Where a model's parameters outweigh its activations (Llama-7B with one sequence) the peak comes at the
end, when all gradients exist, whatever the blocks do: what is saved then goes into larger batches.
Checkpointed is `torch.utils.checkpoint`
(non-reentrant) around each block that conversion finds. Blocks that change the shape, stem, head and loss are stored in
every row: where they are most of a network (a language model's scores and loss) they are what is left. GPT-2 is without
dropout on attention, with which the CPU has no fused kernel and would store every score. Llama-7B is in
bfloat16; its chains are in integers of 32 bits, by default (states of 16 bits would drift).
"""


@dataclass(frozen=True)
class Case:
    """A model of real size."""

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], Any]


def torchvision(name: str) -> nn.Module:
    return import_extra("torchvision.models", "vision").get_model(name)


def language(kind: str, dtype: torch.dtype = torch.float32, **settings: int) -> nn.Module:
    transformers = import_extra("transformers", "hf")
    config = transformers.AutoConfig.for_model(kind, **settings)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)


def tokens(batch: int, length: int) -> dict[str, Any]:
    ids = torch.zeros(batch, length, dtype=torch.long)
    return {"input_ids": ids, "labels": ids, "use_cache": False}


MEDIUM = {"n_layer": 24, "n_embd": 1024, "n_head": 16, "attn_pdrop": 0.0}
CASES = (
    Case("ResNet-152, 64 x 3 x 224 x 224", lambda: torchvision("resnet152"), lambda: (64, 3, 224, 224)),
    Case("ViT-L/16, 32 x 3 x 224 x 224", lambda: torchvision("vit_l_16"), lambda: (32, 3, 224, 224)),
    Case("GPT-2 medium, 8 x 1024 tokens", lambda: language("gpt2", **MEDIUM), lambda: tokens(8, 1024)),
    Case("Llama-7B, bfloat16, 1 x 2048 tokens", lambda: language("llama", torch.bfloat16), lambda: tokens(1, 2048)),
)
WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "plain": lambda model: model,
    "checkpointed": checkpointed,
    "Momentum(0.9)": lambda model: reversa.convert(model, scheme=reversa.Momentum(0.9)),
    "Momentum(0.9), exact": lambda model: reversa.convert(model, scheme=reversa.Momentum(0.9), exact=True),
}


def loss_of(output: Any) -> torch.Tensor:
    return output.loss if hasattr(output, "loss") else output.mean()


def predicted(case: Case, way: str) -> MemoryReport:
    print(f"estimating {case.name}: {way} ...", flush=True)
    with torch.device("meta"):
        model = case.make().train()
    return estimate(WAYS[way](model), case.inputs(), loss_of)


def row(way: str, found: MemoryReport) -> tuple[str, ...]:
    numbers = (found.peak.parameters, found.peak.gradients, found.after_forward.activations, found.peak_bytes)
    return way, *(f"{number / GIB:.2f}" for number in numbers)


def draw(found: dict[str, dict[str, MemoryReport]]) -> None:
    import_extra("matplotlib", "plot").use("Agg")
    plt = import_extra("matplotlib.pyplot", "plot")
    with plt.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure, panels = plt.subplots(2, 2, figsize=(9.5, 4.6), dpi=110, layout="constrained")
        for panel, (name, ways) in zip(panels.flat, found.items(), strict=True):
            left = [0.0] * len(ways)
            for kind, colour in KINDS.items():
                sizes = [getattr(one.peak, kind) / GIB for one in ways.values()]
                panel.barh(list(ways), sizes, left=left, color=colour, label=kind)
                left = [a + b for a, b in zip(left, sizes, strict=True)]
            for i, one in enumerate(ways.values()):
                panel.text(one.peak_bytes / GIB, i, f" {one.peak_bytes / GIB:.1f}", va="center", fontsize=8)
            held = [one.after_forward.total / GIB for one in ways.values()]
            panel.plot(held, range(len(ways)), "D", color="black", markersize=4, label="alive after the forward pass")
            panel.invert_yaxis()
            panel.margins(x=0.12)
            panel.set_title(name, fontsize=9)
            panel.set_xlabel("GiB at the peak of a training step", fontsize=8)
        handles, names = panels.flat[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False)
        figure.savefig(report.IMAGES / "conversion_memory.png")


def main() -> None:
    report.parser(__doc__, "nothing is left out").parse_args()
    found = {case.name: {way: predicted(case, way) for way in WAYS} for case in CASES}
    columns = ("GiB", "parameters", "gradients at the peak", "activations after the forward pass", "peak")
    tables = [report.Table(name, columns, [row(way, one) for way, one in ways.items()]) for name, ways in found.items()]
    question = "What does conversion save on models of real size? (predicted)"
    report.finish("conversion_memory", question, tables, NOTES, ("torchvision", "transformers"), lambda: draw(found))


if __name__ == "__main__":
    main()

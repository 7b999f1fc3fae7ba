"""What a model's stages are, and what became of them: in words and in bytes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from reversa.convert.example import example_inputs, same_class_runs
from reversa.convert.find import Findings, FoundStage, find_stages
from reversa.convert.marks import is_switched, place_of
from reversa.convert.record import NotCopied
from reversa.convert.report import Explanation, StageReport
from reversa.convert.stage import Between, Stage
from reversa.engine import Engine, Invert
from reversa.exact import Exact, ExactScheme, dtype_of
from reversa.schemes import Momentum, Scheme
from reversa.schemes.coupling import Duplicated

DEFAULT_SCHEME, DEFAULT_ENGINE = Momentum(0.9), Invert()
LEFT = "_reversa_left"
"""Where a converted model keeps what was left as it is, and why."""


def find(model: nn.Module, example: Any = None) -> Findings:
    """The stages that :func:`convert` would make reversible, and what it would leave.

    Raises:
        ConversionError: nothing tells which inputs the model takes, and no example was given.
    """
    inputs = example_inputs(model, example)
    if inputs is None:
        return same_class_runs(model)
    try:
        return find_stages(model, *inputs)
    except NotCopied:  # sharded by FSDP2: what structure alone tells is verified at the first call
        guessed = same_class_runs(model)
        if not guessed.stages:
            raise
        return guessed


def explain(model: nn.Module, example: Any = None) -> Explanation:
    """What was converted, what was left as it is, and why; of a model that is not converted: what would be.

    Args:
        model: the model; it is not changed.
        example: as in :func:`convert`; only needed for models that are not converted.
    """
    if not is_converted(model):
        findings = find(model, example)
        stages = {stage_of(found): list(found.blocks) for found in findings.stages}
        reports = [_report(stage, blocks, model) for stage, blocks in stages.items()]
        reports = [replace(report, kept="all activations") for report in reports]
        left = tuple((block.name, block.reason) for block in findings.left)
        return Explanation(False, "", tuple(reports), left)
    stages, left = {}, []
    for name, module in model.named_modules():
        if (place := place_of(module)) is not None:
            stages.setdefault(place.stage, []).append(name)
        prefix = f"{name}." if name else ""
        left += [(f"{prefix}{block}", reason) for block, reason in module.__dict__.get(LEFT, ())]
    reports = [_report(stage, blocks, model) for stage, blocks in stages.items()]
    rules = dict.fromkeys(f"{stage.runs(dtype_of(model))}, {stage.engine}" for stage in stages)
    return Explanation(True, "; ".join(rules), tuple(reports), tuple(left))


def stage_of(
    found: FoundStage,
    scheme: Scheme = DEFAULT_SCHEME,
    engine: Engine = DEFAULT_ENGINE,
    exact: Exact = None,
    between: Between = "error",
) -> Stage:
    """What the blocks of a stage that was found share once they are converted; without a scheme, by default."""
    length = len(found.blocks) * scheme.functions_per_block
    return Stage(found.name, scheme, engine, length, exact, between, found.shape, found.after, found.stored)


def is_converted(model: nn.Module) -> bool:
    """Whether any module of the model is switched."""
    return any(is_switched(module) for module in model.modules())


def _report(stage: Stage, blocks: Sequence[str], model: nn.Module) -> StageReport:
    dtype, kept_bytes = dtype_of(model), None
    scheme = stage.runs(dtype)
    if stage.shape is not None and stage.stored is not None:
        elements = math.prod(stage.shape)
        kept_bytes = stage.engine.kept_bytes(scheme, stage.length, dtype, elements, stage.stored)
    return StageReport(
        stage.name,
        tuple(blocks),
        type(model.get_submodule(blocks[0])).__name__,
        stage.shape,
        stage.engine.kept_states(scheme, stage.length, dtype),
        stage.stored,
        kept_bytes,
        tuple(_notes(stage, scheme, dtype)),
    )


def _notes(stage: Stage, scheme: Scheme, dtype: torch.dtype) -> Iterator[str]:
    """What changes in the function that is computed, and in how."""
    if stage.after:
        yield (
            f"the block ends with {', '.join(stage.after)} after its residual addition. It becomes part of f(x) = "
            "block(x) - x; where a scheme's step is not x + f(x), the carried tensor does not pass through it any "
            "more, and pretrained weights need fine-tuning: with Momentum the less the smaller gamma is"
        )
    if isinstance(stage.scheme, Duplicated):
        yield (
            "attention and MLP move a stream each, both of which begin as the input; the output is their mean. It is "
            "another function of the same parameters, and pretrained weights need fine-tuning (arXiv:2302.04869)"
        )
    if dtype.itemsize == 2 and isinstance(scheme, ExactScheme) and stage.exact is None:
        yield (
            f"states of 16 bits ({dtype}) would drift soon when computed back. They are held in integers of 32 "
            "bits instead, and nothing drifts; convert(..., exact=False) keeps 16 bits, and a state every few steps"
        )

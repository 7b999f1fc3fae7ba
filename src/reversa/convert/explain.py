"""What a model's stages are, and what became of them: in words and in bytes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
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
from reversa.errors import SettingError
from reversa.exact import Exact, ExactScheme, dtype_of
from reversa.schemes import BDIA, Dr2Net, Momentum, Scheme
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
    check_is_module(model, "explain")
    converted, stages, left = is_converted(model), dict[Stage, list[str]](), list[tuple[str, str]]()
    if not converted:
        findings = find(model, example)
        stages = {stage_of(found): list(found.blocks) for found in findings.stages}
        left = [(block.name, block.reason) for block in findings.left]
    for name, module in model.named_modules():
        if (place := place_of(module)) is not None:
            stages.setdefault(place.stage, []).append(name)
        prefix = f"{name}." if name else ""
        left += [(f"{prefix}{block}", reason) for block, reason in module.__dict__.get(LEFT, ())]
    reports = tuple(_report(stage, blocks, model) for stage, blocks in stages.items())
    return Explanation(converted, "; ".join(dict.fromkeys(r.rule for r in reports)), reports, tuple(left))


def check_is_module(model: Any, who: str) -> None:
    """Refuse what is no module.

    Raises:
        SettingError: it is not.
    """
    if not isinstance(model, nn.Module):
        raise SettingError(f"{who} needs a torch.nn.Module, got {type(model).__name__}")


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
        f"{scheme}, {stage.engine}",
        stage.shape,
        stage.engine.kept_states(scheme, stage.length, dtype),
        stage.stored,
        kept_bytes,
        tuple(_notes(stage, scheme, dtype, _is_guessed(stage, model.get_submodule(blocks[0])))),
    )


def _is_guessed(stage: Stage, block: nn.Module) -> bool:
    """Whether it is not known yet that the blocks are residual blocks."""
    place = place_of(block)
    return stage.guessed if place is None else place.guessed


def _notes(stage: Stage, scheme: Scheme, dtype: torch.dtype, guessed: bool) -> Iterator[str]:
    """What changes in the function that is computed, and in how."""
    if guessed:
        yield (
            "found by structure alone (modules of one class, one behind the other): the first call tells whether they "
            "are residual blocks. An example of the inputs tells it now, and shapes and bytes"
        )
    change = _change(stage.scheme)
    yield change
    if stage.after and change not in (AS_BEFORE, AS_BEFORE_IN_EVAL):
        yield (
            f"the block ends with {', '.join(stage.after)} after its residual addition. It becomes part of f(x) = "
            "block(x) - x, and the carried tensor does not pass through it any more"
        )
    if dtype.itemsize == 2 and isinstance(scheme, ExactScheme) and stage.exact is None:
        yield (
            f"states of 16 bits ({dtype}) would drift soon when computed back. A chain holds them in integers of 32 "
            "bits instead, and nothing drifts; convert(..., exact=False) keeps 16 bits, and a state every few steps"
        )


AS_BEFORE = "the function that is computed is the original, up to rounding"
AS_BEFORE_IN_EVAL = f"in eval() {AS_BEFORE}; in training a random sign decides between two rules in each step"


def _change(scheme: Scheme) -> str:
    """How the function that is computed differs from the original's."""
    if isinstance(scheme, BDIA):
        return AS_BEFORE_IN_EVAL
    if isinstance(scheme, Dr2Net) and (scheme.alpha, scheme.beta) == (1, 0):
        return AS_BEFORE
    if isinstance(scheme, Duplicated):
        return (
            "attention and MLP move a stream each, both of which begin as the input; the output is their mean. It is "
            "another function of the same parameters, and pretrained weights need fine-tuning (arXiv:2302.04869)"
        )
    less = ", the less the smaller gamma is" if isinstance(scheme, Momentum) else ""
    return (
        "the step of the scheme stands in place of x + f(x), with f(x) = block(x) - x: another function of the same "
        f"parameters. Pretrained weights need fine-tuning{less}"
    )

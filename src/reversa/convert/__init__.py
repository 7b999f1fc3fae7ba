"""Conversion: the stages of a model that somebody else wrote become reversible chains over the same modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from reversa.convert.example import example_inputs, same_class_runs
from reversa.convert.find import Findings, FoundStage, find_stages
from reversa.convert.report import Explanation, StageReport
from reversa.convert.stage import Between, Place, Stage
from reversa.convert.switch import (
    is_switched,
    place_of,
    refuse_unswitchable,
    switch_back,
    switch_block,
    switch_container,
)
from reversa.engine import Engine, Invert
from reversa.errors import ConversionError, SettingError, nearest
from reversa.exact import Arithmetic, check_exact
from reversa.schemes import Momentum, Scheme

Model = TypeVar("Model", bound=nn.Module)

_LEFT = "_reversa_left"


def convert(
    model: Model,
    scheme: Scheme | None = None,
    stages: Literal["auto"] | Sequence[str] = "auto",
    exact: bool | Arithmetic = False,
    engine: Engine | None = None,
    example: Any = None,
    between: Between = "error",
) -> Model:
    """Make the residual stages of a model reversible, in place: same modules, same parameters, same ``state_dict``.

    Every block of a stage then takes one step of a chain with ``f(x) = block(x) - x``: for Momentum
    ``v' = gamma v + (1 - gamma) f(x)``, ``x' = x + v'``. The smaller gamma is, the less the model changes.
    A block that changes the shape stays as it is.

    Args:
        model: a network with residual blocks.
        scheme: the update rule; ``Momentum(0.9)`` if not given.
        stages: ``"auto"``, or names of stages as :func:`explain` shows them.
        exact: the backward pass computes back the very bits of the forward pass, whatever gamma is: True, or an
            arithmetic, :class:`reversa.exact.FixedPoint` or :class:`reversa.exact.Ratio`.
        engine: how the backward pass gets the states; :class:`reversa.Invert` if not given.
        example: an input to find the stages with: a tensor, a tuple of arguments or a dictionary of keyword
            arguments. Not needed for torchvision's, timm's, Hugging Face's and ``torch.nn``'s models.
        between: what a block does with a tensor that is not what the block before it returned: ``"error"``, or
            ``"carry"`` to let the hidden streams go on (a state is kept there).

    Returns:
        The model itself.

    Raises:
        ConversionError: the model has no convertible stage, or is converted already.
        SettingError: an unknown stage name, or a scheme that cannot carry another model's tensor.

    >>> import torch, reversa
    >>> block = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    >>> model = reversa.convert(torch.nn.TransformerEncoder(block, 4), scheme=reversa.Momentum(0.5))
    >>> model(torch.randn(2, 3, 16)).sum().backward()
    """
    scheme = Momentum(0.9) if scheme is None else scheme
    engine = Invert() if engine is None else engine
    _check_settings(model, scheme, engine, exact, between)
    findings = find(model, example)
    chosen = _choose(findings, stages)
    modules: dict[str, nn.Module] = dict(model.named_modules())
    for name in (name for found in chosen for name in found.blocks):
        refuse_unswitchable(modules[name], name)
    for found in chosen:
        stage = Stage(found.name, scheme, engine, len(found.blocks), exact, between, found.shape, found.after)
        guessed = found.shape is None and stages == "auto"
        for index, name in enumerate(found.blocks):
            switch_block(modules[name], Place(stage, index, name, found.key, guessed))
    containers = [_containers(modules, found.blocks[0]) for found in chosen]
    for inner, *_ in containers:
        switch_container(inner, holds_loop=True)
    for owner in (owner for _, *owners in containers for owner in owners):
        switch_container(owner, holds_loop=False)
    unchosen = [(found.name, "not among the stages asked for") for found in findings.stages if found not in chosen]
    model.__dict__[_LEFT] = (*unchosen, *((block.name, block.reason) for block in findings.left))
    return model


def find(model: nn.Module, example: Any = None) -> Findings:
    """The stages that :func:`convert` would make reversible, and what it would leave.

    Raises:
        ConversionError: nothing tells which inputs the model takes, and no example was given.
    """
    inputs = example_inputs(model, example)
    return same_class_runs(model) if inputs is None else find_stages(model, *inputs)


def restore(model: Model) -> Model:
    """Undo :func:`convert`, in place: the original classes, the same modules and parameters.

    Raises:
        ConversionError: the model is not converted.
    """
    if not _is_converted(model):
        raise ConversionError(f"restore needs a converted model, got a {type(model).__name__} with no reversible stage")
    for name, module in model.named_modules():
        if place_of(module) is not None and not is_switched(module):
            raise ConversionError(
                f"{name} was made a {type(module).__name__} by another library after the conversion (fully_shard, "
                "a parametrization). Undo that first, then restore."
            )
    for module in model.modules():
        switch_back(module)
        module.__dict__.pop(_LEFT, None)
    return model


def explain(model: nn.Module, example: Any = None) -> Explanation:
    """What was converted, what was left as it is, and why; of a model that is not converted: what would be.

    Args:
        model: the model; it is not changed.
        example: as in :func:`convert`; only needed for models that are not converted.
    """
    if not _is_converted(model):
        findings = find(model, example)
        left = tuple((block.name, block.reason) for block in findings.left)
        reports = (
            _report(found.name, found.blocks, model, found.shape, found.after, "all activations")
            for found in findings.stages
        )
        return Explanation(False, "", tuple(reports), left)
    blocks: dict[Stage, list[str]] = {}
    left = []
    for name, module in model.named_modules():
        if (place := place_of(module)) is not None:
            blocks.setdefault(place.stage, []).append(name)
        prefix = f"{name}." if name else ""
        left += [(f"{prefix}{block}", reason) for block, reason in module.__dict__.get(_LEFT, ())]
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())
    reports = (
        _report(s.name, names, model, s.shape, s.after, s.engine.kept_states(s.runs(dtype), s.length, dtype))
        for s, names in blocks.items()
    )
    rules = dict.fromkeys(f"{stage.runs(dtype)}, {stage.engine}" for stage in blocks)
    return Explanation(True, "; ".join(rules), tuple(reports), tuple(left))


def _report(
    name: str, blocks: Sequence[str], model: nn.Module, shape: tuple[int, ...] | None, after: tuple[str, ...], kept: str
) -> StageReport:
    kind = type(model.get_submodule(blocks[0])).__name__
    note = ""
    if after:
        note = (
            f"the block ends with {', '.join(after)} after its residual addition. It becomes part of f(x) = block(x) "
            "- x; where a scheme's step is not x + f(x), the carried tensor does not pass through it any more, and "
            "pretrained weights need fine-tuning: with Momentum the less the smaller gamma is"
        )
    return StageReport(name, tuple(blocks), kind, shape, kept, note)


def _is_converted(model: nn.Module) -> bool:
    return any(is_switched(module) for module in model.modules())


def _check_settings(model: nn.Module, scheme: Scheme, engine: Engine, exact: bool | Arithmetic, between: str) -> None:
    if not isinstance(model, nn.Module):
        raise SettingError(f"convert needs a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(scheme, Scheme) or not isinstance(engine, Engine):
        raise SettingError(
            f"convert needs a scheme and an engine such as Momentum(0.9) and Invert(), got {scheme!r}, {engine!r}"
        )
    if not scheme.carries_input or scheme.functions_per_block != 1 or scheme.modules() or scheme.ends_otherwise:
        raise SettingError(
            f"{scheme} cannot take over another model's blocks: conversion needs one function per block, a state that "
            "begins with the whole input, and no parameters or last step of its own. Use Momentum(gamma), BDIA() or "
            "Dr2Net()."
        )
    check_exact(scheme, exact)
    engine.begin(scheme, 1)  # refuses what cannot be made step by step
    if between not in ("error", "carry"):
        raise SettingError(f"between must be 'error' or 'carry', got {between!r}")
    if _is_converted(model):
        raise ConversionError("the model is converted already. Call reversa.restore(model) first.")


def _choose(findings: Findings, stages: Literal["auto"] | Sequence[str]) -> list[FoundStage]:
    if not findings.stages:
        reasons = "".join(f"\n  {block.name}: {block.reason}" for block in findings.left[:8])
        raise ConversionError(
            "no convertible stage was found. A stage is a run of at least two blocks in which each one's output is "
            f"the next one's input, of one shape and data type, with parameters and a residual addition.{reasons}"
        )
    if stages == "auto":
        return list(findings.stages)
    names = [found.name for found in findings.stages]
    if isinstance(stages, str) or not stages:
        raise SettingError(f"stages must be 'auto' or a list of names from {names}, got {stages!r}")
    for name in stages:
        if name not in names:
            raise SettingError(nearest(name, names, "stage"))
    return [found for found in findings.stages if found.name in stages]


def _containers(modules: dict[str, nn.Module], block: str) -> list[nn.Module]:
    """Whose calls can contain the loop over the blocks: every Sequential above, and the first other module."""
    containers: list[nn.Module] = []
    name = block
    while name:
        name = name.rpartition(".")[0]
        module = modules[name]
        if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            continue
        containers.append(module)
        if not isinstance(module, nn.Sequential):
            break
    return containers


__all__ = ["Explanation", "convert", "explain", "find", "restore"]

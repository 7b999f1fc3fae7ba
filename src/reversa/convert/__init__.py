"""Conversion: the stages of a model that somebody else wrote become reversible chains over the same modules."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar

from torch import nn

from reversa.convert.example import example_inputs
from reversa.convert.explain import DEFAULT_ENGINE, DEFAULT_SCHEME, LEFT, explain, find, is_converted, stage_of
from reversa.convert.find import Findings, FoundStage
from reversa.convert.marks import is_switched, place_of, switch_back
from reversa.convert.report import NO_STAGE, Explanation
from reversa.convert.stage import Between, Place
from reversa.convert.streams import Branches, Streams, two_branches
from reversa.convert.switch import switch
from reversa.engine import Engine, Mixed
from reversa.errors import ConversionError, SettingError, nearest
from reversa.exact import Exact, check_exact
from reversa.schemes import RevNet, Scheme
from reversa.schemes.coupling import Duplicated

Model = TypeVar("Model", bound=nn.Module)


def convert(
    model: Model,
    scheme: Scheme | Mapping[str, Scheme] | None = None,
    stages: Literal["auto"] | Sequence[str] = "auto",
    exact: Exact = None,
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
        scheme: the update rule; ``Momentum(0.9)`` if not given. ``RevNet()`` duplicates the carried tensor, and lets
            the attention and the MLP of transformer blocks move a stream each. A mapping has a scheme for each stage,
            by its name or a pattern of names, and the other stages are left: ``{"layer3": Momentum(0.9)}``.
        stages: ``"auto"``, or names of stages as :func:`explain` shows them, or patterns of names (``"layer[23]"``).
        exact: the backward pass computes back the very bits of the forward pass, whatever gamma is: True, or an
            arithmetic, :class:`reversa.exact.FixedPoint` or :class:`reversa.exact.Ratio`. If not given: True for
            states of 16 bits, which would drift soon, False for others.
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
    engine = DEFAULT_ENGINE if engine is None else engine
    schemes = dict(scheme) if isinstance(scheme, Mapping) else {"*": DEFAULT_SCHEME if scheme is None else scheme}
    schemes = {name: Duplicated() if isinstance(one, RevNet) else one for name, one in schemes.items()}
    _check_settings(model, schemes.values(), engine, exact, between)
    findings = find(model, example)
    chosen = _choose(findings, stages)
    if isinstance(scheme, Mapping):
        by_name = _choose(findings, list(schemes))
        chosen = [found for found in chosen if found in by_name]
    rules = {f.name: next(one for name, one in schemes.items() if fnmatch.fnmatch(f.name, name)) for f in chosen}
    twofold = [found for found in chosen if isinstance(rules[found.name], Duplicated)]
    branches, unfit = _branches(model, twofold, stages, example)
    chosen = [found for found in chosen if found.name not in unfit]
    places: list[list[Place]] = []
    for found in chosen:
        stage = stage_of(found, rules[found.name], engine, exact, between)
        guessed = found.shape is None and stages == "auto"
        if found in twofold:
            run = [Streams(stage, i, name, found.key, False, None, branches.get(name)) for i, name in found.numbered]
        else:
            run = [Place(stage, i, name, found.key, guessed) for i, name in found.numbered]
        places.append(list(run))
    switch(model, places)
    unasked = "not among the stages asked for"
    unchosen = [(f.name, unfit.get(f.name, unasked)) for f in findings.stages if f not in chosen]
    model.__dict__[LEFT] = (*unchosen, *((block.name, block.reason) for block in findings.left))
    return model


def restore(model: Model) -> Model:
    """Undo :func:`convert`, in place: the original classes, the same modules and parameters.

    Raises:
        ConversionError: the model is not converted.
    """
    if not is_converted(model):
        raise ConversionError(f"restore needs a converted model, got a {type(model).__name__} with no reversible stage")
    for name, module in model.named_modules():
        if place_of(module) is not None and not is_switched(module):
            raise ConversionError(
                f"{name} was made a {type(module).__name__} by another library after the conversion (fully_shard, "
                "a parametrization). Undo that first, then restore."
            )
    for module in model.modules():
        switch_back(module)
        module.__dict__.pop(LEFT, None)
    return model


def _check_settings(model: nn.Module, schemes: Iterable[Scheme], engine: Engine, exact: Exact, between: str) -> None:
    if not isinstance(model, nn.Module):
        raise SettingError(f"convert needs a torch.nn.Module, got {type(model).__name__}")
    for scheme in schemes:
        _check_rule(scheme, engine, exact)
    if between not in ("error", "carry"):
        raise SettingError(f"between must be 'error' or 'carry', got {between!r}")
    if is_converted(model):
        raise ConversionError("the model is converted already. Call reversa.restore(model) first.")


def _check_rule(scheme: Scheme, engine: Engine, exact: Exact) -> None:
    if not isinstance(scheme, Scheme) or not isinstance(engine, Engine):
        raise SettingError(
            f"convert needs a scheme and an engine such as Momentum(0.9) and Invert(), got {scheme!r}, {engine!r}"
        )
    whole = scheme.carries_input and scheme.functions_per_block == 1
    if not (whole or isinstance(scheme, Duplicated)) or scheme.modules() or scheme.ends_otherwise:
        raise SettingError(
            f"{scheme} cannot take over another model's blocks: conversion needs one function per block, a state that "
            "begins with the whole input, and no parameters or last step of its own. Use Momentum(gamma), BDIA() or "
            "Dr2Net(); for transformers also RevNet(), whose streams then are two copies of the input."
        )
    check_exact(scheme, exact)
    if not isinstance(engine, Mixed):  # which tells by itself whether it is made for a chain
        engine.begin(scheme, 1)  # refuses what cannot be made step by step


def _choose(findings: Findings, stages: Literal["auto"] | Sequence[str]) -> list[FoundStage]:
    if not findings.stages:
        reasons = "".join(f"\n  {block.name}: {block.reason}" for block in findings.left[:8])
        raise ConversionError(f"no convertible stage was found. {NO_STAGE}{reasons}")
    if stages == "auto":
        return list(findings.stages)
    names = [found.name for found in findings.stages]
    if isinstance(stages, str) or not stages:
        raise SettingError(f"stages must be 'auto' or a list of names from {names}, got {stages!r}")
    for name in stages:
        if not fnmatch.filter(names, name):
            raise SettingError(nearest(name, names, "stage"))
    return [found for found in findings.stages if any(fnmatch.fnmatch(found.name, name) for name in stages)]


def _branches(
    model: nn.Module, chosen: list[FoundStage], stages: Literal["auto"] | Sequence[str], example: Any
) -> tuple[dict[str, Branches], dict[str, str]]:
    """Of stages under a scheme of two streams the branches of every block, and which of them have none, and why."""
    inputs = example_inputs(model, example) if chosen else None
    if inputs is None:  # blocks that were found by structure alone are looked at in their first call
        return {}, {}
    branches, unfit = two_branches(model, chosen, *inputs)
    if len(unfit) == len(chosen) or (unfit and stages != "auto"):
        reasons = "".join(f"\n  {name}: {reason}" for name, reason in unfit.items())
        raise ConversionError(
            "RevNet needs pre-norm transformer blocks, x + A(x) + M(x + A(x)), of which each function is made of "
            f"modules of its own. Use Momentum(gamma) for others, or name stages that fit.{reasons}"
        )
    return branches, unfit


__all__ = ["Explanation", "convert", "explain", "find", "restore"]

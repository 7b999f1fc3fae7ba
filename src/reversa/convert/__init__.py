"""Conversion: the stages of a model that somebody else wrote become reversible chains over the same modules."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar

from torch import nn

from reversa.convert.example import example_inputs
from reversa.convert.explain import (
    DEFAULT_ENGINE,
    DEFAULT_SCHEME,
    LEFT,
    check_is_module,
    explain,
    find,
    is_converted,
    stage_of,
)
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
        scheme: the update rule; ``Momentum(0.9)`` if not given. ``RevNet()`` duplicates the carried tensor (its ``dim``
            means nothing here), and lets the attention and the MLP of transformer blocks move a stream each. A mapping
            has a scheme for each stage, by its name or a pattern of names, and leaves the other stages:
            ``{"layer3": Momentum(0.9)}``.
        stages: ``"auto"``, or names of stages as :func:`explain` shows them, or patterns of names (``"layer[23]"``).
            Without an example, stages that are guessed by structure are verified at their first call; those that are
            named are taken on trust.
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
    wanted = _twofold(DEFAULT_SCHEME if scheme is None else scheme)
    _check_settings(model, wanted, engine, exact, between)
    findings = find(model, example)
    rules = _rules(findings, wanted, stages)
    chosen = [found for found in findings.stages if found.name in rules]
    two_streams = [found for found in chosen if isinstance(rules[found.name], Duplicated)]
    branches, unfit = _branches(model, two_streams, example, must_fit=stages != "auto" or isinstance(wanted, dict))
    places: list[list[Place]] = []
    for found in (found for found in chosen if found.name not in unfit):
        stage = stage_of(found, rules[found.name], engine, exact, between)
        run = [Place(stage, i, name, found.key, stage.guessed) for i, name in enumerate(found.blocks)]
        if found in two_streams:
            run = [Streams(**vars(place), branches=branches.get(place.name)) for place in run]
        if stages != "auto":
            _trust(run)
        places.append(run)
    switch(model, places)
    reasons = dict.fromkeys((f.name for f in findings.stages if f.name not in rules), "not among the stages asked for")
    left = [(name, reason) for name, reason in (reasons | unfit).items()]
    model.__dict__[LEFT] = (*left, *((block.name, block.reason) for block in findings.left))
    return model


def _twofold(scheme: Scheme | Mapping[str, Scheme]) -> Scheme | dict[str, Scheme]:
    """RevNet's steps on two copies of the carried tensor, in RevNet's place."""
    if isinstance(scheme, Mapping):
        return {name: Duplicated() if isinstance(one, RevNet) else one for name, one in scheme.items()}
    return Duplicated() if isinstance(scheme, RevNet) else scheme


def _trust(run: Iterable[Place]) -> None:
    """Who names a stage says that its blocks are residual blocks."""
    for place in run:
        place.guessed = False


def restore(model: Model) -> Model:
    """Undo :func:`convert`, in place: the original classes, the same modules and parameters.

    Raises:
        ConversionError: the model is not converted.
    """
    check_is_module(model, "restore")
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


def _check_settings(
    model: nn.Module, wanted: Scheme | dict[str, Scheme], engine: Engine, exact: Exact, between: str
) -> None:
    check_is_module(model, "convert")
    if wanted == {}:
        raise SettingError("scheme names no stage: give one scheme, or a mapping from names of stages to schemes")
    for scheme in wanted.values() if isinstance(wanted, dict) else [wanted]:
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


def _rules(
    findings: Findings, wanted: Scheme | dict[str, Scheme], stages: Literal["auto"] | Sequence[str]
) -> dict[str, Scheme]:
    """The scheme of each stage that becomes reversible. Names go before patterns, and earlier ones before others."""
    if not findings.stages:
        reasons = "".join(f"\n  {block.name}: {block.reason}" for block in findings.left[:8])
        raise ConversionError(f"no convertible stage was found. {NO_STAGE}{reasons}")
    names = [found.name for found in findings.stages]
    if not isinstance(wanted, dict):
        return dict.fromkeys(names if stages == "auto" else _named(names, stages), wanted)
    if stages != "auto":
        raise SettingError("a mapping of schemes names the stages itself: leave out stages=, or give one scheme")
    rules: dict[str, Scheme] = {}
    for pattern in sorted(wanted, key=lambda pattern: pattern not in names):
        new = [name for name in _named(names, [pattern]) if name not in rules]
        if not new:
            raise SettingError(f"scheme {pattern!r} decides no stage: others before it have taken them all")
        rules |= dict.fromkeys(new, wanted[pattern])
    return rules


def _named(names: list[str], stages: Sequence[str]) -> list[str]:
    """The stages that are meant by names and patterns."""
    if isinstance(stages, str) or not stages:
        raise SettingError(f"stages must be 'auto' or a list of names from {names}, got {stages!r}")
    for name in stages:
        if not fnmatch.filter(names, name):
            raise SettingError(nearest(name, names, "stage"))
    return [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in stages)]


def _branches(
    model: nn.Module, chosen: list[FoundStage], example: Any, must_fit: bool
) -> tuple[dict[str, Branches], dict[str, str]]:
    """Of stages under a scheme of two streams the branches of every block, and which of them have none, and why."""
    inputs = example_inputs(model, example) if chosen else None
    if inputs is None:  # blocks that were found by structure alone are looked at in their first call
        return {}, {}
    branches, unfit = two_branches(model, chosen, *inputs)
    if len(unfit) == len(chosen) or (unfit and must_fit):
        reasons = "".join(f"\n  {name}: {reason}" for name, reason in unfit.items())
        raise ConversionError(
            "RevNet needs pre-norm transformer blocks, x + A(x) + M(x + A(x)), of which each function is made of "
            f"modules of its own. Use Momentum(gamma) for others, or name stages that fit.{reasons}"
        )
    return branches, unfit


__all__ = ["Explanation", "convert", "explain", "find", "restore"]

"""Finding the stages of a model that somebody else wrote: by what one recorded forward pass did, not by names.

A stage is a run of at least two modules with one parent. Each has parameters, is called once, is given the very tensor
that the one before it gave on, keeps its shape and type, and adds what it computed to it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from reversa.convert.record import Call, Key, Seen, record
from reversa.convert.residual import after_addition, edge_of
from reversa.convert.runs import Block, Run, is_within, most_saving, parent_of, runs_of, stored_by

ONE_BLOCK = "a run of one block, which would save little"
UNCALLED = "is not called in the forward pass"
SHARED = "is called several times in one forward pass"


@dataclass(frozen=True)
class FoundStage:
    """A run of residual blocks that can become one reversible chain.

    Attributes:
        name: path of the blocks' common parent (``"layer3"``); where the parent holds several runs, or is the model
            itself, the path and the first and last block (``"features.5-6"``, ``"b1-b4"``).
        blocks: paths of the blocks, in the order of their calls.
        key: where the carried tensor stands in the blocks' calls: a position, or a keyword.
        shape: its shape for the inputs of the recorded pass, batch included; None where no pass was made.
        dtype: its data type; None where no pass was made.
        after: what acts on ``x + f(x)`` before it leaves the block: ``("relu",)`` for a post-activation block,
            ``("norm",)`` for a post-norm block, ``()`` for a plain sum.
        stored: bytes that autograd stores in its blocks for the backward pass, for the inputs of the recorded pass;
            None where no pass was made.
    """

    name: str
    blocks: tuple[str, ...]
    key: Key = 0
    shape: tuple[int, ...] | None = None
    dtype: torch.dtype | None = None
    after: tuple[str, ...] = ()
    stored: int | None = None


@dataclass(frozen=True)
class LeftBlock:
    """A module that looks like a block and stays as it is, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Findings:
    """The stages of a model, and the blocks that are in none, both in the order of the model."""

    stages: tuple[FoundStage, ...]
    left: tuple[LeftBlock, ...]


def find_stages(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Findings:
    """The stages of a model, from one forward pass of a copy on fake tensors, in the mode that the model is in.

    The model is not changed: no parameter, buffer, mode, hook, nor any state of a random number generator. Where runs
    lie inside each other's blocks, those become stages that save more bytes.

    Args:
        model: any module.
        args: positional arguments for its forward; only shapes and types of tensors matter.
        kwargs: keyword arguments.

    Raises:
        ConversionError: the model cannot be copied, or not be run on fake tensors with these arguments.

    >>> block = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    >>> model = nn.TransformerEncoder(block, 4)
    >>> stage, = find_stages(model, (torch.zeros(2, 3, 16),), {}).stages
    >>> stage.name, stage.blocks, stage.after
    ('layers', ('layers.0', 'layers.1', 'layers.2', 'layers.3'), ('norm',))
    """
    modules = dict(model.named_modules())
    verdicts = _judge(record(model, args, kwargs), modules)
    runs = runs_of(verdicts)
    chosen = most_saving([run for run in runs if len(run) > 1])
    chosen.sort(key=lambda run: list(modules).index(run[0].name))
    names = stage_names([[block.name for block in run] for run in chosen])
    stages = tuple(_stage(name, run) for name, run in zip(names, chosen, strict=True))
    return Findings(stages, _left(modules, stages, verdicts))


def why_no_block(module: nn.Module, key: Key, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str | None:
    """Why a module, called so, is no residual block that carries argument ``key``; None where it is one.

    >>> why_no_block(nn.Linear(2, 2), 0, (torch.zeros(3, 2),), {})
    'no residual addition found'
    """
    verdict = _block_or_reason(record(module, args, kwargs)[0], [key])
    return verdict if isinstance(verdict, str) else None


def why_no_residual(f: Tensor, x: Tensor) -> str | None:
    """Why ``f = y - x``, freshly computed from x, does not come from a residual block; None where it does."""
    node, number = edge_of(f)[0].next_functions[0]
    if node is not None and after_addition((node, number), edge_of(x)) is not None:
        return None
    return "no residual addition found"


def stage_names(runs: list[list[str]]) -> list[str]:
    """A name for each run of blocks, given by their paths: the parent's path where that says which run is meant.

    >>> stage_names([["layer1.0", "layer1.1"], ["f.2", "f.3"], ["f.5", "f.6"], ["b1", "b2"]])
    ['layer1', 'f.2-3', 'f.5-6', 'b1-b2']
    """
    parents = [parent_of(run[0]) for run in runs]
    return [
        parent if parent and parents.count(parent) == 1 else f"{run[0]}-{run[-1].removeprefix(f'{parent}.')}"
        for parent, run in zip(parents, runs, strict=True)
    ]


def _judge(calls: list[Call], modules: dict[str, nn.Module]) -> dict[str, Block | str]:
    """For every module that was called, in the order of the calls: the block that it is, or why it is none."""
    times = Counter(call.name for call in calls)
    verdicts: dict[str, Block | str] = {}
    given_on: set[tuple[str, int]] = set()
    for call in calls:
        parent = parent_of(call.name)
        if times[call.name] > 1:
            verdicts[call.name] = SHARED
        elif call.name and has_parameters(modules[call.name]):
            # Of several arguments that fit, the carried one is what a sibling gave on; else the first.
            foreign = {key: (parent, id(seen.tensor)) not in given_on for key, seen in call.inputs.items()}
            verdicts[call.name] = _block_or_reason(call, sorted(foreign, key=foreign.__getitem__))
        if call.output is not None:
            given_on.add((parent, id(call.output.tensor)))
    return verdicts


def _block_or_reason(call: Call, keys: list[Key]) -> Block | str:
    """The call as a block that carries the first of these arguments that it can carry; else why it cannot."""
    if call.output is None:
        return "does not return a tensor, or a tuple that begins with one"
    if not keys:
        return "is not given a tensor as an argument of its own"
    fitting = [key for key in keys if call.inputs[key].fits(call.output)]
    if not fitting:
        return _misfit(call.inputs[keys[0]], call.output)
    if call.output.changed:
        return "its output is changed in place later on"
    for key in fitting:
        given, gave = call.inputs[key], call.output
        after = after_addition(gave.edge, given.edge) if gave.edge and given.edge else None
        if after is not None:
            return (
                "changes its input in place"
                if key in call.writes
                else Block(call.name, key, given, gave, after, call.stored)
            )
    if call.output.edge is None:
        return "runs without gradients"
    if any(call.inputs[key].edge for key in fitting):
        return "no residual addition found"
    return "is given a tensor without gradient, from which no residual addition can be seen"


def _misfit(given: Seen, gave: Seen) -> str:
    """Why the one tensor cannot be carried on as the other."""
    a, b = given.tensor, gave.tensor
    if a.shape != b.shape:
        old, new = (s[1:] if a.shape[:1] == b.shape[:1] else s for s in (tuple(a.shape), tuple(b.shape)))
        return f"changes the shape {old} -> {new}"
    if a.dtype != b.dtype:
        return f"changes the data type {a.dtype} -> {b.dtype}"
    if a.device != b.device:
        return f"changes the device {a.device} -> {b.device}"
    return f"carries {a.dtype}, not floating-point numbers"


def _stage(name: str, run: Run) -> FoundStage:
    carried = run[0].given.tensor
    after = dict.fromkeys(act for block in run for act in block.after)
    return FoundStage(
        name,
        tuple(block.name for block in run),
        run[0].key,
        tuple(carried.shape),
        carried.dtype,
        tuple(after),
        sum(stored_by(run).values()),
    )


def _left(
    modules: dict[str, nn.Module], stages: tuple[FoundStage, ...], verdicts: dict[str, Block | str]
) -> tuple[LeftBlock, ...]:
    """Modules that look like blocks and are in no stage: neither inside nor around one, nor inside one another.

    What looks like a block is composite, and either of the class of a block or of a sibling, or stands beside a stage,
    or is used several times.
    """
    composite = {name: module for name, module in modules.items() if name and is_composite(module)}
    kinds = {type(module) for name, module in composite.items() if isinstance(verdicts.get(name), Block)}
    siblings = Counter((parent_of(name), type(module)) for name, module in composite.items())
    taken = [name for stage in stages for name in stage.blocks]
    beside = set(map(parent_of, taken))
    left: list[LeftBlock] = []
    for name, module in composite.items():
        verdict, parent = verdicts.get(name, UNCALLED), parent_of(name)
        told = type(module) in kinds or siblings[parent, type(module)] > 1 or parent in beside or verdict == SHARED
        nested = [*taken, *(block.name for block in left)]
        if told and not any(is_within(name, other) or is_within(other, name) for other in nested):
            left.append(LeftBlock(name, verdict if isinstance(verdict, str) else ONE_BLOCK))
    if not left and not stages:  # nothing looks like a block: say it of the parts of the model
        parts = [name for name, module in modules.items() if name and "." not in name and has_parameters(module)]
        left = [LeftBlock(n, why) for n in parts if isinstance(why := verdicts.get(n, UNCALLED), str)]
    return tuple(left)


def is_composite(module: nn.Module) -> bool:
    """Whether a module does more than call others in turn, and these have parameters: what a block looks like.

    >>> is_composite(nn.Linear(2, 2)), is_composite(nn.Sequential(nn.Linear(2, 2)))
    (False, False)
    >>> is_composite(nn.TransformerEncoderLayer(4, 2, 4))
    True
    """
    plain = type(module) in (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    return not plain and any(map(has_parameters, module.children()))


def has_parameters(module: nn.Module) -> bool:
    """Whether the module or a module inside it has a parameter."""
    return any(True for _ in module.parameters())

"""What a converted block does when it is called: one step of its stage's chain, or two, within the model's own loop."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from reversa.convert.caches import stripped, tell_of_checkpointing, without_caches
from reversa.convert.find import why_no_block, why_no_residual
from reversa.convert.marks import PLACE, switch_back
from reversa.convert.silent import Switches, refuse_hooks, refuse_written, without
from reversa.convert.stage import Place, continued, leave_link
from reversa.convert.streams import Streams, separate, two_steps
from reversa.engine import _torch
from reversa.engine.steps import PlainSteps, first_tensor, with_value
from reversa.errors import BlockError, ConversionError
from reversa.schemes import State

Forward = Callable[..., Any]


class _Residual:
    """``f(x) = block(x) - x``, with the carried tensor at its place among the block's arguments."""

    __slots__ = ("block", "call", "key")

    def __init__(self, block: nn.Module, call: Forward, key: int | str) -> None:
        self.block = block
        self.call = call
        self.key = key

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self.key, str):
            output = self.call(self.block, *args, **kwargs, **{self.key: x})
        else:
            output = self.call(self.block, *args[: self.key], x, *args[self.key :], **kwargs)
        y = first_tensor(output)
        if not isinstance(y, Tensor) or (not y.is_nested and y.shape != x.shape):
            return output  # which the step refuses, with its own message
        return with_value(output, y - x)


@functools.cache
def _compiled(original: type[nn.Module], options: tuple[tuple[str, Any], ...]) -> Forward:
    return torch.compile(original.forward, **dict(options))


def _take_carried(
    block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, Any, Any, int | str]:
    """The carried tensor, the other arguments, and where it stood."""
    place: Place = block.__dict__[PLACE]
    key: int | str = place.key
    if isinstance(key, int) and key < len(args):
        x, args = args[key], (*args[:key], *args[key + 1 :])
    else:
        if key not in kwargs:
            key = next((name for name, value in kwargs.items() if isinstance(value, Tensor)), "")
        x, kwargs = kwargs.get(key), {k: v for k, v in kwargs.items() if k != key}
    if not isinstance(x, Tensor):
        raise BlockError(
            f"{place.name} (block {place.index} of stage {place.stage.name!r}) needs the carried tensor as argument "
            f"{place.key!r}, got {type(x).__name__}. Convert after tracing or feature extraction, not before; a stage "
            "whose blocks are called in another way now is to be left out (stages=[...])."
        )
    return x, args, kwargs, key


def _verify_guess(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, x: Tensor) -> None:
    """After the first call of a block that was found by structure alone: is it a residual block?

    Its own graph tells; without one (no gradients, compiled code), a pass of a copy on fake tensors does. Where
    neither can, the next call is looked at.
    """
    place: Place = block.__dict__[PLACE]
    residual = first_tensor(output)
    if x.requires_grad and residual.requires_grad and place.compiled is None:
        reason = why_no_residual(residual, x)
    else:
        plain = copy.copy(block)  # another thread may be using the block itself
        switch_back(plain)
        try:
            reason = why_no_block(plain, place.key, args, kwargs)
        except ConversionError:
            return
    if reason is not None:
        raise ConversionError(
            f"{place.name} was taken for a residual block because it stands in a run of modules of one class, but its "
            f"first call shows: {reason}. Call reversa.restore(model), and convert with stages=[...] or example=."
        )
    place.guessed = False


def step(block: nn.Module, original: type[nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One step of the stage's chain, within the model's own loop."""
    place: Place = block.__dict__[PLACE]
    stage = place.stage
    x, others, named, key = _take_carried(block, args, kwargs)
    others, named, once = without_caches(block, stage, others, named)
    tell_of_checkpointing(block, stage)
    call = original.forward if place.compiled is None else _compiled(original, tuple(sorted(place.compiled.items())))
    if isinstance(place, Streams):
        functions = _two_functions(block, place, call, key, *stripped(args, kwargs))
        return two_steps(block, place, functions, x, others, named, once)
    with continued(place, x) as link:
        scheme = stage.scheme_of(link, x, block.training)
        state: State = scheme.open(x) if link is None else (x if link.head is None else link.head, *link.hidden)
        given = state[0]  # what the block sees: in exact arithmetic x in integers
        steps = stage.begin(scheme) if link is None else link.steps
        made = PlainSteps(scheme, steps.taken) if once else steps
        state, output = made.step(_Residual(block, call, key), state, others, named, module=block)
        if once:
            steps = stage.afresh(steps, made.taken)
    if place.guessed:
        _verify_guess(block, *stripped(args, kwargs), output, given)
    leave_link(place, state, steps)
    return with_value(output, scheme.close(state))


def _two_functions(
    block: nn.Module, place: Streams, call: Forward, key: int | str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[_Residual]:
    """The residual functions of a block's attention and of its MLP: each with the other's modules switched off.

    Which these are is found out at the first call of a block that was found by structure alone.
    """
    if place.branches is None:
        plain = copy.copy(block)
        switch_back(plain)
        found = separate(plain, {"": key}, args, kwargs)[""]
        if isinstance(found, str):
            raise ConversionError(
                f"{place.name} cannot be made of two streams: {found}. Call reversa.restore(model), and convert with "
                "stages=[...] or another scheme."
            )
        place.branches = found

    def function(off: Switches) -> _Residual:
        def partly(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
            refuse_hooks(block, off)
            shallow = without(block, off)
            output = call(shallow, *args, **kwargs)
            if not torch.compiler.is_compiling():
                refuse_written(block, shallow)
            return output

        return _Residual(block, partly, key)

    return [function(place.branches.mlp), function(place.branches.attention)]


step_outside_dynamo = _torch.outside_dynamo(step)

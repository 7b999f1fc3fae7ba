"""Switching: a block gets a dynamic subclass of its own class whose forward makes one step of its stage's chain.

Containers stay, modules stay, names stay. ``forward`` is overridden rather than ``__call__``, so that hooks see the
block's input and output once, and FSDP2's gathering of parameters happens outside.
"""

from __future__ import annotations

import copy
import copyreg
import functools
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from reversa.convert.find import why_no_block, why_no_residual
from reversa.convert.stage import Place, continued, leave_link, scope
from reversa.engine import _torch
from reversa.engine.steps import first_tensor, is_recording, with_value
from reversa.errors import BlockError, ConversionError
from reversa.exact import ExactScheme
from reversa.schemes import State

PLACE = "_reversa"
_ORIGINAL = "_reversa_original"

Forward = Callable[..., Any]


def is_switched(module: nn.Module) -> bool:
    """Whether the module's class is one of ours."""
    return _ORIGINAL in vars(type(module))


def place_of(module: nn.Module) -> Place | None:
    """Where a converted block stands; None for every other module."""
    return module.__dict__.get(PLACE)


def refuse_unswitchable(module: nn.Module, name: str) -> None:
    """Raise :class:`ConversionError` where a block's forward cannot be redirected."""
    if isinstance(module, torch.jit.ScriptModule):
        raise ConversionError(
            f"{name} is a ScriptModule, whose forward cannot be redirected. Convert first, then script."
        )
    if "forward" in module.__dict__:
        raise ConversionError(
            f"{name}: this instance has a forward of its own (set by a hook of another library), which hides its "
            "class's. Convert the model before such hooks are installed."
        )


def switch_block(module: nn.Module, place: Place) -> None:
    """Make a block take its step in the stage's chain."""
    module.__class__ = _switched(type(module), _block_members)
    module.__dict__[PLACE] = place


def switch_container(module: nn.Module, holds_loop: bool) -> None:
    """Give every call of a container's forward a scope of its own.

    Args:
        module: the container.
        holds_loop: whether its forward runs over the blocks; or may, where it could iterate over a Sequential.
    """
    if not is_switched(module) and "forward" not in module.__dict__:
        module.__class__ = _switched(type(module), _container_members if holds_loop else _owner_members)


def switch_back(module: nn.Module) -> None:
    """Undo :func:`switch_block` and :func:`switch_container`."""
    if is_switched(module):
        module.__class__ = vars(type(module))[_ORIGINAL]
        module.__dict__.pop(PLACE, None)


Members = Callable[[type[nn.Module]], dict[str, Any]]


@functools.cache
def _switched(original: type[nn.Module], members: Members) -> type[nn.Module]:
    """The subclass: it prints, pickles and is named like the original."""

    def reduce_ex(self: nn.Module, protocol: Any) -> Any:
        reduced = original.__reduce_ex__(self, protocol)
        if isinstance(reduced, str) or reduced[0] is not copyreg.__newobj__:  # type: ignore[attr-defined]
            return reduced
        return (_rebuild, (original, members, *reduced[1][1:]), *reduced[2:])

    names = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "__reduce_ex__": reduce_ex,
        _ORIGINAL: original,
    }
    metaclass = cast(Callable[..., type[nn.Module]], type(original))
    switched = metaclass(original.__name__, (original,), names)
    # After the class is made: a base class may wrap whatever forward a new subclass brings along.
    for name, member in members(original).items():
        setattr(switched, name, member)
    return switched


def _rebuild(original: type[nn.Module], members: Members, *args: Any) -> nn.Module:
    switched = _switched(original, members)
    return switched.__new__(switched, *args)


def _container_members(original: type[nn.Module]) -> dict[str, Any]:
    @functools.wraps(original.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            return _call_outside_dynamo(original, self, args, kwargs)
        return _call_in_scope(original, self, args, kwargs)

    return {"forward": forward}


def _owner_members(original: type[nn.Module]) -> dict[str, Any]:
    @functools.wraps(original.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():  # the Sequential inside has a scope: compile what is around it
            return original.forward(self, *args, **kwargs)
        return _call_in_scope(original, self, args, kwargs)

    return {"forward": forward}


def _call_in_scope(original: type[nn.Module], self: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    with scope():
        return original.forward(self, *args, **kwargs)


# Dynamo cannot break a graph inside a loop: the frame that holds the loop over the blocks runs as it is.
_call_outside_dynamo = _torch.outside_dynamo(_call_in_scope)


def _block_members(original: type[nn.Module]) -> dict[str, Any]:
    @functools.wraps(original.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if PLACE not in self.__dict__:
            return original.forward(self, *args, **kwargs)
        step = _step_outside_dynamo if torch.compiler.is_dynamo_compiling() else _step
        return step(self, original, args, kwargs)

    def extra_repr(self: nn.Module) -> str:
        place = place_of(self)
        ours = f"reversible: stage {place.stage.name}, block {place.index}" if place else ""
        return ", ".join(filter(None, (original.extra_repr(self), ours)))

    def compile(self: nn.Module, **options: Any) -> None:
        """Compile the block as the residual function: the same code in both directions."""
        self.__dict__[PLACE].compiled = options

    return {"forward": forward, "extra_repr": extra_repr, "compile": compile}


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
            f"{place.key!r}, got {type(x).__name__}. Convert after tracing or feature extraction, not before."
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


def _step(block: nn.Module, original: type[nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One step of the stage's chain, within the model's own loop."""
    place: Place = block.__dict__[PLACE]
    stage = place.stage
    x, others, named, key = _take_carried(block, args, kwargs)
    call = original.forward if place.compiled is None else _compiled(original, tuple(sorted(place.compiled.items())))
    with continued(place, x) as link:
        scheme = stage.scheme_for(x, block.training) if link is None else link.steps.scheme
        if isinstance(scheme, ExactScheme):
            scheme.way_back = stage.engine.inverts and is_recording()
        state: State = scheme.open(x) if link is None else (x if link.head is None else link.head, *link.hidden)
        given = state[0]  # what the block sees: in exact arithmetic x in integers
        steps = stage.begin(scheme) if link is None else link.steps
        state, output = steps.step(_Residual(block, call, key), state, others, named, module=block)
    if place.guessed:
        _verify_guess(block, args, kwargs, output, given)
    leave_link(place, state, steps)
    return with_value(output, scheme.close(state))


_step_outside_dynamo = _torch.outside_dynamo(_step)

"""Switching: a block gets a dynamic subclass of its own class whose forward makes one step of its stage's chain.

Containers stay, modules stay, names stay. ``forward`` is overridden rather than ``__call__``, so that hooks see the
block's input and output once, and FSDP2's gathering of parameters happens outside.
"""

from __future__ import annotations

import copyreg
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import nn

from reversa.convert.marks import ORIGINAL, PLACE, is_switched, place_of
from reversa.convert.stage import Place, scope
from reversa.convert.step import step, step_outside_dynamo
from reversa.engine import _torch
from reversa.errors import ConversionError


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


def switch(model: nn.Module, places: Iterable[Sequence[Place]]) -> None:
    """Switch the blocks that have these places, stage by stage, and the modules whose calls hold the loops over them.

    Raises:
        ConversionError: one of the blocks cannot be switched; none is, then.
    """
    modules: dict[str, nn.Module] = dict(model.named_modules())
    places = [list(run) for run in places]
    for place in (place for run in places for place in run):
        refuse_unswitchable(modules[place.name], place.name)
    for place in (place for run in places for place in run):
        switch_block(modules[place.name], place)
    containers = [_containers(modules, run[0].name) for run in places]
    for inner, *_ in containers:
        switch_container(inner, holds_loop=True)
    for owner in (owner for _, *owners in containers for owner in owners):
        switch_container(owner, holds_loop=False)


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
        ORIGINAL: original,
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
        take = step_outside_dynamo if torch.compiler.is_dynamo_compiling() else step
        return take(self, original, args, kwargs)

    def extra_repr(self: nn.Module) -> str:
        place = place_of(self)
        ours = f"reversible: stage {place.stage.name}, block {place.index}" if place else ""
        return ", ".join(filter(None, (original.extra_repr(self), ours)))

    def compile(self: nn.Module, **options: Any) -> None:
        """Compile the block as the residual function: the same code in both directions."""
        self.__dict__[PLACE].compiled = options

    return {"forward": forward, "extra_repr": extra_repr, "compile": compile}

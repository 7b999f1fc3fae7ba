"""What every engine shares: one step made plainly, and the checks on what a residual function returns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from types import FunctionType, MappingProxyType
from typing import Any, TypeGuard, cast

import torch
from torch import Tensor

from reversa.engine import _torch
from reversa.errors import BlockError
from reversa.schemes import Scheme, State

Function = Callable[..., Any]
Opening = Callable[[], State]
"""Makes the state before the first step. A loop over the steps opens it itself: no frame outside holds it then."""

_NONE: Mapping[str, Any] = MappingProxyType({})


class Place:
    """How errors call a step: its number and its residual function's class. Spelled out only when one is raised."""

    __slots__ = ("module", "number")

    def __init__(self, module: Any, number: int) -> None:
        self.module = module
        self.number = number

    def __str__(self) -> str:
        kind = self.module.__name__ if isinstance(self.module, FunctionType) else type(self.module).__name__
        return f"step {self.number} ({kind})"


def is_bundle(output: Any) -> TypeGuard[Sequence[Any]]:
    """Whether a residual function returned several things: a tuple or list, which its carried tensor begins."""
    return isinstance(output, (tuple, list)) and len(cast(Sequence[Any], output)) > 0


def first_tensor(output: Any) -> Any:
    """What a step goes on with: the output itself, or the first element of a tuple or list."""
    return output if isinstance(output, Tensor) or not is_bundle(output) else output[0]


def carried_value(output: Any, argument: Tensor, where: object) -> Tensor:
    """The tensor that a step goes on with: what ``f`` returned, or the first element of it.

    Under autocast a value in a lower precision is taken to the state's data type.

    Raises:
        BlockError: there is no such tensor, or its shape or data type is not the argument's.
    """
    value = first_tensor(output)
    if not isinstance(value, Tensor):
        raise BlockError(
            f"{where} returned {_kind(output)}; a reversible step needs a tensor of shape {tuple(argument.shape)}, or "
            "a tuple or list that begins with one. Return the residual, or leave this block out of the sequence."
        )
    if value.is_nested or argument.is_nested:
        return value
    if value.shape != argument.shape:
        raise BlockError(
            f"{where} made {tuple(value.shape)} of {tuple(argument.shape)}. A reversible step keeps the shape: end the "
            "sequence here, put the layer that changes the shape after it, and begin a new sequence."
        )
    if value.dtype != argument.dtype:
        if not _torch.any_autocast():
            raise BlockError(
                f"{where} made {value.dtype} of {argument.dtype}. A reversible step keeps the data type: convert "
                "the module or its input, or use torch.autocast."
            )
        value = value.to(argument.dtype)
    return value


def _kind(output: Any) -> str:
    if is_bundle(output):
        return f"a {type(output).__name__} that begins with {type(output[0]).__name__}"
    return "None" if output is None else type(output).__name__


def refuse_in_place(argument: Tensor, version: int, where: object) -> None:
    """Raise :class:`BlockError` where ``f`` wrote to the tensor that it was given."""
    if argument._version != version:
        raise BlockError(
            f"{where} changes its input in place, which would change the state that the step is computed from. "
            "Replace the in-place operation at its entry (for instance ReLU(inplace=True)) by an ordinary one."
        )


def with_value(output: Any, value: Tensor) -> Any:
    """``f``'s output with the carried tensor in its place."""
    if isinstance(output, Tensor):
        return value
    rest = (value, *output[1:])
    kind = cast(Any, type(output))
    return kind._make(rest) if hasattr(kind, "_make") else kind(rest)


def plain_step(
    scheme: Scheme,
    f: Function,
    state: State,
    step: int,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    where: object,
) -> tuple[State, Any]:
    """One step that autograd records in the ordinary way."""
    argument = scheme.argument(state, step)
    version = None if argument.is_inference() else argument._version
    output = f(argument, *args, **kwargs)
    value = carried_value(output, argument, where)
    if version is not None:
        refuse_in_place(argument, version, where)
    return scheme.forward(state, value, step), output


class Steps(ABC):
    """Steps of one chain in the making: one :meth:`step` after another, each with its own arguments, then :meth:`end`.

    Args:
        scheme: the update rule.
        first: number of the first step, where others were made before.
    """

    def __init__(self, scheme: Scheme, first: int = 0) -> None:
        self.scheme = scheme
        self.taken: int = first

    @abstractmethod
    def _take(
        self, f: Function, state: State, args: tuple[Any, ...], kwargs: Mapping[str, Any], module: Any, where: object
    ) -> tuple[State, Any]: ...

    def step(
        self,
        f: Function,
        state: State,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        module: Any = None,
    ) -> tuple[State, Any]:
        """One step from ``state``.

        Args:
            f: the residual function, called as ``f(argument, *args, **kwargs)``.
            state: what the step before returned, or ``scheme.open(x)``.
            args: extra positional arguments of this step.
            kwargs: extra keyword arguments of this step.
            module: the module whose parameters and buffers ``f`` reads, where ``f`` is not that module itself.

        Returns:
            The state after the step, and what ``f`` returned.
        """
        module = f if module is None else module
        kwargs = _NONE if kwargs is None else kwargs
        result = self._take(f, state, args, kwargs, module, Place(module, self.taken))
        self.taken += 1
        return result

    def end(self) -> None:  # noqa: B027 - most engines have nothing to do here
        """No step follows."""


class PlainSteps(Steps):
    """Steps that autograd records in the ordinary way."""

    def _take(
        self, f: Function, state: State, args: tuple[Any, ...], kwargs: Mapping[str, Any], module: Any, where: object
    ) -> tuple[State, Any]:
        return plain_step(self.scheme, f, state, self.taken, args, kwargs, where)


def is_recording() -> bool:
    """Whether saved-tensor hooks can stand between autograd and its saved tensors here."""
    return torch.is_grad_enabled() and not _torch.under_transform()

"""What a user says of a training step: inputs, loss, optimizer, precision; and what is made of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from reversa.check.step import default_loss, tensors_of
from reversa.errors import SettingError

Loss = Callable[[Any], Tensor]
OptimizerLike = Optimizer | Callable[[Iterable[Tensor]], Optimizer] | None

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Settings:
    """What a step is made of.

    Raises:
        SettingError: something of another kind.
    """

    model: nn.Module
    inputs: Any
    loss: Loss | None
    optimizer: OptimizerLike
    precision: str | None

    def __post_init__(self) -> None:
        if not isinstance(self.model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise SettingError(f"model must be a torch.nn.Module, got {type(self.model).__name__}")
        if self.precision is not None and self.precision not in PRECISIONS:
            raise SettingError(f"precision must be None, 'bf16' or 'fp16', got {self.precision!r}")
        if self.optimizer is not None and not callable(self.optimizer) and not isinstance(self.optimizer, Optimizer):
            raise SettingError(
                "optimizer must be None, a class such as torch.optim.AdamW, a function of the parameters, or an "
                f"optimizer; got {self.optimizer!r}"
            )
        if isinstance(self.optimizer, Optimizer):
            own = {id(p) for p in self.model.parameters()}
            if not all(id(p) in own for group in self.optimizer.param_groups for p in group["params"]):
                raise SettingError(
                    "the optimizer has parameters that the model has not: make it of model.parameters(), after the "
                    "model was converted or moved"
                )

    @property
    def given(self) -> Arguments:
        """Positional and keyword arguments of the model's call, shapes as they are."""
        return arguments(self.inputs)

    @property
    def loss_function(self) -> Loss:
        """The user's, or the one of :func:`reversa.check`."""
        return default_loss if self.loss is None else self.loss

    @property
    def made_optimizer(self) -> Optimizer | None:
        """The optimizer, where it is one already."""
        return self.optimizer if isinstance(self.optimizer, Optimizer) else None

    def optimizer_of(self, model: nn.Module, copied: Optimizer | None) -> Optimizer | None:
        """The optimizer of a copy of the model.

        Raises:
            SettingError: what is to make one makes something else.
        """
        if copied is not None or self.optimizer is None or isinstance(self.optimizer, Optimizer):
            return copied
        made = self.optimizer(model.parameters())
        if not isinstance(made, Optimizer):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise SettingError(f"optimizer(parameters) must make a torch.optim.Optimizer, got {type(made).__name__}")
        return made

    @property
    def device(self) -> torch.device:
        """Where the step runs: where the first parameter, buffer or input is; the CPU for what is on no device yet."""
        tensors = [*self.model.parameters(), *self.model.buffers(), *tensors_of(self.given)]
        device = next((tensor.device for tensor in tensors), torch.device("cpu"))
        return torch.device("cpu") if device.type == "meta" else device

    @property
    def dtype(self) -> torch.dtype:
        """The type of a tensor that only a shape was given for: that of the model's first floating parameter."""
        floating = (p.dtype for p in self.model.parameters() if p.is_floating_point())
        return next(floating, torch.get_default_dtype())


def arguments(inputs: Any) -> Arguments:
    """Positional and keyword arguments of one call; shapes are still tuples of integers in them.

    Raises:
        SettingError: something else was given.

    >>> arguments((2, 3, 8, 8))
    (((2, 3, 8, 8),), {})
    >>> arguments({"x": (2, 3), "flag": True})
    ((), {'x': (2, 3), 'flag': True})
    """
    if isinstance(inputs, Tensor) or is_shape(inputs):
        return (inputs,), {}
    if isinstance(inputs, (tuple, list)) and inputs:
        return tuple(inputs), {}
    if isinstance(inputs, Mapping) and inputs:
        return (), dict(inputs)
    raise SettingError(
        "inputs must be a tensor, a tuple of arguments, a dictionary of keyword arguments, or shapes such as "
        f"(64, 3, 224, 224) in the place of tensors; got {inputs!r}"
    )


def is_shape(value: Any) -> bool:
    """Whether a value is a tuple or list of sizes."""
    return (
        isinstance(value, (tuple, list))
        and len(value) > 0
        and all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in value)
    )


def with_tensors(given: Arguments, made: Callable[[Tensor], Tensor], shaped: Callable[..., Tensor]) -> Arguments:
    """The same arguments with every tensor exchanged for ``made(tensor)``, and every shape for ``shaped(*shape)``.

    A tensor that is given twice is exchanged for one tensor that is given twice.
    """
    done: dict[int, Tensor] = {}

    def exchanged(value: Any) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in done:
                done[id(value)] = made(value)
            return done[id(value)]
        if is_shape(value):
            return shaped(*value)
        if isinstance(value, dict):
            return {key: exchanged(item) for key, item in value.items()}
        if isinstance(value, (tuple, list)):
            items = [exchanged(item) for item in value]
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        return value

    args, kwargs = given
    return tuple(map(exchanged, args)), {key: exchanged(value) for key, value in kwargs.items()}


def in_words(given: Arguments) -> str:
    """Shapes of all tensors, for a heading.

    >>> in_words(((torch.zeros(2, 3),), {"flag": True}))
    '2 x 3'
    """
    shapes: list[str] = []

    def note(*shape: int) -> Tensor:
        shapes.append(" x ".join(map(str, shape)))
        return torch.empty(0)

    with_tensors(given, lambda tensor: note(*tensor.shape), note)
    return ", ".join(shapes)

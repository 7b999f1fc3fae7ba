"""Training steps beside one another: networks in several ways, at several sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, TypeVar

from torch import nn
from torch.utils.checkpoint import checkpoint

from reversa.convert import explain
from reversa.errors import ConversionError
from reversa.memory.estimate import estimate
from reversa.memory.report import MemoryReport
from reversa.memory.settings import Loss, OptimizerLike

Model = TypeVar("Model", bound=nn.Module)


def sweep(
    ways: Mapping[str, Callable[[int], tuple[nn.Module, Any]]],
    values: Iterable[int],
    loss: Loss | None = None,
    optimizer: OptimizerLike = None,
    precision: str | None = None,
) -> dict[str, list[MemoryReport]]:
    """Estimate training steps of several networks at several sizes.

    Args:
        ways: by name, a function of the size that returns the model and its inputs, as
            :func:`reversa.memory.estimate` takes them.
        values: the sizes: batches, image sides, numbers of blocks.
        loss: as in :func:`reversa.memory.estimate`.
        optimizer: as in :func:`reversa.memory.estimate`.
        precision: as in :func:`reversa.memory.estimate`.

    Returns:
        By name, one report for each value.

    Raises:
        SettingError: as in :func:`reversa.memory.estimate`.

    >>> def stored(batch):
    ...     return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)), (batch, 8)
    >>> reports = sweep({"stored": stored}, (16, 32), loss=lambda output: output.sum())["stored"]
    >>> [report.held_bytes for report in reports]  # what Tanh returned, and the loss
    [516, 1028]
    """
    values = list(values)
    return {
        name: [estimate(*make(value), loss, optimizer, precision) for value in values] for name, make in ways.items()
    }


def checkpointed(model: Model, example: Any = None) -> Model:
    """Let ``torch.utils.checkpoint`` recompute each residual block, in place: the usual way to save memory.

    The blocks are those that :func:`reversa.convert` would make reversible. The numbers stay those of the model.

    Args:
        model: a network with residual blocks that is not converted.
        example: as in :func:`reversa.convert`.

    Returns:
        The model itself.

    Raises:
        ConversionError: nothing tells which inputs the model takes, and no example was given; or it has no such block.

    >>> import torch
    >>> from reversa.memory import estimate
    >>> layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True), 4)
    >>> before = estimate(layers, (8, 5, 16)).held_bytes
    >>> estimate(checkpointed(layers), (8, 5, 16)).held_bytes < before / 5
    True
    """
    stages = explain(model, example).stages
    if not stages:
        raise ConversionError("no residual block was found to put a checkpoint around: `reversa.explain` tells why")
    for stage in stages:
        for name in stage.blocks:
            block = model.get_submodule(name)
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    return model

"""Reading the checkpoints of ``reversa train``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from reversa import models
from reversa.errors import CheckpointError
from reversa.train.config import TrainConfig

MARK = "reversa"
"""The entry by which a checkpoint is known as ours; it holds the settings of the run."""

_PREFIX = "network."


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """The content of a checkpoint of ``reversa train``, on the CPU.

    The network's parameters and buffers are under ``"state_dict"``, each name behind ``network.``; the run's settings
    are under ``"reversa"``; the rest is what Lightning needs to go on. No code in the file is run (``weights_only``).

    Raises:
        CheckpointError: there is no such file, it is cut short or damaged, or another program wrote it.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}. A run's are in its folder, under checkpoints/.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails in the unpickler, the zip reader, the decoder, ...
        raise CheckpointError(
            f"{path} ({path.stat().st_size} bytes) cannot be read: it is cut short, damaged or not a checkpoint of "
            "tensors. Copy it again, or take the run's other checkpoint."
        ) from error
    if not isinstance(content, dict) or not {MARK, "state_dict"} <= content.keys():
        raise CheckpointError(
            f"{path} is not a checkpoint of reversa train: it has no entry {MARK!r}. "
            "Load it with the program that wrote it."
        )
    return content


def load_network(path: str | Path) -> nn.Module:
    """The trained network of a checkpoint, in eval mode.

    Raises:
        CheckpointError: as :func:`load_checkpoint`; or the weights do not belong to the network of the settings.
    """
    content = load_checkpoint(path)
    try:
        network = make_network(TrainConfig(**content[MARK]["config"]), **content[MARK]["shape"])
        weights = content["state_dict"].items()
        network.load_state_dict({name.removeprefix(_PREFIX): value for name, value in weights})
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} does not fit this version of Reversa: {error}. Use the version that wrote it."
        ) from error
    return network.eval()


def make_network(config: TrainConfig, num_classes: int, channels: int) -> nn.Module:
    """The network of a configuration, for images with so many channels.

    Raises:
        SettingError: the network does not take the settings.
    """
    return models.create(config.model, num_classes, channels=channels, **config.network_settings())

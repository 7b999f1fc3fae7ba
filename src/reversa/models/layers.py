"""What networks begin and end with, and what joins their stages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reversa.errors import SettingError, StateError
from reversa.models.functions import convolution

# Shapes in this file: N images, C channels, H x W pixels.


def check_sizes(**sizes: int) -> None:
    """Refuse sizes below 1, by a SettingError."""
    for name, size in sizes.items():
        if size < 1:
            raise SettingError(f"{name} must be at least 1, got {size}")


class Place(NamedTuple):
    """Where a residual block stands in a network."""

    block: int
    """Its number, from 1 on."""
    blocks: int
    """How many there are."""
    narrow: int
    """Channels before it."""
    wide: int
    """Channels behind it."""
    stride: int

    @property
    def keeps_shape(self) -> bool:
        """Whether the block can be a reversible step."""
        return self.narrow == self.wide and self.stride == 1


def places(width: int, widths: Sequence[int], blocks: Sequence[int]) -> list[list[Place]]:
    """The blocks of each stage: its first block changes the width and, but for the first stage, halves the resolution.

    >>> [place.stride for stage in places(16, (16, 32), (2, 2)) for place in stage]
    [1, 1, 2, 1]

    Raises:
        SettingError: there are not as many widths as numbers of blocks.
    """
    if not isinstance(blocks, Sequence) or len(widths) != len(blocks):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise SettingError(
            f"each stage needs a width and a number of blocks: got blocks={blocks!r} for {len(widths)} widths behind "
            "the stem's"
        )
    made: list[list[Place]] = []
    block = 0
    for stage, (wide, number) in enumerate(zip(widths, blocks, strict=True)):
        made.append([])
        for i in range(number):
            block += 1
            made[-1].append(Place(block, sum(blocks), width, wide, 2 if i == 0 and stage > 0 else 1))
            width = wide
    return made


def norm(channels: int) -> nn.BatchNorm2d:
    """Batch normalisation with the eps of the RevNet authors, 1e-3.

    Their statistics keep 0.99 of the old in each step, which a run of a few hundred steps never gets over: 0.9 here.
    """
    return nn.BatchNorm2d(channels, eps=1e-3)


def stem(channels: int, width: int, large: bool = False) -> nn.Sequential:
    """Convolution, BN, ReLU: 3x3 for small images; for large ones 7x7 of stride 2 and a max pool of stride 2."""
    if not large:
        return nn.Sequential(convolution(channels, width, 3), norm(width), nn.ReLU())
    return nn.Sequential(convolution(channels, width, 7, 2), norm(width), nn.ReLU(), nn.MaxPool2d(3, 2, 1))


class ImageClassifier(nn.Module):
    """What all networks here are: a stem, stages (or units) one after another, and a head that tells classes."""

    def __init__(self, stem: nn.Module, stages: Iterable[nn.Module], head: nn.Module) -> None:
        super().__init__()
        self.stem, self.stages, self.head = stem, nn.Sequential(*stages), head

    def forward(self, x: Tensor) -> Tensor:
        """Scores (N, num_classes) of images (N, channels, H, W)."""
        return self.head(self.stages(self.stem(x)))


class Head(nn.Module):
    """(N, C, H, W) -> (N, num_classes): BN, ReLU, mean over the pixels, linear."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.norm = norm(width)
        self.linear = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        # The mean, not adaptive pooling: pooling has no deterministic backward on a GPU.
        return self.linear(self.norm(x).relu().mean((2, 3)))


class PoolAndPad(nn.Module):
    """(N, narrow, H, W) -> (N, wide, H/s, W/s) without a parameter: mean over s x s pixels, and channels of zeros.

    Each of the ``parts`` that the channels consist of (the two streams of a reversible network) is padded on its own,
    by the same number of channels before and behind.

    Raises:
        SettingError: the new channels cannot be shared out evenly.
        StateError: (in the forward pass) the image is smaller than the stride.
    """

    def __init__(self, narrow: int, wide: int, stride: int = 1, parts: int = 1) -> None:
        super().__init__()
        new = wide - narrow
        if new < 0 or new % (2 * parts):
            raise SettingError(
                f"{narrow} channels cannot be padded to {wide}: {parts} part(s) need {2 * parts} new channels, "
                "or a multiple of that"
            )
        self.parts, self.stride, self.padding = parts, stride, new // (2 * parts)

    def forward(self, x: Tensor) -> Tensor:
        if min(x.shape[2:]) < self.stride:
            raise StateError(
                f"an image of {x.shape[2]} x {x.shape[3]} pixels cannot be halved once more: use larger images, or a "
                "network with fewer stages"
            )
        x = F.avg_pool2d(x, self.stride) if self.stride > 1 else x
        if not self.padding:
            return x
        return torch.cat([F.pad(part, (0, 0, 0, 0, *[self.padding] * 2)) for part in x.chunk(self.parts, 1)], 1)


def shortcut(narrow: int, wide: int, stride: int, projects: bool) -> nn.Module:
    """What goes past a block that changes the shape: a 1x1 convolution, or :class:`PoolAndPad`."""
    return convolution(narrow, wide, 1, stride) if projects else PoolAndPad(narrow, wide, stride)

"""What a data set is to the trainer: three splits of images in memory, and how to vary the training images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from reversa.errors import SettingError

Augment = Callable[[Tensor, Generator], Tensor]
"""A batch of images, varied: same shape; every random number comes from the generator."""


class Split(NamedTuple):
    """Images (N, C, H, W), normalised, and their labels (N,)."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class DataSet:
    """Three splits that share no image. ``val`` chooses between checkpoints, ``test`` is looked at once, at the end."""

    train: Split
    val: Split
    test: Split
    num_classes: int
    augment: Augment


@dataclass
class Batches:
    """A split, batch by batch.

    With a seed, images are shuffled and augmented; the numbers of epoch e depend on ``(seed, e)`` alone, so
    that a run that goes on from a checkpoint sees what an unbroken run sees. Batches are then of one size (images that
    are left over wait for the next epoch): a small last batch would disturb the statistics of BatchNorm.

    Args:
        split: images and labels.
        size: images in a batch.
        seed: makes it a training split; None leaves the images in order and as they are.
        augment: how images are varied.
        done: training steps made already; the first iteration is what is left of the epoch that they end in.

    Raises:
        SettingError: a training split smaller than one batch.

    >>> split = Split(torch.arange(5.0).reshape(5, 1, 1, 1), torch.arange(5))
    >>> [len(labels) for _, labels in Batches(split, 2)]
    [2, 2, 1]
    >>> [len(labels) for _, labels in Batches(split, 2, seed=0)]
    [2, 2]
    """

    split: Split
    size: int
    seed: int | None = None
    augment: Augment = field(default=lambda images, _: images)
    done: int = 0

    def __post_init__(self) -> None:
        if self.seed is not None and self.size > len(self.split.labels):
            raise SettingError(
                f"batch_size={self.size}, but there are {len(self.split.labels)} images to train on: "
                "choose a smaller one"
            )

    def __len__(self) -> int:
        """Number of batches in an epoch."""
        images = len(self.split.labels)
        return images // self.size if self.seed is not None else -(-images // self.size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch of (images, labels)."""
        if self.seed is None:
            yield from zip(self.split.images.split(self.size), self.split.labels.split(self.size), strict=True)
            return
        epoch, first = divmod(self.done, len(self))
        self.done = (epoch + 1) * len(self)
        # Two numbers in one: neighbouring seeds must not meet in later epochs.
        generator = Generator().manual_seed((self.seed << 20) + epoch)
        order = torch.randperm(len(self.split.labels), generator=generator)
        for number, batch in enumerate(order[: len(self) * self.size].split(self.size)):
            images = self.augment(self.split.images[batch], generator)
            if number >= first:
                yield images, self.split.labels[batch]

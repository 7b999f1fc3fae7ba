"""What the examples train on, without a download: source code of Python's standard library, scikit-learn's digits.

``text()`` is bytes, so that no tokenizer is needed: a vocabulary of 256. ``digits()`` are 1,797 images of 8 x 8 pixels.
"""

from __future__ import annotations

import argparse
import inspect
import statistics
from collections.abc import Iterator

import torch
from sklearn.datasets import load_digits
from torch import Tensor


def text() -> Tensor:
    """Two modules of the standard library, byte by byte."""
    source = inspect.getsource(argparse) + inspect.getsource(statistics)
    return torch.tensor(list(source.encode()))


def pieces(batches: int, size: int = 8, length: int = 64) -> Iterator[Tensor]:
    """Batches of random pieces of the text, always the same ones."""
    bytes_, generator = text(), torch.Generator().manual_seed(0)
    for _ in range(batches):
        starts = torch.randint(len(bytes_) - length, (size, 1), generator=generator)
        yield bytes_[starts + torch.arange(length)]


def digits(side: int = 8) -> tuple[Tensor, Tensor]:
    """Images of one channel, ``side`` x ``side`` pixels from 0 to 1, and their labels."""
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    return torch.nn.functional.interpolate(images, side), torch.tensor(labels)

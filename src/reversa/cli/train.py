"""``reversa train``."""

from __future__ import annotations

from collections.abc import Sequence

from reversa.train import train
from reversa.train.config import parse


def run(arguments: Sequence[str]) -> int:
    """Train with the settings of the flags and files."""
    train(parse(arguments))
    return 0

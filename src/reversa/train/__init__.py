"""Training with one command: settings, data, the run, its folder and its checkpoints.

Nothing here loads Lightning before :func:`train` is called.
"""

from __future__ import annotations

from reversa.train.checkpoint import load_checkpoint, load_network
from reversa.train.config import TrainConfig
from reversa.train.data import DATASETS
from reversa.train.job import Interrupted, train
from reversa.train.monitor import MemoryMonitor
from reversa.train.report import Result

__all__ = [
    "DATASETS",
    "Interrupted",
    "MemoryMonitor",
    "Result",
    "TrainConfig",
    "load_checkpoint",
    "load_network",
    "train",
]

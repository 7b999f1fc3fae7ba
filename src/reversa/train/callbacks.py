"""What happens beside the training steps: rows of metrics, checkpoints, progress, an orderly stop.

Import it late: it loads Lightning.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.io import TorchCheckpointIO
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from reversa.train.files import RunFolder, write_text, write_whole

COLUMNS = ("step", "epoch", "train_loss", "val_loss", "val_accuracy", "lr", "seconds")
Row = dict[str, float | int]


class Stopped(Exception):
    """The user asked for an end, and the checkpoint is written."""


class WholeCheckpoints(TorchCheckpointIO):
    """Lightning's checkpoints, written whole or not at all."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        write_whole(Path(path), lambda file: torch.save(checkpoint, file))


class Record(Callback):
    """A row of ``metrics.csv`` and the checkpoint ``last.ckpt`` per epoch; ``best.ckpt`` where it is the best yet.

    The best is the one with the lowest validation loss: accuracy on few images moves in steps too coarse to choose by.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.rows: list[Row] = []
        self._losses: list[Tensor] = []  # of the epoch's steps, also of those before a resumed run was stopped
        self._before = 0.0  # seconds trained before this process, where a run goes on
        self._begun = 0.0

    @property
    def best(self) -> Row:
        """The best epoch's row."""
        return min(self.rows, key=itemgetter("val_loss"))

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "losses": self._losses, "seconds": self._seconds()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows, self._losses = list(state_dict["rows"]), list(state_dict["losses"])
        self._before = state_dict["seconds"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begun = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._losses.append(outputs["loss"].detach())

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        values: dict[str, Any] = {name: float(value) for name, value in trainer.callback_metrics.items()}
        values["train_loss"] = sum(map(float, self._losses)) / len(self._losses)
        self._losses = []
        values |= {"step": trainer.global_step, "epoch": trainer.current_epoch, "seconds": round(self._seconds(), 2)}
        values["lr"] = trainer.optimizers[0].param_groups[0]["lr"]
        self.rows.append({name: values[name] for name in COLUMNS})
        lines = [COLUMNS, *([f"{row[name]:.6g}" for name in COLUMNS] for row in self.rows)]
        write_text(self.folder.metrics, "".join(",".join(line) + "\n" for line in lines))
        if self.best is self.rows[-1]:
            trainer.save_checkpoint(self.folder.best)
        trainer.save_checkpoint(self.folder.last)

    def _seconds(self) -> float:
        return self._before + (time.perf_counter() - self._begun if self._begun else 0.0)


class OrderlyStop(Callback):
    """On Ctrl-C the step in work is finished and ``last.ckpt`` is written; a second Ctrl-C does not wait."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.asked = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take Ctrl-C from Python for the time of the training."""
        if threading.current_thread() is not threading.main_thread():  # signals go to the main thread alone
            yield
            return
        before = signal.getsignal(signal.SIGINT)
        signal.signal(signal.SIGINT, self._ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _ask(self, *_: Any) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # After an epoch's last step its validation follows, and the checkpoint of the whole epoch.
        if self.asked and batch_idx + 1 < trainer.num_training_batches:
            trainer.save_checkpoint(self.folder.last)
            raise Stopped

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.asked:
            raise Stopped


class Bar(Callback):
    """Progress over all steps in a terminal, and nothing elsewhere."""

    def __init__(self, console: Console, record: Record) -> None:
        self._record = record
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("training", total=None)

    @contextmanager
    def shown(self) -> Iterator[None]:
        with self._progress:
            yield

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._progress.update(self._task, total=trainer.estimated_stepping_batches, completed=trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._progress.update(self._task, completed=trainer.global_step)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        row = self._record.rows[-1]
        told = f"epoch {row['epoch'] + 1}/{trainer.max_epochs}, loss {row['train_loss']:.3f}"
        self._progress.update(self._task, description=f"{told}, val {row['val_accuracy']:.1%}")

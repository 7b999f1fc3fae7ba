"""The folder of a run. Every file in it is written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

from reversa.errors import OutputError


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file beside ``path`` and put it in its place when it is complete.

    Raises:
        OutputError: the file cannot be written; what stood at ``path`` before still stands there.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        with open(unfinished, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except OSError as error:
        raise OutputError(
            f"cannot write {path}: {error.strerror or error}. Make room, or choose another --out."
        ) from error
    finally:
        unfinished.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    write_whole(path, lambda file: file.write(text.encode()))


@dataclass(frozen=True)
class RunFolder:
    """Where a run leaves its files."""

    path: Path

    @classmethod
    def choose(cls, out: str | None, name: str) -> RunFolder:
        """The folder asked for, or a new one under ``runs/``; nothing is created yet.

        Raises:
            OutputError: it cannot be made or written to, or it holds another run.
        """
        path = _new_path(name) if out is None else Path(out)
        if (path / "metrics.csv").exists() or (path / "config.yaml").exists():
            raise OutputError(f"{path} holds a run already: choose another --out, or remove it first.")
        return cls._checked(path)

    @classmethod
    def of_checkpoint(cls, checkpoint: Path) -> RunFolder:
        """The folder of the run that wrote the checkpoint.

        Raises:
            OutputError: the checkpoint is in no run's folder, or nothing can be written there.
        """
        folder = cls._checked(checkpoint.absolute().parent.parent)
        if not folder.config.exists():
            raise OutputError(f"{checkpoint} is not in the folder of a run: resume it where reversa train wrote it.")
        return folder

    @classmethod
    def _checked(cls, path: Path) -> RunFolder:
        standing = next(parent for parent in (path.absolute(), *path.absolute().parents) if os.path.lexists(parent))
        if not standing.is_dir():
            raise OutputError(f"cannot make the folder {path}: {standing} is not a folder. Choose another --out.")
        if not os.access(standing, os.W_OK | os.X_OK):
            raise OutputError(f"cannot write to {standing}, so not to {path}: no permission. Choose another --out.")
        return cls(path)

    def create(self) -> None:
        """Make the folder, and find out that it can be written to.

        Raises:
            OutputError: it cannot.
        """
        try:
            (self.path / "checkpoints").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"cannot make the folder {self.path}: {error.strerror or error}. Choose another --out."
            ) from error

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.csv"

    @property
    def curves(self) -> Path:
        return self.path / "curves.png"

    @property
    def report(self) -> Path:
        return self.path / "report.md"

    @property
    def last(self) -> Path:
        return self.path / "checkpoints" / "last.ckpt"

    @property
    def best(self) -> Path:
        return self.path / "checkpoints" / "best.ckpt"


def _new_path(name: str) -> Path:
    stem = f"{datetime.now():%Y-%m-%d-%H%M%S}-{name}"
    names = [stem, *(f"{stem}-{number}" for number in range(2, 100))]
    return next(path for each in names if not (path := Path("runs") / each).exists())

"""The same bits of a residual function twice: deterministic algorithms where exact arithmetic runs, or an error."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from threading import Lock
from typing import Any

import torch

from reversa.errors import BlockError
from reversa.schemes import Scheme


def deterministic(scheme: Scheme, device: torch.device) -> AbstractContextManager[None]:
    """Where bits count, operations take deterministic algorithms, the same in both evaluations.

    A user who has asked PyTorch only to warn of operations without one keeps that setting, and is warned.

    Raises:
        BlockError: inside, an operation has no deterministic algorithm, or PyTorch was not set up for it.
    """
    return _deterministic(device) if scheme.exact else nullcontext()


# How PyTorch's own errors are known.
_NO_ALGORITHM, _NOT_SET_UP = "does not have a deterministic implementation", "CUBLAS_WORKSPACE_CONFIG"


@contextmanager
def _deterministic(device: torch.device) -> Generator[None]:
    try:
        with _SETTING, _cudnn() if device.type == "cuda" else nullcontext():
            yield
    except RuntimeError as error:
        if any(words in str(error) for words in (_NO_ALGORITHM, _NOT_SET_UP)):
            raise BlockError(_refusal(str(error), device)) from error
        raise


class _Setting:
    """PyTorch has one setting for all threads: the first that comes changes it, the last that leaves puts it back."""

    def __init__(self) -> None:
        self.inside = 0
        self.lock = Lock()
        self.memory: Any = torch.utils.deterministic

    def __enter__(self) -> None:
        with self.lock:
            if self.inside == 0:
                self.before = torch.get_deterministic_debug_mode(), self.memory.fill_uninitialized_memory
                # use_deterministic_algorithms would import a compiler
                torch.set_deterministic_debug_mode(self.before[0] or "error")
                self.memory.fill_uninitialized_memory = False
            self.inside += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.inside -= 1
            if self.inside == 0:
                mode, self.memory.fill_uninitialized_memory = self.before
                torch.set_deterministic_debug_mode(mode)


_SETTING = _Setting()


def _cudnn() -> AbstractContextManager[None]:
    cudnn = torch.backends.cudnn
    return cudnn.flags(enabled=cudnn.enabled, benchmark=False, deterministic=True, allow_tf32=cudnn.allow_tf32)


def _refusal(reason: str, device: torch.device) -> str:
    """What PyTorch said, in terms of what it means here."""
    if _NOT_SET_UP in reason:
        what = (
            "PyTorch promises them for CUDA's matrix products only where the environment variable "
            "CUBLAS_WORKSPACE_CONFIG is :4096:8 or :16:8. Set it before Python starts "
            "(export CUBLAS_WORKSPACE_CONFIG=:4096:8), or in os.environ before the first matrix product."
        )
    else:
        what = (
            f"{reason.split(_NO_ALGORITHM)[0].strip()} has no deterministic algorithm on {device.type}: the backward "
            "pass could see other bits, and give a wrong gradient. Use another operation, leave this function out of "
            "the chain, or use exact=False."
        )
    return (
        f"exact=True needs the same bits of a residual function twice, and {what} To run it all the same, call "
        "torch.use_deterministic_algorithms(True, warn_only=True), and use Invert(verify=True), which raises where "
        "bits differ."
    )

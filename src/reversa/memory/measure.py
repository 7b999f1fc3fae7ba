"""What a training step costs, measured on this machine."""

from __future__ import annotations

import copy
import statistics
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from reversa.check.step import Generators
from reversa.errors import DriftWarning, SettingError
from reversa.memory.notes import eagerly, notes_on
from reversa.memory.places import stages_of
from reversa.memory.report import MemoryReport
from reversa.memory.settings import Loss, OptimizerLike, Settings, with_tensors
from reversa.memory.step import Count, Step, as_report, count


def measure(
    model: nn.Module,
    inputs: Any,
    loss: Loss | None = None,
    optimizer: OptimizerLike = None,
    precision: str | None = None,
    repeats: int = 3,
) -> MemoryReport:
    """Measure what a training step costs in memory, operations and time, on the model's device.

    A copy of the model makes a step to warm up, a step that is counted, and ``repeats`` steps that are timed. The
    model, its gradients and buffers, its optimizer, the inputs and the generators stay as they are; the copy needs
    room beside them. On the CPU live bytes are counted storage by storage (:class:`LiveBytes`); on an accelerator the
    peak is that of its allocator, and what of it no tensor accounts for is called unseen.

    Args:
        model: any module, with its weights; modes (train, eval) and engines are its own.
        inputs: as in :func:`estimate`; where shapes are given, the tensors are random.
        loss: as in :func:`estimate`.
        optimizer: as in :func:`estimate`.
        precision: as in :func:`estimate`.
        repeats: number of steps that are timed; the report has their median.

    Returns:
        A report of the same structure as that of :func:`estimate`.

    Raises:
        SettingError: settings of another kind, as in :func:`estimate`; a model on the meta device or one that cannot be
            copied; a device that tells no memory.

    >>> from reversa.memory import estimate
    >>> model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
    >>> report = measure(model, (512, 64), optimizer=torch.optim.SGD)
    >>> report.peak_bytes == estimate(model, (512, 64), optimizer=torch.optim.SGD).peak_bytes
    True
    """
    settings = Settings(model, inputs, loss, optimizer, precision)
    if not (isinstance(repeats, int) and repeats >= 1):
        raise SettingError(f"repeats must be a number of steps >= 1, got {repeats!r}")
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        raise SettingError(
            f"{type(model).__name__} is on the meta device and has no numbers to compute with: use "
            "reversa.memory.estimate, or give it memory with model.to_empty(device=...)"
        )
    with _undisturbed(settings.device):
        memory = Allocator(settings.device)
        step = _step_of(settings)
        step.run()
        step.release()
        memory.reset()
        with eagerly(model):
            counted = memory.completed(count(step, stages_of(model)))
        seconds = statistics.median(_timed(step, memory) for _ in range(repeats))
    return as_report(settings, step, counted, notes_on(model, settings.device, measured=True), seconds)


class Allocator:
    """What an accelerator's allocator says; on the CPU there is nothing to ask."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.backend = _backend(device)
        self.before = 0
        if self.backend is None:
            return
        if not hasattr(self.backend, "max_memory_allocated"):
            raise SettingError(f"PyTorch does not tell how much memory is allocated on {device.type}: use estimate")
        self.before = self.backend.memory_allocated(device)

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.backend is not None:
            self.backend.synchronize(self.device)

    def reset(self) -> None:
        """The peak begins anew."""
        self.wait()
        if self.backend is not None:
            self.backend.reset_peak_memory_stats(self.device)

    def completed(self, counted: Count) -> Count:
        """A count with what the allocator holds beyond its tensors.

        Raises:
            SettingError: the allocator tells zero, or less than the tensors have.
        """
        if self.backend is None:
            return counted
        self.wait()
        peak = self.backend.max_memory_allocated(self.device) - self.before
        if peak < counted.peak.total:
            raise SettingError(
                f"the allocator of {self.device} tells a peak of {peak} bytes, and the tensors of this step alone have "
                f"{counted.peak.total}: its statistics are of no use here (another thread resets them, or there are "
                "none). Use reversa.memory.estimate."
            )
        return replace(counted, peak=replace(counted.peak, unseen=peak - counted.peak.total))


def _backend(device: torch.device) -> Any:
    return None if device.type == "cpu" else torch.get_device_module(device)


def _step_of(settings: Settings) -> Step:
    try:
        model, optimizer = copy.deepcopy((settings.model, settings.made_optimizer))
    except (RuntimeError, TypeError) as error:
        raise SettingError(
            f"measure works on a copy of the model, and copy.deepcopy({type(settings.model).__name__}) failed: "
            f"{error}. Measure it before it is wrapped for distributed training, and before it keeps tensors with a "
            "graph."
        ) from error
    device, dtype = settings.device, settings.dtype

    def made(tensor: Tensor) -> Tensor:
        return tensor.detach().clone().requires_grad_(tensor.requires_grad)

    def shaped(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device)

    given = with_tensors(settings.given, made, shaped)
    return Step(
        model, given, settings.loss_function, settings.optimizer_of(model, optimizer), settings.precision, device
    )


def _timed(step: Step, memory: Allocator) -> float:
    memory.wait()
    begun = time.perf_counter()
    step.run()
    memory.wait()
    return time.perf_counter() - begun


@contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """Gradients on, forecasts of drift silent, and the generators put back in the end."""
    generators = Generators({device})
    try:
        with torch.inference_mode(False), torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", DriftWarning)
            yield
    finally:
        generators.restore()

"""What an evaluation depends on beside its arguments and its module: random numbers and autocast."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor

from reversa.engine import _torch


class RandomState(NamedTuple):
    """The state of the CPU generator and of the accelerator that the carried tensor is on."""

    cpu: Tensor
    device: Tensor | None

    @staticmethod
    def now(device: torch.device) -> RandomState:
        cpu = torch.default_generator.get_state()
        if device.type in ("cpu", "meta"):
            return RandomState(cpu, None)
        return RandomState(cpu, torch.get_device_module(device).get_rng_state(device))

    def same(self, other: RandomState) -> bool:
        if not torch.equal(self.cpu, other.cpu):
            return False
        return self.device is None or other.device is None or torch.equal(self.device, other.device)

    def restore(self, device: torch.device) -> None:
        torch.default_generator.set_state(self.cpu)
        if self.device is not None:
            torch.get_device_module(device).set_rng_state(self.device, device)


Autocast = list[dict[str, Any]]


def autocast_now(device: torch.device) -> Autocast | None:
    """What autocast does now, as arguments of ``torch.autocast``; None where it is off."""
    if not _torch.any_autocast():
        return None
    cache = torch.is_autocast_cache_enabled()
    return [
        {
            "device_type": kind,
            "enabled": torch.is_autocast_enabled(kind),
            "dtype": torch.get_autocast_dtype(kind),
            "cache_enabled": cache,
        }
        for kind in dict.fromkeys(("cpu", device.type))
        if torch.amp.is_autocast_available(kind)
    ]


def autocast_as(recorded: Autocast | None, device: torch.device) -> ExitStack | None:
    """A context in which autocast does what was recorded; None where it does so already."""
    if recorded is None:
        now = autocast_now(device)
        if now is None:
            return None
        recorded = [dict(settings, enabled=False) for settings in now]
    stack = ExitStack()
    for settings in recorded:
        stack.enter_context(torch.autocast(**settings))
    return stack

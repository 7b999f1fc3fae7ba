"""What an evaluation depends on beside its arguments and its module: random numbers and autocast."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from reversa.engine import _torch

RandomState = tuple[Tensor, ...]
"""The state of the CPU's generator, and of the generator of the accelerator that a tensor is on."""


def random_state(device: torch.device) -> RandomState:
    """The generators' state now."""
    cpu = torch.default_generator.get_state()
    if device.type in ("cpu", "meta"):
        return (cpu,)
    return cpu, torch.get_device_module(device).get_rng_state(device)


def same_random_state(one: RandomState, two: RandomState) -> bool:
    """Whether nothing was drawn in between."""
    return all(map(torch.equal, one, two))


def restore_random_state(state: RandomState, device: torch.device) -> None:
    """Put the generators back."""
    torch.default_generator.set_state(state[0])
    for accelerator in state[1:]:
        torch.get_device_module(device).set_rng_state(accelerator, device)


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


def autocast_as(recorded: Autocast | None, device: torch.device) -> ExitStack:
    """A context in which autocast does what was recorded."""
    if recorded is None:
        recorded = [dict(settings, enabled=False) for settings in autocast_now(device) or []]
    stack = ExitStack()
    for settings in recorded:
        stack.enter_context(torch.autocast(**settings))
    return stack

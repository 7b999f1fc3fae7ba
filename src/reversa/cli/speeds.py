"""``--speed``: the device that a plan is for, by name or in numbers."""

from __future__ import annotations

import torch

from reversa.errors import SettingError, nearest
from reversa.memory import Speed

SPEEDS = {
    "a100": Speed(flops=19.5e12, flops_16=312e12, bandwidth=2.039e12, host=32e9),
    "h100": Speed(flops=67e12, flops_16=989e12, bandwidth=3.35e12, host=64e9),
}
"""Of NVIDIA's data sheets, SXM modules of 80 GB: float32 outside of tensor cores, bfloat16 without sparsity, device
memory, one direction of PCIe."""


def speed_named(text: str | None, device: torch.device | None) -> Speed:
    """The speed of a name, of four numbers, or else of this machine, in three digits so that it can be written down.

    Raises:
        SettingError: no such name, or no such numbers.

    >>> speed_named("20e12, 300e12, 2e12, 25e9", None).host
    25000000000.0
    """
    if text is None:
        measured = Speed.measured(device or "cpu")
        return Speed(**{name: float(f"{value:.3g}") for name, value in vars(measured).items()})
    if text.lower() in SPEEDS:
        return SPEEDS[text.lower()]
    try:
        flops, flops_16, bandwidth, host = map(float, text.split(","))
    except ValueError:
        raise SettingError(
            f"--speed takes a name, or four numbers FLOPS,FLOPS16,BANDWIDTH,HOST such as 20e12,300e12,2e12,25e9: what "
            f"the device does in a second. {nearest(text, SPEEDS, 'device')}"
        ) from None
    return Speed(flops, flops_16, bandwidth, host)

"""How fast a device is, in the three numbers that a training step's time depends on most."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from reversa.errors import SettingError


@dataclass(frozen=True)
class Speed:
    r"""What a device does in a second. An operation is taken to need

    .. math::
        \max\Big(\frac{\text{operations}}{\text{flops}}, \frac{\text{bytes read and written}}{\text{bandwidth}}\Big)

    seconds, as in the roofline model (Williams et al. 2009, https://doi.org/10.1145/1498765.1498785): matrix products
    and convolutions are limited by the first, everything else by the second.

    Args:
        flops: operations a second of matrix products in float32.
        flops_16: the same in bfloat16 and float16.
        bandwidth: bytes a second from and to the device's memory.
        host: bytes a second between the device and the host's memory.

    Raises:
        SettingError: a number that is not above 0.

    >>> Speed(flops=60e12, flops_16=800e12, bandwidth=3.3e12, host=50e9).host
    50000000000.0
    """

    flops: float
    flops_16: float
    bandwidth: float
    host: float

    def __post_init__(self) -> None:
        if not all(value > 0 for value in vars(self).values()):
            raise SettingError(f"Speed needs numbers above 0, got {self}")

    def seconds(self, flops: float, read_and_written: float, dtype: torch.dtype | None) -> float:
        """The time that an operation on one device takes."""
        peak = self.flops_16 if dtype in (torch.bfloat16, torch.float16) else self.flops
        return max(flops / peak, read_and_written / self.bandwidth)

    @staticmethod
    def measured(device: torch.device | str = "cpu", size: int = 1024) -> Speed:
        """A matrix product, an addition and a copy to the host, timed on this machine: a fraction of a second.

        Args:
            device: where.
            size: of the matrices.
        """
        a, b = (torch.ones(size, size, device=device) for _ in range(2))  # draws nothing of the user's random numbers
        low = a.bfloat16(), b.bfloat16()
        x = torch.ones(32 * size * 1024 // 4, device=device)
        work = 2 * size**3
        return Speed(
            work / _fastest(lambda: a @ b),
            work / _fastest(lambda: low[0] @ low[1]),
            2 * x.nbytes / _fastest(lambda: x.add_(1)),
            x.nbytes / _fastest(lambda: x.to("cpu", copy=True)),
        )


def _fastest(call: Callable[[], Tensor], repeats: int = 5) -> float:
    """Seconds of the fastest of several calls; the first warms up."""

    def wait() -> None:
        if result.device.type != "cpu":
            torch.accelerator.synchronize(result.device)

    result = call()
    times: list[float] = []
    for _ in range(repeats):
        wait()
        begin = time.perf_counter()
        result = call()
        wait()
        times.append(time.perf_counter() - begin)
    return min(times)

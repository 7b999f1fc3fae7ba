"""What is trained: residual functions, their input, and how many steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def mlp(width: int, hidden: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


def tanh_mlp(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))


def conv(channels: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(inplace=True),
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels),
    )


class Attention(nn.Module):
    """Pre-norm self-attention. Shapes: B batch, L tokens, D width, H heads, E = D / H."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x_BLD: Tensor) -> Tensor:
        q_BHLE, k_BHLE, v_BHLE = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.norm(x_BLD)).chunk(3, -1)
        )
        return self.out(F.scaled_dot_product_attention(q_BHLE, k_BHLE, v_BHLE).transpose(1, 2).flatten(2))


def feed_forward(width: int) -> nn.Module:
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


@dataclass(frozen=True)
class Workload:
    """A chain of ``depth`` steps.

    Args:
        function: the residual function of a step, from the step's number and the width of its stream.
        width: size of a stream along ``dim``. A RevNet's input has two streams, Momentum's one.
        shape: the input's shape with None in the place of ``dim``.
        depth: number of steps.
        repeat: training steps in one timed run, so that a run takes long enough to time.
    """

    function: Callable[[int, int], nn.Module]
    width: int
    shape: tuple[int | None, ...]
    depth: int
    repeat: int = 1

    @property
    def dim(self) -> int:
        return self.shape.index(None)

    def build(self, scheme: str, device: str, seed: int = 0) -> tuple[list[nn.Module], Tensor]:
        """The residual functions and an input that requires a gradient."""
        torch.manual_seed(seed)
        functions = [self.function(step, self.width).to(device) for step in range(self.depth)]
        width = self.width * (2 if scheme == "revnet" else 1)
        x = torch.randn([width if size is None else size for size in self.shape], device=device)
        return functions, x.requires_grad_()


def _sublayer(step: int, width: int) -> nn.Module:
    return feed_forward(width) if step % 2 else Attention(width, heads=4)


TIMED = {
    "conv": Workload(lambda _, width: conv(width), 64, (4, None, 32, 32), depth=16),
    "transformer": Workload(_sublayer, 256, (4, 128, None), depth=12),
    "mlp": Workload(lambda _, width: mlp(width, 4 * width), 256, (256, None), depth=16),
    "tiny": Workload(lambda _, width: mlp(width, width), 64, (16, None), depth=64, repeat=3),
}

QUICK = {
    "conv": Workload(lambda _, width: conv(width), 32, (2, None, 32, 32), depth=8),
    "transformer": Workload(_sublayer, 128, (2, 64, None), depth=8),
    "mlp": Workload(lambda _, width: mlp(width, 4 * width), 128, (128, None), depth=8),
    "tiny": TIMED["tiny"],
}


def memory_workload(scheme: str, depth: int, width: int = 32, batch: int = 16384) -> Workload:
    """What the published packages are measured on: Linear-Tanh-Linear, RevNet's streams half as wide as Momentum's.

    The input has ``width`` features with either scheme; a tensor is much larger than all parameters.
    """
    return Workload(
        lambda _, width: tanh_mlp(width), width // 2 if scheme == "revnet" else width, (batch, None), depth=depth
    )

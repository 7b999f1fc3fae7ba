"""ODE-Net, one neural ODE in the place of all residual blocks, and the network that it was compared with."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from reversa.errors import SettingError, StateError
from reversa.models.layers import ImageClassifier
from reversa.models.momentum import MeanHead
from reversa.models.ode import NeuralODE
from reversa.models.resnet import ResidualBlock

# Shapes in this file: N images, C channels, H x W pixels.


class ODENet(ImageClassifier):
    r"""Classifier of small images whose residual blocks are one neural ODE.

    .. code-block:: text

        (N, channels, H, W)   conv3x3, then GN-ReLU-conv4x4 of stride 2, twice   -> (N, width, (H-2)/4, (W-2)/4)
        flow                  NeuralODE from 0 to `time`                         -> the same shape
        head                  GN-ReLU, mean over pixels, linear                  -> (N, num_classes)

    with :math:`f(t, z) =` GN-ReLU-conv3x3-GN-ReLU-conv3x3-GN, where each convolution sees the time as one more channel.

    Args:
        num_classes: width of the output layer.
        channels: channels of the images.
        width: channels of the state; below 32, or a multiple of 32.
        halvings: convolutions of stride 2. Two for MNIST's 28 x 28 pixels; one for 8 x 8.
        time: how far the state flows.
        method: a solver of torchdiffeq, as in :class:`NeuralODE`.
        tolerance: relative and absolute error of a step, for methods that choose their steps.
        adjoint: gradients by the adjoint method; False to store the activations of the solver's steps.
        steps: how many equal steps, for methods that take them.

    Raises:
        SettingError: channels that do not divide into the groups of GN; otherwise as :class:`NeuralODE`.
        StateError: (when called) an image too small for the convolutions; otherwise as :class:`NeuralODE`.

    Source: Chen, Rubanova, Bettencourt, Duvenaud, NeurIPS 2018, arXiv:1806.07366, and torchdiffeq's example for MNIST,
    whose parameters it has to the last one; the paper prints 0.22 million.

    >>> sum(p.numel() for p in ODENet(channels=1).parameters())
    208266
    """

    def __init__(
        self,
        num_classes: int = 10,
        channels: int = 3,
        width: int = 64,
        halvings: int = 2,
        time: float = 1.0,
        method: str = "dopri5",
        tolerance: float = 1e-3,
        adjoint: bool = True,
        steps: int | None = None,
    ) -> None:
        flow = NeuralODE(ODEFunction(width), time, method, tolerance, tolerance, adjoint, steps)
        super().__init__(Reduction(channels, width, halvings), [flow], _head(width, num_classes))


class ODEResNet(ImageClassifier):
    r"""The residual network beside ODE-Net: the same stem and head, and stored residual blocks in between.

    A block is :math:`x + f(x)` with f = GN-ReLU-conv3x3-GN-ReLU-conv3x3.

    Args:
        num_classes: width of the output layer.
        channels: channels of the images.
        width: channels of every block; below 32, or a multiple of 32.
        blocks: residual blocks.
        halvings: convolutions of stride 2 in the stem.

    Raises:
        SettingError: channels that do not divide into the groups of GN.
        StateError: (when called) an image too small for the stem.

    Source: as :class:`ODENet`; the paper prints 0.60 million parameters.

    >>> sum(p.numel() for p in ODEResNet(channels=1).parameters())
    576778
    """

    def __init__(
        self, num_classes: int = 10, channels: int = 3, width: int = 64, blocks: int = 6, halvings: int = 2
    ) -> None:
        def function() -> nn.Module:
            convs = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
            return nn.Sequential(*_normalised(width, convs))

        residual = (ResidualBlock(function(), nn.Identity()) for _ in range(blocks))
        super().__init__(Reduction(channels, width, halvings), residual, _head(width, num_classes))


class ODEFunction(nn.Module):
    """The derivative in ODE-Net: GN-ReLU-conv3x3-GN-ReLU-conv3x3-GN, (t, (N, C, H, W)) -> (N, C, H, W)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(group_norm(width) for _ in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(width + 1, width, 3, padding=1) for _ in range(2))

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        for norm, conv in zip(self.norms, self.convs, strict=False):
            time = t.to(z).expand_as(z[:, :1])
            z = conv(torch.cat((time, norm(z).relu()), 1))
        return self.norms[-1](z)


class Reduction(nn.Sequential):
    """The stem: conv3x3 without padding, then GN-ReLU-conv4x4 of stride 2, so many times as there are halvings.

    It leaves at least 2 x 2 pixels. Of a single one GN sees two numbers for each group, makes plus and minus one of
    them, and passes next to no gradient: networks of either kind stay at chance, and the adjoint's solver gives up.

    Raises:
        StateError: (when called) an image too small for that.
    """

    def __init__(self, channels: int, width: int, halvings: int) -> None:
        halving = (nn.Conv2d(width, width, 4, stride=2, padding=1) for _ in range(halvings))
        super().__init__(nn.Conv2d(channels, width, 3), *_normalised(width, halving))
        self.least = 2 + 2 * 2**halvings

    def forward(self, input: Tensor) -> Tensor:
        if min(input.shape[2:]) < self.least:
            height, width = input.shape[2:]
            raise StateError(
                f"the stem needs images of at least {self.least} x {self.least} pixels, got {height} x {width}: use "
                "larger images, or fewer halvings, as odenetsmall"
            )
        return super().forward(input)


def group_norm(width: int) -> nn.GroupNorm:
    """GN in 32 groups, or in as many as there are channels where these are fewer.

    Raises:
        SettingError: the channels do not divide into 32 groups.
    """
    if width > 32 and width % 32:
        raise SettingError(f"{width} channels do not divide into 32 groups: choose 32 or fewer, or a multiple of 32")
    return nn.GroupNorm(min(32, width), width)


def _normalised(width: int, layers: Iterable[nn.Module]) -> list[nn.Module]:
    """GN-ReLU before each layer."""
    return [part for layer in layers for part in (group_norm(width), nn.ReLU(), layer)]


def _head(width: int, num_classes: int) -> nn.Sequential:
    return nn.Sequential(*_normalised(width, [MeanHead(width, num_classes)]))

"""Momentum ResNets: the ResNets that everybody knows, with one changed rule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from reversa.engine import Engine
from reversa.errors import SettingError
from reversa.exact import Arithmetic
from reversa.models.functions import at_depth
from reversa.models.layers import ImageClassifier, Place, places
from reversa.models.resnet import ResidualBlock
from reversa.schemes import Momentum
from reversa.sequence import ReversibleSequence

# Shapes in this file: N images, C channels, H x W pixels.


class MeanHead(nn.Linear):
    """(N, C, H, W) -> (N, num_classes): mean over the pixels, linear."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.mean((2, 3)))


class MomentumResNet(ImageClassifier):
    r"""ResNet of the original kind (convolution, BN, ReLU), whose stages are Momentum chains.

    .. code-block:: text

        (N, channels, H, W)   conv3x3-BN-ReLU (large: conv7x7, stride 2, max pool)  -> (N, 64, H, W)
        stage i               an ordinary block where the shape changes, then a Momentum chain
        head                  mean over pixels, linear                              -> (N, num_classes)

    There is no ReLU behind a sum, as in the authors' networks. Without a learned velocity the parameters are those of
    the ResNet of the same size.

    Args:
        num_classes: width of the output layer.
        channels: channels of the images.
        blocks: residual blocks of each stage; stages have 64, 128, ... channels (four times as many with bottlenecks).
        narrows: blocks are bottlenecks of three convolutions instead of two 3x3 convolutions.
        large: images as large as ImageNet's: the stem reduces them by four.
        gamma: weight of the old velocity, in (0, 1].
        init: the first velocity of each chain: ``"zero"``, or ``"learned"``, one more residual function of its input.
        groups: of the 3x3 convolution of a bottleneck; more than one makes it ResNeXt's.
        survival: with stochastic depth, the probability that the last residual function is not left out of a training
            step. Blocks that change the shape always take part.
        engine: how the backward pass gets the states, :class:`reversa.Invert` where not given.
        exact: as in :class:`reversa.ReversibleSequence`.

    Raises:
        SettingError: gamma outside (0, 1], or another init.

    Source: Sander, Ablin, Blondel, Peyré, ICML 2021, arXiv:2102.07870, and the authors' code.

    >>> sum(p.numel() for p in MomentumResNet(num_classes=1000, large=True).parameters())  # torchvision's resnet18
    11689512
    """

    def __init__(
        self,
        num_classes: int = 10,
        channels: int = 3,
        blocks: Sequence[int] = (2, 2, 2, 2),
        narrows: bool = False,
        large: bool = False,
        gamma: float = 0.9,
        init: Literal["zero", "learned"] = "zero",
        groups: int = 1,
        survival: float = 1.0,
        engine: Engine | None = None,
        exact: bool | Arithmetic = False,
    ) -> None:
        if init not in ("zero", "learned"):
            raise SettingError(f"the first velocity is 'zero' or 'learned', got {init!r}")

        def function(place: Place) -> nn.Module:
            return _function(place.narrow, place.wide, place.stride, narrows, groups)

        def transition(place: Place) -> nn.Module:
            return ResidualBlock(function(place), nn.Sequential(*_conv(place.narrow, place.wide, 1, place.stride)))

        def stage(blocks: Sequence[Place]) -> nn.Module:
            inside = [place for place in blocks if place.keeps_shape]
            functions = [at_depth(function(place), place.block, place.blocks, survival) for place in inside]
            parts = [transition(place) for place in blocks if not place.keeps_shape]
            if functions:
                first = function(inside[0]) if init == "learned" else "zero"
                parts.append(ReversibleSequence(functions, Momentum(gamma, first), exact, engine))
            return nn.Sequential(*parts)

        stages = places(64, [64 * 2**stage * (4 if narrows else 1) for stage in range(len(blocks))], blocks)
        size, stride = (7, 2) if large else (3, 1)
        pool = [nn.MaxPool2d(3, 2, 1)] if large else []
        super().__init__(
            nn.Sequential(*_conv(channels, 64, size, stride), nn.ReLU(), *pool),
            map(stage, stages),
            MeanHead(stages[-1][-1].wide, num_classes),
        )


def _function(narrow: int, wide: int, stride: int, narrows: bool, groups: int) -> nn.Sequential:
    """Convolution-BN, with ReLU in between and none behind; the stride is in the (first) 3x3 convolution."""
    if not narrows:
        return nn.Sequential(*_conv(narrow, wide, 3, stride), nn.ReLU(), *_conv(wide, wide, 3))
    inner = wide // (4 if groups == 1 else 2)
    middle = _conv(inner, inner, 3, stride, groups)
    return nn.Sequential(*_conv(narrow, inner, 1), nn.ReLU(), *middle, nn.ReLU(), *_conv(inner, wide, 1))


def _conv(narrow: int, wide: int, size: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(narrow, wide, size, stride, size // 2, groups=groups, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return [conv, nn.BatchNorm2d(wide)]

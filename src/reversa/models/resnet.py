"""Pre-activation residual networks with stored activations: what reversible networks are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn

from reversa.models.functions import at_depth, basic, bottleneck
from reversa.models.layers import Head, ImageClassifier, Place, places, shortcut, stem

# Shapes in this file: N images, C channels, H x W pixels.


class ResidualBlock(nn.Module):
    """``shortcut(x) + residual(x)``; the shortcut is x itself where the shape stays."""

    def __init__(self, residual: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.residual, self.shortcut = residual, shortcut

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.residual(x)


class ResNet(ImageClassifier):
    """Pre-activation ResNet, as the RevNet authors built it for their comparison.

    .. code-block:: text

        (N, channels, H, W)   stem                                               -> (N, widths[0], H, W)
        stage i               blocks[i] residual blocks; the first one halves the resolution (i > 0)
        head                  BN-ReLU, mean over pixels, linear                  -> (N, num_classes)

    Args:
        num_classes: width of the output layer.
        channels: channels of the images.
        widths: channels of the stem and of each stage; with a bottleneck stages have four times as many.
        blocks: residual blocks of each stage.
        narrows: blocks are bottlenecks of three convolutions instead of two 3x3 convolutions.
        large: images as large as ImageNet's: the stem reduces them by four.
        groups: of the 3x3 convolution of a bottleneck; more than one makes it ResNeXt's.
        survival: with stochastic depth, the probability that the last residual function is not left out of a training
            step. Blocks that change the shape always take part.

    Source: He, Zhang, Ren, Sun: Identity Mappings in Deep Residual Networks, ECCV 2016, arXiv:1603.05027; in detail as
    in the code of Gomez et al., NeurIPS 2017, arXiv:1707.04585, whose parameters it has to the last one.

    >>> sum(p.numel() for p in ResNet().parameters())
    464154
    """

    def __init__(
        self,
        num_classes: int = 10,
        channels: int = 3,
        widths: Sequence[int] = (16, 16, 32, 64),
        blocks: Sequence[int] = (5, 5, 5),
        narrows: bool = False,
        large: bool = False,
        groups: int = 1,
        survival: float = 1.0,
    ) -> None:
        make = partial(bottleneck, groups=groups) if narrows else basic

        def block(place: Place) -> nn.Module:
            residual = make(place.narrow, place.wide, place.stride, activate=place.block > 1)
            if place.keeps_shape:
                return ResidualBlock(at_depth(residual, place.block, place.blocks, survival), nn.Identity())
            return ResidualBlock(residual, shortcut(place.narrow, place.wide, place.stride, projects=narrows))

        stages = places(widths[0], [width * (4 if narrows else 1) for width in widths[1:]], blocks)
        super().__init__(
            stem(channels, widths[0], large),
            (nn.Sequential(*map(block, stage)) for stage in stages),
            Head(stages[-1][-1].wide, num_classes),
        )

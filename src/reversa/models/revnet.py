"""RevNets: residual networks on two streams, reversible but where the resolution changes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from reversa.engine import Engine
from reversa.exact import Arithmetic
from reversa.models.functions import at_depth, basic, bottleneck
from reversa.models.layers import Head, ImageClassifier, Place, places, shortcut, stem
from reversa.schemes import RevNet as RevNetScheme
from reversa.sequence import ReversibleSequence

# Shapes in this file: N images, C channels, H x W pixels.


class RevNetTransition(nn.Module):
    r"""The first block of a stage, which changes the shape and is not reversible.

    .. math:: y_1 = D_1 x_1 + F(x_2), \qquad y_2 = D_2 x_2 + G(y_1)
    """

    def __init__(self, f: nn.Module, g: nn.Module, shortcuts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.f, self.g = f, g
        self.shortcuts = nn.ModuleList(shortcuts)

    def forward(self, x: Tensor) -> Tensor:
        one, two = x.chunk(2, 1)
        one = self.shortcuts[0](one) + self.f(two)
        return torch.cat((one, self.shortcuts[1](two) + self.g(one)), 1)


class RevNet(ImageClassifier):
    """The reversible residual network, whose streams are the halves of the channels.

    .. code-block:: text

        (N, channels, H, W)   stem                                               -> (N, widths[0], H, W)
        stage i               a first block that changes the shape, stored; then a reversible chain of blocks
        head                  BN-ReLU, mean over pixels, linear                  -> (N, num_classes)

    In the first stage of a network for small images the first block changes nothing, and belongs to the chain.

    Args:
        num_classes: width of the output layer.
        channels: channels of the images.
        widths: channels of the stem and of each stage, both streams together; with a bottleneck stages have four times
            as many.
        blocks: blocks ``(F, G)`` of each stage.
        narrows: functions are bottlenecks of three convolutions instead of two 3x3 convolutions.
        large: images as large as ImageNet's: the stem reduces them by four.
        groups: of the 3x3 convolution of a bottleneck; more than one makes it ResNeXt's.
        survival: with stochastic depth, the probability that the last residual function is not left out of a training
            step. Blocks that change the shape always take part.
        engine: how the backward pass gets the states, :class:`reversa.Invert` where not given.
        exact: as in :class:`reversa.ReversibleSequence`.

    Source: Gomez, Ren, Urtasun, Grosse, NeurIPS 2017, arXiv:1707.04585. Parameters as in the authors' code; the paper
    prints 45.2 million for RevNet-104, which has 45,428,072.

    >>> sum(p.numel() for p in RevNet().parameters())
    464890
    """

    def __init__(
        self,
        num_classes: int = 10,
        channels: int = 3,
        widths: Sequence[int] = (32, 32, 64, 112),
        blocks: Sequence[int] = (3, 3, 3),
        narrows: bool = False,
        large: bool = False,
        groups: int = 1,
        survival: float = 1.0,
        engine: Engine | None = None,
        exact: bool | Arithmetic = False,
    ) -> None:
        make = partial(bottleneck, groups=groups) if narrows else basic

        def pair(place: Place) -> tuple[nn.Module, nn.Module]:
            half = place.wide // 2
            return make(place.narrow // 2, half, place.stride, activate=place.block > 1), make(half, half)

        def transition(place: Place) -> nn.Module:
            halves = place.narrow // 2, place.wide // 2
            return RevNetTransition(*pair(place), [shortcut(*halves, place.stride, projects=narrows) for _ in range(2)])

        def stage(blocks: Sequence[Place]) -> nn.Module:
            pairs = [
                tuple(at_depth(f, place.block, place.blocks, survival) for f in pair(place))
                for place in blocks
                if place.keeps_shape
            ]
            parts = [transition(place) for place in blocks if not place.keeps_shape]
            chain = [ReversibleSequence(pairs, RevNetScheme(), exact, engine)] if pairs else []
            return nn.Sequential(*parts, *chain)

        stages = places(widths[0], [width * (4 if narrows else 1) for width in widths[1:]], blocks)
        super().__init__(stem(channels, widths[0], large), map(stage, stages), Head(stages[-1][-1].wide, num_classes))

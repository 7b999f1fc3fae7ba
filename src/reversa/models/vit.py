"""Vision Transformers, whose activations need not be stored."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from reversa.engine import Engine
from reversa.errors import SettingError, StateError
from reversa.exact import Arithmetic
from reversa.models.layers import ImageClassifier, check_sizes
from reversa.models.transformer import Transformer, Trunk, linear, sines

# Shapes in this file: N images, C channels, H x W pixels; L tokens, D features (the width).


class PatchEmbedding(nn.Module):
    r"""A token for every patch of P x P pixels: (N, C, H, W) -> (N, H W / P^2, D), row by row.

    .. math:: x_{ij} = W \, \mathrm{patch}_{ij} + b + \big(\mathrm{sines}(i), \mathrm{sines}(j)\big)

    The position code has no parameters, so that images of any size can be taken: one half of the features tells the
    row, the other the column (:func:`reversa.models.transformer.sines`).

    Args:
        channels: C.
        width: D; a multiple of 4.
        patch: P.

    Raises:
        SettingError: a width that is no multiple of 4, or a size below 1.
        StateError: (when called) P does not divide the image's sides.

    Source: Dosovitskiy et al., 2021, arXiv:2010.11929; the position code: Beyer, Zhai, Kolesnikov: Better plain ViT
    baselines for ImageNet-1k, 2022, arXiv:2205.01580.

    >>> PatchEmbedding(3, 8, patch=4)(torch.randn(2, 3, 8, 12)).shape
    torch.Size([2, 6, 8])
    """

    def __init__(self, channels: int, width: int, patch: int) -> None:
        super().__init__()
        check_sizes(channels=channels, width=width, patch=patch)
        if width % 4:
            raise SettingError(
                f"the position code needs sines and cosines for rows and columns, got a width of {width}: "
                "choose a multiple of 4"
            )
        self.patch = patch
        self.conv = nn.Conv2d(channels, width, patch, stride=patch)
        # As in the ViT authors' code: PyTorch's own weights would leave the pixels faint beside the position code.
        nn.init.trunc_normal_(self.conv.weight, std=1 / math.sqrt(channels * patch**2))

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-2] % self.patch or x.shape[-1] % self.patch:
            raise StateError(
                f"images of {x.shape[-2]} x {x.shape[-1]} pixels do not divide into patches of {self.patch} x "
                f"{self.patch}: resize or pad them, or choose another patch"
            )
        y = self.conv(x)
        tokens = y.flatten(2).transpose(1, 2)
        # In the parameters' data type, so that under autocast the state that the trunk carries is no narrower.
        rows, columns = (torch.arange(side, dtype=self.conv.weight.dtype, device=x.device) for side in y.shape[-2:])
        half = y.shape[1] // 2
        by_row = sines(rows, half).repeat_interleave(len(columns), 0)
        by_column = sines(columns, half).repeat(len(rows), 1)
        return (tokens + torch.cat((by_row, by_column), -1)).contiguous()


class MeanTokenHead(nn.Module):
    """(N, L, D) -> (N, num_classes): mean over the tokens, linear."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.linear = linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.mean(1))


class VisionTransformer(ImageClassifier):
    r"""Vision Transformer on any trunk of :class:`reversa.models.transformer.Transformer`.

    .. code-block:: text

        (N, channels, H, W)   patches by a convolution, position code            -> (N, L, width)
        trunk                 depth times attention and perceptron, LayerNorm    -> (N, L, width)
        head                  mean over the tokens, linear                       -> (N, num_classes)

    There is no class token, and the position code has no parameters: images of any size work whose sides are multiples
    of the patch. All trunks have the same parameters.

    Args:
        num_classes: width of the output layer.
        channels: channels of the images.
        patch: side of a patch.
        width: features of a token; a multiple of 4 and of the number of heads.
        depth: blocks, each of two residual functions.
        heads: heads of the attention.
        trunk: ``"residual"`` with stored activations, ``"revnet"`` (Rev-ViT) or ``"momentum"``.
        gamma: weight of the old velocity of a momentum trunk, 0.9 where not given.
        dropout: the probability of a zero in the residual functions, in training.
        engine: how the backward pass of a reversible trunk gets its states, :class:`reversa.Invert` where not given.
        exact: as in :class:`reversa.ReversibleSequence`.

    Raises:
        SettingError: heads or 4 do not divide the width, an unknown trunk, or a setting that the trunk does not have.
        StateError: (when called) an image whose sides are no multiple of the patch.

    Source: Dosovitskiy et al.: An Image is Worth 16x16 Words, ICLR 2021, arXiv:2010.11929; Mangalam et al.: Reversible
    Vision Transformers, CVPR 2022, arXiv:2302.04869.

    >>> net = VisionTransformer(trunk="revnet", depth=2, width=32)
    >>> net(torch.randn(2, 3, 32, 32)).shape, net(torch.randn(2, 3, 8, 8)).shape
    (torch.Size([2, 10]), torch.Size([2, 10]))
    """

    def __init__(
        self,
        num_classes: int = 10,
        channels: int = 3,
        patch: int = 4,
        width: int = 96,
        depth: int = 6,
        heads: int = 4,
        trunk: Trunk = "residual",
        gamma: float | None = None,
        dropout: float = 0.0,
        engine: Engine | None = None,
        exact: bool | Arithmetic = False,
    ) -> None:
        check_sizes(num_classes=num_classes)
        super().__init__(
            PatchEmbedding(channels, width, patch),
            [Transformer(width, depth, heads, None, trunk, gamma, dropout, engine=engine, exact=exact)],
            MeanTokenHead(width, num_classes),
        )

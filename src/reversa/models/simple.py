"""The Hamiltonian networks of a student report: simplified, regularised, and with inception kernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reversa.engine import Engine
from reversa.errors import SettingError, StateError
from reversa.exact import Arithmetic
from reversa.models.functions import Kernel, Symmetric
from reversa.schemes import Hamiltonian
from reversa.sequence import ReversibleSequence

# Shapes in this file: N images, C channels, H x W pixels.


class BiasedKernel(Kernel):
    r""":math:`K x + b`, and the adjoint :math:`K^\top z`.

    Args:
        width: channels of x.
        padding: of the 3x3 convolution.
        published: add b behind the adjoint as well, as the report's code does. That is not the adjoint of anything.
    """

    def __init__(self, width: int, padding: int = 0, published: bool = False) -> None:
        super().__init__(width, 3, padding=padding)
        # What nn.Conv2d begins with. Not a bias of zero: behind a transition one stream is zero, and a ReLU at exactly
        # zero has another slope than at what float arithmetic computes back, a zero but for its last digits.
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)
        bound = (9 * width) ** -0.5
        self.bias = nn.Parameter(torch.empty(width).uniform_(-bound, bound))
        self.published = published

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, padding=self.padding)

    def adjoint(self, z: Tensor) -> Tensor:
        return F.conv_transpose2d(z, self.weight, self.bias if self.published else None, padding=self.padding)


class Inception(nn.Module):
    r"""An inception block as one affine map, and the adjoint of its linear part.

    The channels are four groups of equal width: one goes through a 1x1 convolution, one through 1x1 and 3x3, one
    through 1x1 and 5x5, and one stays as it is.

    .. math:: K = \mathrm{diag}(C_1,\; C_3 C_1',\; C_5 C_1'',\; I), \qquad
        K^\top = \mathrm{diag}(C_1^\top,\; C_1'^\top C_3^\top,\; C_1''^\top C_5^\top,\; I)

    Args:
        width: channels; a multiple of four.
        published: transpose as the report's code does: :math:`C_3^\top C_1'^\top` instead of
            :math:`C_1'^\top C_3^\top`, with the biases added again. That is not the adjoint, and the report's proof of
            stability does not cover it.

    Raises:
        SettingError: the channels do not divide into four groups.
    """

    def __init__(self, width: int, published: bool = False) -> None:
        super().__init__()
        if width % 4:
            raise SettingError(f"an inception kernel has four groups of channels; {width} do not divide into them")
        quarter = width // 4

        def conv(size: int) -> nn.Conv2d:
            return nn.Conv2d(quarter, quarter, size, padding=size // 2)

        self.branches = nn.ModuleList(
            [nn.Sequential(conv(1)), nn.Sequential(conv(1), conv(3)), nn.Sequential(conv(1), conv(5)), nn.Sequential()]
        )
        self.published = published

    def forward(self, x: Tensor) -> Tensor:
        """K x and the biases."""
        groups = zip(self.branches, x.chunk(4, 1), strict=True)
        return torch.cat([branch(group) for branch, group in groups], 1)

    def adjoint(self, z: Tensor) -> Tensor:
        r""":math:`K^\top z`."""
        groups = list(z.chunk(4, 1))
        for i, branch in enumerate(self.branches):
            convs = list(branch) if self.published else list(branch)[::-1]  # type: ignore[call-overload]
            for conv in convs:
                bias = conv.bias if self.published else None
                groups[i] = F.conv_transpose2d(groups[i], conv.weight, bias, padding=conv.padding)
        return torch.cat(groups, 1)


class SimpleHamiltonianNet(nn.Module):
    r"""Hamiltonian-218 as a student report built it: step size 1, kernels without padding, no normalisation.

    .. code-block:: text

        (N, 3, 32, 32)        conv3x3 without padding, [BN]                      -> (N, 32, 30, 30)
        unit 1, 2, 3          reversible chain of blocks; mean over 3 x 3 pixels, stride 2; 32, then 64 channels of
                              zeros behind the others                            -> (N, 128, 2, 2)
        head                  [dropout 0.4], linear                              -> (N, num_classes)

    The zeros stand behind all channels, so that after a transition one stream holds everything and the other nothing.

    Args:
        num_classes: width of the output layer.
        channels: channels of the images, which have 32 x 32 pixels.
        blocks: blocks ``(F, G)`` of each unit.
        h: the step size; 1 in the report.
        regularised: with BN behind the first convolution and dropout before the last layer.
        inception: with :class:`Inception` kernels instead of 3x3 convolutions.
        published: with the report's transposes, which are not adjoints (:class:`BiasedKernel`, :class:`Inception`).
        engine: how the backward pass gets the states, :class:`reversa.Invert` where not given.
        exact: as in :class:`reversa.ReversibleSequence`.

    Raises:
        StateError: (when called) images of another size.

    Source: Masin, Rothschild: a report on Chang et al., AAAI 2018, arXiv:1709.03698. Its accuracies (96 and 97 %) come
    from a run that trained on 9,000 of the 10,000 test images, and are no target.

    >>> sum(p.numel() for p in SimpleHamiltonianNet().parameters())
    1751882
    """

    def __init__(
        self,
        num_classes: int = 10,
        channels: int = 3,
        blocks: int = 18,
        h: float = 1.0,
        regularised: bool = False,
        inception: bool = False,
        published: bool = False,
        engine: Engine | None = None,
        exact: bool | Arithmetic = False,
    ) -> None:
        super().__init__()

        def function(width: int) -> nn.Module:
            kernel = Inception(width, published) if inception else BiasedKernel(width, 0, published)
            return Symmetric(kernel, nn.Identity())

        def chain(width: int) -> ReversibleSequence:
            pairs = [(function(width // 2), function(width // 2)) for _ in range(blocks)]
            return ReversibleSequence(pairs, Hamiltonian(h), exact, engine)

        first: list[nn.Module] = [nn.Conv2d(channels, 32, 3)]
        self.stem = nn.Sequential(*first, *([nn.BatchNorm2d(32)] if regularised else []))
        self.units = nn.ModuleList(chain(width) for width in (32, 64, 128))
        self.drop = nn.Dropout(0.4 if regularised else 0.0)
        self.head = nn.Linear(512, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Scores (N, num_classes) of images (N, channels, 32, 32)."""
        if not all(25 <= side <= 32 for side in x.shape[2:]):  # the head takes the 2 x 2 pixels that are left of these
            raise StateError(
                f"this network is built for images (N, channels, 32, 32), got {tuple(x.shape)}: resize them, or "
                "train on digits32"
            )
        x = self.stem(x)
        for i, unit in enumerate(self.units):
            x = F.avg_pool2d(unit(x), 3, 2)
            if i < 2:
                x = torch.cat((x, torch.zeros_like(x)), 1)
        return self.head(self.drop(x.flatten(1)))

r"""Residual functions of the papers.

What is called kernel is the linear map K of a function :math:`K^\top \sigma(K x + b)`: the same numbers serve a
convolution and its adjoint, the transposed convolution.

Shapes in this file: N images, C channels, H x W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reversa.errors import SettingError


class Bias(nn.Module):
    """One number for each channel (dim 1), added."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias.view(-1, *[1] * (x.dim() - 2))


class Kernel(nn.Module):
    r"""A linear map K and its adjoint :math:`K^\top`, by the same numbers: :math:`\langle K x, z \rangle = \langle x,
    K^\top z \rangle`.

    Args:
        width: channels (or features) of x.
        size: side of a convolution's kernel; None for a dense map.
        hidden: channels of K x; as many as x has where not given.
        padding: of the convolution; by default so that K keeps the image's size.

    Raises:
        SettingError: an even kernel without a padding, which would not keep the image's size.
    """

    def __init__(self, width: int, size: int | None = 3, hidden: int | None = None, padding: int | None = None) -> None:
        super().__init__()
        if size is not None and padding is None and size % 2 == 0:
            raise SettingError(f"a kernel of side {size} does not keep the image's size: choose an odd side")
        self.size = size
        self.padding = padding if padding is not None else (size or 1) // 2
        hidden = width if hidden is None else hidden
        self.weight = nn.Parameter(torch.empty(hidden, width, *[] if size is None else [size, size]))
        nn.init.kaiming_normal_(self.weight, mode="fan_out")

    def forward(self, x: Tensor) -> Tensor:
        """K x."""
        return F.linear(x, self.weight) if self.size is None else F.conv2d(x, self.weight, padding=self.padding)

    def adjoint(self, z: Tensor) -> Tensor:
        r""":math:`K^\top z`."""
        if self.size is None:
            return F.linear(z, self.weight.t())
        return F.conv_transpose2d(z, self.weight, padding=self.padding)


class Map(Protocol):
    """A linear (or affine) map, and the adjoint of its linear part; a module."""

    def __call__(self, x: Tensor) -> Tensor: ...

    def adjoint(self, z: Tensor) -> Tensor: ...


class Symmetric(nn.Module):
    r"""The two-layer residual function with a symmetric Jacobian.

    .. math:: f(x) = K^\top \mathrm{ReLU}(K\, b_1(x) + b_2)

    whose Jacobian :math:`K^\top \mathrm{diag}(\sigma') K` is symmetric and has no negative eigenvalue. In a Hamiltonian
    network two of them push each other around; in a leapfrog network it is the force.

    Args:
        kernel: K.
        inner: what K x goes through before the ReLU: a :class:`Bias`, or a normalisation.
        outer: what x goes through before K; nothing where not given.

    Source: Chang et al., AAAI 2018, arXiv:1709.03698; the authors' code has both biases.

    >>> f = Symmetric(Kernel(4), Bias(4))
    >>> sum(p.numel() for p in f.parameters())
    148
    """

    def __init__(self, kernel: Map, inner: nn.Module, outer: nn.Module | None = None) -> None:
        super().__init__()
        self.outer = nn.Identity() if outer is None else outer
        self.kernel, self.inner = kernel, inner

    def forward(self, x: Tensor) -> Tensor:
        return self.kernel.adjoint(self.inner(self.kernel(self.outer(x))).relu())


class Antisymmetric(nn.Module):
    r"""The one-layer residual function of midpoint networks.

    .. math:: f(x) = \mathrm{ReLU}\big((K - K^\top) x + b\big)

    :math:`K - K^\top` is antisymmetric, so that its eigenvalues are imaginary.

    Args:
        kernel: K, which keeps the shape.
        inner: what :math:`(K - K^\top) x` goes through before the ReLU.

    Source: Chang et al., AAAI 2018, arXiv:1709.03698.

    >>> sum(p.numel() for p in Antisymmetric(Kernel(4), Bias(4)).parameters())
    148
    """

    def __init__(self, kernel: Kernel, inner: nn.Module) -> None:
        super().__init__()
        self.kernel, self.inner = kernel, inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.kernel(x) - self.kernel.adjoint(x)).relu()


class OneLayer(nn.Module):
    r"""Half of a one-layer Hamiltonian block: :math:`F(z) = \mathrm{ReLU}(K z + b)`, or with
    :math:`K^\top` for the other half.

    Source: Haber, Ruthotto: Stable Architectures for Deep Neural Networks, 2017, arXiv:1705.03341.
    """

    def __init__(self, kernel: Kernel, inner: nn.Module, adjoint: bool = False) -> None:
        super().__init__()
        self.kernel, self.inner, self.adjoint = kernel, inner, adjoint

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.kernel.adjoint(x) if self.adjoint else self.kernel(x)).relu()


def one_layer_pair(width: int, size: int | None = 3) -> tuple[OneLayer, OneLayer]:
    r"""A block ``(F, G)`` of the one-layer Hamiltonian network: :math:`\dot y = \sigma(K z + b_1)`,
    :math:`\dot z = -\sigma(K^\top y + b_2)`, one kernel for both.

    >>> f, g = one_layer_pair(4)
    >>> f.kernel is g.kernel
    True
    """
    kernel = Kernel(width, size)
    return OneLayer(kernel, Bias(width)), OneLayer(kernel, Bias(width), adjoint=True)


class StochasticDepth(nn.Module):
    r"""Leaves a residual function out of a training step, at random, for the whole batch at once.

    .. math:: f'(x) = b f(x), \quad b \sim \mathrm{Bernoulli}(p); \qquad \text{in eval mode } p f(x)

    A function that is left out is not computed, and its parameters have no gradient in that step (DDP wants
    ``find_unused_parameters=True`` then). The engine replays the same b on the way back.

    Args:
        function: f.
        survival: p, in (0, 1].

    Raises:
        SettingError: p outside (0, 1].

    Source: Huang, Sun, Liu, Sedra, Weinberger: Deep Networks with Stochastic Depth, ECCV 2016, arXiv:1603.09382.
    """

    def __init__(self, function: nn.Module, survival: float) -> None:
        super().__init__()
        if not 0 < survival <= 1:
            raise SettingError(f"the probability to survive must lie in (0, 1], got {survival}")
        self.function, self.survival = function, survival

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return self.survival * self.function(x)
        return self.function(x) if torch.rand(()) < self.survival else torch.zeros_like(x)


def at_depth(function: nn.Module, block: int, blocks: int, survival: float) -> nn.Module:
    r"""The function of a block (1, 2, ...) under the linear rule of stochastic depth; itself where all survive.

    .. math:: p_l = 1 - \tfrac{l}{L} (1 - p_L)

    >>> at_depth(nn.Identity(), 1, 10, survival=0.5).survival
    0.95

    Raises:
        SettingError: survival outside (0, 1].
    """
    if not 0 < survival <= 1:
        raise SettingError(f"the probability to survive must lie in (0, 1], got {survival}")
    return function if survival == 1 else StochasticDepth(function, 1 - block / blocks * (1 - survival))


def preactivated(layers: Sequence[nn.Module], activate: bool = True) -> nn.Sequential:
    """BN-ReLU before each convolution; not before the first where ``activate`` is False."""
    made: list[nn.Module] = []
    for i, layer in enumerate(layers):
        if i or activate:
            made += [nn.BatchNorm2d(int(layer.in_channels), eps=1e-3), nn.ReLU()]  # type: ignore[arg-type]
        made.append(layer)
    return nn.Sequential(*made)


def basic(narrow: int, wide: int, stride: int = 1, activate: bool = True) -> nn.Sequential:
    """Two 3x3 convolutions, pre-activated, the stride in the first: (N, narrow, H, W) -> (N, wide, H/s, W/s).

    Source: Gomez et al., NeurIPS 2017, arXiv:1707.04585, and the authors' code.
    """
    return preactivated([convolution(narrow, wide, 3, stride), convolution(wide, wide, 3)], activate)


def bottleneck(narrow: int, wide: int, stride: int = 1, activate: bool = True, groups: int = 1) -> nn.Sequential:
    """1x1, 3x3 and 1x1 convolution, pre-activated, the stride in the first; a quarter of the channels in between.

    With more than one group it is ResNeXt's (Xie et al., CVPR 2017, arXiv:1611.05431): half of the channels in between,
    and a grouped 3x3 convolution.

    Raises:
        SettingError: the inner channels do not divide into the groups.
    """
    inner = wide // (4 if groups == 1 else 2)
    if inner % groups:
        raise SettingError(f"{inner} channels do not divide into {groups} groups")
    middle = convolution(inner, inner, 3, groups=groups)
    return preactivated([convolution(narrow, inner, 1, stride), middle, convolution(inner, wide, 1)], activate)


def convolution(narrow: int, wide: int, size: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """Without bias, so padded that only the stride changes the size; normal weights of variance 2 / (size^2 wide)."""
    conv = nn.Conv2d(narrow, wide, size, stride, size // 2, groups=groups, bias=False)
    deviation = math.sqrt(2 / (size**2 * wide))
    nn.init.trunc_normal_(conv.weight, std=deviation, a=-2 * deviation, b=2 * deviation)
    return conv

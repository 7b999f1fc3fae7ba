"""What invertible networks change the shape with: every layer here has an ``inverse``."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reversa.errors import SettingError, StateError

# Shapes in this file: N images, C channels, H x W pixels.


class Invertible(Protocol):
    """A layer with an inverse."""

    def __call__(self, x: Tensor) -> Tensor: ...

    def inverse(self, x: Tensor) -> Tensor: ...


class SpaceToDepth(nn.Module):
    r"""Squares of pixels become channels: :math:`\psi`, which changes the shape and loses nothing.

    .. math:: \psi(x)_{n,\,(i s + j) C + c,\,h,\,w} = x_{n,\,c,\,s h + i,\,s w + j}, \qquad 0 \le i, j < s

    (N, C, s H, s W) -> (N, s^2 C, H, W). All channels of a square's first pixel come first, then those of the pixel to
    its right, as in the authors' code; :func:`torch.nn.functional.pixel_unshuffle` has the pixels of the first channel
    first. The numbers are moved, never changed: :meth:`inverse` gives back the same bits.

    Args:
        size: the side s of a square; 1 changes nothing.

    Raises:
        SettingError: size is not a whole number from 1 on.
        StateError: (in :meth:`forward`) the sides of the image are no multiples of s; (in :meth:`inverse`) the channels
            are no multiple of s^2.

    Source: Jacobsen, Smeulders, Oyallon: i-RevNet: Deep Invertible Networks, ICLR 2018, arXiv:1802.07088.

    >>> import torch
    >>> psi = SpaceToDepth(2)
    >>> x = torch.arange(8.0).view(1, 2, 2, 2)
    >>> psi(x).flatten().tolist()
    [0.0, 4.0, 1.0, 5.0, 2.0, 6.0, 3.0, 7.0]
    >>> torch.equal(psi.inverse(psi(x)), x)
    True
    """

    def __init__(self, size: int = 2) -> None:
        super().__init__()
        if not _is_whole(size) or size < 1:
            raise SettingError(f"the side of a square must be a whole number from 1 on, got {size!r}")
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        _check_images(x, "SpaceToDepth")
        n, c, height, width = x.shape
        s = self.size
        if height % s or width % s:
            raise StateError(
                f"images of {height} x {width} pixels do not divide into squares of {s} x {s}: crop or pad them, or "
                f"choose sides that are multiples of {s}"
            )
        squares = x.reshape(n, c, height // s, s, width // s, s)
        return squares.permute(0, 3, 5, 1, 2, 4).reshape(n, s * s * c, height // s, width // s)

    def inverse(self, x: Tensor) -> Tensor:
        """(N, s^2 C, H, W) -> (N, C, s H, s W)."""
        _check_images(x, "SpaceToDepth")
        n, c, height, width = x.shape
        s = self.size
        if c % (s * s):
            raise StateError(
                f"{c} channels do not make squares of {s} x {s} pixels, which takes a multiple of {s * s}: give the "
                "inverse what the forward pass returned"
            )
        squares = x.reshape(n, s, s, c // (s * s), height, width)
        return squares.permute(0, 3, 4, 1, 5, 2).reshape(n, c // (s * s), s * height, s * width)

    def extra_repr(self) -> str:
        return f"size={self.size}"


class InjectivePad(nn.Module):
    """Channels of zeros behind the others: (N, C, H, W) -> (N, C + channels, H, W).

    The map is injective: :meth:`inverse` drops those channels, whatever is in them.

    Args:
        channels: how many are added; 0 changes nothing.

    Raises:
        SettingError: channels is not a whole number from 0 on.
        StateError: x has not the shape of images; (in :meth:`inverse`) there are fewer channels than were added.

    Source: Jacobsen, Smeulders, Oyallon: i-RevNet: Deep Invertible Networks, ICLR 2018, arXiv:1802.07088.

    >>> import torch
    >>> pad = InjectivePad(2)
    >>> pad(torch.ones(1, 1, 1, 1)).flatten().tolist()
    [1.0, 0.0, 0.0]
    >>> pad.inverse(torch.ones(1, 3, 8, 8)).shape
    torch.Size([1, 1, 8, 8])
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        if not _is_whole(channels) or channels < 0:
            raise SettingError(f"the number of channels to add must be a whole number from 0 on, got {channels!r}")
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        _check_images(x, "InjectivePad")
        return F.pad(x, (0, 0, 0, 0, 0, self.channels))

    def inverse(self, x: Tensor) -> Tensor:
        """(N, C + channels, H, W) -> (N, C, H, W)."""
        _check_images(x, "InjectivePad")
        if x.shape[1] < self.channels:
            raise StateError(
                f"{self.channels} channels were added, so the inverse needs at least as many; it got {x.shape[1]}: "
                "give it what the forward pass returned"
            )
        return x[:, : x.shape[1] - self.channels]

    def extra_repr(self) -> str:
        return f"channels={self.channels}"


class EachHalf(nn.Module):
    """A layer for each half of the channels, the two streams: not the same as for all channels at once.

    >>> import torch
    >>> EachHalf(SpaceToDepth(2))(torch.arange(8.0).view(1, 2, 2, 2)).flatten().tolist()
    [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    """

    def __init__(self, layer: Invertible) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.layer(half) for half in x.chunk(2, 1)], 1)

    def inverse(self, x: Tensor) -> Tensor:
        """The layer's inverse for each half."""
        return torch.cat([self.layer.inverse(half) for half in x.chunk(2, 1)], 1)


class Before(nn.Module):
    r"""A residual function of what a layer was given, as a function of what it returned: :math:`f(\psi^{-1}(x))`."""

    def __init__(self, layer: Invertible, f: nn.Module) -> None:
        super().__init__()
        self.layer, self.f = layer, f

    def forward(self, x: Tensor) -> Tensor:
        return self.f(self.layer.inverse(x))


class BesideZeros(nn.Module):
    """A residual function of a stream whose last channels are padding.

    They are made zero once more, since they are computed back as rounding errors: BN blows those up where there is
    nothing else, and a ReLU at exactly zero has another slope than beside it.
    """

    def __init__(self, pad: InjectivePad, f: nn.Module) -> None:
        super().__init__()
        self.pad, self.f = pad, f

    def forward(self, x: Tensor) -> Tensor:
        return self.f(self.pad(self.pad.inverse(x)))


def _is_whole(number: object) -> bool:
    return isinstance(number, int) and not isinstance(number, bool)


def _check_images(x: Tensor, name: str) -> None:
    if x.dim() != 4:
        raise StateError(f"{name} takes images of shape (N, C, H, W), got {tuple(x.shape)}: add the missing dimensions")

"""A residual network for small images whose stages are reversible sequences."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

from reversa.engine import Engine
from reversa.errors import SettingError
from reversa.exact import Arithmetic
from reversa.models.layers import check_sizes
from reversa.schemes import Momentum, Scheme
from reversa.sequence import ReversibleSequence

# Shapes in this file: N images, C channels, H x W pixels.


class ReversibleResNet(nn.Module):
    r"""Residual network for small images: stages of reversible residual blocks.

    .. code-block:: text

        (N, channels, H, W)   conv3x3-BN-ReLU                                    -> (N, width, H, W)
        stage 1               depth/stages blocks, conv3x3-BN-ReLU-conv3x3-BN    -> the same shape
        transition            ordinary block of stride 2, twice the channels     -> (N, 2 width, H/2, W/2)
        stage 2, ...          and so on
        head                  BN-ReLU, mean over pixels, linear                  -> (N, num_classes)

    The last normalisation of every residual function begins with scale 0, so the network begins as its
    stem, transitions and head: a network of any depth can be trained with the same settings.

    Args:
        num_classes: width of the output layer.
        depth: residual blocks in all stages together.
        scheme: the update rule, ``Momentum(0.9)`` where not given. A block has as many residual functions as the
            scheme wants; where it splits the channels they have half the width.
        engine: how the backward pass gets the states, :class:`reversa.Invert` where not given.
        channels: channels of the images.
        width: channels of the first stage; even, so that every scheme can split them.
        stages: number of stages; each halves the resolution of the one before.
        exact: as in :class:`reversa.ReversibleSequence`.

    Raises:
        SettingError: fewer blocks than stages, a setting that is not a positive number, or a scheme of another kind.

    Source: Sander, Ablin, Blondel, Peyré: Momentum Residual Neural Networks, ICML 2021, arXiv:2102.07870; stages and
    transitions as in He, Zhang, Ren, Sun: Deep Residual Learning, CVPR 2016, arXiv:1512.03385.

    >>> import torch
    >>> net = ReversibleResNet(num_classes=10, depth=6, width=8)
    >>> net(torch.randn(2, 1, 8, 8)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        num_classes: int = 10,
        depth: int = 54,
        scheme: Scheme | None = None,
        engine: Engine | None = None,
        channels: int = 1,
        width: int = 16,
        stages: int = 3,
        exact: bool | Arithmetic = False,
    ) -> None:
        super().__init__()
        check_sizes(num_classes=num_classes, channels=channels, width=width, stages=stages, depth=depth)
        if depth < stages:
            raise SettingError(f"depth={depth} blocks cannot fill {stages} stages: choose depth >= {stages}")
        if width % 2:
            raise SettingError(
                f"width={width} is odd, but the channels must split into two streams: choose an even width"
            )
        scheme = Momentum(0.9) if scheme is None else scheme
        if not isinstance(scheme, Scheme):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise SettingError(
                f"scheme must be one of reversa.schemes, for instance reversa.Momentum(0.9); got {scheme!r}"
            )
        widths = [width * 2**stage for stage in range(stages)]
        self.stem = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.chains = nn.ModuleList(
            _chain(scheme, engine, exact, width, depth // stages + (stage < depth % stages))
            for stage, width in enumerate(widths)
        )
        self.transitions = nn.ModuleList(Transition(narrow, wide) for narrow, wide in pairwise(widths))
        self.norm = nn.Sequential(nn.BatchNorm2d(widths[-1]), nn.ReLU())
        self.head = nn.Linear(widths[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Scores (N, num_classes) of images (N, channels, H, W)."""
        x = self.chains[0](self.stem(x))
        for transition, chain in zip(self.transitions, self.chains[1:], strict=True):
            x = chain(transition(x))
        # The mean, not adaptive pooling: pooling has no deterministic backward on a GPU.
        return self.head(self.norm(x).mean((2, 3)))


class Transition(nn.Module):
    """Ordinary residual block of stride 2, from ``narrow`` to ``wide`` channels: its activations are stored."""

    def __init__(self, narrow: int, wide: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            nn.Conv2d(narrow, wide, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU(),
            nn.Conv2d(wide, wide, 3, padding=1, bias=False),
            nn.BatchNorm2d(wide),
        )
        self.shortcut = nn.Sequential(nn.Conv2d(narrow, wide, 1, stride=2, bias=False), nn.BatchNorm2d(wide))

    def forward(self, x: Tensor) -> Tensor:
        """(N, narrow, H, W) -> (N, wide, H/2, W/2), odd sizes rounded up."""
        return (self.shortcut(x) + self.residual(x)).relu()


def residual_function(width: int) -> nn.Sequential:
    """conv3x3-BN-ReLU-conv3x3-BN on ``width`` channels, zero at first."""
    last = nn.BatchNorm2d(width)
    nn.init.zeros_(last.weight)
    return nn.Sequential(
        nn.Conv2d(width, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1, bias=False),
        last,
    )


def _chain(
    scheme: Scheme, engine: Engine | None, exact: bool | Arithmetic, width: int, blocks: int
) -> ReversibleSequence:
    own = width if scheme.carries_input else width // 2  # the streams are halves
    per_block = scheme.functions_per_block
    functions = [tuple(residual_function(own) for _ in range(per_block)) for _ in range(blocks)]
    return ReversibleSequence([f if per_block > 1 else f[0] for f in functions], scheme, exact, engine)

"""i-ResNets: residual networks with an inverse, because their functions are contractions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from reversa.engine import Engine
from reversa.errors import SettingError, StateError
from reversa.models.invertible import InjectivePad, SpaceToDepth
from reversa.models.layers import Head, ImageClassifier
from reversa.models.lipschitz import LipschitzConv2d, Prepared, prepare, refresh
from reversa.schemes import IResNet as IResNetScheme
from reversa.sequence import ReversibleSequence

# Shapes in this file: N images, C channels, H x W pixels.


class ActNorm(Prepared):
    r"""A scale and a shift for each channel, chosen by the first training batch: it comes out with mean 0, variance 1.

    .. math:: y = e^s x + b

    Inverse: :math:`x = e^{-s} (y - b)`. :func:`~reversa.models.lipschitz.prepare` in training mode chooses s and b,
    once; whether that was done is in the ``state_dict``.

    Args:
        channels: of x, along dim 1.

    Shapes: (N, C, H, W) -> the same.

    Source: Kingma, Dhariwal: Glow, NeurIPS 2018, arXiv:1807.03039.

    >>> norm, x = ActNorm(3), 2 + torch.randn(8, 3, 4, 4)
    >>> prepare(norm, x)
    >>> bool(norm(x).mean().abs() < 1e-5), torch.allclose(norm.unscaled(norm(x) - norm.shifts), x, atol=1e-5)
    (True, True)
    """

    chosen: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(channels))
        self.shift = nn.Parameter(torch.zeros(channels))
        self.register_buffer("chosen", torch.tensor(False))

    @property
    def shifts(self) -> Tensor:
        """b, as (C, 1, 1)."""
        return self.shift.view(-1, 1, 1)

    @torch.no_grad()
    def prepare(self, x: Tensor) -> None:
        if not self.training or self.chosen:
            return
        variance, mean = torch.var_mean(x, (0, 2, 3), correction=0)
        self.log_scale.copy_(-(variance + 1e-5).log() / 2)  # the authors' eps; channels of zeros get 316
        self.shift.copy_(-mean * self.log_scale.exp())
        self.chosen = torch.ones_like(self.chosen)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.log_scale.exp().view(-1, 1, 1) + self.shifts

    def unscaled(self, y: Tensor) -> Tensor:
        """:math:`e^{-s} y`: a difference of two outputs as the difference of their inputs."""
        return y * (-self.log_scale).exp().view(-1, 1, 1)


class Contraction(nn.Module):
    r"""The residual function of an i-ResNet.

    .. math:: f(x) = A^{-1} g(A x + b), \qquad g = W_3\, \sigma\, W_2\, \sigma\, W_1\, [\sigma]

    with :math:`\sigma` = ELU, whose slope is at most 1, convolutions of 3x3, 1x1 and 3x3 pixels whose operator norms
    are at most c, and A a positive diagonal matrix (:class:`ActNorm`). So :math:`\|f(x) - f(y)\|_A \le c^3 \|x - y\|_A`
    in the norm :math:`\|x\|_A = \|A x\|`: f is a contraction, and :math:`x' = x + f(x)` has an inverse by iteration to
    the fixed point, whatever A is.

    The authors write :math:`z' = z + g(z)` with :math:`z = A_k z_k + b_k` between the blocks, where the normalisation
    scales what the network carries. Here what is carried stays as it is: the product of all scales so far is in A, so
    the networks are the same functions with the same parameters in other coordinates, and a chain of steps.

    Args:
        channels: of x.
        hidden: channels between the convolutions.
        bound: c, in (0, 1).
        activate: an ELU before the first convolution; the first block of a network has none.

    Shapes: (N, channels, H, W) -> the same.

    Raises:
        SettingError: the bound is not in (0, 1).
        StateError: (when called) it was not prepared for images of that size.

    Source: Behrmann, Grathwohl, Chen, Duvenaud, Jacobsen: Invertible Residual Networks, ICML 2019, arXiv:1811.00995,
    and the authors' code.

    >>> f, x = Contraction(4, 8), torch.randn(2, 4, 8, 8)
    >>> prepare(f, x)
    >>> f(x).shape
    torch.Size([2, 4, 8, 8])
    """

    def __init__(self, channels: int, hidden: int, bound: float = 0.9, activate: bool = True) -> None:
        super().__init__()
        self.norm = ActNorm(channels)
        self.layers = nn.Sequential(
            nn.ELU() if activate else nn.Identity(),
            LipschitzConv2d(channels, hidden, 3, bound),
            nn.ELU(),
            LipschitzConv2d(hidden, hidden, 1, bound),
            nn.ELU(),
            LipschitzConv2d(hidden, channels, 3, bound),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.norm.unscaled(self.layers(self.norm(x)))


class Stage(nn.Module):
    """Squares of pixels become channels (but in the first stage), then a chain of steps; it has an inverse."""

    def __init__(self, squeeze: SpaceToDepth, chain: ReversibleSequence) -> None:
        super().__init__()
        self.squeeze, self.chain = squeeze, chain

    def forward(self, x: Tensor) -> Tensor:
        return self.chain(self.squeeze(x))

    def inverse(self, y: Tensor) -> Tensor:
        """What :meth:`forward` made y of."""
        return self.squeeze.inverse(self.chain.inverse_state((y,))[0])


class IResNet(ImageClassifier):
    r"""The invertible residual network: up to the head no information is lost, and :meth:`invert` gives images back.

    .. code-block:: text

        (N, channels, H, W)   channels of zeros                                  -> (N, width, H, W)
        stage i               2x2 pixels become channels (i > 0), then blocks[i] steps x' = x + f(x), with widths[i]
                              channels inside f (Contraction)                    -> (N, 4^i width, H/2^i, W/2^i)
        head                  BN-ReLU, mean over pixels, linear                  -> (N, num_classes)

    Layers are prepared by the network itself: all at the first call, at a new size of images, and where training
    mode begins or ends (one more forward pass without gradients); norms of weights that have changed, before each call.
    The first training batch chooses the scales: let it be a large one (the authors take 1024 images), and with several
    processes show it before the network is wrapped.

    Args:
        num_classes: width of the output layer.
        channels: channels of the images.
        width: channels after zeros were added; 16 in the authors' script, which adds 13.
        widths: channels inside the functions of each stage.
        blocks: steps of each stage. The paper's tables are of 54 blocks, ``(18, 18, 18)``.
        bound: c, the largest operator norm of a convolution; functions contract by c^3.
        engine: how the backward pass gets the states, :class:`reversa.Invert` where not given.

    Raises:
        SettingError: the bound is not in (0, 1), width is less than channels, or widths do not fit blocks.
        StateError: (when called) the sides of the image cannot be halved as often as there are stages, less one.
        DriftError: (in :meth:`invert` and the backward pass) the iteration to the fixed point does not converge.

    Source: Behrmann, Grathwohl, Chen, Duvenaud, Jacobsen: Invertible Residual Networks, ICML 2019, arXiv:1811.00995,
    with the parameters of the authors' script for CIFAR-10 but for a prior that classification does not use. Their code
    calls 7-7-7 blocks "iResNet 64": three convolutions each, and the last layer. It differs in the batch normalisation
    of the head (eps 1e-5, and statistics that keep 0.1 of the old in each step), and takes the norms of the first block
    of a stage on images of twice the side.

    >>> sum(p.numel() for p in IResNet().parameters())
    4873178
    """

    stages: nn.Sequential

    def __init__(
        self,
        num_classes: int = 10,
        channels: int = 3,
        width: int = 16,
        widths: Sequence[int] = (32, 64, 128),
        blocks: Sequence[int] = (7, 7, 7),
        bound: float = 0.9,
        engine: Engine | None = None,
    ) -> None:
        if channels > width or len(widths) != len(blocks):
            raise SettingError(
                f"an i-ResNet adds channels of zeros up to width={width}, and each stage has blocks and a width of its "
                f"own; got images of {channels} channels, blocks={tuple(blocks)}, widths={tuple(widths)}"
            )

        def stage(i: int) -> Stage:
            carried = width * 4**i
            functions = [Contraction(carried, widths[i], bound, activate=i + j > 0) for j in range(blocks[i])]
            return Stage(
                SpaceToDepth(2 if i else 1), ReversibleSequence(functions, IResNetScheme(bound**3), False, engine)
            )

        stages = [stage(i) for i in range(len(blocks))]
        super().__init__(InjectivePad(width - channels), stages, Head(width * 4 ** (len(blocks) - 1), num_classes))
        self._prepared: object = None

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))

    def features(self, x: Tensor) -> Tensor:
        """What the head gets: (N, C, H, W) with all that is in the images."""
        self.prepare(x)
        return self.stages(self.stem(x))

    @torch.no_grad()
    def invert(self, features: Tensor) -> Tensor:
        """The images that :meth:`features` made these of.

        Raises:
            StateError: these are no features of this network.
            DriftError: the iteration to the fixed point does not converge.
        """
        width = cast(Head, self.head).linear.in_features
        if features.dim() != 4 or features.shape[1] != width:
            raise StateError(
                f"invert needs features of shape (N, {width}, h, w), got {tuple(features.shape)}: give it what "
                "features(x) returned"
            )
        for stage in reversed(self.stages):
            features = cast(Stage, stage).inverse(features)
        return cast(InjectivePad, self.stem).inverse(features)

    def prepare(self, x: Tensor) -> None:
        """Bring the norms of all layers up to date, and choose the scales if that was not done."""
        now = self.training, x.shape[1:]
        if now == self._prepared:
            refresh(self)
        else:
            prepare(nn.Sequential(self.stem, self.stages), x)
            self._prepared = now

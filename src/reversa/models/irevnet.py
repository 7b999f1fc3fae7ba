"""i-RevNet: a network that is invertible from the image to its features."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import cast

from torch import Tensor, nn

from reversa.engine import Engine
from reversa.errors import BlockError, SettingError, StateError
from reversa.exact import Arithmetic
from reversa.models.invertible import Before, BesideZeros, EachHalf, InjectivePad, SpaceToDepth
from reversa.models.layers import Head, ImageClassifier
from reversa.schemes import IRevNet as IRevNetScheme
from reversa.schemes import State
from reversa.sequence import ReversibleSequence

# Shapes in this file: N images, C channels, H x W pixels.


def narrowing(narrow: int, wide: int, stride: int = 1, activate: bool = True, dropout: float = 0.0) -> nn.Sequential:
    """BN-ReLU, 3x3, BN-ReLU, 3x3, dropout, BN-ReLU, 3x3: (N, narrow, H, W) -> (N, wide, H/s, W/s).

    The stride is in the first convolution, in between are a quarter of the channels. Without ``activate`` there is no
    BN-ReLU before the first convolution.

    Source: Jacobsen et al., ICLR 2018, arXiv:1802.07088, and the authors' code.

    >>> sum(p.numel() for p in narrowing(16, 16).parameters())
    1344
    """
    inner = wide // 4
    before = [nn.BatchNorm2d(narrow), nn.ReLU(inplace=True)] if activate else []
    return nn.Sequential(
        *before,
        nn.Conv2d(narrow, inner, 3, stride, 1, bias=False),
        nn.BatchNorm2d(inner),
        nn.ReLU(inplace=True),
        nn.Conv2d(inner, inner, 3, 1, 1, bias=False),
        nn.Dropout(dropout),
        nn.BatchNorm2d(inner),
        nn.ReLU(inplace=True),
        nn.Conv2d(inner, wide, 3, 1, 1, bias=False),
    )


class Stage(nn.Module):
    r"""A layer that changes the shape, and a reversible chain: invertible as a whole.

    The paper's block of stride 2 is :math:`(x_1, x_2) \mapsto (\psi x_2,\; \psi x_1 + F(x_2))`. With both streams
    reshaped first it is an ordinary step, :math:`(c, p) \mapsto (p + f(c), c)` at :math:`c = \psi x_2, p = \psi x_1`
    with :math:`f = F \circ \psi^{-1}` (:class:`Before`), so that it belongs to the chain and nothing of it is stored.

    Args:
        reshape: the layer, for the concatenated streams.
        chain: of scheme :class:`reversa.IRevNet`.
    """

    def __init__(self, reshape: EachHalf | InjectivePad, chain: ReversibleSequence) -> None:
        super().__init__()
        self.reshape, self.chain = reshape, chain

    def forward(self, x: Tensor) -> Tensor:
        return self.chain(self.reshape(x))

    def forward_state(self, x: Tensor) -> tuple[Tensor, State]:
        """What :meth:`forward` returns, and what of the integers of exact arithmetic it does not hold."""
        scheme = self.chain.scheme
        state = self.chain.forward_state(scheme.open(self.reshape(x)))
        y, integers, remainder = scheme.close(state[:2]), state[2:4], state[4:]
        low = tuple(i - told for i, told in zip(integers, self._opened(y)[2:], strict=True))
        return y, (*low, *remainder) if remainder or any(bool(part.any()) for part in low) else ()

    def inverse(self, y: Tensor, kept: State = ()) -> Tensor:
        """The input, from both that :meth:`forward_state` returned."""
        state = self._opened(y)
        if kept:
            state = (*state[:2], *(i + low for i, low in zip(state[2:], kept, strict=False)), *kept[2:])
        return self.reshape.inverse(self.chain.scheme.close(self.chain.inverse_state(state)[:2]))

    def _opened(self, y: Tensor) -> State:
        """The state after the last step: the streams, in exact arithmetic followed by integers."""
        return self.chain.scheme_for(y).open(y)


class IRevNet(ImageClassifier):
    r"""The fully invertible network: its features hold everything that is in the image, and give it back.

    .. code-block:: text

        (N, channels, H, W)   squares of squeeze x squeeze pixels become channels, where squeeze > 1
        stage i               of stride 2: 2 x 2 pixels of each stream become channels, four times as many;
                              of stride 1: channels of zeros behind the others, where the stage is wider.
                              Then a reversible chain of blocks                  -> (N, 2 widths[i], h, w)
        head                  BN-ReLU, mean over pixels, linear                  -> (N, num_classes)

    A stage and its inverse, with streams :math:`x_1, x_2` and the residual functions :math:`F` of :func:`narrowing`:

    .. math:: y_1 = \psi x_2, \quad y_2 = \psi x_1 + F(x_2); \qquad
        x_2 = \psi^{-1} y_1, \quad x_1 = \psi^{-1} (y_2 - F(x_2))

    where :math:`\psi` (:class:`~reversa.models.invertible.SpaceToDepth`) stands in the first block of a stage of stride
    2 only. In training nothing is kept but the state at the end of each stage.

    :meth:`features` is what the head is given, and ``net.invert(net.features(x))`` is ``x`` but for rounding errors, in
    eval mode. To the last bit it is with ``exact``: ``net.invert(*net.forward_state(x))``.

    Args:
        num_classes: width of the output layer.
        channels: channels of the images.
        widths: channels of one stream in each stage. None: as many as there are without padding, so that the network
            is a bijection (``squeeze=2`` makes the odd number of a colour image even).
        blocks: blocks of each stage.
        strides: 1 or 2 for each stage.
        squeeze: the side of the squares of pixels that become channels first; 1 for none. The authors' ``init_ds``.
        dropout: the probability behind the second convolution of a residual function.
        engine: how the backward pass gets the states, :class:`reversa.Invert` where not given.
        exact: as in :class:`reversa.ReversibleSequence`.

    Raises:
        SettingError: widths, blocks and strides are not equally many; another stride; a stage of stride 2 that is not
            four times as wide as its streams before; a stage narrower than those, or below 4; an odd number of channels
            for two streams.
        StateError: (when called) an image of other channels, or whose sides are not divisible by all strides; (in
            :meth:`invert`) features of another shape.

    Source: Jacobsen, Smeulders, Oyallon: i-RevNet: Deep Invertible Networks, ICLR 2018, arXiv:1802.07088. Parameters as
    in the authors' code, also for ImageNet, where the paper's table prints 29 million for the bijection: that code has
    125,120,356. Without padding an image has as many numbers as its features.

    One thing differs: the first residual function of a padded image sees nothing but zeros. In the authors' code it is
    zero for ever, because its biases begin at 0, where a ReLU has no slope; here they begin at 1.

    >>> import torch
    >>> net = IRevNet(blocks=(2, 2, 2)).eval()
    >>> image = torch.rand(1, 3, 8, 8)
    >>> features = net.features(image)
    >>> features.shape, bool((net.invert(features) - image).abs().max() < 1e-4)
    (torch.Size([1, 512, 2, 2]), True)
    """

    def __init__(
        self,
        num_classes: int = 10,
        channels: int = 3,
        widths: Sequence[int] | None = (16, 64, 256),
        blocks: Sequence[int] = (18, 18, 18),
        strides: Sequence[int] = (1, 2, 2),
        squeeze: int = 1,
        dropout: float = 0.1,
        engine: Engine | None = None,
        exact: bool | Arithmetic = False,
    ) -> None:
        stem, width = SpaceToDepth(squeeze), channels * squeeze**2
        shrinks = squeeze
        stages: list[Stage] = []
        for wide, number, stride in _plan(width, widths, blocks, strides):
            reshape = _reshape(width, wide, stride)
            functions = [_first(reshape, wide, bool(stages), dropout)]
            functions += [narrowing(wide, wide, dropout=dropout) for _ in range(number - 1)]
            stages.append(Stage(reshape, ReversibleSequence(functions, IRevNetScheme(), exact, engine)))
            width, shrinks = 2 * wide, shrinks * stride
        head = Head(width, num_classes)
        head.norm = nn.BatchNorm2d(width, momentum=0.9)  # the authors': statistics of little more than the last batch
        super().__init__(stem, stages, head)
        self._channels, self._shrinks = channels, shrinks

    def forward(self, x: Tensor) -> Tensor:
        """Scores (N, num_classes) of images (N, channels, H, W)."""
        return self.head(self.features(x))

    def features(self, x: Tensor) -> Tensor:
        """The features (N, 2 widths[-1], h, w) of images (N, channels, H, W): what the head is given."""
        return self.stages(self._begun(x))

    def forward_state(self, x: Tensor) -> tuple[Tensor, list[State]]:
        """The features, and what :meth:`invert` needs besides them to find every bit of the images again.

        The integers of exact arithmetic may have more digits than the features' data type. What it does not hold is
        told for each stage; keep it with the features. Nothing is told, ``()``, in float arithmetic, and where the data
        type does hold the integers: then the features alone are the images to the last bit. So it is in float64 while
        the streams stay below 2^13, and in float32 with ``exact=FixedPoint(bits=32, radix=16)`` below 2^8, for images
        whose numbers are multiples of the arithmetic's smallest one, 2^-40 or 2^-16.

        Raises:
            BlockError: BatchNorm or dropout is in training mode.

        >>> import torch
        >>> net = IRevNet(blocks=(2, 2, 2), exact=True).eval()
        >>> image = torch.rand(1, 3, 8, 8)
        >>> torch.equal(net.invert(*net.forward_state(image)), image)
        True
        """
        self._refuse_training()
        x = self._begun(x)
        kept: list[State] = []
        for stage in self._stages():
            x, rest = stage.forward_state(x)
            kept.append(rest)
        return x, kept

    def invert(self, features: Tensor, kept: Sequence[State] = ()) -> Tensor:
        """The images (N, channels, H, W) of features that were computed in eval mode.

        Args:
            features: what :meth:`features` or :meth:`forward_state` returned.
            kept: what :meth:`forward_state` returned besides; without it there are rounding errors.

        Raises:
            BlockError: BatchNorm or dropout is in training mode.
            StateError: these are no features of this network.
        """
        self._refuse_training()
        width = cast(Head, self.head).linear.in_features
        if features.dim() != 4 or features.shape[1] != width or len(kept) not in (0, len(self.stages)):
            raise StateError(
                f"invert needs features of shape (N, {width}, h, w), and nothing else or what forward_state kept for "
                f"each of {len(self.stages)} stages; got {tuple(features.shape)} and {len(kept)} kept: give it what "
                "features(x) or forward_state(x) returned"
            )
        for stage, rest in zip(self._stages()[::-1], kept[::-1] or [()] * len(self.stages), strict=True):
            features = stage.inverse(features, rest)
        return cast(SpaceToDepth, self.stem).inverse(features)

    def _begun(self, x: Tensor) -> Tensor:
        """What the stem makes of images, which are looked at first."""
        if x.dim() != 4 or x.shape[1] != self._channels or x.shape[2] % self._shrinks or x.shape[3] % self._shrinks:
            raise StateError(
                f"this i-RevNet takes images (N, {self._channels}, H, W) whose sides are multiples of {self._shrinks}, "
                f"got {tuple(x.shape)}: crop, pad or resize them, or build it with channels= of the images"
            )
        return self.stem(x)

    def _stages(self) -> list[Stage]:
        return cast(list[Stage], list(self.stages))

    def _refuse_training(self) -> None:
        if any(m.training for m in self.stages.modules() if isinstance(m, (nn.BatchNorm2d, nn.Dropout))):
            raise BlockError(
                "the network is inverted in eval mode only, and its BatchNorm or dropout is in training mode, where "
                "residual functions depend on the other images of a batch and on chance. Call net.eval(), compute the "
                "features, and invert them"
            )


def _plan(
    width: int, widths: Sequence[int] | None, blocks: Sequence[int], strides: Sequence[int]
) -> Iterator[tuple[int, int, int]]:
    """Width of a stream, blocks and stride of each stage."""
    if width % 2 and (widths is None or 2 in strides[:1]):
        raise SettingError(
            f"{width} channels do not make two equal streams. squeeze=2 makes four times as many of them; a first "
            "stage of stride 1 with a width of its own pads them"
        )
    if widths is None:
        widths = list(accumulate(strides, lambda half, stride: half * stride**2, initial=width // 2))[1:]
    if not 0 < len(widths) == len(blocks) == len(strides):
        raise SettingError(
            f"widths, blocks and strides need one number for each stage, got {len(widths)}, {len(blocks)} and "
            f"{len(strides)} of them"
        )
    if any(number < 1 for number in blocks) or any(width < 4 for width in widths):
        raise SettingError(
            "a stage needs at least 1 block, and streams of at least 4 channels (a quarter of them are inside a "
            f"residual function); got blocks={tuple(blocks)} of widths {tuple(widths)}"
        )
    return zip(widths, blocks, strides, strict=True)


def _first(reshape: EachHalf | InjectivePad, wide: int, activate: bool, dropout: float) -> nn.Module:
    """The first residual function of a stage."""
    if isinstance(reshape, EachHalf):
        return Before(reshape.layer, narrowing(wide // 4, wide, 2, activate, dropout))
    f = narrowing(wide, wide, 1, activate, dropout)
    if not reshape.channels:
        return f
    if reshape.channels >= wide:
        # Of nothing but zeros it would be zero for ever, and so would be channels of the next function's argument.
        for norm in (m for m in f if isinstance(m, nn.BatchNorm2d)):
            nn.init.ones_(norm.bias)
    return BesideZeros(InjectivePad(min(wide, reshape.channels)), f)


def _reshape(width: int, wide: int, stride: int) -> EachHalf | InjectivePad:
    """What a stage begins with: from so many channels to two streams of ``wide`` channels."""
    if stride not in (1, 2):
        raise SettingError(f"a stage has stride 1 or 2, got {stride!r}")
    if stride == 2 and wide != 2 * width:
        raise SettingError(
            f"a stage of stride 2 makes streams of four times as many channels: two of {wide} cannot come of {width} "
            f"channels. Use the width {2 * width}, or widths=None"
        )
    if 2 * wide < width:
        raise SettingError(
            f"a stage of stride 1 cannot have fewer channels than come to it: {width} do not fit into two streams of "
            f"{wide}. Use a width of at least {(width + 1) // 2}"
        )
    return EachHalf(SpaceToDepth(2)) if stride == 2 else InjectivePad(2 * wide - width)

"""HeunNet: residual networks that step by a predictor and a corrector, with stored activations."""

# pyright: reportUnnecessaryIsInstance=false

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

from torch import Tensor, nn

from reversa.engine.steps import carried_value
from reversa.errors import SettingError
from reversa.models.functions import basic
from reversa.models.layers import Head, ImageClassifier, Place, places, shortcut, stem
from reversa.models.resnet import ResidualBlock
from reversa.schemes.base import check_step_size

# Shapes in this file: N images, C channels, H x W pixels; a state x has any shape.


class HeunSequence(nn.Module):
    r"""Residual steps by Heun's method: a step of Euler, corrected by the next residual function at its end.

    .. math:: \tilde x_n = x_n + h f_n(x_n), \qquad
        x_{n+1} = x_n + h \big( (1 - \alpha) f_n(x_n) + \alpha f_{n+1}(\tilde x_n) \big)

    with :math:`\alpha = \tfrac12`, where it is of second order. There is no inverse in closed form: activations are
    stored. The output has the input's shape.

    A function that stands between two others is evaluated twice, at :math:`\tilde x_{n-1}` and at :math:`x_n`, and the
    statistics of its BatchNorm move twice.

    Args:
        functions: n residual functions, which make n - 1 steps. One module may stand at several places.
        h: the step size.
        alpha: weight of the corrector, in [0, 1]; other weights than 1/2 make the "extended" method. With 0 it is
            Euler's, and so a plain residual network that leaves out the last function.

    Raises:
        SettingError: fewer than two functions, something that is no module, or a number outside its range.
        BlockError: (when called) a residual function changes the shape or the data type.

    Source: Maleki, Habiba, Pearlmutter: HeunNet: Extending ResNet using Heun's Methods, 2021, arXiv:2105.06168.

    >>> import torch
    >>> seq = HeunSequence([nn.Identity()] * 3, h=0.5)  # y' = y: (1 + h + h^2 / 2)^2
    >>> seq(torch.ones(1))
    tensor([2.6406])
    """

    def __init__(self, functions: Iterable[nn.Module], h: float = 1.0, alpha: float = 0.5) -> None:
        super().__init__()
        functions = list(functions)
        check_step_size(h)
        if not (isinstance(alpha, (int, float)) and 0 <= alpha <= 1):
            raise SettingError(f"alpha must lie in [0, 1], got {alpha!r}. Heun's method has 0.5.")
        if not all(isinstance(f, nn.Module) for f in functions):
            raise SettingError(f"residual functions must be modules, got {functions!r}. Wrap a plain function in one.")
        if len(functions) < 2:
            raise SettingError(
                f"a step of Heun's method takes two residual functions, got {len(functions)}: give one more than there "
                "are to be steps (the same one again, where it is shared)"
            )
        self.functions = nn.ModuleList(functions)
        self.h, self.alpha = h, alpha

    def forward(self, x: Tensor) -> Tensor:
        """The state after the last step."""
        for n, (this, following) in enumerate(pairwise(self.functions)):
            start = carried_value(this(x), x, f"residual function {n}")
            end = carried_value(following(x + self.h * start), x, f"residual function {n + 1}")
            x = x + self.h * ((1 - self.alpha) * start + self.alpha * end)
        return x

    def extra_repr(self) -> str:
        """The step size and the corrector's weight."""
        return f"h={self.h}, alpha={self.alpha}"


class HeunNet(ImageClassifier):
    r"""A residual network for images whose stages step by Heun's method.

    .. code-block:: text

        (N, channels, H, W)   stem                                               -> (N, widths[0], H, W)
        stage i               where the shape changes an ordinary residual block, then a HeunSequence of the others
        head                  BN-ReLU, mean over pixels, linear                  -> (N, num_classes)

    Its residual functions are those of :class:`ResNet`, and so are its parameters.

    Args:
        num_classes: width of the output layer.
        channels: channels of the images.
        widths: channels of the stem and of each stage.
        blocks: residual functions of each stage; at least two that keep the shape, or none.
        h: the step size; 1 as in a residual network.
        alpha: weight of the corrector, in [0, 1].

    Raises:
        SettingError: as :class:`HeunSequence`.

    Source: Maleki, Habiba, Pearlmutter, 2021, arXiv:2105.06168, who step recurrent cells; the network for images,
    with functions and stages of Gomez et al., NeurIPS 2017, arXiv:1707.04585, is Reversa's.

    >>> sum(p.numel() for p in HeunNet().parameters())  # as resnet32
    464154
    """

    def __init__(
        self,
        num_classes: int = 10,
        channels: int = 3,
        widths: Sequence[int] = (16, 16, 32, 64),
        blocks: Sequence[int] = (5, 5, 5),
        h: float = 1.0,
        alpha: float = 0.5,
    ) -> None:
        def function(place: Place) -> nn.Module:
            return basic(place.narrow, place.wide, place.stride, activate=place.block > 1)

        def transition(place: Place) -> nn.Module:
            return ResidualBlock(function(place), shortcut(place.narrow, place.wide, place.stride, projects=False))

        def stage(blocks: Sequence[Place]) -> nn.Module:
            parts = [transition(place) for place in blocks if not place.keeps_shape]
            functions = [function(place) for place in blocks if place.keeps_shape]
            return nn.Sequential(*parts, *([HeunSequence(functions, h, alpha)] if functions else []))

        stages = places(widths[0], widths[1:], blocks)
        super().__init__(stem(channels, widths[0]), map(stage, stages), Head(stages[-1][-1].wide, num_classes))

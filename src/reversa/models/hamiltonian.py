"""Networks of Chang et al.: Hamiltonian, midpoint and leapfrog. Signals in them are neither damped nor blown up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

from torch import nn

from reversa.engine import Engine
from reversa.errors import SettingError
from reversa.exact import Arithmetic
from reversa.models.functions import Antisymmetric, Bias, Kernel, Symmetric
from reversa.models.layers import Head, ImageClassifier, PoolAndPad, norm, stem
from reversa.schemes import Hamiltonian, Leapfrog, Midpoint, Scheme
from reversa.sequence import ReversibleSequence

# Shapes in this file: N images, C channels, H x W pixels.

Between = Literal["bias", "batchnorm"]


class HamiltonianNet(ImageClassifier):
    r"""Deep network whose blocks are Verlet steps of a Hamiltonian system.

    .. code-block:: text

        (N, channels, H, W)   stem                                               -> (N, widths[0], H, W)
        unit i                reversible chain of blocks, on two halves of the channels
        transition            mean over 2 x 2 pixels, channels of zeros for each half
        head                  BN-ReLU, mean over pixels, linear                  -> (N, num_classes)

    The functions are :math:`K^\top \mathrm{ReLU}(K (x + b_1) + b_2)`, with BN in the place of both biases where
    ``between="batchnorm"``; the very first has no :math:`b_1`. As in the authors' code the first block of each unit but
    the first stands before the transition, at the width and resolution of the unit before.

    Args:
        num_classes: width of the output layer.
        channels: channels of the images.
        widths: channels of the stem and of each unit, both streams together.
        blocks: blocks ``(F, G)`` of each unit.
        h: the step size. The authors' code has 0.1.
        between: ``"bias"`` or ``"batchnorm"``.
        engine: how the backward pass gets the states, :class:`reversa.Invert` where not given.
        exact: as in :class:`reversa.ReversibleSequence`.

    Raises:
        SettingError: h is not a positive number; another ``between``.

    Source: Chang, Meng, Haber, Ruthotto, Begert, Holtham, AAAI 2018, arXiv:1709.03698. No one convention gives the
    parameters that the paper prints for all three networks: with biases Hamiltonian-74 and -218 have the printed 0.43
    and 1.68 million; Hamiltonian-1202 has the printed 9.70 with BN.

    >>> sum(p.numel() for p in HamiltonianNet().parameters())
    429690
    """

    def __init__(
        self,
        num_classes: int = 10,
        channels: int = 3,
        widths: Sequence[int] = (32, 32, 64, 112),
        blocks: Sequence[int] = (6, 6, 6),
        h: float = 0.1,
        between: Between = "bias",
        engine: Engine | None = None,
        exact: bool | Arithmetic = False,
    ) -> None:
        make, scheme = _between(between), Hamiltonian(h)

        def function(width: int, first: bool = False) -> Symmetric:
            half = width // 2
            return Symmetric(Kernel(half), make(half), None if first else make(half))

        def block(width: int, first: bool) -> tuple[nn.Module, nn.Module]:
            return function(width, first), function(width)

        units = _units(widths, blocks, 2, lambda made: ReversibleSequence(made, scheme, exact, engine), block)
        super().__init__(stem(channels, widths[0]), units, Head(widths[-1], num_classes))


class _OneStream(ImageClassifier):
    """What midpoint and leapfrog networks share: every block is one function of all channels."""

    scheme: ClassVar[Callable[[float], Scheme]]
    function: ClassVar[type[Symmetric | Antisymmetric]]

    def __init__(
        self,
        num_classes: int = 10,
        channels: int = 3,
        widths: Sequence[int] = (32, 32, 64, 112),
        blocks: Sequence[int] = (4, 4, 4),
        h: float = 0.1,
        between: Between = "bias",
        engine: Engine | None = None,
        exact: bool | Arithmetic = False,
    ) -> None:
        make, scheme, function = _between(between), type(self).scheme(h), self.function
        units = _units(
            widths,
            blocks,
            1,
            lambda made: ReversibleSequence(made, scheme, exact, engine),
            lambda width, first: function(Kernel(width), make(width)),
        )
        super().__init__(stem(channels, widths[0]), units, Head(widths[-1], num_classes))


class MidpointNet(_OneStream):
    r"""Deep network whose blocks are steps of the midpoint rule, with :math:`f(x) = \mathrm{ReLU}((K - K^\top) x + b)`.

    Built like :class:`HamiltonianNet`, on all channels at once.

    Args:
        num_classes: width of the output layer.
        channels: channels of the images.
        widths: channels of the stem and of each unit.
        blocks: blocks of each unit.
        h: the step size. Without smoothness from layer to layer rounding errors grow fast: 0.1 or less.
        between: ``"bias"`` or ``"batchnorm"``, before the ReLU.
        engine: how the backward pass gets the states, :class:`reversa.Invert` where not given.
        exact: as in :class:`reversa.ReversibleSequence`.

    Raises:
        SettingError: h is not a positive number; another ``between``.

    Source: Chang et al., AAAI 2018, arXiv:1709.03698. The parameters that the paper prints (0.50 and 1.78 million) are
    not reproduced by any convention that we know; these have 535,258 (26) and 1,801,738 (62).

    >>> sum(p.numel() for p in MidpointNet().parameters())
    535258
    """

    scheme = Midpoint
    function = Antisymmetric


class LeapfrogNet(_OneStream):
    r"""Deep network whose blocks are leapfrog steps, with the force :math:`f(x) = K^\top \mathrm{ReLU}(K x + b)`.

    Settings, parameters and source as of :class:`MidpointNet`.

    >>> sum(p.numel() for p in LeapfrogNet().parameters())
    535258
    """

    scheme = Leapfrog
    function = Symmetric


_BETWEEN: dict[str, Callable[[int], nn.Module]] = {"bias": Bias, "batchnorm": norm}


def _between(name: str) -> Callable[[int], nn.Module]:
    if name not in _BETWEEN:
        raise SettingError(f"between must be one of {', '.join(_BETWEEN)}, got {name!r}")
    return _BETWEEN[name]


Block = nn.Module | tuple[nn.Module, nn.Module]


def _units(
    widths: Sequence[int],
    blocks: Sequence[int],
    streams: int,
    chain: Callable[[list[Block]], nn.Module],
    block: Callable[[int, bool], Block],
) -> list[nn.Module]:
    """A chain for each width, with a transition between them.

    The first block of a unit is computed before the transition, so that it belongs to the chain before.

    Raises:
        SettingError: the stem's width is not the first unit's.
    """
    if widths[0] != widths[1]:
        raise SettingError(f"the first unit has the channels of the stem: widths[0] = widths[1], got {tuple(widths)}")
    made: list[nn.Module] = []
    for unit, width in enumerate(widths[1:]):
        number = blocks[unit] - (unit > 0) + (unit + 1 < len(blocks))
        if unit > 0:
            made.append(PoolAndPad(widths[unit], width, 2, streams))
        made.append(chain([block(width, unit == 0 and i == 0) for i in range(number)]))
    return made

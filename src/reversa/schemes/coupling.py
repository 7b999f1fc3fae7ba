"""Additive couplings: two streams that take turns, each moved by a function of the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from reversa.schemes.base import Scheme, State, added, check_step_size, halves


class Coupling(Scheme):
    """What RevNet and NICE share: the streams are the halves of x along ``dim``, and steps alternate between them.

    Nothing is lost in a step (``|b| = 1``): the drift is rounding alone.
    """

    dim: int
    first: ClassVar[int]
    """The stream that step 0 moves."""

    @property
    def weights(self) -> tuple[float, float]:
        """What each stream takes of the other's function."""
        return 1, 1

    def open(self, x: Tensor) -> State:
        return halves(x, self.dim, type(self).__name__)

    def close(self, state: State) -> Tensor:
        return torch.cat(state, self.dim)

    def _moved(self, step: int) -> int:
        return (self.first + step) % 2

    def argument(self, state: State, step: int) -> Tensor:
        return state[1 - self._moved(step)]

    def forward(self, state: State, value: Tensor, step: int) -> State:
        moved = self._moved(step)
        new = _added(state[moved], value, self.weights[moved])
        return (new, state[1]) if moved == 0 else (state[0], new)

    def uncover(self, state: State, step: int) -> tuple[Tensor, State]:
        moved = self._moved(step)
        return state[1 - moved], (state[moved],)

    def inverse(self, argument: Tensor, rest: State, value: Tensor, step: int) -> State:
        moved = self._moved(step)
        old = _added(rest[0], value, -self.weights[moved])
        return (old, argument) if moved == 0 else (argument, old)


def _added(stream: Tensor, value: Tensor, weight: float) -> Tensor:
    """``stream + weight * value``; for the weights 1 and -1 without asking further, which tiny steps feel."""
    if weight == 1:
        return stream + value
    return stream - value if weight == -1 else added(stream, value, weight)


@dataclass(frozen=True)
class RevNet(Coupling):
    r"""Reversible residual block with two functions.

    .. math:: y_1 = x_1 + F(x_2), \qquad y_2 = x_2 + G(y_1)

    Inverse: :math:`x_2 = y_2 - G(y_1)`, then :math:`x_1 = y_1 - F(x_2)`. A block is ``(F, G)`` and makes two
    steps. State ``(x1, x2)``: the halves of x along ``dim``; the output is their concatenation. No bits are lost.
    Linear stability: for :math:`F = \mu, G = \nu` with :math:`-4 \le \mu \nu \le 0`.

    Args:
        dim: the dimension along which x is split; its size must be even.

    Raises:
        StateError: (in :meth:`open`) x has no such dimension, or its size is odd.

    Source: Gomez, Ren, Urtasun, Grosse: The Reversible Residual Network, NeurIPS 2017, arXiv:1707.04585.

    >>> import torch
    >>> scheme = RevNet(dim=1)
    >>> state = scheme.forward(scheme.open(torch.zeros(1, 4)), torch.ones(1, 2), step=0)
    >>> scheme.close(state)
    tensor([[1., 1., 0., 0.]])
    """

    dim: int = 1

    source: ClassVar[str] = "Gomez et al., 2017, arXiv:1707.04585"
    functions_per_block: ClassVar[int] = 2
    first: ClassVar[int] = 0


@dataclass(frozen=True)
class Duplicated(Coupling):
    r"""RevNet's step on two copies of the whole input, in the place of its halves: what conversion makes of RevNet.

    .. math:: a_0 = b_0 = x, \qquad a' = a + A(b), \quad b' = b + M(a'), \qquad y = (a + b) / 2

    Inverse: :math:`b = b' - M(a')`, then :math:`a = a' - A(b)`. State ``(a, b)``, both of x's shape. A block
    ``(A, M)``, of a transformer the attention and the MLP, makes two steps. No bits are lost.

    Where another tensor is put in the place of the output, the first stream goes on from it, and the second from where
    it is.

    Source: Mangalam, Fan, Li, Wu, Xiong, Feichtenhofer, Malik: Reversible Vision Transformers, CVPR 2022,
    arXiv:2302.04869.

    >>> import torch
    >>> scheme = Duplicated()
    >>> state = scheme.forward(scheme.open(torch.zeros(3)), torch.ones(3), step=0)
    >>> scheme.close(state)
    tensor([0.5000, 0.5000, 0.5000])
    """

    source: ClassVar[str] = "Mangalam et al., 2022, arXiv:2302.04869"
    functions_per_block: ClassVar[int] = 2
    first: ClassVar[int] = 0

    def __repr__(self) -> str:
        return "RevNet over duplicated streams (a' = a + A(b), b' = b + M(a'), y = (a + b) / 2)"

    def open(self, x: Tensor) -> State:
        return x, x

    def close(self, state: State) -> Tensor:
        return (state[0] + state[1]) / 2

    def resumed(self, x: Tensor, state: State, step: int) -> tuple[State, int]:
        return (x, state[1]), step


@dataclass(frozen=True)
class AdditiveCoupling(Coupling):
    r"""NICE's additive coupling layer: one function, and the halves change places from layer to layer.

    .. math:: y_1 = x_1, \qquad y_2 = x_2 + m(x_1)

    Inverse: :math:`x_2 = y_2 - m(y_1)`. The layer after it moves the first half by a function of the second, and
    so on in turn. State ``(x1, x2)``: the halves of x along ``dim``; the Jacobian's determinant is 1. No bits are lost.
    Linear stability: for functions :math:`\mu` and :math:`\nu` in turn with :math:`-4 \le \mu \nu \le 0`.

    Args:
        dim: the dimension along which x is split; its size must be even.

    Raises:
        StateError: (in :meth:`open`) x has no such dimension, or its size is odd.

    Source: Dinh, Krueger, Bengio: NICE: Non-linear Independent Components Estimation, 2014, arXiv:1410.8516.

    >>> import torch
    >>> scheme = AdditiveCoupling(dim=1)
    >>> state = scheme.forward(scheme.open(torch.zeros(1, 4)), torch.ones(1, 2), step=0)
    >>> scheme.close(state)
    tensor([[0., 0., 1., 1.]])
    """

    dim: int = 1

    source: ClassVar[str] = "Dinh et al., 2014, arXiv:1410.8516"
    first: ClassVar[int] = 1


@dataclass(frozen=True)
class Hamiltonian(Coupling):
    r"""The Verlet step of a Hamiltonian system: two streams that push each other around.

    .. math:: y' = y + h F(z), \qquad z' = z - h G(y')

    Inverse: :math:`z = z' + h G(y')`, then :math:`y = y' - h F(z)`. A block is ``(F, G)`` and makes two steps. State
    ``(y, z)``: the halves of x along ``dim``; the output is their concatenation. No bits are lost.

    With :math:`F(z) = K_1^\top \sigma(K_1 z + b_1)` and :math:`G(y) = K_2^\top \sigma(K_2 y + b_2)`
    (:class:`reversa.models.functions.Symmetric`) this is the two-layer network of the paper, whose continuous limit has
    a Jacobian with imaginary eigenvalues: signals are neither damped nor blown up. Linear stability: for
    :math:`F = \mu, G = \nu` with :math:`\mu \nu > 0` the step is stable while :math:`h \sqrt{\mu \nu} \le 2`.

    Args:
        h: the step size. The authors' code has 0.1; with 1 a hundred layers blow rounding errors up beyond use.
        dim: the dimension along which x is split; its size must be even.

    Raises:
        SettingError: h is not a positive number.
        StateError: (in :meth:`open`) x has no such dimension, or its size is odd.

    Source: Chang, Meng, Haber, Ruthotto, Begert, Holtham: Reversible Architectures for Arbitrarily Deep Residual Neural
    Networks, AAAI 2018, arXiv:1709.03698.

    >>> import torch
    >>> scheme = Hamiltonian(h=0.5)
    >>> state = scheme.forward(scheme.open(torch.zeros(1, 4)), torch.ones(1, 2), step=0)
    >>> scheme.close(scheme.forward(state, torch.ones(1, 2), step=1))
    tensor([[ 0.5000,  0.5000, -0.5000, -0.5000]])
    """

    h: float = 0.1
    dim: int = 1

    source: ClassVar[str] = "Chang et al., 2018, arXiv:1709.03698"
    functions_per_block: ClassVar[int] = 2
    first: ClassVar[int] = 0

    def __post_init__(self) -> None:
        check_step_size(self.h)

    @property
    def weights(self) -> tuple[float, float]:
        return self.h, -self.h

"""LISTA: an algorithm for sparse codes, unrolled into a residual network and trained."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reversa.engine import Engine
from reversa.errors import SettingError, StateError
from reversa.exact import Arithmetic
from reversa.models.layers import check_sizes
from reversa.models.transformer import Residual, through
from reversa.schemes import Scheme
from reversa.sequence import ReversibleSequence

# Shapes in this file: N samples y of d numbers, each with a code x of p numbers; the dictionary D is (d, p).


def lasso(x: Tensor, y: Tensor, dictionary: Tensor, penalty: float) -> Tensor:
    r"""What a sparse code should make small: (N, p), (N, d) -> (N,).

    .. math:: \ell(x) = \tfrac12 \|y - D x\|_2^2 + \lambda \|x\|_1

    Source: Tibshirani: Regression Shrinkage and Selection via the Lasso, 1996.

    >>> lasso(torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0]]), torch.tensor([[2.0, 1.0]]), penalty=0.5)
    tensor([1.])
    """
    return (y - x @ dictionary.T).square().sum(1) / 2 + penalty * x.abs().sum(1)


def random_problem(
    atoms: int = 32, dimension: int = 16, samples: int = 1000, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """A dictionary (dimension, atoms) and samples (samples, dimension): Gaussian, of unit norm each.

    Raises:
        SettingError: a size below 1.

    Source: as in the experiment of Sander et al., ICML 2021, arXiv:2102.07870, with 32 atoms in 16 dimensions.

    >>> dictionary, y = random_problem(generator=torch.Generator().manual_seed(0))
    >>> dictionary.shape, y.shape
    (torch.Size([16, 32]), torch.Size([1000, 16]))
    """
    check_sizes(atoms=atoms, dimension=dimension, samples=samples)
    dictionary = torch.randn(dimension, atoms, generator=generator)
    return F.normalize(dictionary, dim=0), F.normalize(torch.randn(samples, dimension, generator=generator), dim=1)


class Shrinkage(nn.Module):
    r"""The residual function of LISTA: x (N, p) and y (N, d) -> (N, p).

    .. math:: f(x, y) = \mathrm{ST}(W_1 x + W_2 y, \eta \lambda) - x, \qquad \mathrm{ST}(z, t) = \mathrm{sign}(z)
              \max(|z| - t, 0)

    It begins with :math:`W_1 = I - \eta D^\top D`, :math:`W_2 = \eta D^\top` and :math:`\eta = 1 / \|D\|_2^2`: then x +
    f(x, y) is one step of ISTA.

    Args:
        dictionary: D.
        penalty: lambda.
    """

    def __init__(self, dictionary: Tensor, penalty: float) -> None:
        super().__init__()
        step = 1 / float(torch.linalg.matrix_norm(dictionary, 2)) ** 2
        identity = torch.eye(dictionary.shape[1], dtype=dictionary.dtype, device=dictionary.device)
        self.threshold = step * penalty
        self.code = nn.Parameter(identity - step * dictionary.T @ dictionary)
        self.sample = nn.Parameter(step * dictionary.T)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.softshrink(F.linear(x, self.code) + F.linear(y, self.sample), self.threshold) - x


class Lista(nn.Module):
    r"""Learned ISTA: sparse codes x (N, p) of samples y (N, d), by a residual network that begins at x = 0.

    .. math:: \min_x \tfrac12 \|y - D x\|_2^2 + \lambda \|x\|_1, \qquad
              f(x, y) = \mathrm{ST}(W_1 x + W_2 y, \eta \lambda) - x

    Each layer has :math:`W_1, W_2` of its own, and begins as a step of ISTA (:class:`Shrinkage`).

    Args:
        dictionary: D, (d, p).
        depth: layers.
        penalty: lambda, above 0.
        scheme: None is LISTA, ``x' = x + f(x, y)``, with stored activations. ``reversa.Momentum(gamma)`` is Momentum
            LISTA, of the same parameters. ``reversa.RevNet()`` is RevLISTA, of twice the parameters: both streams begin
            at 0, and their mean is the code. RevLISTA cannot come to rest, since its steps keep volumes: untrained, its
            values grow with depth.
        engine: how the backward pass of a reversible chain gets its states, :class:`reversa.Invert` where not given.
        exact: as in :class:`reversa.ReversibleSequence`.

    Raises:
        SettingError: the dictionary is no matrix, or zero; depth below 1; a penalty that is not above 0; an exact
            without a scheme.
        StateError: (when called) samples of another length than the dictionary's.

    Source: Gregor, LeCun: Learning Fast Approximations of Sparse Coding, ICML 2010; its reversible forms: Sander et
    al., ICML 2021, arXiv:2102.07870. To read RevLISTA's code as the mean of its streams is our choice.

    >>> import reversa
    >>> dictionary, y = random_problem()
    >>> net = Lista(dictionary, depth=10, penalty=0.1, scheme=reversa.Momentum(0.5))
    >>> net(y).shape
    torch.Size([1000, 32])
    """

    def __init__(
        self,
        dictionary: Tensor,
        depth: int,
        penalty: float,
        scheme: Scheme | None = None,
        engine: Engine | None = None,
        exact: bool | Arithmetic = False,
    ) -> None:
        super().__init__()
        check_sizes(depth=depth)
        _check(dictionary, penalty)
        if scheme is None and exact:
            raise SettingError(
                "LISTA without a scheme is not inverted and has no exact: leave it out, or give a scheme"
            )
        self.dimension, self.atoms = dictionary.shape
        if scheme is None:
            self.layers = Residual([Shrinkage(dictionary, penalty) for _ in range(depth)])
        else:
            functions = getattr(scheme, "functions_per_block", 1)
            blocks = [tuple(Shrinkage(dictionary, penalty) for _ in range(functions)) for _ in range(depth)]
            self.layers = ReversibleSequence(blocks, scheme, exact, engine)

    def forward(self, y: Tensor) -> Tensor:
        if y.dim() != 2 or y.shape[1] != self.dimension:
            raise StateError(
                f"samples of this dictionary are vectors of {self.dimension} numbers, (N, {self.dimension}); got "
                f"{tuple(y.shape)}"
            )
        return through(self.layers, y.new_zeros(len(y), self.atoms), y)


def _check(dictionary: Tensor, penalty: float) -> None:
    if dictionary.dim() != 2 or not dictionary.any():
        raise SettingError(
            f"the dictionary must be a matrix (dimension, atoms) that is not zero, got {tuple(dictionary.shape)}"
        )
    if not penalty > 0:
        raise SettingError(f"the penalty must be above 0, got {penalty}")

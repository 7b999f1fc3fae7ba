"""Density estimation with couplings: NICE, and Real NVP's affine couplings in its place."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from reversa.engine import Engine
from reversa.errors import SettingError, StateError
from reversa.schemes import AdditiveCoupling, AffineCoupling
from reversa.sequence import ReversibleSequence


class NICE(nn.Module):
    r"""Density of vectors, by an invertible map to independent ones.

    .. math:: z = e^{s} \odot y(x), \qquad
        \log p(x) = \sum_i \log p_z(z_i) + \sum_i s_i + \log \left| \det \frac{dy}{dx} \right|

    with y a chain of coupling layers and :math:`p_z` the logistic (or normal) density. The determinant is 1 for
    additive couplings. Inverse: :math:`x = y^{-1}(e^{-s} \odot z)`, which is what :meth:`sample` does to random z.

    Activations are computed back in training, so that memory does not grow with the number of layers.

    Args:
        dimension: length of a vector; even.
        layers: number of couplings; an even number treats both halves alike.
        hidden: width of the hidden layers of each coupling's function.
        depth: how many hidden layers it has.
        coupling: ``"additive"``, or ``"affine"`` with a second function for the scale.
        prior: ``"logistic"`` or ``"normal"``.
        engine: how the backward pass gets the states.

    Raises:
        SettingError: an odd dimension, no layer, or an unknown coupling or prior.
        StateError: (when called) vectors of another length, or of integers.

    Source: Dinh, Krueger, Bengio: NICE, 2014, arXiv:1410.8516 (additive couplings, four of them with five hidden layers
    of 1000 on MNIST); Dinh, Sohl-Dickstein, Bengio: Real NVP, ICLR 2017, arXiv:1605.08803 (affine couplings).

    >>> flow = NICE(dimension=4, layers=4, hidden=8, depth=1)
    >>> flow.log_prob(torch.randn(5, 4)).shape, flow.sample(3).shape
    (torch.Size([5]), torch.Size([3, 4]))
    """

    def __init__(
        self,
        dimension: int,
        layers: int = 4,
        hidden: int = 1000,
        depth: int = 5,
        coupling: Literal["additive", "affine"] = "additive",
        prior: Literal["logistic", "normal"] = "logistic",
        engine: Engine | None = None,
    ) -> None:
        super().__init__()
        if dimension < 2 or dimension % 2:
            raise SettingError(f"NICE splits vectors into halves: the dimension must be even, got {dimension}")
        if layers < 1 or depth < 0 or hidden < 1:
            raise SettingError(f"NICE needs at least one layer of some width, got {layers=}, {depth=}, {hidden=}")
        if coupling not in ("additive", "affine"):
            raise SettingError(f"coupling must be 'additive' or 'affine', got {coupling!r}")
        if prior not in ("logistic", "normal"):
            raise SettingError(f"prior must be 'logistic' or 'normal', got {prior!r}")
        self.prior = prior
        self.scheme = AdditiveCoupling() if coupling == "additive" else AffineCoupling()
        sizes = [dimension // 2, *[hidden] * depth, dimension // 2]
        parts = self.scheme.functions_per_block
        blocks = [tuple(_mlp(sizes) for _ in range(parts)) for _ in range(layers)]
        self.chain = ReversibleSequence([b if parts > 1 else b[0] for b in blocks], self.scheme, engine=engine)
        self.log_scale = nn.Parameter(torch.zeros(dimension))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What x, (N, dimension), is mapped to, and the logarithm of the map's determinant, (N,)."""
        self._check(x)
        state = self.chain.forward_state(self.scheme.open(x))
        z = self.scheme.close(state) * self.log_scale.exp()
        of_scale = self.log_scale.sum().expand(len(x))
        if isinstance(self.scheme, AffineCoupling):
            return z, of_scale + self.scheme.log_determinant(state)
        return z, of_scale

    def log_prob(self, x: Tensor) -> Tensor:
        """Logarithm of the density at each x: (N, dimension) -> (N,)."""
        z, log_determinant = self(x)
        logistic = self.prior == "logistic"
        of_z = -softplus(z) - softplus(-z) if logistic else -0.5 * z**2 - 0.5 * math.log(2 * math.pi)
        return of_z.sum(1) + log_determinant

    @torch.no_grad()
    def inverse(self, z: Tensor) -> Tensor:
        """What is mapped to z, (N, dimension)."""
        self._check(z)
        state = self.scheme.open(z * (-self.log_scale).exp())
        return self.scheme.close(self.chain.inverse_state(state))

    def _check(self, x: Tensor) -> None:
        if x.dim() != 2 or x.shape[1] != len(self.log_scale) or not x.is_floating_point():
            raise StateError(
                f"NICE takes vectors of floating-point numbers, (N, {len(self.log_scale)}), got {x.dtype} of shape "
                f"{tuple(x.shape)}: flatten or convert them, or build it with another dimension"
            )

    def sample(self, number: int) -> Tensor:
        """Random vectors from the density: (number, dimension)."""
        like = self.log_scale.new_empty(number, len(self.log_scale))
        if self.prior == "normal":
            return self.inverse(like.normal_())
        return self.inverse(torch.logit(like.uniform_(), eps=torch.finfo(like.dtype).eps))


def _mlp(sizes: list[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for narrow, wide in pairwise(sizes):
        layers += [nn.Linear(narrow, wide), nn.ReLU()]
    return nn.Sequential(*layers[:-1])

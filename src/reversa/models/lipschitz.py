r"""Linear layers with a bound on their operator norm: what contractions are made of.

A layer W with the bound c computes with

.. math:: \bar W = W / \max\big(1, \sigma / c\big), \qquad \sigma = \max_v \|W v\| / \|v\|

where W is the operator on images of the size that the layer really gets. (A bound on the matrix that a convolution's
kernel can be reshaped to, which :func:`torch.nn.utils.parametrizations.spectral_norm` gives, is none on the operator.)
The maximum is found outside of the forward pass, by :func:`prepare` and :func:`refresh`, so that a layer is the same
function whenever it is evaluated: a reversible engine evaluates it more than once in a training step.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reversa.errors import SettingError, StateError

# Shapes in this file: N images, C channels, H x W pixels.

LANCZOS_STEPS = 16  # in a round; rounds go on while one raises the largest eigenvalue by more than this part of it:
GROWTH = 1e-4
MARGIN = 1e-3  # what is found is a lower bound of the norm; it counts as larger by this part of it


class Prepared(nn.Module):
    """A layer that has to see an input once, outside of the forward pass, before it is used: see :func:`prepare`."""

    @abstractmethod
    def prepare(self, x: Tensor) -> None:
        """Take from the first input what the layer needs of it."""


class Lipschitz(Prepared):
    r"""A linear operator with a bound c on its norm, and a bias.

    ``vector`` is the unit vector v that W stretches most, as far as it is known: in training mode every new weight is
    good for one power iteration, :math:`v \leftarrow W^\top W v / \|W^\top W v\|`, as in the authors' script; at a new
    size and in eval mode Lanczos iterations go on until they find no larger norm. Gradients flow through
    :math:`\sigma = \|W v\|` with v held fixed: those of the operator norm.
    """

    weight: Tensor
    vector: Tensor

    def _begin(self, bound: float) -> None:
        if not (isinstance(bound, (int, float)) and 0 < bound < 1):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise SettingError(
                f"the bound on the norm must lie in (0, 1), got {bound!r}: with 1 or more x + f(x) may not have an "
                "inverse. The authors have 0.9."
            )
        self.bound = bound
        self.register_buffer("vector", self.weight.new_zeros(0))
        self.register_load_state_dict_pre_hook(_make_room)
        self._seen: tuple[int, int] | None = None
        self._converged = False

    @abstractmethod
    def operator(self, v: Tensor, weight: Tensor) -> Tensor:
        """W v, without the bias."""

    @abstractmethod
    def adjoint(self, z: Tensor, weight: Tensor) -> Tensor:
        r""":math:`W^\top z`."""

    @abstractmethod
    def domain(self, x: Tensor) -> torch.Size:
        """The shape of v for inputs like x: on it the operator has the norm that it has there."""

    def norm(self) -> Tensor:
        r""":math:`\sigma`, the norm of the operator before the division; differentiable in the weight."""
        with torch.autocast(self.weight.device.type, enabled=False):
            weight = self._wide(self.weight)
            return self.operator(self.vector.to(weight), weight).norm() * (1 + MARGIN)

    def bounded(self, x: Tensor) -> Tensor:
        r""":math:`\bar W`, the weight that inputs like x are multiplied with.

        Raises:
            StateError: the layer was not prepared for inputs of that size.
        """
        if self.vector.shape != self.domain(x):
            known = f"inputs like {tuple(self.vector.shape)}" if self.vector.numel() else "any input"
            raise StateError(
                f"{type(self).__name__} got an input of shape {tuple(x.shape)} and was not prepared for its size, but "
                f"for {known}: call reversa.models.lipschitz.prepare(network, x) first"
            )
        return self.weight / (self.norm() / self.bound).clamp(min=1).to(self.weight.dtype)

    def prepare(self, x: Tensor) -> None:
        """Find the norm on inputs of the size of x."""
        if self.vector.shape != self.domain(x):
            start = torch.randn(self.domain(x), generator=torch.Generator().manual_seed(0))
            self.vector = start.to(self.weight)
            self._seen = None
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Take account of a weight that has changed; nothing to do where it has not.

        Raises:
            StateError: the weight is not finite.
        """
        if not self.vector.numel():
            return
        now, exactly = (id(self.weight), self.weight._version), self._seen is None or not self.training
        if now == self._seen and (self._converged or not exactly):
            return
        with torch.autocast(self.weight.device.type, enabled=False):
            weight = self._wide(self.weight)

            def gram(v: Tensor) -> Tensor:
                return self.adjoint(self.operator(v, weight), weight)

            vector = self.vector.to(weight)
            if exactly:
                vector = most_stretched(gram, vector)
            else:
                image = gram(vector)
                vector = image / image.norm().clamp(min=torch.finfo(image.dtype).tiny)
        # A new tensor, never a write: what was recorded with the old one still needs it for its backward pass.
        self.vector, self._seen, self._converged = vector.to(self.weight), now, exactly

    @staticmethod
    def _wide(weight: Tensor) -> Tensor:
        """In 32 bits at least: in 16 a norm would be found to a few parts in a thousand, and never again the same."""
        return weight.to(torch.promote_types(weight.dtype, torch.float32))


def _make_room(layer: Lipschitz, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """A vector that is loaded has the shape of the images that it was found for."""
    loaded = state_dict.get(prefix + "vector")
    if loaded is not None:
        layer.vector, layer._seen = layer.vector.new_zeros(loaded.shape), None


class LipschitzConv2d(Lipschitz, nn.Conv2d):
    r"""Convolution (N, C, H, W) -> (N, C', H', W') whose operator norm, on images of that size, is at most the bound.

    Args:
        in_channels, out_channels, kernel_size: of :class:`torch.nn.Conv2d`.
        bound: c, in (0, 1).
        settings: stride, padding (a number; the default keeps an image's size), dilation, groups, bias.

    Raises:
        SettingError: the bound is not in (0, 1), or a padding that is not a number of zeros.
        StateError: (when called) it was not prepared for images of that size.

    Source: Behrmann et al., ICML 2019, arXiv:1811.00995; Gouk, Frank, Pfahringer, Cree, 2018, arXiv:1804.04368.

    >>> conv = LipschitzConv2d(3, 8, 3, bound=0.9, bias=False)
    >>> x = torch.randn(2, 3, 8, 8)
    >>> prepare(conv, x)
    >>> bool(conv(x).norm() <= 0.9 * x.norm())
    True
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, bound: float = 0.9, **settings: Any
    ) -> None:
        settings = {"padding": kernel_size // 2} | settings
        if isinstance(settings["padding"], str) or settings.get("padding_mode", "zeros") != "zeros":
            raise SettingError(f"LipschitzConv2d pads with a number of zeros, got {settings}")
        nn.Conv2d.__init__(self, in_channels, out_channels, kernel_size, **settings)
        self._begin(bound)

    def operator(self, v: Tensor, weight: Tensor) -> Tensor:
        return self._conv_forward(v, weight, None)

    def adjoint(self, z: Tensor, weight: Tensor) -> Tensor:
        shape, geometry = self.vector.shape, (self.stride, self.padding, self.dilation, self.groups)
        return torch.nn.grad.conv2d_input(shape, weight, z, *geometry)  # type: ignore[arg-type]

    def domain(self, x: Tensor) -> torch.Size:
        # A 1x1 convolution does the same at every pixel.
        pointwise = set(self.kernel_size) == {1} and set(self.stride) == {1}
        return torch.Size((1, x.shape[1], 1, 1) if pointwise else (1, *x.shape[1:]))

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.bounded(input), self.bias)


class LipschitzLinear(Lipschitz, nn.Linear):
    r"""Dense layer (..., in_features) -> (..., out_features) whose matrix has a spectral norm of at most the bound.

    Args:
        in_features, out_features, bias: of :class:`torch.nn.Linear`.
        bound: c, in (0, 1).

    Raises:
        SettingError: the bound is not in (0, 1).
        StateError: (when called) it was not prepared.

    Source: Behrmann et al., ICML 2019, arXiv:1811.00995.

    >>> dense = LipschitzLinear(4, 4, bound=0.5, bias=False)
    >>> prepare(dense, torch.randn(1, 4))
    >>> bool(torch.linalg.matrix_norm(dense(torch.eye(4)), 2) <= 0.5)
    True
    """

    def __init__(self, in_features: int, out_features: int, bound: float = 0.9, bias: bool = True) -> None:
        nn.Linear.__init__(self, in_features, out_features, bias)
        self._begin(bound)

    def operator(self, v: Tensor, weight: Tensor) -> Tensor:
        return F.linear(v, weight)

    def adjoint(self, z: Tensor, weight: Tensor) -> Tensor:
        return F.linear(z, weight.t())

    def domain(self, x: Tensor) -> torch.Size:
        return torch.Size((1, x.shape[-1]))

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.bounded(input), self.bias)


@torch.no_grad()
def prepare(network: nn.Module, x: Tensor) -> None:
    """Show a network (or one layer) an input, so that its layers find their norms and begin their normalisation.

    One forward pass without gradients: each layer is prepared just before it is used. It is due before the first use
    and at a new size of images; after each optimizer step :func:`refresh` is enough. A network without such
    a layer is refused by a SettingError.

    >>> net = nn.Sequential(LipschitzConv2d(1, 4, 3), nn.ELU(), LipschitzConv2d(4, 1, 3))
    >>> prepare(net, torch.randn(1, 1, 8, 8))
    >>> net(torch.randn(5, 1, 8, 8)).shape
    torch.Size([5, 1, 8, 8])
    """
    layers = [m for m in network.modules() if isinstance(m, Prepared)]
    if not layers:
        raise SettingError(f"{type(network).__name__} has no layer to prepare: use LipschitzConv2d and LipschitzLinear")
    hooks = [m.register_forward_pre_hook(lambda layer, inputs: layer.prepare(inputs[0])) for m in layers]  # type: ignore
    try:
        network(x)
    finally:
        for hook in hooks:
            hook.remove()


def refresh(network: nn.Module) -> None:
    """Let all layers of a network take account of weights that have changed: before each training step.

    >>> conv = LipschitzConv2d(1, 1, 3)
    >>> prepare(conv, torch.randn(1, 1, 8, 8))
    >>> _ = nn.init.ones_(conv.weight)
    >>> refresh(conv.eval())  # now conv.norm() is (1 + 2 cos(pi / 9))^2
    """
    for layer in network.modules():
        if isinstance(layer, Lipschitz):
            layer.refresh()


def most_stretched(gram: Callable[[Tensor], Tensor], v: Tensor) -> Tensor:
    r"""The unit eigenvector to the largest eigenvalue of a symmetric map like :math:`W^\top W`, from a first guess v.

    Lanczos iterations, begun again with the best vector until it is no better. Plain power iteration is no choice
    here: on smooth kernels it creeps, and looks as if it had converged.

    Raises:
        StateError: a value is not finite.
    """
    while True:
        better, before, after = _lanczos(gram, v)
        if not after < torch.inf:
            raise StateError(
                "the operator norm of a layer is not finite: its weights have blown up. Train with a smaller learning "
                "rate, or go back to a checkpoint."
            )
        if after <= before * (1 + GROWTH):
            return v  # to the bit what it was: copies and checkpoints of a layer compute the same
        v = better


def _lanczos(gram: Callable[[Tensor], Tensor], v: Tensor) -> tuple[Tensor, float, float]:
    """The best unit vector in the span of v, A v, A A v, ..., and the Rayleigh quotients of v and of that vector."""
    basis, images = (v / v.norm()).flatten()[None], v.new_zeros(0, v.numel())
    for _ in range(min(LANCZOS_STEPS, v.numel())):
        images = torch.cat((images, gram(basis[-1].view_as(v)).flatten()[None]))
        new = images[-1]
        for _ in range(2):  # once is not orthogonal enough in float arithmetic
            new = new - (basis @ new) @ basis
        if not new.norm() > 1e-5 * images[-1].norm():
            break  # nothing is left in A's range that the basis does not span
        basis = torch.cat((basis, new[None] / new.norm()))
    projected = basis[: len(images)] @ images.T
    if not projected.isfinite().all():
        return v, torch.nan, torch.nan
    values, vectors = torch.linalg.eigh(projected)
    return (vectors[:, -1] @ basis[: len(images)]).view_as(v), float(projected[0, 0]), float(values[-1])

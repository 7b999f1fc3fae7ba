"""Eigenvalues of the Jacobian of a function that keeps the shape: a residual function, a field, a chain."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import jacrev, jvp, vjp
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from reversa.engine.steps import first_tensor
from reversa.errors import SettingError, StateError, import_extra
from reversa.models.functions import StochasticDepth
from reversa.schemes.base import Residual

_RANDOM = (_BatchNorm, _DropoutNd, StochasticDepth)
DENSE = 4096
"""States of more numbers have no dense Jacobian here: it would take 128 MiB and more in float64."""


def jacobian(f: Residual, x: Tensor) -> Tensor:
    r"""The Jacobian of f at one sample.

    .. math:: J_{ij} = \partial f_i / \partial x_j

    Args:
        f: a function or module that keeps the shape, in eval mode.
        x: one sample of n numbers, in the shape that f takes: ``(1, C, H, W)`` for convolutions.

    Returns:
        (n, n), the elements of x and f(x) in the order of ``flatten()``.

    Raises:
        StateError: f changes the shape; x has more than 4096 numbers.
        SettingError: f has dropout or batch normalisation in training mode, or x is of integers.

    >>> jacobian(torch.square, torch.tensor([1.0, 3.0]))
    tensor([[2., 0.],
            [0., 6.]])
    """
    f = checked(f, x)
    n = x.numel()
    if n > DENSE:
        raise StateError(
            f"the dense Jacobian of a state of {n} numbers has {n}^2 entries; states may have up to {DENSE} numbers. "
            "Take a smaller image, or largest_real_part, which needs no dense Jacobian."
        )
    return jacrev(f)(x).detach().reshape(n, n)


def spectrum(f: Residual, x: Tensor) -> Tensor:
    r"""All eigenvalues of the Jacobian of f at one sample, those with the largest real part first.

    A forward propagation :math:`\dot x = f(x)` is stable where :math:`\max_i \mathrm{Re}\, \lambda_i \le 0`, for
    Jacobians that can be diagonalised and change slowly in time.

    Args:
        f: as in :func:`jacobian`.
        x: as in :func:`jacobian`; in float64 for more than a few digits.

    Returns:
        (n,), complex.

    Raises:
        StateError, SettingError: as :func:`jacobian`.

    Source: Chang et al., AAAI 2018, arXiv:1709.03698, equation 2.

    >>> quarter_turn = nn.Linear(2, 2, bias=False)
    >>> quarter_turn.weight.data = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
    >>> spectrum(quarter_turn, torch.zeros(1, 2)).imag.sort().values
    tensor([-1.,  1.])
    """
    values = torch.linalg.eigvals(jacobian(f, x))
    return values[values.real.argsort(descending=True)]


def largest_real_part(f: Residual, x: Tensor, dense: int = 1024, tol: float = 1e-6, max_products: int = 5000) -> float:
    r""":math:`\max_i \mathrm{Re}\, \lambda_i` of the Jacobian of f at one sample.

    Small states have a dense Jacobian (:func:`spectrum`). For large ones it is ARPACK's implicitly restarted Arnoldi
    iteration (``scipy.sparse.linalg.eigs``) on products :math:`J v` in forward mode. That finds an eigenvalue which
    stands out to the right; where all have nearly the same real part, as the imaginary ones of a Hamiltonian field, it
    does not converge, and says so.

    Args:
        f: as in :func:`jacobian`.
        x: as in :func:`jacobian`, of any size.
        dense: states of up to so many numbers have a dense Jacobian.
        tol: relative accuracy of the eigenvalue.
        max_products: products with the Jacobian at most, about.

    Raises:
        StateError: f changes the shape; the iteration does not converge.
        SettingError: as :func:`jacobian`.
        MissingExtra: scipy is needed and not installed.

    Source: Lehoucq, Sorensen, Yang: ARPACK Users' Guide, SIAM 1998.

    >>> largest_real_part(torch.square, torch.tensor([-1.0, 3.0]))
    6.0
    """
    f = checked(f, x)
    if x.numel() <= dense:
        return float(spectrum(f, x)[0].real)
    linalg = import_extra("scipy.sparse.linalg", "train")
    ncv = 40
    try:
        values = linalg.eigs(
            operator(linalg, lambda v: push(f, x, v)[1], x),
            k=1,
            which="LR",
            v0=start(x).flatten().cpu().numpy(),
            tol=tol,
            ncv=ncv,
            maxiter=max(1, max_products // ncv),
            return_eigenvectors=False,
        )
    except linalg.ArpackNoConvergence as error:
        raise StateError(
            f"no eigenvalue of the largest real part to a relative {tol:g} within about {max_products} products: many "
            "have nearly the same. Raise dense or max_products, or take a smaller state."
        ) from error
    return float(values.real.max())


def spectral_norm(f: Residual, x: Tensor, dense: int) -> float:
    """The largest singular value of f's Jacobian at x: dense up to so many numbers, beyond by ARPACK on products."""
    f = checked(f, x)
    if x.numel() <= dense:
        return float(torch.linalg.matrix_norm(jacobian(f, x), ord=2))
    linalg = import_extra("scipy.sparse.linalg", "train")
    transposed = vjp(f, x)[1]
    products = operator(linalg, lambda v: push(f, x, v)[1], x, lambda v: transposed(v)[0])
    first = start(x).flatten().cpu().numpy()
    return float(linalg.svds(products, k=1, v0=first, tol=1e-6, return_singular_vectors=False)[0])


def push(f: Residual, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """f(x) and J v, in forward mode."""
    with warnings.catch_warnings():  # PyTorch warns of its own code, where forward mode is used for the first time
        warnings.filterwarnings("ignore", r"`torch\.jit\.script`", FutureWarning)
        warnings.filterwarnings("ignore", r"`torch\.jit\.script`", DeprecationWarning)
        value, moved = jvp(f, (x,), (v,))[:2]
    return value.detach(), moved.detach()


def start(x: Tensor) -> Tensor:
    """A random direction, always the same, of length 1."""
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype).to(x.device)
    return direction / direction.norm()


def operator(
    linalg: Any, product: Callable[[Tensor], Tensor], x: Tensor, transposed: Callable[[Tensor], Tensor] | None = None
) -> Any:
    """A linear map of tensors like x, as scipy's operator on arrays."""

    def on_arrays(map: Callable[[Tensor], Tensor]) -> Callable[[Any], Any]:
        return lambda v: map(x.new_tensor(v.reshape(x.shape))).detach().flatten().cpu().numpy()

    back = None if transposed is None else on_arrays(transposed)
    dtype = torch.empty(0, dtype=x.dtype).numpy().dtype
    return linalg.LinearOperator((x.numel(), x.numel()), on_arrays(product), back, dtype=dtype)


def checked(f: Residual, x: Tensor) -> Residual:
    """f, as a function of one tensor to one tensor of the same shape.

    Raises:
        StateError, SettingError: it cannot be looked at here.
    """
    if isinstance(f, nn.Module):
        refuse_training([f])
    if x.dtype not in (torch.float32, torch.float64):
        raise SettingError(f"eigenvalues need a state in float32 or float64, got {x.dtype}: convert it and the module")

    def keeps_shape(x: Tensor) -> Tensor:
        value = first_tensor(f(x))
        if value.shape != x.shape:
            raise StateError(
                f"a Jacobian with eigenvalues needs a function that keeps the shape; it made {tuple(value.shape)} of "
                f"{tuple(x.shape)}. Give the residual function, field or chain alone, without what stands around it."
            )
        return value

    return keeps_shape


def refuse_training(modules: Iterable[nn.Module]) -> None:
    """Refuse layers that compute something else at every call.

    Raises:
        SettingError: dropout or batch normalisation in training mode.
    """
    for part in (part for module in modules for part in module.modules()):
        if part.training and isinstance(part, _RANDOM):
            raise SettingError(
                f"{type(part).__name__} is in training mode, where it is no function of one sample. Call eval() first."
            )

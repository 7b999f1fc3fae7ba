r"""The fields :math:`\dot s = g(s)` whose solutions the steps of a scheme follow, as functions of one tensor.

That of a residual network and of :class:`reversa.Midpoint` is the residual function itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reversa.schemes.base import Residual, halves


def hamiltonian_field(f: Residual, g: Residual, dim: int = 1) -> Residual:
    r"""The field of :class:`reversa.Hamiltonian` on :math:`(y, z)`, the halves of a tensor along ``dim``.

    .. math:: \dot y = F(z), \qquad \dot z = -G(y)

    Its Jacobian is :math:`\begin{pmatrix} 0 & A \\ -B & 0 \end{pmatrix}` with :math:`A = F'(z)`, :math:`B = G'(y)`. For
    :class:`reversa.models.functions.Symmetric` both are symmetric without negative eigenvalues; then so are those of
    :math:`A B`, and the Jacobian's, :math:`\pm i \sqrt{\lambda(A B)}`, are imaginary. Where A or B is singular (a ReLU
    network whose kernels have no more rows than columns) zero is a defective eigenvalue: the field's linear part grows
    like t along it, and in floating point such eigenvalues are off by the square root of the rounding error.

    Args:
        f: F.
        g: G.
        dim: the dimension along which a state is split; its size must be even.

    Raises:
        StateError: (when called) the state has no such dimension, or its size is odd.

    Source: Chang et al., AAAI 2018, arXiv:1709.03698, equation 3.

    >>> hamiltonian_field(torch.relu, torch.relu)(torch.tensor([[1.0, 2.0]]))
    tensor([[ 2., -1.]])
    """

    def field(state: Tensor) -> Tensor:
        y, z = halves(state, dim, "hamiltonian_field")
        return torch.cat((f(z), -g(y)), dim)

    return field


def leapfrog_field(f: Residual, dim: int = 1) -> Residual:
    r"""The field of :class:`reversa.Leapfrog`, :math:`\ddot y = -f(y)`, on :math:`(y, \dot y)`, halves along ``dim``.

    .. math:: \dot y = v, \qquad \dot v = -f(y)

    For eigenvalues :math:`\mu` of :math:`f'(y)` its Jacobian has :math:`\pm i \sqrt{\mu}`: imaginary for
    :class:`reversa.models.functions.Symmetric`, with the reservation of :func:`hamiltonian_field`.

    Args:
        f: the residual function, whose negative is the force.
        dim: the dimension along which a state is split; its size must be even.

    Raises:
        StateError: (when called) the state has no such dimension, or its size is odd.

    Source: Chang et al., AAAI 2018, arXiv:1709.03698.

    >>> leapfrog_field(torch.relu)(torch.tensor([[1.0, 2.0]]))
    tensor([[ 2., -1.]])
    """

    def field(state: Tensor) -> Tensor:
        y, v = halves(state, dim, "leapfrog_field")
        return torch.cat((v, -f(y)), dim)

    return field

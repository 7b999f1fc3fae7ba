"""What a whole chain does to a perturbation of its state, forwards and on the way back."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from reversa.engine.steps import first_tensor
from reversa.errors import SettingError
from reversa.schemes.base import Residual, Scheme, State, run, run_back
from reversa.sequence import ReversibleSequence
from reversa.stability.spectrum import push, refuse_training, spectral_norm, start


def growth(seq: ReversibleSequence, x: Tensor) -> Tensor:
    r"""By how much each step multiplies an infinitesimal perturbation of the state, as logarithms.

    .. math:: g_k = \log \frac{\|J_k \delta_k\|}{\|\delta_k\|}, \qquad
        \delta_{k+1} = \frac{J_k \delta_k}{\|J_k \delta_k\|}

    with the Jacobian :math:`J_k` of step k from state to state (all streams), at the states of x. The first direction
    is random, always the same. The norm is that of the whole state: give one sample.

    Args:
        seq: the chain, in eval mode; it is looked at in floating point also where it computes exactly.
        x: the input.

    Returns:
        (steps,). ``growth(seq, x).cumsum(0).exp()`` is the size of a perturbation of size 1 after each step.

    Raises:
        SettingError: it is no chain, or a residual function has dropout or batch normalisation in training mode.

    >>> import reversa
    >>> from torch import nn
    >>> seq = reversa.ReversibleSequence([nn.Tanh()] * 5, scheme=reversa.Momentum(0.9))
    >>> growth(seq, torch.zeros(1, 3)).shape
    torch.Size([5])
    """
    functions = _functions(seq)
    scheme = seq.scheme.begun(x, len(functions), seq.training)
    state = _stacked(scheme.open(x)).detach()
    delta, grown = start(state), list[Tensor]()
    for step, f in enumerate(functions):
        state, moved = push(partial(_step, scheme, f, step), state, delta)
        delta = moved / moved.norm()
        grown.append(moved.norm().log())
    return torch.stack(grown)


def lyapunov(seq: ReversibleSequence, x: Tensor, skip: int = 0) -> float:
    r"""The largest Lyapunov exponent of a chain, for each step.

    .. math:: \lambda = \frac{1}{L - s} \sum_{k=s}^{L-1} g_k

    with :math:`g_k` of :func:`growth`: a perturbation grows like :math:`e^{\lambda k}`. At a finite depth L it still
    depends on the first direction, with an error like 1/L; the first s steps, in which the direction turns to the one
    that grows most, may be left out. For a linear chain with the same function in every step it tends to
    :math:`\log |\mu|` of the largest eigenvalue of a step, for Momentum of the roots of
    :math:`\mu^2 - (1 + \gamma + (1 - \gamma) a) \mu + \gamma` with the eigenvalues a of f.

    Args:
        seq: as in :func:`growth`.
        x: as in :func:`growth`.
        skip: s.

    Raises:
        SettingError: as :func:`growth`; skip leaves no step.

    Source: Benettin, Galgani, Giorgilli, Strelcyn: Lyapunov characteristic exponents, Meccanica 15, 1980.

    >>> import reversa
    >>> from torch import nn
    >>> double = nn.Linear(1, 1, bias=False)
    >>> double.weight.data = torch.ones(1, 1)  # x' = x + x, nearly, at a small gamma
    >>> seq = reversa.ReversibleSequence([double] * 40, scheme=reversa.Momentum(0.01))
    >>> round(lyapunov(seq, torch.ones(1, 1), skip=20), 2)  # log 2 = 0.69
    0.69
    """
    steps = len(_functions(seq))
    if not 0 <= skip < steps:
        raise SettingError(f"skip must leave one of the {steps} steps, got {skip}")
    return float(growth(seq, x)[skip:].mean())


def condition(seq: ReversibleSequence, x: Tensor, dense: int = 1024) -> float:
    r"""The condition of a chain: by how much a relative error of its last state may grow on the way back.

    .. math:: \kappa = \|J\|_2 \, \|J^{-1}\|_2 = \sigma_{\max}(J) / \sigma_{\min}(J)

    with the Jacobian J of the whole chain from state to state (all streams), at the states of x. The second norm is
    that of the Jacobian of the inverse, computed as such: the smallest singular value of J itself has no digit left
    from :math:`\kappa` = 1/eps on.

    Args:
        seq: as in :func:`growth`.
        x: one sample; in float64 for deep chains.
        dense: states of up to so many numbers by dense matrices, larger ones by ARPACK (``scipy.sparse.linalg.svds``)
            on products with J, its inverse and their transposes.

    Raises:
        SettingError: as :func:`growth`; a step has no inverse.
        MissingExtra: scipy is needed and not installed.

    >>> import reversa
    >>> from torch import nn
    >>> seq = reversa.ReversibleSequence([nn.Tanh()] * 5, scheme=reversa.Midpoint(h=0.1))
    >>> 1 < condition(seq, torch.zeros(1, 3)) < 10
    True
    """
    functions = _functions(seq)
    scheme = seq.scheme.begun(x, len(functions), seq.training)
    if scheme.amplification == math.inf:
        raise SettingError(f"a step of {scheme} wipes out the state before the last one: it has no inverse")
    first = _stacked(scheme.open(x)).detach()
    there = _on_stack(lambda state: run(scheme, functions, state))
    back = _on_stack(lambda state: run_back(scheme, functions, state))
    return spectral_norm(there, first, dense) * spectral_norm(back, there(first).detach(), dense)


def _functions(seq: ReversibleSequence) -> list[Residual]:
    if not isinstance(seq, ReversibleSequence):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise SettingError(
            f"a ReversibleSequence is needed, such as one of a network's stages, got {type(seq).__name__}"
        )
    refuse_training(seq.functions)
    return [lambda x, f=f: first_tensor(f(x)) for f in seq.functions]


def _step(scheme: Scheme, f: Residual, step: int, stacked: Tensor) -> Tensor:
    state = stacked.unbind()
    return _stacked(scheme.forward(state, f(scheme.argument(state, step)), step))


def _on_stack(map: Callable[[State], State]) -> Residual:
    return lambda stacked: _stacked(map(stacked.unbind()))


def _stacked(state: State) -> Tensor:
    """The streams as one tensor, (streams, ...)."""
    return torch.stack(state)

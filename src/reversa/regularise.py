"""Penalties on the kernels of a network: smoothness from layer to layer, smoothness from step to step, weight decay.

kernel     the numbers of a linear map: the weight of a convolution or a linear layer, or the K of a residual function
           (:class:`reversa.models.functions.Kernel`). Biases and normalisations have none.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from reversa.errors import CheckpointError, SettingError
from reversa.models.functions import Kernel
from reversa.schemes.base import check_step_size
from reversa.sequence import ReversibleSequence

_LINEAR = (_ConvNd, nn.Linear, nn.Bilinear, nn.MultiheadAttention, Kernel)
Pair = tuple[Tensor, Tensor]
"""A kernel, and the one at its place in the layer after."""


def named_kernels(module: nn.Module) -> dict[str, nn.Parameter]:
    """The kernels of a module by their names in ``named_parameters``, each once, in that order.

    A kernel under a parametrisation (``torch.nn.utils.parametrizations``) is its original.

    >>> list(named_kernels(nn.Sequential(nn.Linear(2, 3), nn.LayerNorm((4, 3)))))
    ['0.weight']
    """
    linear = [part for part in module.modules() if isinstance(part, _LINEAR)]
    found = {id(p) for part in linear for name, p in part.named_parameters() if p.ndim > 1 and _is_weight(name)}
    return {name: p for name, p in module.named_parameters() if id(p) in found}


def kernels(module: nn.Module) -> list[nn.Parameter]:
    """The kernels of a module, each once, in the order of ``parameters()``.

    >>> from reversa.models import create
    >>> net = create("hamiltonian74")
    >>> len(kernels(net))  # 18 blocks of two functions, the stem and the head
    38
    """
    return list(named_kernels(module).values())


def _is_weight(name: str) -> bool:
    """Not a bias: attention has biases of three dimensions, a parametrised bias is called ``bias.original``."""
    return not any(part.startswith("bias") for part in name.split("."))


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    r"""Groups for an optimiser, with weight decay on kernels and on nothing else.

    .. math:: \tfrac{\lambda}{2} \sum_K \|K\|_F^2

    Args:
        module: the network.
        weight_decay: :math:`\lambda`.

    Raises:
        SettingError: it is negative.

    Source: Gomez et al., NeurIPS 2017, arXiv:1707.04585, whose code decays the weights of convolutions and of the last
    layer alone.

    >>> groups = parameter_groups(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), 2e-4)
    >>> [(len(group["params"]), group["weight_decay"]) for group in groups]
    [(1, 0.0002), (3, 0.0)]
    """
    if not weight_decay >= 0:
        raise SettingError(f"weight_decay must be 0 or a positive number, got {weight_decay!r}")
    decayed = kernels(module)
    known = {id(p) for p in decayed}
    free = [p for p in module.parameters() if id(p) not in known]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]


def layer_smoothness(network: nn.Module | Iterable[nn.Module], h: float | None = None) -> Tensor:
    r"""Weight smoothness decay: the kernels of a layer should be close to those of the layer before.

    .. math:: R = \frac{1}{h} \sum_k \sum_j \|K_{j+1,k} - K_{j,k}\|_F^2
        \approx \int_0^T \sum_k \|\dot K_k(t)\|_F^2 \, dt

    over the layers j of a chain. The k-th functions of its blocks are compared with one another, so :math:`K_1` and
    :math:`K_2` of a Hamiltonian network never are. A function with several kernels is compared kernel by kernel. Where
    a function's kernels have other shapes than those of the function before, a new run begins, without a term between
    the two. A kernel that two functions of a block share counts once.

    Args:
        network: a chain, a module that holds chains (their sum), or residual functions in the order of the layers.
        h: the step size; where not given each chain's own, and 1 for a scheme that has none, or for functions.

    Returns:
        A scalar, for the loss: ``loss + rate * layer_smoothness(net)``. The paper's rate is 2e-4.

    Raises:
        SettingError: h is not a positive number; a module without a chain.

    Source: Chang et al., AAAI 2018, arXiv:1709.03698.

    >>> from reversa.models.functions import Bias, Symmetric
    >>> f, g = (Symmetric(Kernel(4, size=None), Bias(4)) for _ in range(2))
    >>> R = layer_smoothness([f, g], h=0.5)
    >>> torch.allclose(R, 2 * (g.kernel.weight - f.kernel.weight).square().sum())
    True
    """
    if h is not None:
        check_step_size(h)
    terms = [_distance(pairs) / (own if h is None else h) for pairs, own in _layers(network)]
    return sum(terms, start=torch.zeros(()))


def _layers(network: nn.Module | Iterable[nn.Module]) -> Iterator[tuple[list[Pair], float]]:
    """Of every chain: the kernels to be compared, and the step size."""
    if not isinstance(network, nn.Module):
        yield _pairs(list(network), 1), 1.0
        return
    chains = [part for part in network.modules() if isinstance(part, ReversibleSequence)]
    if not chains:
        raise SettingError(
            f"{type(network).__name__} has no ReversibleSequence to tell the order of its layers: give the residual "
            "functions in order, as a list, or compare with the last step instead (StepSmoothness, across='steps')"
        )
    for chain in chains:
        yield _pairs(chain.functions, chain.scheme.functions_per_block), getattr(chain.scheme, "h", 1.0)


def _pairs(functions: list[nn.Module], per_block: int) -> list[Pair]:
    """Kernels of one place in layers that follow each other, each pair once."""
    found: dict[tuple[int, int], Pair] = {}
    for k in range(per_block):
        for before, after in pairwise(map(kernels, functions[k::per_block])):
            if [K.shape for K in before] == [K.shape for K in after]:
                found |= {(id(a), id(b)): (a, b) for a, b in zip(before, after, strict=True)}
    return list(found.values())


def _distance(pairs: list[Pair]) -> Tensor:
    """Sum of squared Frobenius norms of the differences."""
    return sum(((b - a).square().sum() for a, b in pairs), start=torch.zeros(()))


class StepSmoothness:
    r"""Smoothness in training time: the kernels should be close to what they were before the last optimiser step.

    .. math:: R = \sum_K \|K_\text{now} - K_\text{before the step}\|_F^2

    Before the first step it is zero. It keeps a copy of every kernel.

    Args:
        module: the network.

    Source: the student report behind :class:`reversa.models.SimpleHamiltonianNet`, which reads the weight smoothness
    decay of Chang et al. in this way. The paper's own is :func:`layer_smoothness`.

    >>> net = nn.Linear(2, 1)
    >>> smoothness, optimizer = StepSmoothness(net), torch.optim.SGD(net.parameters(), lr=0.1)
    >>> for _ in range(2):
    ...     loss = net(torch.ones(1, 2)).sum() + 2e-4 * smoothness()
    ...     loss.backward()
    ...     smoothness.remember()
    ...     optimizer.step()
    ...     optimizer.zero_grad()
    >>> round(smoothness().item(), 4)  # two weights that moved by 0.1
    0.02
    """

    def __init__(self, module: nn.Module) -> None:
        self._now = named_kernels(module)
        self._before = {name: K.detach().clone() for name, K in self._now.items()}

    def __call__(self) -> Tensor:
        """R, of the kernels as they are."""
        return _distance([(self._before[name], K) for name, K in self._now.items()])

    def remember(self) -> None:
        """Take the kernels as they are for those before the step; to be called right before ``optimizer.step()``."""
        for name, K in self._now.items():
            self._before[name].copy_(K.detach())

    def state_dict(self) -> dict[str, Tensor]:
        """The kernels before the step, by name."""
        return dict(self._before)

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Take them back.

        Raises:
            CheckpointError: they belong to another network.
        """
        other = {name for name in {*self._now, *state_dict} if _shape(state_dict, name) != _shape(self._now, name)}
        if other:
            raise CheckpointError(
                f"the kept kernels are another network's: these differ in name or shape: {', '.join(sorted(other))}. "
                "Build the network with the settings it was saved with."
            )
        for name, K in state_dict.items():
            self._before[name].copy_(K)


def _shape(tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...] | None:
    return tuple(tensors[name].shape) if name in tensors else None

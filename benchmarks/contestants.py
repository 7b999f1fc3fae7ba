"""Who takes part: each makes a function ``x -> y`` of the same residual functions, with the same parameters."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import reversa
from reversa.engine import Engine
from reversa.errors import import_extra

GAMMA = 0.95
Network = Callable[[Tensor], Tensor]
Build = Callable[[str, Sequence[nn.Module], int], Network]


@dataclass(frozen=True)
class Contestant:
    """A way to train a chain.

    Args:
        name: as in the table.
        build: from the scheme's name, the residual functions and the dimension that RevNet splits.
        schemes: the schemes that it has.
        package: what it needs, beside PyTorch.
    """

    name: str
    build: Build
    schemes: tuple[str, ...] = ("momentum", "revnet")
    package: str | None = None

    @property
    def is_ours(self) -> bool:
        return self.name.startswith("Reversa")


def pairs(functions: Sequence[nn.Module]) -> list[tuple[nn.Module, nn.Module]]:
    """RevNet's blocks ``(F, G)``."""
    return list(zip(functions[::2], functions[1::2], strict=True))


def by_formula(scheme: str, functions: Sequence[nn.Module], dim: int, call: Callable[..., Tensor]) -> Network:
    """The published formula as a loop, for autograd: what everybody's gradients are compared with."""

    def momentum(x: Tensor) -> Tensor:
        v = torch.zeros_like(x)
        for f in functions:
            v = GAMMA * v + (1 - GAMMA) * call(f, x)
            x = x + v
        return x

    def revnet(x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim)
        for first, second in pairs(functions):
            a = a + call(first, b)
            b = b + call(second, a)
        return torch.cat((a, b), dim)

    return momentum if scheme == "momentum" else revnet


def plain(scheme: str, functions: Sequence[nn.Module], dim: int) -> Network:
    return by_formula(scheme, functions, dim, lambda f, x: f(x))


def checkpointed(scheme: str, functions: Sequence[nn.Module], dim: int) -> Network:
    return by_formula(scheme, functions, dim, lambda f, x: checkpoint(f, x, use_reentrant=False))


def ours(engine: Engine, scheme: str, functions: Sequence[nn.Module], dim: int) -> Network:
    if scheme == "momentum":
        return reversa.ReversibleSequence(functions, reversa.Momentum(GAMMA), engine=engine)
    return reversa.ReversibleSequence(pairs(functions), reversa.RevNet(dim), engine=engine)


def momentumnet(scheme: str, functions: Sequence[nn.Module], dim: int) -> Network:
    package = import_extra("momentumnet", "bench")
    return package.MomentumNet(list(functions), gamma=GAMMA, use_backprop=False)


def revlib(scheme: str, functions: Sequence[nn.Module], dim: int) -> Network:
    package = import_extra("revlib", "bench")
    return package.ReversibleSequential(*functions, split_dim=dim)


def revtorch(scheme: str, functions: Sequence[nn.Module], dim: int) -> Network:
    package = import_extra("revtorch", "bench").revtorch
    blocks = [package.ReversibleBlock(f, g, split_along_dim=dim) for f, g in pairs(functions)]
    return package.ReversibleSequence(nn.ModuleList(blocks))


def memcnn(scheme: str, functions: Sequence[nn.Module], dim: int) -> Network:
    with warnings.catch_warnings():  # deprecated names of PyTorch, at import
        warnings.simplefilter("ignore")
        package = import_extra("memcnn", "bench")
    blocks = [
        package.InvertibleModuleWrapper(package.AdditiveCoupling(f, g, split_dim=dim), keep_input=False)
        for f, g in pairs(functions)
    ]

    def run(x: Tensor) -> Tensor:
        y = x.clone()  # it empties the storage of what it is given
        for block in blocks:
            y = block(y)
        return y

    return run


CONTESTANTS = [
    Contestant("plain", plain),
    Contestant("torch.utils.checkpoint", checkpointed),
    Contestant("Reversa Invert()", partial(ours, reversa.Invert())),
    Contestant("Reversa Invert(keep=1)", partial(ours, reversa.Invert(keep=1))),
    Contestant("Reversa Store()", partial(ours, reversa.Store())),
    Contestant("Reversa Recompute()", partial(ours, reversa.Recompute())),
    Contestant("Reversa Offload()", partial(ours, reversa.Offload())),
    Contestant("momentumnet", momentumnet, ("momentum",), "momentumnet"),
    Contestant("revlib", revlib, ("revnet",), "revlib"),
    Contestant("revtorch", revtorch, ("revnet",), "revtorch"),
    Contestant("memcnn", memcnn, ("revnet",), "memcnn"),
]

"""The update rules once more, straight from the papers, over ordinary autograd with stored activations.

Nothing here knows the library: what a reversible chain computes is held against these lines.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Rule = Callable[..., Any]


def carried(output: Any, like: Tensor) -> Tensor:
    """The tensor that goes on: the first of a tuple, in the state's data type (autocast makes narrower ones)."""
    return (output[0] if isinstance(output, tuple) else output).to(like.dtype)


def rejoin(output: Any, y: Tensor) -> Any:
    return (y, *output[1:]) if isinstance(output, tuple) else y


def momentum(fs: Sequence[Rule], x: Tensor, *args: Any, gamma: float = 0.9, init: Rule | None = None, **kw: Any) -> Any:
    """Sander et al. 2021, eq. 3: v' = gamma v + (1 - gamma) f(x), x' = x + v'."""
    v = torch.zeros_like(x) if init is None else init(x)
    output = None
    for f in fs:
        output = f(x, *args, **kw)
        v = gamma * v + (1 - gamma) * carried(output, x)
        x = x + v
    return rejoin(output, x)


def revnet(fs: Sequence[Rule], x: Tensor, *args: Any, dim: int = 1, **kw: Any) -> Any:
    """Gomez et al. 2017, eq. 6: y1 = x1 + F(x2), y2 = x2 + G(y1)."""
    x1, x2 = x.chunk(2, dim)
    output = None
    for big_f, big_g in zip(fs[::2], fs[1::2], strict=True):
        y1 = x1 + carried(big_f(x2, *args, **kw), x)
        output = big_g(y1, *args, **kw)
        y2 = x2 + carried(output, x)
        x1, x2 = y1, y2
    return rejoin(output, torch.cat([x1, x2], dim))


def additive(fs: Sequence[Rule], x: Tensor, *args: Any, dim: int = 1, **kw: Any) -> Any:
    """Dinh et al. 2014, 3.2: y1 = x1, y2 = x2 + m(x1); the next layer has the halves the other way round."""
    x1, x2 = x.chunk(2, dim)
    output = None
    for i, m in enumerate(fs):
        fixed, moved = (x1, x2) if i % 2 == 0 else (x2, x1)
        output = m(fixed, *args, **kw)
        moved = moved + carried(output, x)
        x1, x2 = (fixed, moved) if i % 2 == 0 else (moved, fixed)
    return rejoin(output, torch.cat([x1, x2], dim))


def hamiltonian(fs: Sequence[Rule], x: Tensor, *args: Any, h: float = 0.1, dim: int = 1, **kw: Any) -> Any:
    """Chang et al. 2018, eq. 11: y' = y + h F(z), z' = z - h G(y')."""
    y, z = x.chunk(2, dim)
    output = None
    for big_f, big_g in zip(fs[::2], fs[1::2], strict=True):
        y = y + h * carried(big_f(z, *args, **kw), x)
        output = big_g(y, *args, **kw)
        z = z - h * carried(output, x)
    return rejoin(output, torch.cat([y, z], dim))


def midpoint(fs: Sequence[Rule], x: Tensor, *args: Any, h: float = 0.1, init: str = "euler", **kw: Any) -> Any:
    """Chang et al. 2018: y[j+1] = y[j-1] + 2 h f(y[j]), after one Euler step, or from y[-1] = 0."""
    ys = [x] if init == "euler" else [torch.zeros_like(x), x]
    output = None
    for f in fs:
        output = f(ys[-1], *args, **kw)
        value = carried(output, x)
        ys.append(x + h * value if len(ys) == 1 else ys[-2] + 2 * h * value)
    return rejoin(output, ys[-1])


def leapfrog(fs: Sequence[Rule], x: Tensor, *args: Any, h: float = 0.1, init: str = "rest", **kw: Any) -> Any:
    """Chang et al. 2018: y[j+1] = 2 y[j] - y[j-1] - h^2 f(y[j]), from y[-1] = y[0] or 0, or after an Euler step."""
    ys = [torch.zeros_like(x) if init == "zero" else x, x]
    output = None
    for f in fs:
        output = f(ys[-1], *args, **kw)
        value = carried(output, x)
        euler = init == "euler" and len(ys) == 2
        ys.append(x - h * value if euler else 2 * ys[-1] - ys[-2] - h**2 * value)
    return rejoin(output, ys[-1])


def irevnet(fs: Sequence[Rule], x: Tensor, *args: Any, dim: int = 1, **kw: Any) -> Any:
    """Jacobsen et al. 2018, without its downsampling: y1 = x2, y2 = x1 + F(x2)."""
    x1, x2 = x.chunk(2, dim)
    output = None
    for f in fs:
        output = f(x2, *args, **kw)
        x1, x2 = x2, x1 + carried(output, x)
    return rejoin(output, torch.cat([x1, x2], dim))


def affine(fs: Sequence[Rule], x: Tensor, *args: Any, dim: int = 1, bound: float = 1.0, **kw: Any) -> Any:
    """Dinh et al. 2017, eq. 7, 8, with a bounded s: y1 = x1, y2 = x2 exp(s(x1)) + t(x1); then the other way round."""
    x1, x2 = x.chunk(2, dim)
    output = None
    for i, (big_s, big_t) in enumerate(zip(fs[::2], fs[1::2], strict=True)):
        fixed, moved = (x1, x2) if i % 2 == 0 else (x2, x1)
        s = bound * torch.tanh(carried(big_s(fixed, *args, **kw), x) / bound)
        output = big_t(fixed, *args, **kw)
        moved = moved * torch.exp(s) + carried(output, x)
        x1, x2 = (fixed, moved) if i % 2 == 0 else (moved, fixed)
    return rejoin(output, torch.cat([x1, x2], dim))


def iresnet(fs: Sequence[Rule], x: Tensor, *args: Any, share: float = 0.1, **kw: Any) -> Any:
    """Behrmann et al. 2019: x' = x + g(x), here with a share of f for g."""
    output = None
    for f in fs:
        output = f(x, *args, **kw)
        x = x + share * carried(output, x)
    return rejoin(output, x)


def reversible_heun(fs: Sequence[Rule], x: Tensor, *args: Any, h: float = 0.1, **kw: Any) -> Any:
    """Kidger et al. 2021, algorithm 1 without noise: three registers, of which one is a slope."""
    y, hat = x, x
    output = fs[0](hat, *args, **kw)
    slope = carried(output, x)
    if len(fs) == 1:  # no step, for which it would take two
        return rejoin(output, x + h / 2 * slope)
    for f in fs[1:]:
        hat = 2 * y - hat + h * slope
        output = f(hat, *args, **kw)
        new = carried(output, x)
        y = y + h / 2 * (slope + new)
        slope = new
    return rejoin(output, y)


def mccallum_foster(fs: Sequence[Rule], x: Tensor, *args: Any, coupling: float = 0.999, **kw: Any) -> Any:
    """McCallum and Foster 2024: y' = l y + (1 - l) z + F(z), z' = z + G(y')."""
    y, z = x, x
    output = None
    for big_f, big_g in zip(fs[::2], fs[1::2], strict=True):
        y = coupling * y + (1 - coupling) * z + carried(big_f(z, *args, **kw), x)
        output = big_g(y, *args, **kw)
        z = z + carried(output, x)
    return rejoin(output, y)


def bdia(fs: Sequence[Rule], x: Tensor, *args: Any, gamma: float = 0.5, random: bool = False, **kw: Any) -> Any:
    """Zhang et al. 2025, eq. 10: x[k+1] = g x[k-1] + (1 - g) x[k] + (1 + g) f(x[k]), first x + f(x); g = +- gamma."""
    shape = (len(fs), x.shape[0], *[1] * (x.dim() - 1))
    gammas = gamma * (2 * torch.randint(0, 2, shape) - 1 if random else torch.ones(shape)).to(x.dtype)
    before, output = None, None
    for f, g in zip(fs, gammas, strict=True):
        output = f(x, *args, **kw)
        value = carried(output, x)
        x, before = x + value if before is None else g * before + (1 - g) * x + (1 + g) * value, x
    return rejoin(output, x)


def dr2net(fs: Sequence[Rule], x: Tensor, *args: Any, alpha: float = 0.3, beta: float = 0.7, **kw: Any) -> Any:
    """Zhao et al. 2024: x' = f(x) + alpha x + y, y' = beta x, from y = 0."""
    y, output = torch.zeros_like(x), None
    for f in fs:
        output = f(x, *args, **kw)
        x, y = carried(output, x) + alpha * x + y, beta * x
    return rejoin(output, x)


class Plain(nn.Module):
    """A rule over the functions of a ``ReversibleSequence``, under the same parameter names."""

    def __init__(self, blocks: nn.ModuleList, rule: Rule) -> None:
        super().__init__()
        self.blocks = blocks
        self.rule = rule

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        fs = [f for block in self.blocks for f in (block if isinstance(block, nn.ModuleList) else [block])]
        return self.rule(fs, x, *args, **kwargs)

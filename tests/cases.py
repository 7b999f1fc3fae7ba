"""The tables that the contract runs over (schemes, engines, residual functions), and one training step to compare."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import oracle
import reversa
from reversa import Invert, Mixed, Offload, Recompute, Store
from reversa.engine import Engine
from reversa.exact import Arithmetic
from reversa.schemes import Scheme

DEPTH = 8
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


# ---------------------------------------------------------------------- schemes and engines


def chain(
    scheme: Scheme, fs: Sequence[nn.Module], exact: bool | Arithmetic = False, engine: Any = None
) -> reversa.ReversibleSequence:
    """The functions in the blocks that the scheme wants, as a chain."""
    fs, n = list(fs), scheme.functions_per_block
    blocks = fs if n == 1 else [tuple(fs[i : i + n]) for i in range(0, len(fs), n)]
    return reversa.ReversibleSequence(blocks, scheme, exact=exact, engine=engine)


def input_for(scheme: Scheme, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """An input whose streams have the shape that is given; schemes that split theirs do it along dim 1."""
    batch, width, *rest = shape
    width *= 1 if scheme.carries_input else 2
    return torch.randn(batch, width, *rest, dtype=dtype, requires_grad=True)


class Share(nn.Module):
    """A share of a function's value: of its first part, where it returns several."""

    def __init__(self, f: Callable[..., Any], share: float) -> None:
        super().__init__()
        self.f, self.share = f, share

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        output = self.f(x, *args, **kwargs)
        return (self.share * output[0], *output[1:]) if isinstance(output, tuple) else self.share * output


@dataclass(frozen=True)
class Case:
    """A scheme of the library, and the same rule in the oracle."""

    scheme: Scheme
    rule: Callable[..., Any]
    share: float = 1.0
    """What the chain takes of each function, for a scheme that wants contractions."""

    def tolerance(self, least: float, engine: Engine, depth: int = DEPTH) -> float:
        """What rounding errors of that size may become where an inverse multiplies them, and no state is kept."""
        amplification = self.scheme.amplification
        if not engine.inverts or amplification == math.inf:  # every state is kept
            return least
        return least * min(amplification, 2) ** min(depth, DEPTH)

    def functions(self, fs: Sequence[Callable[..., Any]]) -> list[Any]:
        """The functions as the scheme takes them; the rule of the oracle is given those from before."""
        return list(fs) if self.share == 1 else [Share(f, self.share) for f in fs]

    @property
    def halves(self) -> bool:
        return not self.scheme.carries_input

    def sequence(self, fs: Sequence[nn.Module], engine: Any = None) -> reversa.ReversibleSequence:
        return chain(self.scheme, self.functions(fs), engine=engine)

    def with_engine(self, engine: Any) -> Callable[..., Any]:
        """The chain, called like a rule of the oracle."""
        return lambda fs, x, *args, **kwargs: self.sequence(fs, engine)(x, *args, **kwargs)

    def input(self, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return input_for(self.scheme, *shape, dtype=dtype)


CASES: dict[str, Case] = {
    "momentum": Case(reversa.Momentum(0.9), partial(oracle.momentum, gamma=0.9)),
    "momentum-0.99": Case(reversa.Momentum(0.99), partial(oracle.momentum, gamma=0.99)),
    "revnet": Case(reversa.RevNet(), oracle.revnet),
    "additive": Case(reversa.AdditiveCoupling(), oracle.additive),
    "hamiltonian": Case(reversa.Hamiltonian(), oracle.hamiltonian),
    "midpoint": Case(reversa.Midpoint(), oracle.midpoint),
    "leapfrog": Case(reversa.Leapfrog(), oracle.leapfrog),
    "irevnet": Case(reversa.IRevNet(), oracle.irevnet),
    "affine": Case(reversa.AffineCoupling(), oracle.affine),
    "iresnet": Case(reversa.IResNet(), oracle.iresnet, share=0.1),
    "reversibleheun": Case(reversa.ReversibleHeun(), oracle.reversible_heun),
    "mccallumfoster": Case(reversa.McCallumFoster(0.9), partial(oracle.mccallum_foster, coupling=0.9)),
    "bdia": Case(reversa.BDIA(), partial(oracle.bdia, random=True)),
    "bdia-plus": Case(reversa.BDIA(random=False), oracle.bdia),
    "dr2net": Case(reversa.Dr2Net(), oracle.dr2net),
    "dr2net-0": Case(reversa.Dr2Net(1, 0), partial(oracle.dr2net, alpha=1, beta=0)),
}


class Parts(Mixed):
    """Mixed for chains of any length: computed back, recomputed, computed back again, stored."""

    inverts = True

    def __init__(self) -> None:
        super().__init__([(Invert(), DEPTH)])

    def of(self, length: int) -> Mixed:
        cuts = [0, length // 3, length // 2, length - 1, length]
        engines = (Invert(), Recompute(), Invert(group=1), Store())
        counts = (b - a for a, b in itertools.pairwise(cuts))
        return Mixed([(engine, n) for engine, n in zip(engines, counts, strict=True) if n > 0])

    def begin(self, scheme: Scheme, length: int | None = None, first: int = 0) -> Any:
        return self.of(length or DEPTH).begin(scheme, length, first)

    def run(self, scheme: Scheme, fs: Sequence[Any], *others: Any) -> Any:
        return self.of(len(fs)).run(scheme, fs, *others)

    def kept_states(self, scheme: Scheme, length: int, dtype: torch.dtype) -> str:
        return self.of(length).kept_states(scheme, length, dtype)


ENGINES: dict[str, Engine] = {
    "invert": Invert(),
    "invert-one-by-one": Invert(group=1),  # small states are replayed several steps at a time by default
    "invert-group3": Invert(group=3),
    "invert-keep2": Invert(keep=2),
    "invert-anchors3": Invert(anchors=3),
    "store": Store(),
    "recompute1": Recompute(every=1),
    "recompute3": Recompute(every=3),
    "offload": Offload(),
    "mixed": Parts(),
}

INVERTERS = {name: engine for name, engine in ENGINES.items() if isinstance(engine, Invert)}


# ---------------------------------------------------------------------- residual functions


def mlp(width: int = 6, p: float = 0.0) -> nn.Module:
    drop = [nn.Dropout(p)] if p else []
    return nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), *drop, nn.Linear(2 * width, width))


def conv(channels: int = 4) -> nn.Module:
    def half() -> list[nn.Module]:
        return [nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)]

    return nn.Sequential(*half(), nn.ReLU(inplace=True), *half())


class Attention(nn.Module):
    """Pre-norm attention to a memory (or to itself), then a pre-norm feed-forward part, as one residual function."""

    def __init__(self, width: int = 8, heads: int = 2, p: float = 0.0) -> None:
        super().__init__()
        self.norm, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width, bias=False)  # a key's bias has no gradient but rounding
        self.out, self.ffn = nn.Linear(width, width), mlp(width, p)
        self.heads, self.p = heads, p

    def forward(self, x: Tensor, memory: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        batch, length, width = x.shape
        y = self.norm(x)
        source = y if memory is None else memory
        q = self.q(y).view(batch, length, self.heads, -1).transpose(1, 2)
        k, v = self.kv(source).view(batch, source.shape[1], 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        p = self.p if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p)
        a = self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return a + self.ffn(self.norm2(x + a))


class WithExtra(nn.Module):
    """Returns a tuple: the carried tensor, something else with a gradient, None, and a number."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.body, self.side = mlp(width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, None, int]:
        return self.body(x), self.side(x).sigmoid(), None, 7


class Function(nn.Module):
    """A residual function that does something else besides."""

    def __init__(self, besides=None, width: int = 6) -> None:
        super().__init__()
        self.body, self.besides = mlp(width), besides

    def forward(self, x, *args):
        y = self.body(x)
        return y if self.besides is None else self.besides(self, x, y)


@dataclass(frozen=True)
class Family:
    """How to make one residual function, the shape of its stream, and its extra arguments."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    extras: Callable[[torch.dtype], dict[str, Any]] = field(default=lambda dtype: {})

    def functions(self, depth: int = DEPTH, dtype: torch.dtype = torch.float64) -> list[nn.Module]:
        return [self.make().to(dtype) for _ in range(depth)]


def _memory_and_mask(dtype: torch.dtype) -> dict[str, Any]:
    mask = torch.rand(3, 7) > 0.3
    mask[:, 0] = True
    return {"memory": torch.randn(2, 7, 8, dtype=dtype, requires_grad=True), "mask": mask}


FAMILIES: dict[str, Family] = {
    "mlp": Family(mlp, (4, 6)),
    "dropout": Family(partial(mlp, p=0.3), (4, 6)),
    "conv-bn": Family(conv, (3, 4, 5, 5)),
    "attention": Family(Attention, (2, 3, 8), lambda dtype: {"memory": None}),
    "attention-memory-mask": Family(partial(Attention, p=0.2), (2, 3, 8), _memory_and_mask),
    "tuple": Family(WithExtra, (4, 6)),
}


# ---------------------------------------------------------------------- one training step, and how to compare two

Result = dict[str, Tensor | None]


def loss_of(output: Any) -> Tensor:
    """Every floating tensor of the output takes part, each element with a weight of its own."""
    loss = torch.zeros(())
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            weight = torch.linspace(-1, 1, leaf.numel(), dtype=leaf.dtype).view(leaf.shape)
            loss = loss + (leaf * weight + 0.5 * leaf**2).sum() / leaf.shape[0]
    return loss


def step(
    rule: Callable[..., Any], fs: Sequence[nn.Module], x: Tensor, *args: Any, seed: int = 5, **kwargs: Any
) -> Result:
    """One training step over copies of everything: outputs, all gradients, buffers, and the generator's next draw."""
    module, x, args, kwargs = copy.deepcopy((nn.ModuleList(fs), x, args, kwargs))
    torch.manual_seed(seed)
    output = rule(list(module), x, *args, **kwargs)
    loss_of(output).backward()
    result: Result = {"next random": torch.rand(3), "gradient of x": x.grad}
    for i, leaf in enumerate(tree_leaves(output)):
        result[f"output {i}"] = leaf.detach() if isinstance(leaf, Tensor) else None
    for i, leaf in enumerate(tree_leaves((args, kwargs))):
        if isinstance(leaf, Tensor):
            result[f"gradient of extra {i}"] = leaf.grad
    result |= gradients(module)
    result |= {f"buffer {name}": b.clone() for name, b in module.named_buffers()}
    return result


def gradients(module: nn.Module) -> Result:
    return {f"gradient of {name}": p.grad for name, p in module.named_parameters()}


def error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest element."""
    scale = expected.double().abs().max().item() if expected.numel() else 1.0
    difference = (actual.double() - expected.double()).abs().max().item() if expected.numel() else 0.0
    return difference / scale if scale else difference


def assert_same(actual: Result, expected: Result, tolerance: float) -> None:
    """Every tensor agrees within the tolerance, and what is None here is None there."""
    assert list(actual) == list(expected)
    wrong = {}
    for name, want in expected.items():
        have = actual[name]
        if have is None or want is None:
            if have is not want:
                wrong[name] = f"{have} instead of {want}"
        elif have.shape != want.shape or have.dtype != want.dtype:
            wrong[name] = f"{have.dtype} {tuple(have.shape)} instead of {want.dtype} {tuple(want.shape)}"
        elif not error(have, want) <= tolerance:
            wrong[name] = f"relative error {error(have, want):.1e}"
    assert not wrong, wrong


# ---------------------------------------------------------------------- what is alive


class Storages(TorchDispatchMode):
    """Remembers every storage that an operation made, without keeping it."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and (storage := leaf.untyped_storage())._cdata not in given:
                self._seen[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return output

    def alive(self, *without: Tensor) -> int:
        """Bytes that are still held, those of ``without`` aside."""
        own = {t.untyped_storage()._cdata for t in without}
        return sum(size for key, (ref, size) in self._seen.items() if key not in own and not ref.expired())


@contextmanager
def no_collector() -> Iterator[None]:
    """What dies here dies by its reference count."""
    import gc

    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()

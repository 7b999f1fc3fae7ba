"""One training step over copies of everything, and the slope of its loss by differences."""

from __future__ import annotations

import copy
import pickle
import random
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from reversa.check.trace import Trace, dense, norm, relative, watch
from reversa.engine import Engine, Store
from reversa.engine.conditions import random_state, restore_random_state, same_random_state
from reversa.errors import DriftWarning, SettingError

Loss = Callable[[Any], Tensor]
Named = dict[str, Tensor | None]


def tensors_of(output: Any) -> Iterator[Tensor]:
    """Every tensor in an output: in tuples, mappings and dataclasses, also those that PyTorch does not look into."""
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor):
            yield leaf
        elif isinstance(leaf, Mapping):
            yield from tensors_of(list(leaf.values()))
        elif is_dataclass(leaf) and not isinstance(leaf, type):
            yield from tensors_of([getattr(leaf, f.name, None) for f in fields(leaf)])


def default_loss(output: Any) -> Tensor:
    """Mean squared distance of every floating output from a fixed pattern, added up.

    From a pattern and not from zero: the squares of a normalised output add up to a constant, which has no gradient.

    Raises:
        SettingError: there is no floating tensor in the output.
    """
    floating = [y for y in tensors_of(output) if y.is_floating_point() and y.numel()]
    if not floating:
        raise SettingError(f"no floating tensor in the model's output ({type(output).__name__}): pass loss=function")
    terms = [
        (y - torch.arange(y.numel(), device=y.device).cos().view(y.shape).to(y.dtype)).square().mean() for y in floating
    ]
    return torch.stack([term.to(terms[0].device, terms[0].dtype) for term in terms]).sum()


class Generators:
    """All that random numbers are drawn from: PyTorch's generators, Python's, and numpy's where it is loaded."""

    def __init__(self, devices: set[torch.device]) -> None:
        self.states = {device: random_state(device) for device in devices | {torch.device("cpu")}}
        self.python = random.getstate()
        numpy = sys.modules.get("numpy")
        self.numpy = numpy.random.get_state() if numpy else None

    def restore(self) -> None:
        for device, state in self.states.items():
            restore_random_state(state, device)
        random.setstate(self.python)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)

    def same(self, other: Generators) -> bool:
        numpy = self.numpy is None or other.numpy is None or pickle.dumps(self.numpy) == pickle.dumps(other.numpy)
        states = all(same_random_state(state, other.states[device]) for device, state in self.states.items())
        return states and self.python == other.python and numpy


@dataclass
class Copy:
    """A model and its inputs, to be used up."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def leaves(self) -> dict[str, Tensor]:
        """By name: the parameters and inputs that require a gradient."""
        inputs = {f"input {i}": leaf for i, leaf in enumerate(tree_leaves((self.args, self.kwargs)))}
        named = {**dict(self.model.named_parameters()), **inputs}
        return {name: t for name, t in named.items() if isinstance(t, Tensor) and t.requires_grad}

    def shift(self, size: float) -> None:
        """Move the leaves in a fixed random direction, by a size relative to their own."""
        with torch.no_grad():
            for leaf, direction in zip(self.leaves().values(), self.directions().values(), strict=True):
                leaf.add_(direction, alpha=size)

    def directions(self) -> dict[str, Tensor]:
        return {name: _direction(leaf, seed) for seed, (name, leaf) in enumerate(self.leaves().items())}


@dataclass
class Outcome:
    """What one training step left behind."""

    loss: Tensor
    gradients: Named
    buffers: Named
    generators: Generators
    traces: list[Trace]


class Case:
    """What is checked: a model, its inputs, and a loss. It is only ever copied."""

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], loss: Loss) -> None:
        self.model = model
        self.args = args
        self.kwargs = kwargs
        self.loss = loss
        tensors = [*model.parameters(), *model.buffers(), *tensors_of((args, kwargs))]
        self.devices = {t.device for t in tensors if t.device.type != "meta"}
        self.start = Generators(self.devices)
        self.dtype = next((t.dtype for t in tensors if t.is_floating_point()), torch.get_default_dtype())

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Gradients on, forecasts of drift silent (the drift is measured), and the generators put back in the end."""
        try:
            with torch.inference_mode(False), torch.enable_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore", DriftWarning)
                yield
        finally:
            self.start.restore()

    def copy(self, double: bool) -> Copy:
        """Copies of model and inputs, all in float64 if asked for.

        Raises:
            SettingError: something in the model cannot be copied.
        """

        def fresh(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return copy.deepcopy(leaf)
            clone = leaf.detach().clone()
            clone = clone.double() if double and leaf.is_floating_point() else clone
            return clone.requires_grad_(leaf.requires_grad)

        try:
            model = copy.deepcopy(self.model)
        except (RuntimeError, TypeError) as error:
            raise SettingError(
                f"check works on copies of the model, and copy.deepcopy({type(self.model).__name__}) failed: {error}. "
                "Check it before it is wrapped for distributed training, and before it keeps tensors with a graph."
            ) from error
        model.zero_grad(set_to_none=True)
        model = model.double() if double else model
        _wake(model)
        return Copy(model, tree_map(fresh, self.args), tree_map(fresh, self.kwargs))

    def forward(self, copied: Copy) -> Tensor:
        """The loss, with the random numbers that every run begins with."""
        self.start.restore()
        loss = self.loss(copied.model(*copied.args, **copied.kwargs))
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise SettingError(f"loss must make one number of the model's output, got {type(loss).__name__}")
        return loss

    def step(self, double: bool, engine: Engine | None, shift: float = 0.0) -> Outcome:
        """One training step of a copy: with one engine everywhere, or with the model's own (None), looked at."""
        copied = self.copy(double)
        if shift:
            copied.shift(shift)
        traces = watch(copied.model, engine)
        loss = self.forward(copied)
        if loss.requires_grad:
            loss.backward()
        gradients = {name: leaf.grad for name, leaf in copied.leaves().items()}
        buffers: Named = dict(copied.model.named_buffers())
        return Outcome(loss.detach(), gradients, buffers, Generators(self.devices), traces)

    def slope_error(self, gradients: Named) -> tuple[float, bool]:
        """How far the loss's slope in a random direction, by central differences in float64, is from the gradient's.

        Where the first step disagrees, a smaller one is tried (the loss may bend), then larger ones (rounding inside
        the model may drown the difference).

        Returns:
            The relative error, and whether the differences agree with each other well enough to tell.
        """
        directions = self.copy(double=True).directions()
        parts = [torch.real(g.to_dense().conj() * directions[name]) for name, g in gradients.items() if g is not None]
        expected, scale = sum(float(part.sum()) for part in parts), norm(*parts)

        def error(slope: float) -> float:
            return relative(abs(slope - expected), max(scale, abs(expected)))

        slopes: list[float] = []
        for size in (1e-7, 1e-8, 1e-6, 1e-5, 1e-4, 1e-3):
            slopes.append((self._shifted(size) - self._shifted(-size)) / (2 * size))
            if error(slopes[-1]) < 1e-5:
                return error(slopes[-1]), True
        spread, slope = min((abs(a - b), a) for a, b in pairwise(slopes))
        return error(slope), spread < 0.01 * min(abs(slope), abs(slope - expected))

    def _shifted(self, size: float) -> float:
        copied = self.copy(double=True)
        copied.shift(size)
        watch(copied.model, Store())
        return float(self.forward(copied).detach())


def _wake(model: nn.Module) -> None:
    """Give small random values to trainable parameters that are all zero: what they multiply could not be checked."""
    with torch.no_grad():
        for seed, p in enumerate(model.parameters()):
            if p.requires_grad and not p.any():
                p.add_(_direction(p, seed), alpha=0.1)


def _direction(t: Tensor, seed: int) -> Tensor:
    """Random, of the tensor's own size: 1 where that is zero."""
    noise = torch.randn(t.shape, dtype=t.dtype, generator=torch.Generator().manual_seed(seed)).to(t.device)
    return noise * (norm(t) / max(1, t.numel()) ** 0.5 or 1.0)


def worst(have: Named, want: Named, floor: float = 0.0) -> tuple[float, str]:
    """The largest relative error among named tensors, and whose it is.

    Args:
        have: the tensors in question.
        want: what they should be.
        floor: a tensor counts as at least so long, in units of the typical one: what is next to zero is rounding.
    """
    there = [t for t in want.values() if t is not None]
    typical = floor * norm(*there) / max(1, sum(t.numel() for t in there)) ** 0.5 if floor and there else 0.0
    found = (0.0, next(iter(want), ""))
    for name in {**want, **have}:
        a, b = have.get(name), want.get(name)
        if a is None and b is None:
            continue
        if a is None or b is None or a.shape != b.shape or a.dtype != b.dtype:
            error = float("inf")
        elif not b.is_floating_point() and not b.is_complex():
            error = 0.0 if torch.equal(a, b) else float("inf")
        else:
            error = relative(norm(dense(a) - dense(b)), max(norm(b), typical * b.numel() ** 0.5))
        found = max(found, (error, name), key=lambda pair: pair[0])
    return found

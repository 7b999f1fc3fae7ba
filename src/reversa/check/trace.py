"""The chains of a model, and what their steps really do in one training step: schemes that are looked at."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from reversa.engine import Engine, Invert, Mixed, _torch
from reversa.exact import Exact, dtype_of, run_in
from reversa.schemes import Scheme, State
from reversa.sequence import ReversibleSequence


class Stage(Protocol):
    """What the blocks of a converted stage share."""

    name: str
    scheme: Scheme
    engine: Engine
    exact: Exact

    def scheme_for(self, x: Tensor, *training: bool) -> Scheme: ...


Holder = ReversibleSequence | Stage

Finding = tuple[float, int]
"""A relative error, and the step where it was found."""

NOTHING: Finding = (0.0, -1)


def dense(t: Tensor) -> Tensor:
    """The tensor's values, wide enough for norms of differences."""
    t = t.detach()
    t = t.to_dense() if t.layout == torch.sparse_coo else t
    if not (t.is_floating_point() or t.is_complex()):
        return t.double()
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t


def norm(*tensors: Tensor) -> float:
    """Euclidean length of all elements together."""
    return math.hypot(*(float(torch.linalg.vector_norm(dense(t))) for t in tensors))


def relative(difference: float, scale: float) -> float:
    """The difference in units of the scale; infinite where either is not finite, or only the scale is zero."""
    if difference == 0:
        return 0.0
    return difference / scale if math.isfinite(difference) and math.isfinite(scale) and scale else math.inf


def distance(have: State, want: State) -> float:
    """Relative error of several tensors taken together; of integers, zero only where all bits are the same."""
    error = relative(norm(*(dense(a) - dense(b) for a, b in zip(have, want, strict=True))), norm(*want))
    if error == 0 and not want[0].is_floating_point() and not all(map(torch.equal, have, want)):
        return torch.finfo(torch.float64).eps
    return error


class Trace:
    """Compares what one chain computes in the backward pass with what it computed in the forward pass.

    Attributes:
        name: the chain's name in the model.
        places: names of the residual functions, in the order of the steps.
        taken: number of steps made in the forward pass.
        drift: largest error of a recovered state; step -1 where no state was recovered.
        undo: largest error of one step and its inverse, from the forward pass's own state and value.
        repeat: largest error of a value of ``f`` that was computed again, where its argument does not explain it.
    """

    def __init__(self, name: str, places: list[str]) -> None:
        self.name = name
        self.places = places
        self.taken = 0
        self.drift = self.undo = self.repeat = NOTHING
        self._seen: dict[int, list[tuple[State, Tensor]]] = {}

    def looked_at(self, scheme_for: Callable[..., Scheme], x: Tensor, *training: bool) -> Scheme:
        """The scheme that a chain runs in, looked at: an instance's attributes are found before its class's methods."""
        scheme = scheme_for(x, *training)
        spied = copy.copy(scheme)
        vars(spied).update(forward=partial(self._forward, scheme), inverse=partial(self._inverse, scheme))
        return spied

    def place(self, step: int) -> str:
        """What to call a step in words."""
        known = 0 <= step < len(self.places) and self.taken % len(self.places) == 0
        return f"step {step} ({self.places[step]})" if known else f"step {step} of {self.name}"

    def _forward(self, scheme: Scheme, state: State, value: Tensor, step: int) -> State:
        after = scheme.forward(state, value, step)
        if value.is_nested:  # which the engines store
            return after
        with torch.no_grad():
            if _torch.graph_task() >= 0:  # inside a backward pass: recomputed, or a chain within a chain
                self._look(scheme, scheme.argument(state, step), value, step)
                return after
            self.taken += 1
            self._seen.setdefault(step, []).append((tuple(s.detach().clone() for s in state), value.detach().clone()))
            argument, rest = scheme.uncover(tuple(s.detach() for s in after), step)
            back = scheme.inverse(argument, rest, value.detach(), step)
            self.undo = max(self.undo, (distance(scheme.told(back), scheme.told(state)), step))
        return after

    def _inverse(self, scheme: Scheme, argument: Tensor, rest: State, value: Tensor, step: int) -> State:
        before = scheme.inverse(argument, rest, value, step)
        with torch.no_grad():
            seen = self._look(scheme, argument, value, step)
            if seen is not None:
                self.drift = max(self.drift, (distance(scheme.told(before), scheme.told(seen)), step))
        return before

    def _look(self, scheme: Scheme, argument: Tensor, value: Tensor, step: int) -> State | None:
        """Hold a second evaluation against the first one with the nearest argument; the state before that one."""
        found: tuple[float, float, State] | None = None
        for state, first in self._seen.get(step, []):
            there = scheme.argument(state, step)
            scale = norm(there, first)
            moved = relative(norm(dense(argument) - dense(there)), scale)
            changed = relative(norm(dense(value) - dense(first)), scale)
            if found is None or (moved, changed) < found[:2]:
                found = moved, changed, state
        if found is None:
            return None
        moved, changed, state = found
        if changed > 1000 * moved:  # a smooth function does not make that of a rounding error
            self.repeat = max(self.repeat, (changed, step))
        return state


def chains(model: nn.Module) -> Iterator[tuple[str, Holder, list[str]]]:
    """Name, holder and residual functions' names of every reversible chain in the model."""
    stages: dict[int, tuple[Stage, list[str]]] = {}
    for name, module in model.named_modules():
        if isinstance(module, ReversibleSequence):
            prefix = f"{name}.blocks" if name else "blocks"
            count = module.scheme.functions_per_block
            ends = [str(i) if count == 1 else f"{i}.{j}" for i in range(len(module.blocks)) for j in range(count)]
            yield name or type(module).__name__, module, [f"{prefix}.{end}" for end in ends]
        elif (stage := _stage_of(module)) is not None:
            stages.setdefault(id(stage), (stage, []))[1].append(name)
    for stage, places in stages.values():
        yield stage.name, stage, [name for name in places for _ in range(stage.scheme.functions_per_block)]


def is_exact(holder: Holder, model: nn.Module) -> bool:
    """Whether a chain of the model computes in integers, with states of the parameters' type."""
    dtype = dtype_of(model)
    return run_in(holder.scheme, holder.exact, dtype, dtype).exact


def _stage_of(module: nn.Module) -> Stage | None:
    """A converted block carries its place, and the place knows its stage (conversion itself is not imported here)."""
    for value in vars(module).values():
        stage = getattr(value, "stage", None)
        if isinstance(getattr(stage, "scheme", None), Scheme) and isinstance(getattr(stage, "engine", None), Engine):
            return stage
    return None


def watch(model: nn.Module, engine: Engine | None) -> list[Trace]:
    """Put one engine into every chain of a copy; or, with None, leave the engines and look at what they do."""
    traces: list[Trace] = []
    for name, holder, places in list(chains(model)):
        if engine is not None:
            holder.engine = engine
            continue
        holder.engine = _accepting(holder.engine)
        trace = Trace(name, places)
        vars(holder)["scheme_for"] = partial(trace.looked_at, holder.scheme_for)
        traces.append(trace)
    return traces


def _accepting(engine: Engine) -> Engine:
    """The same engine, which does not raise because of drift: where it comes from is for us to say."""
    if isinstance(engine, Mixed):
        return Mixed([(_accepting(part), count) for part, count in engine.parts])
    if isinstance(engine, Invert) and engine.anchors is not None:
        return replace(engine, accept_drift=True)
    return engine

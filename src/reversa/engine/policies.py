"""How the backward pass gets the states of the forward pass: stored, computed back, recomputed, or from the host."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from reversa.engine import _torch
from reversa.engine.chain import Chain
from reversa.engine.drift import accept, anchor_interval
from reversa.engine.replay import Extras
from reversa.engine.steps import Function, PlainSteps, Steps, is_recording, plain_step
from reversa.engine.watch import AsRecorded, Watch
from reversa.errors import SettingError
from reversa.schemes import Scheme, State

# A state this small is dominated by Python's overhead: several steps are replayed in one go.
SMALL_STATE_BYTES = 1 << 15
SMALL_STATE_GROUP = 8


class Engine(ABC):
    """A policy for what the backward pass needs. It knows no formula."""

    def __repr__(self) -> str:
        """The settings that differ from the defaults."""
        changed = [f"{f.name}={v!r}" for f in fields(self) if (v := getattr(self, f.name)) != f.default]  # type: ignore[arg-type]
        return f"{type(self).__name__}({', '.join(changed)})"

    @abstractmethod
    def begin(self, scheme: Scheme, length: int | None = None) -> Steps:
        """Begin a chain that is made step by step.

        Args:
            scheme: the update rule.
            length: number of steps, where it is known.
        """

    def run(
        self, scheme: Scheme, fs: Sequence[Function], state: State, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[State, Any]:
        """All steps of a chain with the same extra arguments: the last state, and what the last ``f`` returned."""
        steps = self.begin(scheme, len(fs))
        output = None
        for f in fs:
            state, output = steps.step(f, state, args, kwargs)
        steps.end()
        return state, output

    def kept_states(self, scheme: Scheme, length: int, dtype: torch.dtype) -> str:
        """In words: what a chain of that length keeps for the backward pass."""
        return f"the activations of {length} steps"


@dataclass(frozen=True, repr=False)
class Store(Engine):
    """Ordinary backpropagation: autograd stores every activation.

    >>> import torch, reversa
    >>> seq = reversa.ReversibleSequence([torch.nn.Linear(4, 4)], scheme=reversa.Momentum(0.9))
    >>> seq.engine = reversa.Store()
    """

    def begin(self, scheme: Scheme, length: int | None = None) -> Steps:
        return PlainSteps(scheme)


@dataclass(frozen=True, repr=False)
class Offload(Engine):
    """Every activation is stored in the host's memory and copied back in the backward pass.

    Source: ``torch.autograd.graph.save_on_cpu``.

    Args:
        pin_memory: use page-locked memory, which copies faster from and to a GPU.
    """

    pin_memory: bool = False

    def begin(self, scheme: Scheme, length: int | None = None) -> Steps:
        return _OffloadSteps(scheme, self.pin_memory)

    def kept_states(self, scheme: Scheme, length: int, dtype: torch.dtype) -> str:
        return f"the activations of {length} steps, in the host's memory"


class _OffloadSteps(Steps):
    def __init__(self, scheme: Scheme, pin_memory: bool) -> None:
        super().__init__(scheme)
        self.pin_memory = pin_memory

    def _take(
        self, f: Function, state: State, args: tuple[Any, ...], kwargs: Mapping[str, Any], module: Any, where: object
    ) -> tuple[State, Any]:
        with save_on_cpu(self.pin_memory) if is_recording() else nullcontext():
            return plain_step(self.scheme, f, state, self.taken, args, kwargs, where)


@dataclass(frozen=True, repr=False)
class Recompute(Engine):
    """The state before every ``every``-th step is stored, and the steps after it are computed forwards again.

    Memory grows with depth as ``length / every`` states. It needs no inverse and drifts not at all.

    Source: ``torch.utils.checkpoint`` (non-reentrant); statistics of normalisation layers move once, not twice.

    Args:
        every: number of steps recomputed together.

    Raises:
        SettingError: ``every`` is smaller than 1; or larger than 1 where a chain is made step by step.
    """

    every: int = 1

    def __post_init__(self) -> None:
        if self.every < 1:
            raise SettingError(f"Recompute needs every >= 1 step, got {self.every}")

    def begin(self, scheme: Scheme, length: int | None = None) -> Steps:
        if self.every > 1:
            raise SettingError(
                f"Recompute(every={self.every}) needs all its steps at once, but they are made one by one here "
                "(inside another model's loop). Use Recompute(every=1)."
            )
        return _RecomputeSteps(scheme)

    def run(
        self, scheme: Scheme, fs: Sequence[Function], state: State, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[State, Any]:
        steps = _RecomputeSteps(scheme)
        output = None
        for first in range(0, len(fs), self.every):
            state, output = steps.several(fs[first : first + self.every], state, args, kwargs)
        return state, output

    def kept_states(self, scheme: Scheme, length: int, dtype: torch.dtype) -> str:
        return f"{-(-length // self.every)} states"


class _RecomputeSteps(Steps):
    def _take(
        self, f: Function, state: State, args: tuple[Any, ...], kwargs: Mapping[str, Any], module: Any, where: object
    ) -> tuple[State, Any]:
        def one(*state: torch.Tensor) -> tuple[State, Any]:
            return plain_step(self.scheme, f, state, step, args, kwargs, where)

        step = self.taken
        return _checkpointed(one, state, [module], where)

    def several(
        self, fs: Sequence[Function], state: State, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[State, Any]:
        def some(*state: torch.Tensor) -> tuple[State, Any]:
            steps, output = PlainSteps(self.scheme), None
            steps.taken = first
            for f in fs:
                state, output = steps.step(f, state, args, kwargs)
            return state, output

        first, self.taken = self.taken, self.taken + len(fs)
        where = f"steps {first} to {self.taken - 1}"
        return _checkpointed(some, state, fs, where)


def _checkpointed(function: Any, state: State, modules: Sequence[Any], where: object) -> tuple[State, Any]:
    if not is_recording():
        return function(*state)
    watches = [Watch(module) for module in modules]
    contexts = nullcontext(), AsRecorded(watches, where)
    result = checkpoint(function, *state, use_reentrant=False, context_fn=lambda: contexts)
    for watch in watches:
        watch.settle(where)
    return result


@dataclass(frozen=True, repr=False)
class Invert(Engine):
    """States are computed back from the end by the scheme's inverse: memory that does not grow with depth.

    One more evaluation of each residual function is the price. Where float arithmetic would drift too far
    (:meth:`~reversa.schemes.Scheme.drift`), a state is kept every so many steps.

    Args:
        keep: the last ``keep`` steps store their activations in the ordinary way (less time, more memory).
        anchors: ``"auto"`` keeps a state wherever the drift law asks for one; a number keeps one every so many
            steps; None keeps none, with a warning or an error where the drift is too large.
        accept_drift: with ``anchors=None``, do not raise.
        group: number of steps replayed in one go; None chooses by the size of the state.

    Raises:
        SettingError: a setting outside its range.
        DriftError: (while running) ``anchors=None`` and the drift law passes 1e-2.

    >>> Invert(keep=2)
    Invert(keep=2)
    """

    keep: int = 0
    anchors: Literal["auto"] | int | None = "auto"
    accept_drift: bool = False
    group: int | None = None

    def __post_init__(self) -> None:
        if self.keep < 0:
            raise SettingError(f"Invert needs keep >= 0 steps, got {self.keep}")
        if (
            self.anchors is not None
            and self.anchors != "auto"
            and not (isinstance(self.anchors, int) and self.anchors >= 1)
        ):
            raise SettingError(f"Invert needs anchors='auto', None, or a number of steps >= 1, got {self.anchors!r}")
        if self.group is not None and self.group < 1:
            raise SettingError(f"Invert needs group >= 1 steps, got {self.group}")

    def begin(self, scheme: Scheme, length: int | None = None) -> Steps:
        return _InvertSteps(scheme, self, length)

    def interval(self, scheme: Scheme, length: int | None, dtype: torch.dtype, under: torch.dtype) -> int | None:
        """Steps from one kept state to the next; None where only the last is kept.

        Args:
            scheme: the update rule, with its drift law.
            length: number of steps in all, where it is known; the intervals are made equal then.
            dtype: the state's data type.
            under: the data type that the residual functions compute in.
        """
        inverted = None if length is None else max(0, length - self.keep)
        wanted = anchor_interval(scheme, dtype, under) if self.anchors == "auto" else self.anchors
        if wanted is None or inverted is None or inverted <= wanted:
            return wanted if inverted is None else None
        return -(-inverted // -(-inverted // wanted))

    def kept_states(self, scheme: Scheme, length: int, dtype: torch.dtype) -> str:
        inverted = max(0, length - self.keep)
        interval = self.interval(scheme, length, dtype, dtype)
        states = min(1, inverted) if interval is None else -(-inverted // interval)
        every = "" if interval is None else f" (one every {interval} steps)"
        stored = f" and the activations of {min(self.keep, length)} steps" if self.keep else ""
        return f"{states} state{'s' * (states != 1)}{every}{stored}"


class _InvertSteps(Steps):
    """Chains of recorded steps, one behind the other: where one ends, a state is kept."""

    def __init__(self, scheme: Scheme, engine: Invert, length: int | None) -> None:
        super().__init__(scheme)
        self.engine = engine
        self.inverted = None if length is None else max(0, length - engine.keep)
        self.length = length
        self.interval: int | None = None
        self.chain: Chain | None = None
        self.extras: Extras | None = None
        self.begun = False

    def _take(
        self, f: Function, state: State, args: tuple[Any, ...], kwargs: Mapping[str, Any], module: Any, where: object
    ) -> tuple[State, Any]:
        if not is_recording() or state[0].is_nested or (self.inverted is not None and self.taken >= self.inverted):
            self.end()
            return plain_step(self.scheme, f, state, self.taken, args, kwargs, where)
        if not self.begun:
            self._look_at(state)
        if self.chain is None or len(self.chain) == self.interval:
            self.end()
            self.chain = Chain(self.scheme, self.taken, self._group(state))
        return self.chain.step(f, state, self._extras(args, kwargs), module, where)

    def _look_at(self, state: State) -> None:
        """What only a state tells: its data type, and so its drift."""
        self.begun = True
        dtype = state[0].dtype
        kind = state[0].device.type
        under = torch.get_autocast_dtype(kind) if _torch.any_autocast() and torch.is_autocast_enabled(kind) else dtype
        if self.engine.anchors is None and self.inverted is not None:
            accept(self.scheme, self.inverted, dtype, under, self.engine.accept_drift)
        self.interval = self.engine.interval(self.scheme, self.length, dtype, under)

    def _group(self, state: State) -> int:
        if self.engine.group is not None:
            return self.engine.group
        small = state[0].numel() * state[0].element_size() <= SMALL_STATE_BYTES
        return SMALL_STATE_GROUP if small else 1

    def _extras(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Extras:
        """One record for all steps that are given the same arguments."""
        if self.extras is None or self.extras.args is not args or self.extras.kwargs is not kwargs:
            self.extras = Extras(args, kwargs)
        return self.extras

    def end(self) -> None:
        if self.chain is not None:
            self.chain.end()
            self.chain = None

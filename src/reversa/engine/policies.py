"""How the backward pass gets the states of the forward pass: stored, computed back, recomputed, or from the host."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint  # pyright: ignore[reportUnknownVariableType]

from reversa.engine.steps import Function, Opening, PlainSteps, Steps, is_recording, plain_step
from reversa.engine.watch import AsRecorded, Watch
from reversa.errors import SettingError
from reversa.schemes import Scheme, State


class Engine(ABC):
    """A policy for what the backward pass needs. It knows no formula."""

    @property
    def inverts(self) -> bool:
        """Whether the backward pass goes back over steps by the scheme's inverse."""
        return False

    def __repr__(self) -> str:
        """The settings that differ from the defaults."""
        changed = [f"{f.name}={v!r}" for f in fields(self) if (v := getattr(self, f.name)) != f.default]  # type: ignore[arg-type]
        return f"{type(self).__name__}({', '.join(changed)})"

    @abstractmethod
    def begin(self, scheme: Scheme, length: int | None = None, first: int = 0) -> Steps:
        """Begin a chain, or a part of one, that is made step by step.

        Args:
            scheme: the update rule.
            length: number of steps, where it is known.
            first: number of the first of them: of a part, the steps before it.
        """

    def run(
        self,
        scheme: Scheme,
        fs: Sequence[Function],
        opening: Opening,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        first: int = 0,
    ) -> tuple[State, Any]:
        """All steps of a chain, or of a part of one, with the same extra arguments: the last state, and what the last
        ``f`` returned.
        """
        steps = self.begin(scheme, len(fs), first)
        state, output = opening(), None
        for f in fs:
            output = None  # what a function returned is let go before the next one runs
            state, output = steps.step(f, state, args, kwargs)
        steps.end()
        return state, output

    def kept_states(self, scheme: Scheme, length: int, dtype: torch.dtype) -> str:
        """In words: what a chain of that length keeps for the backward pass."""
        return f"the activations of {length} steps"

    def kept_bytes(self, scheme: Scheme, length: int, dtype: torch.dtype, elements: int, stored: int) -> int:
        """The same in bytes of the device.

        Args:
            scheme: the update rule.
            length: number of steps.
            dtype: the state's data type.
            elements: of one stream.
            stored: bytes of the activations of all steps.
        """
        return stored


@dataclass(frozen=True, repr=False)
class Store(Engine):
    """Ordinary backpropagation: autograd stores every activation.

    >>> import torch, reversa
    >>> seq = reversa.ReversibleSequence([torch.nn.Linear(4, 4)], scheme=reversa.Momentum(0.9))
    >>> seq.engine = reversa.Store()
    """

    def begin(self, scheme: Scheme, length: int | None = None, first: int = 0) -> Steps:
        return PlainSteps(scheme, first)


@dataclass(frozen=True, repr=False)
class Offload(Engine):
    """Every activation is stored in the host's memory and copied back in the backward pass.

    Source: ``torch.autograd.graph.save_on_cpu``.

    Args:
        pin_memory: use page-locked memory, which copies faster from and to a GPU.
    """

    pin_memory: bool = False

    def begin(self, scheme: Scheme, length: int | None = None, first: int = 0) -> Steps:
        return _OffloadSteps(scheme, self.pin_memory, first)

    def kept_states(self, scheme: Scheme, length: int, dtype: torch.dtype) -> str:
        return f"the activations of {length} steps, in the host's memory"

    def kept_bytes(self, scheme: Scheme, length: int, dtype: torch.dtype, elements: int, stored: int) -> int:
        return 0


class _OffloadSteps(Steps):
    def __init__(self, scheme: Scheme, pin_memory: bool, first: int) -> None:
        super().__init__(scheme, first)
        self.pin_memory = pin_memory

    def _take(
        self, f: Function, state: State, args: tuple[Any, ...], kwargs: Mapping[str, Any], module: Any, where: object
    ) -> tuple[State, Any]:
        with save_on_cpu(self.pin_memory) if is_recording() else nullcontext():
            return plain_step(self.scheme, f, state, self.taken, args, kwargs, where)


@dataclass(frozen=True, repr=False)
class Recompute(Engine):
    """The state before every ``every``-th step is stored, and the steps after it are computed forwards again.

    With ``every=1`` it is the argument of each residual function. Memory grows with depth as ``length / every``. It
    needs no inverse and drifts not at all.

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

    def begin(self, scheme: Scheme, length: int | None = None, first: int = 0) -> Steps:
        if self.every > 1:
            raise SettingError(
                f"Recompute(every={self.every}) needs all its steps at once, but they are made one by one here "
                "(inside another model's loop). Use Recompute(every=1)."
            )
        return _RecomputeSteps(scheme, first)

    def run(
        self,
        scheme: Scheme,
        fs: Sequence[Function],
        opening: Opening,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        first: int = 0,
    ) -> tuple[State, Any]:
        if self.every == 1:
            return super().run(scheme, fs, opening, args, kwargs, first)
        steps = _RecomputeSteps(scheme, first)
        state, output = opening(), None
        for i in range(0, len(fs), self.every):
            state, output = steps.several(fs[i : i + self.every], state, args, kwargs)
        return state, output

    def kept_states(self, scheme: Scheme, length: int, dtype: torch.dtype) -> str:
        return f"{-(-length // self.every)} {'arguments of f' if self.every == 1 else 'states'}"

    def kept_bytes(self, scheme: Scheme, length: int, dtype: torch.dtype, elements: int, stored: int) -> int:
        streams = 1 if self.every == 1 else scheme.num_streams
        return -(-length // self.every) * streams * elements * scheme.element_bytes(dtype)


class _RecomputeSteps(Steps):
    def _take(
        self, f: Function, state: State, args: tuple[Any, ...], kwargs: Mapping[str, Any], module: Any, where: object
    ) -> tuple[State, Any]:
        """The function alone is checkpointed: its argument is stored, not the whole state."""

        def recomputed(*given: Any, **named: Any) -> Any:
            return checkpointed(partial(f, **named), given, [module], where)

        return plain_step(self.scheme, recomputed, state, self.taken, args, kwargs, where)

    def several(
        self, fs: Sequence[Function], state: State, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[State, Any]:
        def some(*state: torch.Tensor) -> tuple[State, Any]:
            steps, output = PlainSteps(self.scheme, first), None
            for f in fs:
                output = None
                state, output = steps.step(f, state, args, kwargs)
            return state, output

        first, self.taken = self.taken, self.taken + len(fs)
        where = f"steps {first} to {self.taken - 1}"
        return checkpointed(some, state, fs, where)


def checkpointed(function: Any, given: Sequence[Any], modules: Sequence[Any], where: object) -> Any:
    """``function(*given)``, of which autograd keeps the arguments alone; the modules' statistics move once."""
    if not is_recording():
        return function(*given)
    watches = [Watch(module) for module in modules]
    contexts = nullcontext(), AsRecorded(watches, where)
    result = checkpoint(function, *given, use_reentrant=False, context_fn=lambda: contexts)
    for watch in watches:
        watch.settle(where)
    return result

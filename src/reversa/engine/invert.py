"""States computed back from the end: the engine that the library exists for."""

# pyright: reportUnnecessaryIsInstance=false

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from reversa.engine import _torch
from reversa.engine.chain import Chain
from reversa.engine.determinism import deterministic
from reversa.engine.drift import accept, anchor_interval, tolerance
from reversa.engine.extras import Extras
from reversa.engine.policies import Engine
from reversa.engine.sample import Samples
from reversa.engine.steps import Function, Opening, Steps, is_recording, plain_step
from reversa.engine.verify import Hashes
from reversa.errors import SettingError
from reversa.schemes import Scheme, State

# A state this small is dominated by Python's overhead: several steps are replayed in one go.
SMALL_STATE_BYTES = 1 << 15
SMALL_STATE_GROUP = 8


@dataclass(frozen=True, repr=False)
class Invert(Engine):
    """States are computed back from the end by the scheme's inverse: memory that does not grow with depth.

    One more evaluation of each residual function is the price. Where float arithmetic would drift too far
    (:meth:`~reversa.schemes.Scheme.drift`), a state is kept every so many steps; and a few elements of some
    arguments are, with which those that come back must agree: residual functions can multiply errors, too.

    Args:
        keep: the last ``keep`` steps store their activations in the ordinary way (less time, more memory).
        anchors: ``"auto"`` keeps a state wherever the drift law asks for one; a number keeps one every so many
            steps; None keeps none, with a warning or an error where the drift is too large.
        accept_drift: do not raise because of drift, whether foreseen or found. In exact arithmetic there is none:
            a state that comes back with other bits was computed by another function, and that is an error always.
        group: number of steps replayed in one go, with the state before the first step kept as well; None chooses
            1, or 8 for a state so small that Python's overhead matters more.
        verify: in exact arithmetic, keep a hash of the state before each step and compare it on the way back.

    Raises:
        SettingError: a setting outside its range.
        DriftError: (while running) ``anchors=None`` and the drift law passes 1e-2; or, in the backward pass, an
            argument comes back as another one, by 1 % or more (in 16 bits by more).

    >>> Invert(keep=2)
    Invert(keep=2)
    """

    keep: int = 0
    anchors: Literal["auto"] | int | None = "auto"
    accept_drift: bool = False
    group: int | None = None
    verify: bool = False

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

    @property
    def inverts(self) -> bool:
        return True

    def begin(self, scheme: Scheme, length: int | None = None, first: int = 0) -> Steps:
        return _InvertSteps(scheme, self, length, first)

    def run(
        self,
        scheme: Scheme,
        fs: Sequence[Function],
        opening: Opening,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        first: int = 0,
    ) -> tuple[State, Any]:
        return _InvertSteps(scheme, self, len(fs), first).run(fs, opening, args, kwargs)

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
        if scheme.amplification == math.inf:
            wanted = 1  # what a step wipes out cannot be computed back
        if wanted is None or inverted is None or inverted <= wanted:
            return wanted if inverted is None else None
        return -(-inverted // -(-inverted // wanted))

    def kept_states(self, scheme: Scheme, length: int, dtype: torch.dtype) -> str:
        inverted, interval = max(0, length - self.keep), self.interval(scheme, length, dtype, dtype)
        states, words = _states(inverted, interval), scheme.spilled_bytes(inverted)
        spilled = f" and {words} byte{'s' * (words != 1)} of spilled bits for each of its elements" if words else ""
        every = "" if interval is None else " (one every step)" if interval == 1 else f" (one every {interval} steps)"
        stored = f" and the activations of {min(self.keep, length)} steps" if self.keep else ""
        return f"{states} state{'s' * (states != 1)}{every}{spilled}{stored}"

    def kept_bytes(self, scheme: Scheme, length: int, dtype: torch.dtype, elements: int, stored: int) -> int:
        inverted = max(0, length - self.keep)
        states = _states(inverted, self.interval(scheme, length, dtype, dtype))
        of_states = states * scheme.num_streams * scheme.element_bytes(dtype) + scheme.spilled_bytes(inverted)
        return elements * of_states + stored * (length - inverted) // length


def _states(inverted: int, interval: int | None) -> int:
    """How many states are kept: one every so many steps, or the last."""
    return min(1, inverted) if interval is None else -(-inverted // interval)


class _InvertSteps(Steps):
    """Chains of recorded steps, one behind the other: where one ends, a state is kept."""

    def __init__(self, scheme: Scheme, engine: Invert, length: int | None, first: int) -> None:
        super().__init__(scheme, first)
        self.engine = engine
        self.inverted = None if length is None else max(0, length - engine.keep)
        self.stop = None if self.inverted is None else first + self.inverted
        self.length = length
        self.interval: int | None = None
        self.tolerance: float = 0.0
        self.chain: Chain | None = None
        self.extras: Extras | None = None
        self.begun = False

    def _take(
        self, f: Function, state: State, args: tuple[Any, ...], kwargs: Mapping[str, Any], module: Any, where: object
    ) -> tuple[State, Any]:
        if not is_recording() or state[0].is_nested or (self.stop is not None and self.taken >= self.stop):
            self.end()
            return plain_step(self.scheme, f, state, self.taken, args, kwargs, where)
        if not self.begun:
            self._look_at(state)
        if self.chain is None or len(self.chain) == self.interval:
            self.end()
            self.chain = self._chain(state, self.taken, module)
        with deterministic(self.scheme, state[0].device):
            state, output = self.chain.step(f, state, self._extras(args, kwargs), module)
        self.chain.reach(state)
        return state, output

    def _look_at(self, state: State) -> None:
        """What only a state tells: its data type, and so its drift."""
        self.begun = True
        dtype = state[0].dtype
        kind = state[0].device.type
        under = torch.get_autocast_dtype(kind) if _torch.any_autocast() and torch.is_autocast_enabled(kind) else dtype
        if self.engine.anchors is None and self.inverted is not None:
            accept(self.scheme, self.inverted, dtype, under, self.engine.accept_drift)
        self.interval = self.engine.interval(self.scheme, self.length, dtype, under)
        self.tolerance = tolerance(dtype, under)

    def _chain(self, state: State, first: int, module: Any) -> Chain:
        hashes = Hashes(self.scheme) if self.engine.verify else None
        tolerance = None if self.scheme.exact else self.tolerance
        samples = None if self.engine.accept_drift and tolerance is not None else Samples(tolerance)
        return Chain(self.scheme, state, first, self._group(state, module), hashes, samples)

    def _group(self, state: State, module: Any) -> int:
        if self.engine.group is not None:
            return self.engine.group
        if hasattr(module, "unshard"):  # FSDP2 gathers the parameters of one step at a time
            return 1
        small = state[0].numel() * state[0].element_size() <= SMALL_STATE_BYTES
        return SMALL_STATE_GROUP if small else 1

    def _extras(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Extras:
        """One record for all steps that are given the same arguments."""
        if self.extras is None or self.extras.args is not args or self.extras.kwargs is not kwargs:
            self.extras = Extras(args, kwargs)
        return self.extras

    def run(
        self, fs: Sequence[Function], opening: Opening, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[State, Any]:
        """All steps, one directly after another: no backward pass comes in between, so only ends are kept."""
        state, output, inverted, first = opening(), None, len(fs) - self.engine.keep, self.taken
        if is_recording() and not state[0].is_nested and inverted > 0:
            self._look_at(state)
            extras, every = Extras(args, kwargs), self.interval or inverted
            for i in range(0, inverted, every):
                chain = self._chain(state, self.taken, fs[i])
                with deterministic(self.scheme, state[0].device):
                    for f in fs[i : min(i + every, inverted)]:
                        output = None  # what a function returned is let go before the next one runs
                        state, output = chain.step(f, state, extras, f)
                        self.taken += 1
                chain.reach(state)
                chain.end()
        for f in fs[self.taken - first :]:
            output = None
            state, output = self.step(f, state, args, kwargs)
        return state, output

    def end(self) -> None:
        if self.chain is not None:
            self.chain.end()
            self.chain = None

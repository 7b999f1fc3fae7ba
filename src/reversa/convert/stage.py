"""What a converted model remembers, and how a block finds the state that the block before it left.

The carried tensor x travels through the model's own loop as it always did. The rest of the state (the velocity)
travels in a **link**: who returned which tensor, and the hidden streams that belong to it. Links live in a **scope**,
one for each running call of the container whose forward holds the loop, so that nothing outlives the call.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from reversa.engine import Engine, Offload, Steps, Store
from reversa.engine.steps import is_recording
from reversa.errors import ConversionWarning, StateChanged
from reversa.exact import Exact, ExactScheme, run_in, run_with
from reversa.schemes import Scheme, State

Between = Literal["error", "carry"]


@dataclass(eq=False)
class Stage:
    """A run of converted blocks: what they share. It refers to no module and to no tensor of a call."""

    name: str
    scheme: Scheme
    engine: Engine
    length: int
    exact: Exact = None
    between: Between = "error"
    shape: tuple[int, ...] | None = None
    after: tuple[str, ...] = ()
    stored: int | None = None
    _loose: dict[int, list[Link]] = field(default_factory=dict, repr=False)
    _told: set[str] = field(default_factory=set, repr=False)
    _emptied: WeakKeyDictionary[Any, set[int]] | None = field(default=None, repr=False)

    @property
    def guessed(self) -> bool:
        """Found by structure alone, without a pass."""
        return self.shape is None

    @property
    def stores(self) -> bool:
        """Whether each block is evaluated once, and never again in the backward pass."""
        return isinstance(self.engine, (Store, Offload))

    def runs(self, dtype: torch.dtype) -> Scheme:
        """The scheme in the arithmetic that it runs in with states of that type."""
        return run_in(self.scheme, self.exact, dtype, dtype)

    def scheme_for(self, x: Tensor, training: bool) -> Scheme:
        """The scheme in the arithmetic that it runs in with this input, now."""
        return run_with(self.scheme.begun(x, self.length, training), self.exact, x)

    def scheme_of(self, link: Link | None, x: Tensor, training: bool) -> Scheme:
        """The scheme of the pass that a block continues, or of one that begins with it."""
        scheme = self.scheme_for(x, training) if link is None else link.steps.scheme
        if isinstance(scheme, ExactScheme):
            scheme.way_back = self.engine.inverts and is_recording()
        return scheme

    def begin(self, scheme: Scheme) -> Steps:
        """A new chain."""
        return self.engine.begin(scheme, self.length)

    def afresh(self, steps: Steps, number: int) -> Steps:
        """A new chain behind one that ends here; its first step has that number."""
        steps.end()
        new = self.begin(steps.scheme)
        new.taken = number
        return new

    def tell(self, message: str) -> None:
        """Warn, once."""
        if message not in self._told:
            self._told.add(message)
            warnings.warn(message, ConversionWarning, stacklevel=2)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_loose": {}, "_emptied": None}  # links belong to running calls, not to copies

    def withheld_from(self, cache: Any) -> set[int]:
        """Identities of the blocks that were not given this key-value cache; the set may be added to."""
        if self._emptied is None:
            self._emptied = WeakKeyDictionary()
        return self._emptied.setdefault(cache, set[int]())

    def loose(self) -> list[Link]:
        """Links of blocks that are called outside any container's forward, in this thread."""
        return self._loose.setdefault(threading.get_ident(), [])


@dataclass(eq=False)
class Place:
    """Where a converted block stands; kept in the block itself."""

    stage: Stage
    index: int
    name: str
    key: int | str
    guessed: bool = False
    """Found by structure alone: whether it is a residual block is seen at its first call."""
    compiled: dict[str, Any] | None = None


class Link:
    """One pass over a stage, between two of its blocks."""

    __slots__ = ("__weakref__", "alias", "head", "hidden", "index", "ref", "steps", "version")

    def __init__(self, index: int, state: State, steps: Steps) -> None:
        x = state[0]
        self.index = index
        self.ref = weakref.ref(x)
        self.alias = x.detach()
        self.version = None if x.is_inference() else x._version
        self.head: Tensor | None = None  # what the pass goes on with, where it is not the tensor that the loop hands on
        self.hidden = state[1:]  # with their graph
        self.steps = steps

    def holds(self, x: Tensor) -> bool:
        """Whether x *is* what the block returned: the same memory, seen in the same way, not written to since.

        Not the same object: FSDP2 and hooks wrap a tensor anew. Not the same graph node: ``detach()`` has none, and the
        state goes on with the value alone; gradients follow the tensors really passed.
        """
        if x is not self.ref() and (x.is_nested or self.alias.is_nested or _geometry(x) != _geometry(self.alias)):
            return False
        return self.version is None or x.is_inference() or x._version == self.version


def _geometry(t: Tensor) -> tuple[Any, ...]:
    return t.untyped_storage()._cdata, t.shape, t.stride(), t.storage_offset(), t.dtype, t.device


_Scope = dict[Stage, list[Link]]
_scope: ContextVar[_Scope | None] = ContextVar("reversa_scope", default=None)


@contextmanager
def scope() -> Iterator[None]:
    """Links made inside live until it is left; then their chains are complete."""
    links: _Scope = {}
    token = _scope.set(links)
    try:
        yield
    finally:
        _scope.reset(token)
        for link in (link for stage in links.values() for link in stage):
            link.steps.end()


@contextmanager
def continued(place: Place, x: Tensor) -> Iterator[Link | None]:
    """The pass that this block continues; None where a new pass begins with it. If the step fails, it can be tried
    again.

    Raises:
        StateChanged: x is not what an earlier block of the stage returned.
    """
    stage, inside = place.stage, _scope.get()
    links = stage.loose() if inside is None else inside.get(stage, [])
    link = next((link for link in links if link.index < place.index and link.holds(x)), None)
    waiting = [link for link in links if link.index < place.index]
    if link is None and len(waiting) == 1 and stage.between == "carry":
        (link,) = waiting
        (link.head, *hidden), number = link.steps.scheme.resumed(x, (x, *link.hidden), link.steps.taken)
        link.hidden = tuple(hidden)
        link.steps = stage.afresh(link.steps, number)
    if link is None and place.index > 0 and (inside is None or stage in inside):
        _refuse(place, links)  # in a container's call where no block ran, those before it were skipped (LayerDrop)
    if link is not None:
        links.remove(link)
    try:
        yield link
    except BaseException:
        if link is not None:
            links.append(link)
        raise


def _refuse(place: Place, links: list[Link]) -> None:
    before = f"block {links[-1].index}" if links else "the block before it"
    if place.stage.between == "carry" and len(links) > 1:
        raise StateChanged(
            f"{place.name} (block {place.index} of stage {place.stage.name!r}) was given another tensor than the "
            f"blocks before it returned, and {len(links)} passes over the stage are under way: nobody can say whose "
            "velocity goes on. Make one pass after the other."
        )
    raise StateChanged(
        f"{place.name} (block {place.index} of stage {place.stage.name!r}) was not given the tensor that {before} "
        "returned: it was computed from it, changed in place, used twice, or the block was called on its own. Leave "
        "these blocks out of the stages, call the model as a whole, or convert(..., between='carry') to let the "
        "velocity go on."
    )


def leave_link(place: Place, state: State, steps: Steps) -> None:
    """Leave the state for the block that comes next."""
    link, inside = Link(place.index, state, steps), _scope.get()
    if inside is not None:
        inside.setdefault(place.stage, []).append(link)
        return
    links, weak = place.stage.loose(), weakref.ref(link)

    def forget(_: Any) -> None:  # outside a container's call the velocity lives as long as x does
        if (link := weak()) in links:
            links.remove(link)  # type: ignore[arg-type]

    link.ref = weakref.ref(state[0], forget)
    links.append(link)

"""The parameters, buffers and flags of a module: noticed when they change, and put back for a second evaluation."""

# pyright: reportPrivateUsage=false
# The dictionaries of a module are read directly: this runs in every step.

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from reversa.errors import BlockError, ReplayError

# Buffers up to this size are copied before an evaluation in training, in case it writes to them.
SNAPSHOT_NUMEL = 1 << 14


Owner = dict[str, Any]
"""A module's dictionary of parameters, or of buffers."""


def _held_by(owners: list[Owner]) -> list[Tensor | None]:
    """The parameters and buffers in those dictionaries, in order."""
    held: list[Tensor | None] = []
    for owner in owners:
        held += owner.values()
    return held


def _versions(held: list[Tensor | None]) -> list[int | None]:
    return [None if t is None else t._version for t in held]


_NONE: list[Owner] = []
_NO_COPIES: dict[int, Tensor] = {}


class Watch:
    """The parameters, buffers and training flags that a module was evaluated with.

    Normalisation layers in training read their statistics' buffers only to move them, so those are exempt from the
    check and copies are moved in their place. Other small buffers that an evaluation writes to are restored from
    copies.
    """

    __slots__ = ("copies", "held", "modules", "owners", "statistics", "training", "versions")

    def __init__(self, module: Any) -> None:
        # This runs in every step: module.modules() makes names and a set, and isinstance is slow on most classes.
        self.modules: list[nn.Module] = [module] if isinstance(module, nn.Module) else []
        self.training: list[bool] = []
        self.owners: list[Owner] = []
        self.statistics: list[Owner] = _NONE
        self.copies: dict[int, Tensor] = _NO_COPIES
        buffers = False
        for m in self.modules:
            self.training.append(m.training)
            if m._modules:
                self.modules += [child for child in m._modules.values() if child is not None]
            if m._parameters:
                self.owners.append(m._parameters)
            if m._buffers:
                buffers = True
                if m.training and isinstance(m, _NormBase):
                    self.statistics = [*self.statistics, m._buffers]
                else:
                    self.owners.append(m._buffers)
        self.held = _held_by(self.owners)
        self.versions = _versions(self.held)
        if buffers:
            self._copy_buffers()

    def _copy_buffers(self) -> None:
        """Copy small buffers of modules in training, in case the evaluation writes to them (:meth:`settle`)."""
        self.copies = {}
        writable = {id(m._buffers) for m in self.modules if m.training}
        for i, (owner, name) in enumerate(self._places()):
            tensor = owner[name]
            if id(owner) in writable and tensor is not None and tensor.numel() <= SNAPSHOT_NUMEL:
                self.copies[i] = tensor.detach().clone()

    def _places(self) -> list[tuple[Owner, str]]:
        """Where each of the held tensors belongs: dictionary and name."""
        return [(owner, name) for owner in self.owners for name in owner]

    def settle(self, where: object) -> None:
        """After the evaluation: keep the copies of what it wrote to, and only those.

        Raises:
            BlockError: it wrote to a parameter, or to a buffer too large to be copied on every step.
        """
        before, copies = self.versions, self.copies
        self.versions = _versions(self.held)
        if copies:
            self.copies = {}
        if before == self.versions:
            return
        for i, (old, new) in enumerate(zip(before, self.versions, strict=True)):
            if old != new and i not in copies:
                raise BlockError(
                    f"{where} writes in place to its own {self._name(i)} while it is evaluated, so evaluating it "
                    "again in the backward pass would see another value. Use engine=Store() for this model, or move "
                    "the write out of the forward pass."
                )
            if old != new:
                self.copies[i] = copies[i]

    def install(self, undo: list[Callable[[], Any]], where: object) -> list[Tensor]:
        """Put the recorded tensors and flags back into the modules; ``undo`` collects what reverses it.

        Returns:
            Copies that stand in for buffers which the evaluation writes to.

        Raises:
            ReplayError: a parameter or buffer was changed in place, or cannot be put back.
        """
        if _versions(self.held) != self.versions:
            self._refuse_changed(where)
        now = _held_by(self.owners)
        if len(now) != len(self.held):
            raise ReplayError(
                f"{where}: parameters or buffers were added to it or taken from it between the forward and the "
                "backward pass. Run the forward pass again after the change."
            )
        if not all(map(operator.is_, now, self.held)):
            self._put_back(undo, where)
        if [m.training for m in self.modules] != self.training:
            for m, training in zip(self.modules, self.training, strict=True):
                undo.append(partial(setattr, m, "training", m.training))
                m.training = training
        if not (self.statistics or self.copies):
            return []
        places = self._places()
        stand_ins = [
            (owner, name, buffer) for owner in self.statistics for name, buffer in owner.items() if buffer is not None
        ]
        stand_ins += [(*places[i], copy) for i, copy in self.copies.items()]
        return [_exchange(owner, name, tensor.clone(), undo) for owner, name, tensor in stand_ins]

    def _put_back(self, undo: list[Callable[[], Any]], where: object) -> None:
        """Undo an exchange of parameters since the forward pass, such as the end of a ``functional_call``."""
        self._gather(undo)
        for (owner, name), tensor in zip(self._places(), self.held, strict=True):
            now = owner.get(name)
            if now is tensor or (tensor is not None and _is_sharded(tensor)):
                continue  # FSDP2: recorded as shards, unsharded by its own hooks while f runs
            if now is not None and _is_sharded(now):
                raise ReplayError(
                    f"{where}: its parameters are sharded again, so it cannot be evaluated. A backward pass that "
                    "skips blocks walks through them outside FSDP's hooks: shard each block by itself, or use "
                    "fully_shard(..., reshard_after_forward=False)."
                )
            _exchange(owner, name, tensor, undo)

    def _gather(self, undo: list[Callable[[], Any]]) -> None:
        """Unshard what FSDP2 sharded again: a backward pass that skips steps walks through them outside its hooks."""
        exchanged = zip(self._places(), self.held, strict=True)
        gone = {id(now) for (owner, name), tensor in exchanged if (now := owner.get(name)) is not tensor}
        for m in self.modules:
            sharded = (p for p in m.parameters() if id(p) in gone and _is_sharded(p)) if hasattr(m, "unshard") else ()
            if any(True for _ in sharded):
                fsdp: Any = m
                fsdp.unshard()
                undo.append(fsdp.reshard)

    def _name(self, i: int) -> str:
        owner, name = self._places()[i]
        kind = next((type(m).__name__ for m in self.modules if owner is m._parameters or owner is m._buffers), "module")
        tensor = self.held[i]
        return f"{name!r} of {kind}, shape {tuple(tensor.shape) if tensor is not None else None},"

    def _refuse_changed(self, where: object) -> None:
        for i, (version, now) in enumerate(zip(self.versions, _versions(self.held), strict=True)):
            if now != version and i not in self.copies:
                raise ReplayError(
                    f"{where}: the {self._name(i)} was changed in place between the forward and the backward pass, so "
                    "its gradients cannot be computed. Call backward() before optimizer.step(), or run the "
                    "forward pass again after the change."
                )


def _exchange(owner: Owner, name: str, tensor: Tensor | None, undo: list[Callable[[], Any]]) -> Any:
    undo.append(partial(owner.__setitem__, name, owner.get(name)))
    owner[name] = tensor
    return tensor


def _is_sharded(tensor: Tensor) -> bool:
    return type(tensor).__name__ == "DTensor"


class AsRecorded:
    """A context in which modules are as they were watched, and from which no side effect remains."""

    def __init__(self, watches: list[Watch], where: object) -> None:
        self.watches = watches
        self.where = where
        self.undo: list[Callable[[], Any]] = []

    def __enter__(self) -> None:
        for watch in self.watches:
            watch.install(self.undo, self.where)

    def __exit__(self, *_: object) -> None:
        while self.undo:
            self.undo.pop()()

"""The parameters, buffers and flags of a module: noticed when they change, and put back for a second evaluation."""

# pyright: reportPrivateUsage=false
# The dictionaries of a module are read directly: this runs in every step.

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from reversa.errors import BlockError, ReplayError

# Buffers up to this size are copied before an evaluation in training, in case it writes to them.
SNAPSHOT_NUMEL = 1 << 14


def _held_by(modules: list[nn.Module]) -> list[Tensor | None]:
    """Their parameters and buffers, in order; statistics of norms that only move in training are left out."""
    held: list[Tensor | None] = []
    for m in modules:
        held += m._parameters.values()
        if m._buffers and not _moves_statistics(m):
            held += m._buffers.values()
    return held


def _moves_statistics(module: nn.Module) -> bool:
    return isinstance(module, _NormBase) and module.training


def _versions(held: list[Tensor | None]) -> list[int | None]:
    return [None if t is None else t._version for t in held]


class Watch:
    """The parameters, buffers and training flags that a module was evaluated with.

    Normalisation layers in training read their statistics' buffers only to move them, so those are exempt from the
    check and copies are moved in their place. Other small buffers that an evaluation writes to are restored from
    copies.
    """

    __slots__ = ("copies", "held", "modules", "training", "versions")

    def __init__(self, module: Any) -> None:
        # The walk of module.modules(), without its names and its set: this runs in every step.
        self.modules: list[nn.Module] = [module] if isinstance(module, nn.Module) else []
        for m in self.modules:
            if m._modules:
                self.modules += [child for child in m._modules.values() if child is not None]
        self.training = [m.training for m in self.modules]
        self.held = _held_by(self.modules)
        self.versions = _versions(self.held)
        self.copies: dict[int, Tensor] = {}
        if any(m._buffers for m in self.modules):
            self._copy_buffers()

    def _copy_buffers(self) -> None:
        """Copy small buffers of modules in training, in case the evaluation writes to them (:meth:`settle`)."""
        for i, (m, _, name) in enumerate(self._places()):
            tensor = self.held[i]
            if m.training and name in m._buffers and tensor is not None and tensor.numel() <= SNAPSHOT_NUMEL:
                self.copies[i] = tensor.detach().clone()

    def _places(self) -> Iterator[tuple[nn.Module, dict[str, Tensor | None], str]]:
        """Where each of the held tensors belongs: module, dictionary and name."""
        for m, training in zip(self.modules, self.training, strict=True):
            owners: list[Any] = [m._parameters]
            if not (isinstance(m, _NormBase) and training):
                owners.append(m._buffers)
            for owner in owners:
                for name in owner:
                    yield m, owner, name

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
        for m, training in zip(self.modules, self.training, strict=True):
            if m.training != training:
                undo.append(partial(setattr, m, "training", m.training))
                m.training = training
        now = _held_by(self.modules)
        if len(now) != len(self.held):
            raise ReplayError(
                f"{where}: parameters or buffers were added to it or taken from it between the forward and the "
                f"backward "
                "pass. Run the forward pass again after the change."
            )
        if not all(map(operator.is_, now, self.held)):
            self._put_back(undo, where)
        stand_ins = [
            _stand_in(m._buffers, name, undo)
            for m in self.modules
            if m._buffers and _moves_statistics(m)
            for name, buffer in m._buffers.items()
            if buffer is not None
        ]
        return stand_ins + [self._place_copy(i, undo) for i in self.copies]

    def _put_back(self, undo: list[Callable[[], Any]], where: object) -> None:
        """Undo an exchange of parameters since the forward pass, such as the end of a ``functional_call``."""
        for (_, owner, name), tensor in zip(list(self._places()), self.held, strict=True):
            now = owner.get(name)
            if now is tensor or (tensor is not None and _is_sharded(tensor)):
                continue  # FSDP2: recorded as shards, unsharded by its own hooks while f runs
            if now is not None and _is_sharded(now):
                raise ReplayError(
                    f"{where}: its parameters are sharded again, so it cannot be evaluated. A backward pass that "
                    "skips blocks walks through them outside FSDP's hooks: use "
                    "fully_shard(..., reshard_after_forward=False)."
                )
            _exchange(owner, name, tensor, undo)

    def _place_copy(self, i: int, undo: list[Callable[[], Any]]) -> Tensor:
        _, owner, name = list(self._places())[i]
        copy = self.copies[i].clone()
        _exchange(owner, name, copy, undo)
        return copy

    def _name(self, i: int) -> str:
        module, _, name = list(self._places())[i]
        tensor = self.held[i]
        return f"{name!r} of {type(module).__name__}, shape {tuple(tensor.shape) if tensor is not None else None},"

    def _refuse_changed(self, where: object) -> None:
        for i, (version, now) in enumerate(zip(self.versions, _versions(self.held), strict=True)):
            if now != version and i not in self.copies:
                raise ReplayError(
                    f"{where}: the {self._name(i)} was changed in place between the forward and the backward pass, so "
                    "its gradients cannot be computed. Call backward() before optimizer.step(), or run the "
                    "forward pass again after the change."
                )


def _stand_in(owner: dict[str, Tensor | None], name: str, undo: list[Callable[[], Any]]) -> Tensor:
    copy = cast(Tensor, owner[name]).clone()
    _exchange(owner, name, copy, undo)
    return copy


def _exchange(owner: dict[str, Tensor | None], name: str, tensor: Tensor | None, undo: list[Callable[[], Any]]) -> None:
    undo.append(partial(owner.__setitem__, name, owner.get(name)))
    owner[name] = tensor


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

"""Live bytes and operations of a training step, entered under what they are for and where they were made."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from reversa.memory.live import LiveBytes, storages

KINDS: tuple[str, ...] = ("parameters", "buffers", "optimizer_state", "inputs", "gradients", "activations", "temporary")
"""Every live byte is of one of these kinds, which :class:`reversa.memory.report.Moment` describes."""

Place = tuple[int, int]
"""Number of a stage, and of the block within it; -1 for what the stage makes around its blocks."""


@dataclass
class Phase:
    """A part of the step: what it allocates is of that kind."""

    name: str
    kind: str
    flops: int = 0
    recomputed: int = 0
    """Of the flops, those of a forward pass that is made once more."""


@dataclass
class Entry:
    """What is known of a storage."""

    kind: str
    place: Place | None


@dataclass
class Peak:
    """The moment at which most bytes were alive."""

    phase: str = ""
    split: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))


class Ledger(LiveBytes):
    """Live bytes of one device, by kind and by place; and the operations, by phase.

    Args:
        device: what is counted; fake tensors on it count as what they stand for.
        leaves: tensors whose ``.grad`` is a gradient.
    """

    def __init__(self, device: torch.device, leaves: Iterable[Tensor]) -> None:
        super().__init__(exclude=leaves, device=device)
        self.place: Place | None = None
        self.phases: Final[list[Phase]] = []
        self.most = Peak()
        self._entries: Final[dict[int, Entry]] = {}
        self._sums: Final = dict.fromkeys(KINDS, 0)
        self._kind = "temporary"

    @property
    def split(self) -> dict[str, int]:
        """Bytes alive now, by kind."""
        self._look_again()
        return dict(self._sums)

    @contextmanager
    def phase(self, name: str, kind: str) -> Iterator[None]:
        """Count what is done inside as part of the step."""
        self.phases.append(Phase(name, kind))
        self._kind = kind
        with self:
            yield

    def move(self, place: Place | None, given: Any = ()) -> None:
        """What follows is made in that place, which was given those arguments."""
        self.place = place

    def returned(self, place: Place, output: Any) -> None:
        """A function of that place has returned this."""

    def left(self, place: Place, output: Any) -> None:
        """That place is done, with this."""

    def was_there(self, kind: str, tensors: Iterable[Tensor]) -> None:
        """Count tensors as if they had been alive from the beginning on."""
        self._kind, before = kind, self._sum
        for tensor in self._here(tensors):
            for storage in storages(tensor):
                self._add(storage)
        self._peak += self._sum - before
        self.most.split[kind] += self._sum - before

    def made_at(self) -> dict[Place | None, int]:
        """Bytes alive now, by the place where they were made; what was made outside of all places has None."""
        self._look_again()
        found: dict[Place | None, int] = {}
        for key, entry in self._entries.items():
            found[entry.place] = found.get(entry.place, 0) + self._sizes[key]
        return found

    # ------------------------------------------------------------------ counting

    def _run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        result = super()._run(func, args, kwargs)
        formula: Callable[..., int] | None = flop_registry.get(func.overloadpacket)
        if formula is not None:
            phase, flops = self.phases[-1], formula(*args, **kwargs, out_val=result)
            phase.flops += flops
            # Gradients are computed without a graph; in the backward pass only a second evaluation makes one.
            if phase.name == "backward" and torch.is_grad_enabled():
                phase.recomputed += flops
        return result

    def _note(self, given: Iterable[Tensor], returned: Iterable[Tensor]) -> None:
        before = self._peak
        super()._note(given, self._here(returned))
        if self._peak > before:
            self.most = Peak(self.phases[-1].name, dict(self._sums))

    def _here(self, tensors: Iterable[Tensor]) -> Iterator[Tensor]:
        """A fake tensor's storage is nowhere: the tensor says which device it stands for."""
        return (tensor for tensor in tensors if tensor.device == self._device)

    def _counts(self, device: torch.device) -> bool:
        return True

    def _add(self, storage: torch.UntypedStorage) -> None:
        self._entries.setdefault(storage._cdata, Entry(self._kind, self.place))
        super()._add(storage)

    def _change(self, key: int, size: int) -> None:
        self._sums[self._entries[key].kind] += size - self._sizes[key]
        super()._change(key, size)

    def _forget(self, key: int) -> None:
        super()._forget(key)
        self._entries.pop(key, None)

    def _gradient_is_there(self, leaf: Tensor) -> None:
        if leaf.grad is None:
            return
        for storage in storages(leaf.grad):
            entry, size = self._entries.get(storage._cdata), self._sizes.get(storage._cdata, 0)
            if entry is not None:
                self._sums[entry.kind] -= size
                self._sums["gradients"] += size
                entry.kind = "gradients"

"""What each block of a model holds, needs and takes, in one way to train.

Blocks are numbered in the order of the forward pass. While a block is at work, in either direction, everything that the
blocks before it hold is alive; so the bytes alive then are a sum over those, and what the block itself needs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from reversa.memory.ledger import Ledger, Place
from reversa.memory.live import storages
from reversa.memory.places import Where
from reversa.memory.speed import Speed
from reversa.memory.step import Step, run_under
from reversa.memory.units import Unit, as_stages


@dataclass
class Window:
    """A time between two moments that are known: the most bytes alive, and the seconds that operations took."""

    peak: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Profile:
    """A step in which every unit is under the same policy.

    Attributes:
        places: the blocks in the order of the forward pass: number of the unit, and of the block within it.
        held: for each of them, bytes that it holds between its forward and its backward pass.
        forth: for each of them, and for what comes after the last, the most bytes alive in its forward pass, without
            those that the units before it hold.
        needed: the same of its backward pass.
        given: for each of them, bytes of the tensor that it goes on with.
        seconds: for each of them, and for what comes after the last.
        update: the most bytes alive in the optimizer's step.
        peak: the most bytes alive in the step.
        total: seconds of the whole step.
    """

    places: tuple[Place, ...]
    held: tuple[int, ...]
    forth: tuple[int, ...]
    needed: tuple[int, ...]
    given: tuple[int, ...]
    seconds: tuple[float, ...]
    update: int
    peak: int
    total: float


def profile(step: Step, units: list[Unit], speed: Speed) -> Profile:
    """Run a step of fake tensors, and look at every unit."""
    ledger = _Profiler(step.device, step.leaves(), speed)
    held: dict[Place | None, int] = {}
    where = Where(step.model, as_stages(units), ledger)
    run_under(ledger, step, where.told(), lambda: held.update(ledger.made_at()))
    return ledger.profile(held)


_UPDATE = -1


class _Profiler(Ledger):
    """A ledger that knows at which unit the step is, in the backward pass too."""

    def __init__(self, device: torch.device, leaves: Iterable[Tensor], speed: Speed) -> None:
        super().__init__(device, leaves)
        self.speed = speed
        self.numbers: dict[Place, int] = {}
        self.given: list[int] = []
        self.windows: dict[tuple[int, bool], Window] = {}
        self.window = self._window(0)

    def profile(self, held: dict[Place | None, int]) -> Profile:
        """The result, from what was held between the two passes."""
        of_unit = [held.get(place, 0) for place in self.numbers]
        count = len(of_unit)
        forth, back = ([self._window(u, way) for u in range(count + 1)] for way in (False, True))
        before = [sum(of_unit[:u]) for u in range(count + 1)]
        return Profile(
            places=tuple(self.numbers),
            held=tuple(of_unit),
            forth=tuple(window.peak - others for window, others in zip(forth, before, strict=True)),
            needed=tuple(window.peak - others for window, others in zip(back, before, strict=True)),
            given=tuple(self.given),
            seconds=tuple(a.seconds + b.seconds for a, b in zip(forth, back, strict=True)),
            update=self._window(_UPDATE, True).peak,
            peak=self._peak,
            total=sum(window.seconds for window in self.windows.values()),
        )

    def was_there(self, kind: str, tensors: Iterable[Tensor]) -> None:
        """What is told of at the end (the optimizer's state) was alive in every window, too."""
        before = self._sum
        super().was_there(kind, tensors)
        for window in self.windows.values():
            window.peak += self._sum - before

    def move(self, place: Place | None, given: Any = ()) -> None:
        if self.phases and self.phases[-1].name != "forward":
            return  # a function that is evaluated once more
        super().move(place, given)
        if place is None or place[1] < 0:
            return
        if place not in self.numbers:
            self.numbers[place] = len(self.numbers)
            self.given.append(next((_bytes(leaf) for leaf in tree_leaves(given) if isinstance(leaf, Tensor)), 0))
        number = self.numbers[place]
        self.window = self._window(number)
        self._take_over(given, place, number)

    def returned(self, place: Place, output: Any) -> None:
        if self.phases[-1].name != "forward" or place not in self.numbers:
            return
        number = self.numbers[place]
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                leaf.register_hook(lambda _: self._comes_back(number))
                break

    def left(self, place: Place, output: Any) -> None:
        self.returned(place, output)
        if place in self.numbers:
            self.window = self._window(self.numbers[place] + 1)

    def _comes_back(self, number: int) -> None:
        """The gradient of what a unit returned is there: its backward pass begins."""
        if self.phases[-1].name == "backward":
            self.window = self._window(number, True)

    def _take_over(self, given: Any, place: Place, number: int) -> None:
        """A unit's input is held because of the unit, whoever has made it."""
        for leaf in tree_leaves(given):
            if isinstance(leaf, Tensor):
                for storage in storages(leaf):
                    entry = self._entries.get(storage._cdata)
                    if entry is not None and entry.kind == "activations" and self._is_before(entry.place, number):
                        entry.place = place

    def _is_before(self, place: Place | None, number: int) -> bool:
        return place is None or place[1] < 0 or self.numbers[place] < number

    def _window(self, number: int, back: bool = False) -> Window:
        return self.windows.setdefault((number, back), Window())

    # ------------------------------------------------------------------ counting

    def _run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if self.phases[-1].name == "optimizer step":
            self.window = self._window(_UPDATE, True)
        result = super()._run(func, args, kwargs)
        self.window.seconds += self._seconds(func, args, kwargs, result)
        return result

    def _note(self, given: Iterable[Tensor], returned: Iterable[Tensor]) -> None:
        super()._note(given, returned)
        self.window.peak = max(self.window.peak, self._sum)

    def _seconds(self, func: Any, args: Any, kwargs: dict[str, Any], result: Any) -> float:
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if not given or not made or _is_view(func):
            return 0.0
        devices = {tensor.device for tensor in (*given, *made)}
        if len(devices) > 1:
            return sum(map(_bytes, made)) / self.speed.host
        formula = flop_registry.get(func.overloadpacket)
        flops = 0 if formula is None else formula(*args, **kwargs, out_val=result)
        return self.speed.seconds(flops, sum(map(_bytes, (*given, *made))), given[-1].dtype)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size() if tensor.layout is torch.strided else 0


def _is_view(func: Any) -> bool:
    """Whether an operation only looks at memory in another way."""
    returns = func._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)

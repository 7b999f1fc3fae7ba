"""What was planned for a model: what every block does, and what the whole step takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from torch import nn

from reversa.engine import Engine
from reversa.errors import SettingError
from reversa.memory.speed import Speed
from reversa.memory.units import Unit, be_exact, holders_of, put_engines, units_of
from reversa.words import aligned, in_bytes


@dataclass(frozen=True)
class Way:
    """One way to train the whole model, with the bytes alive at most and the predicted seconds of a step."""

    name: str
    peak_bytes: int
    seconds: float


@dataclass(frozen=True)
class Plan:
    """What each block of a model does with its activations.

    Attributes:
        model: the model's class.
        inputs: their shapes.
        budget: bytes that a step may take at most.
        peak_bytes: the most bytes alive in a step with this plan: parameters, gradients, optimizer and loss included.
        seconds: predicted time of a step.
        least_bytes: no choice of the policies that were allowed takes less.
        units: the stages and their blocks.
        engines: for each stage, the engine of each of its blocks.
        ways: others to train the same model in, to compare with.
        speed: what the seconds were counted with.
        exact: chains run in exact arithmetic with this plan.
        notes: what the numbers do not know.
    """

    model: str
    inputs: str
    budget: int
    peak_bytes: int
    seconds: float
    least_bytes: int
    units: tuple[Unit, ...]
    engines: tuple[tuple[Engine, ...], ...]
    ways: tuple[Way, ...]
    speed: Speed
    exact: bool = False
    notes: tuple[str, ...] = ()

    def apply(self, model: nn.Module) -> nn.Module:
        """Give every block its engine, in place. The numbers that the model computes stay the same, but where the plan
        says :attr:`exact` of a model that was not: then they are those of ``exact=True``.

        Args:
            model: the model that the plan was made for, or another one with the same blocks.

        Returns:
            The model itself.

        Raises:
            SettingError: the model has other blocks.
        """
        there = [(unit.chain, unit.stage.blocks) for unit in units_of(model)]
        if there != [(unit.chain, unit.stage.blocks) for unit in self.units]:
            raise SettingError(
                f"this plan is for a {self.model} with the stages {self._names(self.units)}; the model has "
                f"{self._names(units_of(model))}. Make a plan for this model, converted as it will be trained."
            )
        if self.exact:
            be_exact(holders_of(model).values())
        put_engines(model, self.units, [list(engines) for engines in self.engines])
        return model

    def to_dict(self) -> dict[str, Any]:
        """Everything, in types that JSON knows."""
        names = ("model", "inputs", "budget", "peak_bytes", "seconds", "least_bytes", "exact")
        stages = [
            {"name": unit.stage.name, "reversible": unit.chain is not None, "engines": [repr(e) for e in engines]}
            for unit, engines in zip(self.units, self.engines, strict=True)
        ]
        return {name: getattr(self, name) for name in names} | {
            "stages": stages,
            "ways": [vars(way) for way in self.ways],
            "speed": vars(self.speed),
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        stored = self.ways[0].seconds
        ways = [Way(f"this plan, for {in_bytes(self.budget)}", self.peak_bytes, self.seconds), *self.ways]
        rows = [(w.name, in_bytes(w.peak_bytes), f"{w.seconds:.3g} s", f"{w.seconds / stored - 1:+.1%}") for w in ways]
        stages = [
            (unit.stage.name, str(unit.length), _in_turn(engines))
            for unit, engines in zip(self.units, self.engines, strict=True)
        ]
        parts = [
            [f"{self.model}: a training step within {in_bytes(self.budget)} (inputs {self.inputs})"],
            aligned([("", "peak", "time", "over all stored"), *rows]),
            [f"No choice of these policies takes less than {in_bytes(self.least_bytes)}."],
            ["The chains run in exact arithmetic."] * self.exact,
            aligned([("stage", "blocks", "what they do, from the first to the last"), *stages], last_left=True),
            [f"Note: {note}" for note in self.notes],
        ]
        return "\n\n".join("\n".join(part) for part in parts if part)

    @staticmethod
    def _names(units: Sequence[Unit]) -> str:
        return ", ".join(f"{unit.stage.name} ({unit.length})" for unit in units) or "none"


def _in_turn(engines: Sequence[Engine]) -> str:
    """What blocks do, one behind the other.

    >>> from reversa import Recompute, Store
    >>> _in_turn([Recompute(), Recompute(), Store()])
    '2 x Recompute(), 1 x Store()'
    """
    return ", ".join(f"{len(list(same))} x {engine}" for engine, same in groupby(engines))

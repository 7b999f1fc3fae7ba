"""The units that a plan decides about: blocks of reversible chains, and blocks outside of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from reversa.check.trace import Holder, chains
from reversa.engine import Engine, Mixed
from reversa.engine.modules import put_under
from reversa.memory.places import Stage, stages_of


@dataclass(frozen=True)
class Unit:
    """A stage of a model: a reversible chain, or blocks outside of chains, each of which is decided about.

    Attributes:
        stage: its blocks.
        chain: the name of its chain in :func:`reversa.check.trace.chains`; None for blocks outside of chains.
    """

    stage: Stage
    chain: str | None = None

    @property
    def length(self) -> int:
        """How many blocks it has."""
        return len(self.stage.blocks)


def units_of(model: nn.Module) -> list[Unit]:
    """Chains, runs of blocks that are built alike, and the largest modules of several layers outside of both.

    >>> import reversa
    >>> layers = [nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3)]
    >>> chain = reversa.ReversibleSequence(layers[:2], reversa.Momentum(0.9))
    >>> [(unit.stage.name, unit.length, unit.chain) for unit in units_of(nn.Sequential(chain, layers[2]))]
    [('0', 2, '0'), ('1', 1, None)]
    """
    names = [name for name, _, _ in chains(model)]
    stages = stages_of(model)
    units = [Unit(stage, names[i] if i < len(names) else None) for i, stage in enumerate(stages)]
    units += [Unit(Stage(path, "as it is", (path,))) for path in _alone(model, stages)]
    order = {path: i for i, (path, _) in enumerate(model.named_modules(remove_duplicate=False))}
    return sorted(units, key=lambda unit: order[unit.stage.blocks[0]])


def as_stages(units: Iterable[Unit]) -> list[Stage]:
    """The stages of the units."""
    return [unit.stage for unit in units]


def holders_of(model: nn.Module) -> dict[str, Holder]:
    """What holds the engine of each chain, by the chain's name."""
    return {name: holder for name, holder, _ in chains(model)}


def be_exact(holders: Iterable[Holder]) -> None:
    """Let chains run in exact arithmetic; those that do already keep theirs."""
    for holder in holders:
        holder.exact = holder.exact or True


def put_engines(model: nn.Module, units: Iterable[Unit], engines: Iterable[list[Engine]]) -> None:
    """Give every block of every unit its engine."""
    holders = holders_of(model)
    for unit, of_blocks in zip(units, engines, strict=True):
        if unit.chain is not None:
            holders[unit.chain].engine = joined(of_blocks, unit.stage.per_block)
            continue
        for path, engine in zip(unit.stage.blocks, of_blocks, strict=True):
            put_under(model.get_submodule(path), engine)


def joined(engines: list[Engine], per_block: int = 1) -> Engine:
    """One engine for a chain whose blocks have these.

    >>> from reversa import Invert, Store
    >>> joined([Invert(), Invert(), Store()])
    Mixed(2 x Invert(), 1 x Store())
    """
    parts: list[tuple[Engine, int]] = []
    for engine in engines:
        count = per_block
        if parts and parts[-1][0] == engine:
            count += parts.pop()[1]
        parts.append((engine, count))
    return parts[0][0] if len(parts) == 1 else Mixed(parts)


def _alone(model: nn.Module, stages: list[Stage]) -> list[str]:
    """Paths of the largest modules with several layers that neither hold a stage nor lie in one."""
    modules = dict(model.named_modules())
    taken = {path for stage in stages for path in (stage.blocks if stage.sequence is None else (stage.sequence,))}
    found: list[str] = []

    def look(path: str) -> None:
        inside = f"{path}." if path else ""
        if path in taken:
            return
        if any(name.startswith(inside) for name in taken) or not path:
            for name, child in modules[path].named_children():
                if any(True for _ in child.children()):
                    look(f"{inside}{name}")
        else:
            found.append(path)

    look("")
    return found

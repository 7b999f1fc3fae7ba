"""What became of a model's blocks: which are reversible now, which stayed as they were, and why."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StageReport:
    """One stage: its name, its blocks, the carried tensor's shape (batch first), and what training keeps of it."""

    name: str
    blocks: tuple[str, ...]
    kind: str
    shape: tuple[int, ...] | None
    kept: str
    note: str = ""


@dataclass(frozen=True)
class Explanation:
    """The answer of :func:`reversa.explain`; prints as a table.

    Attributes:
        converted: whether the model is converted, or only could be.
        rule: the scheme and engine, in words.
        stages: the stages, in the order of the model.
        left: names of modules that stay as they are, each with the reason.
    """

    converted: bool
    rule: str
    stages: tuple[StageReport, ...]
    left: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        blocks = sum(len(stage.blocks) for stage in self.stages)
        stages = f"{len(self.stages)} stage{'s' * (len(self.stages) != 1)}"
        head = f"{blocks} blocks in {stages} {'are' if self.converted else 'could be made'} reversible"
        rows = [("stage", "blocks", "of", "shape", "kept for the backward pass")]
        rows += [(s.name, _span(s), s.kind, _shape(s.shape), s.kept) for s in self.stages]
        lines = [f"{head}: {self.rule}" if self.rule else head, "", *_table(rows)]
        for note in dict.fromkeys(s.note for s in self.stages if s.note):
            lines += ["", f"{', '.join(s.name for s in self.stages if s.note == note)}: {note}"]
        if self.left:
            lines += ["", "left as they are:", *_table([(name, reason) for name, reason in self.left])]
        return "\n".join(lines)


def _span(stage: StageReport) -> str:
    names = [name.removeprefix(f"{stage.name}.") for name in stage.blocks]
    return f"{len(names)} ({names[0]} to {names[-1]})" if len(names) > 1 else f"1 ({names[0]})"


def _shape(shape: tuple[int, ...] | None) -> str:
    return "seen at the first call" if shape is None else " x ".join(map(str, shape[1:]))


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]

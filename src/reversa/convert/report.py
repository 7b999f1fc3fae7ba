"""What became of a model's blocks: which are reversible now, which stayed as they were, and why."""

from __future__ import annotations

from dataclasses import dataclass

from reversa.words import aligned, in_bytes

NO_STAGE = (
    "A stage is a run of at least two blocks in which each one's output is the next one's input, of one shape and data "
    "type, with parameters and a residual addition."
)


@dataclass(frozen=True)
class StageReport:
    """One stage of a model.

    Attributes:
        name: of the stage.
        blocks: paths of its blocks.
        kind: the first block's class.
        rule: the scheme and the engine, in words; of an unconverted model, those of :func:`reversa.convert` by default.
        shape: of the carried tensor in the pass that the stages were found with, batch first; None without one.
        kept: what training keeps for the backward pass, in words.
        stored_bytes: what ordinary backpropagation stores in the blocks, in that pass; None without one.
        kept_bytes: what a chain keeps instead: of an unconverted model, one that :func:`reversa.convert` makes by
            default.
        notes: what else changes.
    """

    name: str
    blocks: tuple[str, ...]
    kind: str
    rule: str
    shape: tuple[int, ...] | None
    kept: str
    stored_bytes: int | None = None
    kept_bytes: int | None = None
    notes: tuple[str, ...] = ()

    @property
    def saved_bytes(self) -> int | None:
        """Bytes that conversion saves after the forward pass."""
        if self.stored_bytes is None or self.kept_bytes is None:
            return None
        return self.stored_bytes - self.kept_bytes


@dataclass(frozen=True)
class Explanation:
    """The answer of :func:`reversa.explain`; prints as a table.

    Attributes:
        converted: whether the model is converted, or only could be.
        rule: the schemes and engines, in words.
        stages: the stages, in the order of the model.
        left: names of modules that stay as they are, each with the reason.
    """

    converted: bool
    rule: str
    stages: tuple[StageReport, ...]
    left: tuple[tuple[str, str], ...]

    @property
    def saved_bytes(self) -> int | None:
        """Bytes that conversion saves after the forward pass, in the stages of which that is known; None of none."""
        known = [stage.saved_bytes for stage in self.stages if stage.saved_bytes is not None]
        return sum(known) if known else None

    def __str__(self) -> str:
        blocks = sum(len(stage.blocks) for stage in self.stages)
        stages = f"{len(self.stages)} stage{'s' * (len(self.stages) != 1)}"
        head = f"{blocks} blocks in {stages} {'are' if self.converted else 'could be made'} reversible"
        several = len({stage.rule for stage in self.stages}) > 1
        rows = [("stage", "blocks", "of", "shape", "stored", "as a chain", "which keeps", *["by"] * several)]
        rows += [
            (
                s.name,
                _span(s),
                s.kind,
                _shape(s.shape),
                _size(s.stored_bytes),
                _size(s.kept_bytes),
                s.kept,
                *[s.rule] * several,
            )
            for s in self.stages
        ]
        lines = [f"{head}: {self.rule}" if self.rule else head, ""]
        lines += [*_indented(rows), *self._saved()] if self.stages else [NO_STAGE]
        for note in dict.fromkeys(note for s in self.stages for note in s.notes):
            lines += ["", f"{', '.join(s.name for s in self.stages if note in s.notes)}: {note}"]
        if self.left:
            lines += ["", "left as they are:", *_indented([(name, reason) for name, reason in self.left])]
        return "\n".join(lines)

    def _saved(self) -> list[str]:
        known = [stage for stage in self.stages if stage.saved_bytes is not None]
        if not known:
            return []
        stored, saved = sum(stage.stored_bytes or 0 for stage in known), self.saved_bytes or 0
        verb = "saves" if self.converted else "would save"
        return [
            "",
            f"Held after a forward pass with these shapes: {in_bytes(stored)} in the blocks as they are, "
            f"{in_bytes(stored - saved)} as chains; conversion {verb} {in_bytes(saved)}. Other inputs: example=.",
        ]


def _span(stage: StageReport) -> str:
    names = [name.removeprefix(f"{stage.name}.") for name in stage.blocks]
    return f"{len(names)} ({names[0]} to {names[-1]})" if len(names) > 1 else f"1 ({names[0]})"


def _shape(shape: tuple[int, ...] | None) -> str:
    return "seen at the first call" if shape is None else " x ".join(map(str, shape))


def _size(count: int | None) -> str:
    return "" if count is None else in_bytes(count)


def _indented(rows: list[tuple[str, ...]]) -> list[str]:
    return [f"  {line}" for line in aligned(rows, left=True)]

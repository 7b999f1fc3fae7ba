"""What a training step costs in memory: a table that people read, and a dictionary for programs."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from reversa.words import aligned, in_bytes


@dataclass(frozen=True)
class Moment:
    """Live bytes at one moment of a training step, by kind. The kinds add up to :attr:`total`.

    Attributes:
        when: the moment, in words.
        parameters: of the model.
        buffers: of the model.
        optimizer_state: as it is from the second step on.
        inputs: tensors that the model is called with.
        gradients: what lies in ``.grad``, of parameters and of inputs.
        activations: made in the forward pass, the loss included.
        temporary: made in the backward pass and in the optimizer's step, and no gradient in ``.grad`` yet or any more.
        unseen: what an accelerator's allocator holds beyond tensors: workspaces, and the rounding of sizes. Only
            measured, and never on the CPU.

    >>> Moment("now", parameters=8, activations=4).total
    12
    """

    when: str
    parameters: int = 0
    buffers: int = 0
    optimizer_state: int = 0
    inputs: int = 0
    gradients: int = 0
    activations: int = 0
    temporary: int = 0
    unseen: int = 0

    @property
    def kinds(self) -> dict[str, int]:
        """Bytes by kind."""
        return {field.name: getattr(self, field.name) for field in fields(self)[1:]}

    @property
    def total(self) -> int:
        """All bytes alive."""
        return sum(self.kinds.values())


@dataclass(frozen=True)
class StageMemory:
    """Activations that a stage holds after the forward pass: those made in it and still alive.

    Attributes:
        name: of the stage in the model.
        rule: scheme and engine of a reversible chain; ``"as it is"`` for a run of blocks that is none.
        blocks: names of the blocks.
        held_by_block: bytes, by block. What a chain makes between two blocks counts as the first one's.
        around: bytes that the stage made before its first block.
    """

    name: str
    rule: str
    blocks: tuple[str, ...]
    held_by_block: tuple[int, ...]
    around: int = 0

    @property
    def held_bytes(self) -> int:
        """Bytes of all blocks, and of what is around them."""
        return sum(self.held_by_block) + self.around

    @property
    def bytes_per_block(self) -> float:
        """Bytes that one more block adds: the mean over all blocks but the last, which has the stage's output.

        >>> StageMemory("layer1", "as it is", ("0", "1", "2"), (10, 20, 90)).bytes_per_block
        15.0
        """
        inner = self.held_by_block[:-1] or self.held_by_block
        return sum(inner) / len(inner)


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of a step, as PyTorch's ``FlopCounterMode`` counts them: matrix products only.

    Attributes:
        forward: of the forward pass and the loss.
        backward: of the backward pass, with what is recomputed.
        recomputed: of the backward pass, what evaluates the forward pass once more.
    """

    forward: int
    backward: int
    recomputed: int

    @property
    def recomputed_share(self) -> float:
        """What recomputation adds, relative to a step without it.

        >>> Flops(forward=10, backward=30, recomputed=10).recomputed_share  # a third: one forward pass more
        0.3333333333333333
        """
        plain = self.forward + self.backward - self.recomputed
        return self.recomputed / plain if plain else 0.0


@dataclass(frozen=True)
class MemoryReport:
    """What one training step costs; prints as a table.

    Attributes:
        model: the model's class.
        source: estimated (without computing anything) or measured.
        device: where the step runs.
        inputs: shapes, in words.
        precision: of autocast, or None.
        optimizer: its class, or None.
        peak: the moment with most bytes alive.
        after_forward: the moment between the forward and the backward pass.
        stages: what each chain, and each run of blocks built alike, holds after the forward pass.
        flops: operations, with the recomputation that engines add.
        seconds: median time of a step; None for an estimate.
        notes: what the numbers do not know.
    """

    model: str
    source: Literal["estimated", "measured"]
    device: str
    inputs: str
    precision: str | None
    optimizer: str | None
    peak: Moment
    after_forward: Moment
    stages: tuple[StageMemory, ...]
    flops: Flops
    seconds: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def peak_bytes(self) -> int:
        """Most bytes alive at once in the whole step: forward pass, loss, backward pass, optimizer's step."""
        return self.peak.total

    @property
    def held_bytes(self) -> int:
        """Bytes of activations alive after the forward pass."""
        return self.after_forward.activations

    @property
    def elsewhere_bytes(self) -> int:
        """What of :attr:`held_bytes` was made outside all stages."""
        return self.held_bytes - sum(stage.held_bytes for stage in self.stages)

    def to_dict(self) -> dict[str, Any]:
        """Everything, in types that JSON knows."""
        stages = [
            asdict(stage) | {"held_bytes": stage.held_bytes, "bytes_per_block": stage.bytes_per_block}
            for stage in self.stages
        ]
        return asdict(self) | {
            "peak_bytes": self.peak_bytes,
            "held_bytes": self.held_bytes,
            "elsewhere_bytes": self.elsewhere_bytes,
            "stages": stages,
            "flops": asdict(self.flops) | {"recomputed_share": self.flops.recomputed_share},
        }

    def __str__(self) -> str:
        settings = [f"inputs {self.inputs}", f"on {self.device}"]
        settings += [f"autocast {self.precision}"] * (self.precision is not None)
        settings += [f"optimizer {self.optimizer}"] * (self.optimizer is not None)
        parts = [
            [f"{self.model}: a training step, {self.source} ({', '.join(settings)})"],
            self._moments(),
            self._stages(),
            self._work(),
            [f"Note: {note}" for note in self.notes],
        ]
        return "\n\n".join("\n".join(part) for part in parts if part)

    def _moments(self) -> list[str]:
        now, most = self.after_forward.kinds, self.peak.kinds
        rows = [(kind.replace("_", " "), now[kind], most[kind]) for kind in most if now[kind] or most[kind]]
        rows.append(("in all", self.after_forward.total, self.peak_bytes))
        cells = [(what, in_bytes(a), in_bytes(b)) for what, a, b in rows]
        return aligned([("", self.after_forward.when, f"at the peak ({self.peak.when})"), *cells])

    def _stages(self) -> list[str]:
        if not self.stages:
            return []
        rows = [
            (
                stage.name,
                str(len(stage.blocks)),
                in_bytes(stage.held_bytes),
                in_bytes(stage.bytes_per_block),
                stage.rule,
            )
            for stage in self.stages
        ]
        rows.append(("elsewhere", "", in_bytes(self.elsewhere_bytes), "", ""))
        return aligned(
            [("held after the forward pass", "blocks", "bytes", "one block more", ""), *rows], last_left=True
        )

    def _work(self) -> list[str]:
        flops = self.flops
        again = f", {flops.recomputed / 1e9:.3g} of it recomputed ({flops.recomputed_share:+.0%})"
        work = (
            f"{flops.forward / 1e9:.3g} GFLOP forward, {flops.backward / 1e9:.3g} backward"
            f"{again if flops.recomputed else ''}"
        )
        return [work if self.seconds is None else f"{work}; {self.seconds * 1e3:.1f} ms a step (median)"]

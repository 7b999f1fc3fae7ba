"""The bytes alive over one training step, operation by operation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor, nn

from reversa.convert.record import quietly
from reversa.memory.fake import explained, fake_copies, fake_inputs, fake_mode
from reversa.memory.ledger import Ledger
from reversa.memory.notes import eagerly
from reversa.memory.report import Moment
from reversa.memory.settings import Loss, OptimizerLike, Settings, in_words
from reversa.memory.step import Step, run_under


@dataclass(frozen=True)
class Timeline:
    """Live bytes of a training step, operation by operation, as an estimate has them.

    Attributes:
        moments: one after each operation and at the end of each part of the step, in their order; ``when`` is the
            part.
    """

    moments: tuple[Moment, ...]

    @property
    def totals(self) -> list[int]:
        """Bytes alive, moment by moment."""
        return [moment.total for moment in self.moments]

    @property
    def forward_moments(self) -> int:
        """How many moments the forward pass has: the backward pass begins behind them."""
        return sum(moment.when == "forward" for moment in self.moments)


def timeline(
    model: nn.Module,
    inputs: Any,
    loss: Loss | None = None,
    optimizer: OptimizerLike = None,
    precision: str | None = None,
) -> Timeline:
    """Follow the live bytes of a training step, without computing and without memory.

    The step is that of :func:`reversa.memory.estimate`, counted in the same way: the largest of the totals is the
    estimate's peak.

    Args:
        model: as in :func:`reversa.memory.estimate`, and so are the others.
        inputs: tensors, or shapes in their place.
        loss: makes one number of the model's output.
        optimizer: None, a class, a function of the parameters, or an optimizer.
        precision: ``"bf16"`` or ``"fp16"`` for autocast.

    Raises:
        SettingError: as in :func:`reversa.memory.estimate`.

    >>> from reversa.memory import estimate
    >>> model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
    >>> line = timeline(model, (512, 64))
    >>> max(line.totals) == estimate(model, (512, 64)).peak_bytes
    True
    """
    settings = Settings(model, inputs, loss, optimizer, precision)
    mode = fake_mode()
    words = in_words(settings.given)
    with quietly(), eagerly(model), torch.inference_mode(False), torch.enable_grad(), explained(model, words):
        twin, optimizer = fake_copies(mode, settings)
        step = Step(twin, fake_inputs(mode, settings), settings.loss_function, optimizer, precision, settings.device)
        with mode:
            return Timeline(tuple(_recorded(step)))


class _Recorder(Ledger):
    """A ledger that keeps its sums of every moment, not of the peak alone."""

    def __init__(self, device: torch.device, leaves: Iterable[Tensor]) -> None:
        super().__init__(device, leaves)
        self.moments: Final[list[Moment]] = []

    def look(self) -> None:
        """Keep the bytes alive now."""
        self.moments.append(Moment(self.phases[-1].name, **self.split))

    def _run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        result = super()._run(func, args, kwargs)
        if func.namespace != "prim":  # fake tensors ask for each other's device, which is no operation
            self.look()
        return result

    @contextmanager
    def phase(self, name: str, kind: str) -> Iterator[None]:
        """Count a part of the step; what is freed after its last operation shows at its end."""
        with super().phase(name, kind):
            yield
        self.look()


def _recorded(step: Step) -> list[Moment]:
    """The moments of a step. The optimizer's state, which its first step makes, was there all the time."""
    ledger = _Recorder(step.device, step.leaves())
    run_under(ledger, step)
    state = ledger.split["optimizer_state"]
    return [replace(moment, optimizer_state=state) for moment in ledger.moments]

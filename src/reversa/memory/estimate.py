"""What a training step costs, without running it: the step is made in fake tensors, which are counted."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from reversa.convert.record import quietly
from reversa.memory.fake import explained, fake_copies, fake_inputs, fake_mode
from reversa.memory.notes import eagerly, notes_on
from reversa.memory.places import stages_of
from reversa.memory.report import MemoryReport
from reversa.memory.settings import Loss, OptimizerLike, Settings, in_words
from reversa.memory.step import Step, as_report, count


def estimate(
    model: nn.Module,
    inputs: Any,
    loss: Loss | None = None,
    optimizer: OptimizerLike = None,
    precision: str | None = None,
) -> MemoryReport:
    """Predict what a training step costs in memory and operations, without computing and without memory.

    The step (forward pass, loss, backward pass, optimizer's step) is made with a copy of the model in fake tensors,
    which have shapes, types and graphs and no numbers; what would be alive is counted storage by storage, as
    :class:`LiveBytes` counts. The model itself is not touched; it may be on the meta device, and have no weights yet
    (``with torch.device("meta"): model = ...``). Modes (train, eval) and engines are the model's own.

    Args:
        model: any module, original, converted or built of chains.
        inputs: a tensor, a tuple of arguments, a dictionary of keyword arguments; or shapes in the place of tensors,
            such as ``(64, 3, 224, 224)``, for floating tensors of the model's type.
        loss: makes one number of the model's output. If not given: the mean squared distance of every floating
            output from a fixed pattern, as in :func:`reversa.check`.
        optimizer: None, a class such as ``torch.optim.AdamW``, a function of the parameters, or an optimizer over the
            model's parameters. Its state is counted as it is from the second step on.
        precision: ``"bf16"`` or ``"fp16"`` runs the forward pass and the loss in autocast.

    Returns:
        The report: ``report.peak_bytes``, ``report.held_bytes``, ``print(report)``, ``report.to_dict()``.

    Raises:
        SettingError: inputs, optimizer or precision of another kind; a loss that is not one number, or depends on
            nothing that is trained; a model that cannot be copied, or whose forward pass depends on numbers in tensors
            (:func:`measure` runs those).

    Whatever the model itself raises for these inputs is raised, with a note of their shapes.

    >>> model = nn.Sequential(nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 256))
    >>> report = estimate(model, (1024, 256), loss=lambda output: output.sum(), optimizer=torch.optim.AdamW)
    >>> report.held_bytes == 1024 * 256 * 4 + 4  # what Tanh returned, and the loss
    True
    >>> report.peak.optimizer_state // report.peak.parameters
    2
    """
    settings = Settings(model, inputs, loss, optimizer, precision)
    shapes = in_words(settings.given)
    mode = fake_mode()
    with quietly(), eagerly(model), torch.inference_mode(False), torch.enable_grad(), explained(model, shapes):
        twin, optimizer = fake_copies(mode, settings)
        step = Step(twin, fake_inputs(mode, settings), settings.loss_function, optimizer, precision, settings.device)
        with mode:
            counted = count(step, stages_of(model))
    return as_report(settings, step, counted, notes_on(model, settings.device, measured=False))

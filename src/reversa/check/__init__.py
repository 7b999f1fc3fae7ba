"""Does this model train right? Gradients, drift and side effects of its engines against stored activations."""

from __future__ import annotations

from typing import Any

from torch import nn

from reversa.check.findings import examine
from reversa.check.report import CheckReport, Row
from reversa.check.step import Case, Loss, default_loss
from reversa.errors import SettingError


def check(model: nn.Module, *inputs: Any, loss: Loss | None = None, **kwargs: Any) -> CheckReport:
    """Find out whether a model with reversible chains trains right.

    One training step with the model's own engines is held against the same step with stored activations: same
    weights, inputs, modes (dropout is on in training mode) and random numbers; in float64, where every difference is a
    fault, and in the model's own data type, where rounding is part of the answer. What is compared:

    - the gradient of every parameter, and of every input that requires one;
    - each residual function's value in the backward pass with its value in the forward pass;
    - the states that the inverse recovers with those that were (the drift), for each chain;
    - buffers and random generators after the step;
    - the gradient from stored activations with the slope of the loss, measured by differences.

    Weights that are all zero, as a fresh model may have them at the end of each block, are given small random values
    for the check: what they multiply could not be seen otherwise.

    It works on copies: the model, its gradients, buffers and modes, the inputs and the generators stay as they are. It
    takes about the memory of ordinary training, and the time of ten training steps.

    Args:
        model: holds :class:`reversa.ReversibleSequence` modules, or was converted by :func:`reversa.convert`.
        inputs: what the model is called with; a small batch will do.
        loss: makes one number of the model's output. If not given: the mean squared distance of every floating
            output from a fixed pattern.
        kwargs: keyword arguments that the model is called with.

    Returns:
        The report: ``report.ok``, ``print(report)``, ``report.to_dict()``.

    Raises:
        SettingError: the model is no module or cannot be copied, or no loss can be made of its output.
        ConversionError: there is no reversible chain in the model.

    >>> import torch, reversa
    >>> f = [torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh()) for _ in range(3)]
    >>> seq = reversa.ReversibleSequence(f, scheme=reversa.Momentum(gamma=0.9))
    >>> report = reversa.check(seq, torch.randn(2, 4))
    >>> report.ok
    True
    >>> print(report.verdict)
    Training this model with Momentum(gamma=0.9, init='zero') and Invert() gives the right gradients.
    """
    if not isinstance(model, nn.Module):
        raise SettingError(f"check needs a torch.nn.Module, got {type(model).__name__}")
    return examine(Case(model, inputs, kwargs, default_loss if loss is None else loss))


__all__ = ["CheckReport", "Row", "check"]

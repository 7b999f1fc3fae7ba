"""Smoothness of the kernels as a callback of Lightning. Import it late: it loads Lightning."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from reversa.errors import SettingError
from reversa.regularise import StepSmoothness, layer_smoothness

Across = Literal["layers", "steps"]


class Smoothness(Callback):
    r"""Adds a smoothness penalty to the loss of any ``LightningModule`` whose network has kernels.

    .. math:: \nabla_\theta (\mathrm{loss} + \mathrm{rate} \cdot R)
        = \nabla_\theta \mathrm{loss} + \mathrm{rate} \cdot \nabla_\theta R

    A callback cannot change the loss, so the second term is added to the gradients, once for each optimiser step, when
    the gradients of all accumulated batches are there and AMP's scaling is taken out again, and before they are
    clipped. With accumulation each of n batches has the loss :math:`(\mathrm{loss}_i + \mathrm{rate}\, R) / n`, at the
    same weights: the sum of their gradients has :math:`\mathrm{rate}\, \nabla R` once, so the numbers are the same. The
    loss itself is without R, which is logged as ``smoothness``.

    Both published codes add a term that does nothing: the one of Chang et al. compares two objects that are never
    equal, so that the sum is empty, and its hand-written gradients leave the sum out; the student report's turns it
    into a Python number, which has no gradient. What the term is good for cannot be read from those codes.

    Args:
        rate: what R is multiplied by: 2e-4 in the paper.
        across: ``"layers"``: :func:`reversa.regularise.layer_smoothness`, the paper's; ``"steps"``:
            :class:`reversa.regularise.StepSmoothness`, the report's, which also travels in checkpoints.
        h: the step size, for ``"layers"``; each chain's own where not given.

    Raises:
        SettingError: rate is negative or not finite; another ``across``; (in training) ``"steps"`` with several
            optimisers, or ``"layers"`` without a chain.

    Source: Chang et al., AAAI 2018, arXiv:1709.03698.

    >>> from lightning.pytorch import Trainer
    >>> trainer = Trainer(callbacks=[Smoothness(rate=2e-4)], logger=False, enable_checkpointing=False)
    """

    def __init__(self, rate: float, across: Across = "layers", h: float | None = None) -> None:
        if not 0 <= rate < math.inf:
            raise SettingError(f"the rate must be 0 or a positive number, got {rate!r}")
        if across not in get_args(Across):
            raise SettingError(f"across must be one of {', '.join(get_args(Across))}, got {across!r}")
        self.rate, self.across, self.h = rate, across, h
        self._steps: StepSmoothness | None = None
        self._loaded: dict[str, Tensor] | None = None

    @property
    def state_key(self) -> str:
        """Two callbacks in one trainer keep their states apart."""
        return self._generate_state_key(across=self.across)

    def state_dict(self) -> dict[str, Any]:
        return {} if self._steps is None else self._steps.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Lightning calls it before the network is on its device.
        self._loaded = state_dict or None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.across == "layers":
            return
        if len(trainer.optimizers) > 1:
            raise SettingError(
                f"across='steps' compares with the weights before the step, but there are {len(trainer.optimizers)} "
                "optimisers, which step in turn. Use one, or across='layers'."
            )
        self._steps = StepSmoothness(pl_module)
        if self._loaded is not None:
            self._steps.load_state_dict(self._loaded)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        with torch.enable_grad():
            penalty = self._penalty(pl_module)
        if penalty.requires_grad:
            _add_gradient(self.rate * penalty, optimizer)
        if self._steps is not None:
            self._steps.remember()
        pl_module.log("smoothness", penalty.detach())

    def _penalty(self, module: LightningModule) -> Tensor:
        return layer_smoothness(module, self.h) if self._steps is None else self._steps()


def _add_gradient(penalty: Tensor, optimizer: Optimizer) -> None:
    """Add the penalty's gradient to that of the parameters that the optimiser moves."""
    moved = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    for p, gradient in zip(moved, torch.autograd.grad(penalty, moved, allow_unused=True), strict=True):
        if gradient is not None and p.grad is not None:
            p.grad += gradient  # in place: DDP's gradients are views of its buckets
        elif gradient is not None:
            p.grad = gradient

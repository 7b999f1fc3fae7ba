"""The way from a pretrained network to a reversible one, as a callback of Lightning. Import it late."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from reversa.schedule import Annealing


class Anneal(Annealing, Callback):
    r"""Takes chains from a network near the one that was pretrained to a reversible one: :class:`Annealing`.

    For Momentum :math:`\gamma_t = 0.01 + p_t (\gamma - 0.01)`, for Dr2Net :math:`\alpha_t = 1 + p_t (\alpha - 1)` and
    :math:`\beta_t = p_t \beta`, with :math:`p_t = \min(1, t / \mathrm{steps})`.

    Args:
        scheme: where it ends; or for each chain, by its name.
        steps: optimiser steps until then.

    Raises:
        SettingError: fewer than one step, or another kind of scheme; (in training) a model without such chains.

    Source: Zhao et al., CVPR 2024, arXiv:2401.04105 (Dr2Net); Sander et al., ICML 2021, arXiv:2102.07870 (that a small
    gamma is near the residual network).

    >>> from lightning.pytorch import Trainer
    >>> from reversa import Dr2Net
    >>> trainer = Trainer(callbacks=[Anneal(Dr2Net(0.3, 0.7), steps=1000)], logger=False, enable_checkpointing=False)
    """

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.apply(pl_module, trainer.global_step)

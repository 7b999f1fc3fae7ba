"""Dr2Net's way from a pretrained network to a reversible one, as a callback of Lightning. Import it late."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from reversa.errors import SettingError
from reversa.schedule import set_scheme
from reversa.schemes import Dr2Net


class Anneal(Callback):
    r"""Takes every chain from the residual network to :class:`reversa.Dr2Net`, in equal parts over the first steps.

    .. math:: \alpha_t = 1 + p_t (\alpha - 1), \qquad \beta_t = p_t \beta, \qquad p_t = \min(1, t / \mathrm{steps})

    Where a run is taken up again, the coefficients follow from its number of optimiser steps.

    Args:
        scheme: where it ends.
        steps: optimiser steps until then.

    Raises:
        SettingError: fewer than one step, or another kind of scheme; (in training) a model without such chains.

    Source: Zhao et al., CVPR 2024, arXiv:2401.04105.

    >>> from lightning.pytorch import Trainer
    >>> trainer = Trainer(callbacks=[Anneal(Dr2Net(0.3, 0.7), steps=1000)], logger=False, enable_checkpointing=False)
    """

    def __init__(self, scheme: Dr2Net, steps: int) -> None:
        if not isinstance(scheme, Dr2Net):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise SettingError(f"Anneal needs a Dr2Net, got {scheme!r}")
        if steps < 1:
            raise SettingError(f"Anneal needs at least 1 step, got {steps}")
        self.scheme, self.steps = scheme, steps

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        set_scheme(pl_module, self.scheme.at(min(1.0, trainer.global_step / self.steps)))

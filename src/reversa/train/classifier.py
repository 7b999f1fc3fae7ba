"""The training task, in Lightning's terms. Import it late: it loads Lightning."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import OneCycleLR

from reversa.regularise import parameter_groups
from reversa.train.checkpoint import MARK, make_network
from reversa.train.config import TrainConfig


class Classifier(LightningModule):
    """A network that learns to tell the classes of images.

    Args:
        config: the settings of the run.
        steps: training steps in all, for the learning rate's rise and fall.
        num_classes: number of classes.
        channels: channels of the images.
    """

    def __init__(self, config: TrainConfig, steps: int, num_classes: int, channels: int) -> None:
        super().__init__()
        self.config = config
        self.steps = steps
        self.shape = {"num_classes": num_classes, "channels": channels}
        self.network = make_network(config, **self.shape)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        return cross_entropy(self.network(images), labels)

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self._log_scores("val", batch)

    def test_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self._log_scores("test", batch)

    def _log_scores(self, split: str, batch: tuple[Tensor, Tensor]) -> None:
        images, labels = batch
        scores = self.network(images)
        right = (scores.argmax(1) == labels).double().mean()
        values = {f"{split}_loss": cross_entropy(scores, labels), f"{split}_accuracy": right}
        self.log_dict(values, batch_size=len(labels))

    def configure_optimizers(self) -> Any:
        groups = parameter_groups(self.network, self.config.weight_decay)
        optimizer = torch.optim.SGD(groups, self.config.lr, momentum=0.9, nesterov=True)
        schedule = OneCycleLR(optimizer, self.config.lr, total_steps=self.steps, pct_start=0.3)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say what the network is, so that it can be built again from the file alone."""
        checkpoint[MARK] = {"config": asdict(self.config), "shape": self.shape}

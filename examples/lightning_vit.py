"""A timm ViT trained by Lightning, stopped half way, and resumed from the checkpoint.

``python examples/lightning_vit.py`` trains on scikit-learn's digits. Conversion keeps the names in ``state_dict``: the
checkpoint is an ordinary one, and fits the unconverted ViT, too.
"""

from __future__ import annotations

from pathlib import Path

import timm
import torch
from lightning.pytorch import LightningModule, Trainer
from small_data import digits
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import reversa
from reversa.train import MemoryMonitor


class Digits(LightningModule):
    """A reversible ViT, its loss and its optimizer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        vit = timm.models.VisionTransformer(
            img_size=8, patch_size=2, in_chans=1, num_classes=10, embed_dim=64, depth=8, num_heads=4, global_pool="avg"
        )
        self.vit = reversa.convert(vit, scheme=reversa.Momentum(0.9))
        self.losses: list[Tensor] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = cross_entropy(self.vit(images), labels)
        self.losses.append(loss.detach())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def fit(task: Digits, epochs: int, batches: int, resume: Path | None = None) -> Trainer:
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        limit_train_batches=batches,
        callbacks=[MemoryMonitor(every=batches)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(task, DataLoader(TensorDataset(*digits()), batch_size=64), ckpt_path=resume)
    return trainer


def main(steps: int = 40, folder: str = "runs/lightning_vit") -> list[float]:
    first, checkpoint = Digits(), Path(folder) / "half.ckpt"
    fit(first, 1, steps // 2).save_checkpoint(checkpoint)
    second = Digits()
    trainer = fit(second, 2, steps // 2, resume=checkpoint)
    losses = [loss.item() for loss in first.losses + second.losses]
    print(f"loss {losses[0]:.3f} before, {losses[steps // 2]:.3f} when resumed, {losses[-1]:.3f} after {steps} steps")
    print(f"{trainer.callback_metrics['memory/peak_bytes'] / 2**20:.1f} MiB at the peak of a training step")
    return losses


if __name__ == "__main__":
    main()

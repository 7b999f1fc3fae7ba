"""A torchvision ResNet in an Accelerate loop: mixed precision, accumulated and clipped gradients.

``python examples/accelerate_loop.py`` trains on scikit-learn's digits. Convert before ``prepare``, which hides the
model's forward. ``accelerate launch examples/accelerate_loop.py`` is the same on several devices.
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from small_data import digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models.resnet import Bottleneck, ResNet

import reversa


def make_model() -> nn.Module:
    torch.manual_seed(0)
    resnet = ResNet(Bottleneck, [4, 4, 1, 1], num_classes=10, width_per_group=8)
    resnet.conv1 = nn.Conv2d(1, 64, 7, stride=2, padding=3, bias=False)
    return resnet


def main(steps: int = 15, accumulate: int = 2) -> list[float]:
    accelerator = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=accumulate)
    images, labels = digits(side=32)
    model = reversa.convert(make_model(), scheme=reversa.Momentum(0.9), example=images[:2])
    loader = DataLoader(TensorDataset(images, labels), batch_size=16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    losses = []
    for images, labels in loader:
        with accelerator.accumulate(model):
            loss = nn.functional.cross_entropy(model(images), labels)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        if len(losses) == steps * accumulate:
            break
    accelerator.print(f"loss {losses[0]:.3f} before, {losses[-1]:.3f} after {steps} steps of {accumulate} batches")
    return losses


if __name__ == "__main__":
    main()

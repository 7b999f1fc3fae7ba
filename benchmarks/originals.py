"""The models that faithful.py converts, and what is made of them without conversion."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from reversa.errors import import_extra


@dataclass(frozen=True)
class Subject:
    """A model of torchvision's with random weights, and the images of its training step."""

    name: str
    make: Callable[[], nn.Module]
    batch: int
    pixels: int
    classes: int = 1000

    def build(self) -> nn.Module:
        """The original in training mode: BatchNorm normalises with the batch's own statistics."""
        torch.manual_seed(0)
        model = self.make().train()
        for head in (m for m in model.modules() if isinstance(m, nn.Linear) and not m.weight.any()):
            nn.init.xavier_uniform_(head.weight)  # torchvision's ViT begins with zeros there: no gradient would pass
        return model

    def images(self) -> tuple[Tensor, Tensor]:
        torch.manual_seed(1)
        return torch.randn(self.batch, 3, self.pixels, self.pixels), torch.randint(self.classes, (self.batch,))


def subjects(quick: bool) -> list[Subject]:
    vision = import_extra("torchvision.models", "vision")
    if quick:
        vit = partial(vision.VisionTransformer, 32, 8, 6, 4, 64, 128, num_classes=10)
        return [Subject("ResNet-34", vision.resnet34, 4, 64), Subject("small ViT", vit, 8, 32, 10)]
    return [Subject("ResNet-50", vision.resnet50, 4, 224), Subject("ViT-B/16", vision.vit_b_16, 2, 224)]


def blocks_in(model: nn.Module) -> list[str]:
    kinds = ("BasicBlock", "Bottleneck", "EncoderBlock")
    return [name for name, module in model.named_modules() if type(module).__name__ in kinds]


def checkpoint_blocks(model: nn.Module, leave: Sequence[str] = ()) -> nn.Module:
    """PyTorch's checkpoint (non-reentrant) around every residual block, but for those named."""
    for block in (model.get_submodule(name) for name in blocks_in(model) if name not in leave):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    return model


def residual(block: nn.Module, x: Tensor) -> Tensor:
    """What a block of torchvision's ResNet adds to its input, before the ReLU that ends it."""
    for i in [i for i in "123" if hasattr(block, f"conv{i}")]:
        x = block.get_submodule(f"bn{i}")(block.get_submodule(f"conv{i}")(x if i == "1" else x.relu()))
    return x


def with_relu_outside(model: nn.Module, stages: Sequence[Sequence[str]], gamma: float) -> nn.Module:
    """Momentum around the bare residual, with the block's ReLU after the addition: x' = relu(x + v')."""
    model = copy.deepcopy(model)

    def forward(x: Tensor, block: nn.Module, velocity: list[Tensor]) -> Tensor:
        velocity.append((1 - gamma) * residual(block, x) + (gamma * velocity.pop() if velocity else 0))
        return (x + velocity[-1]).relu()

    for names in stages:
        velocity: list[Tensor] = []
        for block in map(model.get_submodule, names):
            block.forward = partial(forward, block=block, velocity=velocity)
    return model

"""A reversible ViT with compiled blocks: ``block.compile()`` compiles the residual function f(x) = block(x) - x.

``python examples/compiled.py`` trains on scikit-learn's digits. All blocks share one graph, which serves the forward
pass and the evaluation in the backward pass. Do not compile the whole model: the loop over the blocks, and
the blocks with it, would run eagerly.
"""

from __future__ import annotations

import time

import timm
import torch
from small_data import digits
from torch.nn.functional import cross_entropy

import reversa


def make_model() -> timm.models.VisionTransformer:
    torch.manual_seed(0)
    return timm.models.VisionTransformer(
        img_size=8, patch_size=2, in_chans=1, num_classes=10, embed_dim=64, depth=8, num_heads=4, global_pool="avg"
    )


def main(steps: int = 20, backend: str = "inductor") -> list[float]:
    model = reversa.convert(make_model(), scheme=reversa.Momentum(0.9))
    for block in model.blocks:
        block.compile(backend=backend)

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    images, labels = digits()
    losses, seconds = [], []
    for x, y in zip(images.split(64)[:steps], labels.split(64), strict=False):
        begun = time.perf_counter()
        loss = cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - begun)
    print(f"loss {losses[0]:.3f} before, {losses[-1]:.3f} after {steps} steps")
    print(f"first step {seconds[0]:.1f} s, where the compiler works; last step {seconds[-1]:.3f} s")
    return losses


if __name__ == "__main__":
    main()

"""Averages of the weights of a reversible ResNet: an exponential moving average, and stochastic weight averaging.

``python examples/averaged.py`` trains on scikit-learn's digits. ``AveragedModel`` copies the converted model, and the
copies are reversible, too. ``update_bn`` computes the BatchNorm statistics that belong to the averages.
"""

from __future__ import annotations

import torch
from small_data import digits
from torch import nn
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models.resnet import Bottleneck, ResNet

import reversa


def make_model() -> nn.Module:
    torch.manual_seed(0)
    resnet = ResNet(Bottleneck, [4, 4, 1, 1], num_classes=10, width_per_group=8)
    resnet.conv1 = nn.Conv2d(1, 64, 7, stride=2, padding=3, bias=False)
    return resnet


@torch.no_grad()
def loss_of(model: nn.Module, loader: DataLoader) -> float:
    model.eval()
    return sum(nn.functional.cross_entropy(model(x), y).item() for x, y in loader) / len(loader)


def main(steps: int = 20) -> dict[str, float]:
    images, labels = digits(side=16)
    model = reversa.convert(make_model(), scheme=reversa.Momentum(0.9), example=images[:2])
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    swa = AveragedModel(model)
    loader = DataLoader(TensorDataset(images[: 32 * steps], labels[: 32 * steps]), batch_size=32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    constant = SWALR(optimizer, swa_lr=0.01, anneal_epochs=5)

    before = loss_of(model, loader)
    model.train()
    for step, (x, y) in enumerate(loader):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        ema.update_parameters(model)
        if step >= steps // 2:
            swa.update_parameters(model)
            constant.step()
    models = {"last weights": model, "moving average": ema, "SWA": swa}
    for one in models.values():
        update_bn(loader, one)
    losses = {"before": before} | {name: loss_of(one, loader) for name, one in models.items()}
    print("\n".join(f"loss, {name}: {loss:.3f}" for name, loss in losses.items()))
    return losses


if __name__ == "__main__":
    main()

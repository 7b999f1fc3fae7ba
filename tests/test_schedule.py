"""Schemes that change while a model is trained."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn

import reversa
from cases import mlp
from reversa import Dr2Net
from reversa.errors import SettingError
from reversa.schedule import set_scheme


def residual_blocks():
    return torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [2, 1, 3, 1], num_classes=4).eval()


def test_every_chain_follows():
    torch.manual_seed(0)
    model, x = residual_blocks(), torch.randn(2, 3, 32, 32)
    plain = model(x)
    reversa.convert(model, scheme=Dr2Net(1, 0))
    net = nn.Sequential(model, reversa.ReversibleSequence([nn.Linear(4, 4)], Dr2Net(1, 0)))
    torch.testing.assert_close(net[0](x), plain)
    set_scheme(net, Dr2Net(0.5, 0.5))
    assert net[1].scheme == Dr2Net(0.5, 0.5)
    moved = net[0](x)
    assert not torch.allclose(moved, plain)
    twin = residual_blocks()
    twin.load_state_dict(net[0].state_dict())
    torch.testing.assert_close(reversa.convert(twin, scheme=Dr2Net(0.5, 0.5))(x), moved)


def test_a_backward_pass_goes_back_as_its_forward_pass_came():
    fs, x = [mlp().double() for _ in range(4)], torch.randn(3, 6, dtype=torch.float64)
    gradients = []
    for changes in (False, True):
        seq = reversa.ReversibleSequence(fs, Dr2Net(0.5, 0.5))
        y = seq(x)
        if changes:
            set_scheme(seq, Dr2Net(0.3, 0.7))
        gradients.append(torch.autograd.grad(y.square().sum(), list(seq.parameters())))
    assert all(map(torch.equal, *gradients))


def test_what_it_cannot_change():
    with pytest.raises(SettingError, match="no reversible chain"):
        set_scheme(nn.Linear(2, 2), Dr2Net())
    with pytest.raises(SettingError, match="cannot take the place of Momentum"):
        set_scheme(reversa.ReversibleSequence([nn.Linear(2, 2)], reversa.Momentum(0.9)), Dr2Net())


@pytest.mark.filterwarnings("ignore")  # Lightning's own
def test_lightning_takes_it_along():
    from lightning.pytorch import LightningModule, Trainer
    from torch.utils.data import DataLoader, TensorDataset

    from reversa.train.anneal import Anneal

    seen = []

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = reversa.ReversibleSequence([mlp() for _ in range(3)], Dr2Net(1, 0))

        def training_step(self, batch):
            seen.append((self.net.scheme.alpha, self.net.scheme.beta))
            return self.net(batch[0]).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    data = DataLoader(TensorDataset(torch.randn(12, 6)), batch_size=2, num_workers=0)
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=[Anneal(Dr2Net(0.2, 0.8), steps=4)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(), data)
    alphas, betas = zip(*seen, strict=True)
    assert alphas == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2, 0.2])
    assert betas == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8, 0.8])
    for scheme, steps in ((Dr2Net(), 0), (reversa.Momentum(0.9), 10)):
        with pytest.raises(SettingError, match="Anneal needs"):
            Anneal(scheme, steps)

"""Schemes that change while a model is trained."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from torch import nn

import reversa
from cases import mlp
from reversa import Dr2Net
from reversa.errors import SettingError
from reversa.schedule import Annealing, set_scheme


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


def test_each_stage_by_its_name():
    model = reversa.convert(residual_blocks(), scheme=reversa.Momentum(0.5))
    set_scheme(model, {"layer3": reversa.Momentum(0.9)})
    assert [stage.kept for stage in reversa.explain(model).stages] == ["1 state", "1 state"]
    assert reversa.explain(model).rule == (
        "Momentum(gamma=0.5, init='zero'), Invert(); Momentum(gamma=0.9, init='zero'), Invert()"
    )
    with pytest.raises(SettingError, match="layer3"):
        set_scheme(model, {"layer33": reversa.Momentum(0.9)})


@pytest.mark.parametrize("exact", [False, True])
def test_gamma_grows_while_a_converted_model_is_tuned(exact):
    """Six steps from gamma 0.01 to 0.9: the weights are those of a network that stores, in integers to the bit; they
    are those of the rule written down by hand, with each step's gamma.
    """
    torch.manual_seed(0)
    plain = nn.Sequential(*(Residual() for _ in range(6))).double()
    data = torch.randn(6, 5, 6, dtype=torch.float64)
    weights, gammas = {}, []
    for engine in (reversa.Invert(), reversa.Store(), None):
        net = copy.deepcopy(plain)
        if engine is not None:
            reversa.convert(net, reversa.Momentum(0.01), exact=exact, engine=engine, example=data[0])
        annealing = Annealing(reversa.Momentum(0.9), steps=5)
        optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
        for step, x in enumerate(data):
            if engine is None:
                y = by_hand(net, x, gammas[step])
            else:
                annealing.apply(net, step)
                (stage,) = {block._reversa.stage for block in net}
                gammas.append(stage.scheme.gamma)
                y = net(x)
            optimizer.zero_grad()
            y.square().sum().backward()
            optimizer.step()
        weights[str(engine)] = torch.cat([p.detach().flatten() for p in net.parameters()])
    assert gammas[:6] == pytest.approx([0.01, 0.188, 0.366, 0.544, 0.722, 0.9])
    inverted, stored, hand = weights.values()
    if exact:
        assert torch.equal(inverted, stored)
    torch.testing.assert_close(inverted, stored, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(stored, hand, rtol=1e-6, atol=1e-7 if exact else 1e-10)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = mlp()

    def forward(self, x):
        return x + self.f(x)


def by_hand(blocks, x, gamma):
    v = torch.zeros_like(x)
    for block in blocks:
        v = gamma * v + (1 - gamma) * block.f(x)
        x = x + v
    return x


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
    for scheme, steps in ((Dr2Net(), 0), (reversa.BDIA(), 10), ({"net": reversa.RevNet()}, 10)):
        with pytest.raises(SettingError, match="annealing needs"):
            Anneal(scheme, steps)


@pytest.mark.filterwarnings("ignore")  # of transformers itself
def test_the_trainer_of_hugging_face_takes_it_along(tmp_path):
    transformers = pytest.importorskip("transformers")
    from reversa.train.huggingface import Anneal

    config = transformers.GPT2Config(n_layer=2, n_embd=16, n_head=2, n_positions=8, vocab_size=20)
    model = reversa.convert(transformers.GPT2LMHeadModel(config), scheme=reversa.Momentum(0.01))
    seen = []

    class Reader(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            seen.append(model.transformer.h[0]._reversa.stage.scheme.gamma)

    data = [{"input_ids": torch.arange(8), "labels": torch.arange(8)} for _ in range(8)]
    settings = transformers.TrainingArguments(
        str(tmp_path), per_device_train_batch_size=2, max_steps=4, report_to=[], save_strategy="no", use_cpu=True
    )
    callbacks = [Anneal(reversa.Momentum(0.9), steps=2), Reader()]
    transformers.Trainer(model, settings, train_dataset=data, callbacks=callbacks).train()
    assert seen == pytest.approx([0.01, 0.455, 0.9, 0.9])

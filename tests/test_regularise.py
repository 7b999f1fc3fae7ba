"""Penalties on kernels: their values by hand, their gradients by differences, and the callback against plain loops."""

from __future__ import annotations

import warnings

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.nn.functional import mse_loss

import reversa
from reversa import models
from reversa.errors import CheckpointError, SettingError
from reversa.models.functions import Bias, Kernel, Symmetric, basic, one_layer_pair
from reversa.regularise import StepSmoothness, kernels, layer_smoothness, named_kernels, parameter_groups
from reversa.train.smoothness import Smoothness

H = 0.1


def symmetric(width=3, hidden=None, size=None, outer=True):
    return Symmetric(Kernel(width, size, hidden), Bias(hidden or width), Bias(width) if outer else None).double()


def hamiltonian(blocks=4, h=H):
    pairs = [(symmetric(outer=i > 0), symmetric()) for i in range(blocks)]
    return reversa.ReversibleSequence(pairs, scheme=reversa.Hamiltonian(h))


def by_hand(chain, h=H):
    """(1/h) sum over j and k of |K[j+1,k] - K[j,k]|^2, from the numbers themselves."""
    total = 0.0
    for k in range(2):
        for j in range(len(chain.blocks) - 1):
            a, b = (chain.blocks[i][k].kernel.weight.detach().numpy() for i in (j, j + 1))
            total += ((b - a) ** 2).sum() / h
    return total


# ---------------------------------------------------------------------------------------------- kernels


@pytest.mark.parametrize("name", ["hamiltonian74", "simplehamiltonian218inception", "revnet38", "reversibleresnet"])
def test_kernels_of_the_papers_networks_are_all_matrices(name):
    net = models.create(name)
    assert [id(K) for K in kernels(net)] == [id(p) for p in net.parameters() if p.ndim > 1]


def test_normalisations_biases_and_embeddings_have_no_kernel():
    net = nn.ModuleDict(
        {
            "norm": nn.LayerNorm((4, 3)),
            "words": nn.Embedding(5, 4),
            "attention": nn.MultiheadAttention(4, 2, add_bias_kv=True),
            "conv": nn.ConvTranspose1d(2, 3, 3),
            "spectral": nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)),
        }
    )
    assert list(named_kernels(net)) == [
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "conv.weight",
        "spectral.parametrizations.weight.original",
    ]


def test_weight_decay_moves_kernels_alone():
    net = nn.Sequential(nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2), Symmetric(Kernel(2), Bias(2)), nn.LayerNorm((2, 2)))
    nn.init.ones_(net[2].inner.bias)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer = torch.optim.SGD(parameter_groups(net, 0.5), lr=0.1)
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in net.named_parameters():
        factor = 0.95 if name in ("0.weight", "2.kernel.weight") else 1
        torch.testing.assert_close(p.detach(), factor * before[name])
    with pytest.raises(SettingError, match="0 or a positive number"):
        parameter_groups(net, -1)


# ---------------------------------------------------------------------------------------------- smoothness by layers


def test_layer_smoothness_is_the_papers_sum():
    chain = hamiltonian()
    assert layer_smoothness(chain).item() == pytest.approx(by_hand(chain), rel=1e-12)
    assert layer_smoothness(chain, h=0.5).item() == pytest.approx(by_hand(chain, 0.5), rel=1e-12)
    net = nn.Sequential(chain, nn.Linear(6, 6), other := hamiltonian(2, h=0.7))
    assert layer_smoothness(net).item() == pytest.approx(by_hand(chain) + by_hand(other, 0.7), rel=1e-12)


def test_the_first_function_of_hamiltonian74_counts_though_it_lacks_a_bias():
    net = models.create("hamiltonian74").double()
    chain = net.stages[0]
    with torch.no_grad():
        for K in kernels(net):
            K.zero_()
        chain.blocks[0][0].kernel.weight[0, 0, 0, 0] = 3.0
    assert layer_smoothness(net).item() == pytest.approx(9 / 0.1)


def test_functions_with_several_kernels_are_compared_kernel_by_kernel():
    fs = [basic(2, 2).double() for _ in range(2)]
    convs = [[m.weight for m in f if isinstance(m, nn.Conv2d)] for f in fs]
    expected = sum((b - a).norm().item() ** 2 for a, b in zip(*convs, strict=True))
    assert layer_smoothness(fs).item() == pytest.approx(expected)
    seq = reversa.ReversibleSequence(fs, scheme=reversa.Momentum(0.9))  # no step size: 1
    assert layer_smoothness(seq).item() == pytest.approx(expected)


def test_other_shapes_begin_a_new_run():
    fs = [symmetric(hidden=n) for n in (3, 3, 5, 5, 3)]
    K = [f.kernel.weight for f in fs]
    expected = (K[1] - K[0]).square().sum() + (K[3] - K[2]).square().sum()
    torch.testing.assert_close(layer_smoothness(fs), expected)
    assert layer_smoothness(fs[:1]) == 0


def test_a_kernel_that_both_functions_share_counts_once():
    pairs = [one_layer_pair(3, size=None) for _ in range(3)]
    K = [f.kernel.weight for f, _ in pairs]
    seq = reversa.ReversibleSequence(pairs, scheme=reversa.Hamiltonian(1.0))
    torch.testing.assert_close(layer_smoothness(seq), (K[1] - K[0]).square().sum() + (K[2] - K[1]).square().sum())


def differences(function, parameter, step=1e-6):
    gradient = torch.empty_like(parameter)
    with torch.no_grad():
        for place in range(parameter.numel()):
            value = parameter.view(-1)[place].item()
            ends = []
            for moved in (value + step, value - step):
                parameter.view(-1)[place] = moved
                ends.append(function().item())
            parameter.view(-1)[place] = value
            gradient.view(-1)[place] = (ends[0] - ends[1]) / (2 * step)
    return gradient


@pytest.mark.parametrize("kind", ["layers", "steps"])
def test_gradients_are_those_of_differences(kind):
    chain = hamiltonian(3)
    penalty = (lambda: layer_smoothness(chain)) if kind == "layers" else StepSmoothness(chain)
    with torch.no_grad():
        for K in kernels(chain):
            K += 0.1 * torch.randn_like(K)
    gradients = torch.autograd.grad(penalty(), kernels(chain))
    for K, gradient in zip(kernels(chain), gradients, strict=True):
        assert gradient.abs().max() > 0.01
        torch.testing.assert_close(gradient, differences(penalty, K), rtol=1e-6, atol=1e-6)
    assert torch.autograd.gradcheck(lambda *_: penalty(), tuple(kernels(chain)))


def test_refusals_of_layer_smoothness():
    with pytest.raises(SettingError, match="has no ReversibleSequence"):
        layer_smoothness(nn.Linear(2, 2))
    with pytest.raises(SettingError, match="step size"):
        layer_smoothness(hamiltonian(), h=0)


# ---------------------------------------------------------------------------------------------- smoothness by steps


def test_step_smoothness_is_the_distance_of_the_last_step():
    net = nn.Linear(3, 2).double()
    smoothness = StepSmoothness(net)
    assert smoothness() == 0
    points = [net.weight.detach().clone()]
    for _ in range(3):
        smoothness.remember()
        with torch.no_grad():
            for p in net.parameters():
                p += torch.randn_like(p)
        points.append(net.weight.detach().clone())
        assert smoothness().item() == pytest.approx(float(((points[-1] - points[-2]) ** 2).sum()), rel=1e-12)


def test_step_smoothness_goes_on_from_its_state():
    net = nn.Linear(3, 2)
    one = StepSmoothness(net)
    with torch.no_grad():
        net.weight += 1
    other = StepSmoothness(net)
    assert other() == 0
    other.load_state_dict({name: K.clone() for name, K in one.state_dict().items()})
    assert other().item() == pytest.approx(6, rel=1e-5)
    for wrong in ({}, {"weight": torch.zeros(2, 2)}, {"weight": torch.zeros(2, 3), "more": torch.zeros(1, 1)}):
        with pytest.raises(CheckpointError, match="another network"):
            other.load_state_dict(wrong)


# ---------------------------------------------------------------------------------------------- the callback


class Task(LightningModule):
    def __init__(self, lr=0.05):
        super().__init__()
        torch.manual_seed(1)
        self.chain, self.lr = hamiltonian(3), lr

    def training_step(self, batch):
        return mse_loss(self.chain(batch), -batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr, momentum=0.9)


BATCHES = [torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in range(6)]
QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}


def fit(task, *callbacks, batches=BATCHES, ckpt_path=None, **settings):
    settings = {"precision": "64-true", "enable_checkpointing": False, "max_epochs": 1, **QUIET} | settings
    loader = torch.utils.data.DataLoader(batches, batch_size=None)
    trainer = Trainer(callbacks=list(callbacks), **settings)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"lightning\.")  # few workers, no validation: meant
        trainer.fit(task, loader, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return trainer


def plain_loop(rule, rate, accumulate=1, clip=None):
    """The same training with loss + rate * penalty, by PyTorch alone."""
    task = Task()
    penalty, remember = rule(task)
    optimizer = task.configure_optimizers()
    for first in range(0, len(BATCHES), accumulate):
        optimizer.zero_grad()
        for batch in BATCHES[first : first + accumulate]:
            ((task.training_step(batch) + rate * penalty()) / accumulate).backward()
        if clip:
            nn.utils.clip_grad_norm_(task.parameters(), clip)
        remember()
        optimizer.step()
    return task


def paper(task):
    """The sum over layers, written down once more."""

    def penalty():
        blocks = task.chain.blocks
        differences = [blocks[j + 1][k].kernel.weight - blocks[j][k].kernel.weight for j in (0, 1) for k in (0, 1)]
        return torch.cat([d.flatten() for d in differences]).norm() ** 2 / H

    return penalty, lambda: None


def report(task):
    """The distance from the weights before the last step, written down once more."""
    weights = [p for name, p in task.named_parameters() if name.endswith("kernel.weight")]
    before = [[p.detach().clone() for p in weights]]

    def penalty():
        return sum(((p - old) ** 2).sum() for p, old in zip(weights, before[-1], strict=True))

    return penalty, lambda: before.append([p.detach().clone() for p in weights])


def assert_equal_weights(one, other, **tolerance):
    for (name, p), q in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


@pytest.mark.parametrize("rule", [paper, report], ids=["layers", "steps"])
@pytest.mark.parametrize(("accumulate", "clip"), [(1, None), (3, None), (2, 0.1)])
def test_training_with_the_callback_is_training_with_the_penalty_in_the_loss(rule, accumulate, clip):
    task, rate = Task(), 0.5
    across = "layers" if rule is paper else "steps"
    trainer = fit(task, Smoothness(rate, across), accumulate_grad_batches=accumulate, gradient_clip_val=clip)
    expected = plain_loop(rule, rate, accumulate, clip)
    assert_equal_weights(task, expected, rtol=1e-10, atol=1e-12)
    assert trainer.callback_metrics["smoothness"] > 0
    without = plain_loop(rule, 0.0, accumulate, clip)
    moved = max((p - q).abs().max().item() for p, q in zip(task.parameters(), without.parameters(), strict=True))
    assert moved > 1e-5, "the penalty makes no difference here"


class Half(Task):
    """With plain SGD of rate 1, so that a step shows the gradient."""

    def __init__(self):
        super().__init__()
        self.chain.float()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1.0)


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
def test_the_penalty_is_not_scaled_by_amp(precision):
    def step(rate):
        task = Half()
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if precision == "16-mixed" else None
        plugin = MixedPrecision(precision, "cpu", scaler)
        fit(task, Smoothness(rate), batches=[BATCHES[0].float()], precision=None, plugins=[plugin])
        return task

    start = Half()
    penalty = paper(start)[0]
    gradients = dict(zip([n for n, _ in start.named_parameters()], start.parameters(), strict=True))
    penalty().backward()
    with_it, without = (dict(step(rate).named_parameters()) for rate in (0.01, 0.0))
    for name, p in gradients.items():
        expected = torch.zeros_like(p) if p.grad is None else -0.01 * p.grad
        torch.testing.assert_close(with_it[name] - without[name], expected, rtol=1e-4, atol=1e-6)


def test_a_resumed_run_remembers_the_weights_before_its_last_step(tmp_path):
    whole, first, second = Task(), Task(), Task()
    fit(whole, Smoothness(0.5, "steps"), max_epochs=2)
    trainer = fit(first, Smoothness(0.5, "steps"))
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    fit(second, Smoothness(0.5, "steps"), max_epochs=2, ckpt_path=tmp_path / "one.ckpt")
    assert_equal_weights(second, whole, rtol=1e-12, atol=1e-14)


def test_frozen_kernels_and_parameters_of_nobody_are_left_alone():
    task = Task()
    frozen = task.chain.blocks[0][0].kernel.weight.requires_grad_(False)
    before = frozen.clone()
    fit(task, Smoothness(0.5))
    torch.testing.assert_close(frozen, before)
    task.requires_grad_(False)
    task.chain.blocks[0][0].inner.bias.requires_grad_(True)
    fit(task, Smoothness(0.5))


class Two(Task):
    automatic_optimization = False

    def training_step(self, batch):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch))
            optimizer.step()

    def configure_optimizers(self):
        first, *rest = self.chain.blocks
        return [torch.optim.SGD(part.parameters(), 0.05) for part in (first, nn.ModuleList(rest))]


def test_each_of_two_optimisers_gets_the_gradient_of_its_own_parameters():
    task, expected = Two(), Two()
    fit(task, Smoothness(0.5), batches=BATCHES[:2])
    penalty = paper(expected)[0]
    optimizers = expected.configure_optimizers()
    for batch in BATCHES[:2]:
        for optimizer in optimizers:
            expected.zero_grad()
            (Task.training_step(expected, batch) + 0.5 * penalty()).backward()
            optimizer.step()
    assert_equal_weights(task, expected, rtol=1e-10, atol=1e-12)
    with pytest.raises(SettingError, match="2 optimisers"):
        fit(Two(), Smoothness(0.5, "steps"))


def test_refusals_of_the_callback():
    for rate in (-1.0, float("inf"), float("nan")):
        with pytest.raises(SettingError, match="rate"):
            Smoothness(rate)
    with pytest.raises(SettingError, match="layers, steps"):
        Smoothness(1.0, across="time")

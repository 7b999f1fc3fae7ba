"""The networks of the papers: parameters to the last one, formulas by hand, memory, and bad input."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import reversa
from reversa import models
from reversa.errors import SettingError, StateError
from reversa.models.functions import Antisymmetric, Bias, Kernel, StochasticDepth, Symmetric, at_depth, bottleneck
from reversa.models.layers import PoolAndPad
from reversa.models.simple import BiasedKernel, Inception

# name, settings, parameters. Those of RevNet, ResNet: recomputed from the layer lists of Gomez et al.'s code; of the
# Hamiltonian networks: from the authors' code; of the simple ones: printed in the report; of Momentum ResNets:
# torchvision's ResNets.
COUNTS = [
    ("resnet32", {}, 464_154),
    ("resnet32", {"num_classes": 100}, 470_004),
    ("resnet110", {}, 1_727_962),
    ("resnet110", {"num_classes": 100}, 1_733_812),
    ("resnet164", {}, 1_703_258),
    ("resnet164", {"num_classes": 100}, 1_726_388),
    ("resnet1202", {}, 19_421_274),
    ("resnet50", {"num_classes": 1000}, 25_549_352),
    ("resnet101", {"num_classes": 1000}, 44_541_480),
    ("revnet38", {}, 464_890),
    ("revnet38", {"num_classes": 100}, 475_060),
    ("revnet110", {}, 1_729_194),
    ("revnet110", {"num_classes": 100}, 1_740_804),
    ("revnet164", {}, 1_748_778),
    ("revnet164", {"num_classes": 100}, 1_794_948),
    ("revnet56", {"num_classes": 1000}, 27_553_128),
    ("revnet104", {"num_classes": 1000}, 45_428_072),
    ("hamiltonian74", {}, 429_690),
    ("hamiltonian74", {"num_classes": 100}, 439_860),
    ("hamiltonian74", {"between": "batchnorm"}, 432_010),
    ("hamiltonian74", {"between": "batchnorm", "num_classes": 100}, 442_180),
    ("hamiltonian218", {}, 1_683_034),
    ("hamiltonian218", {"num_classes": 100}, 1_694_644),
    ("hamiltonian218", {"between": "batchnorm"}, 1_690_890),
    ("hamiltonian218", {"between": "batchnorm", "num_classes": 100}, 1_702_500),
    ("hamiltonian1202", {}, 9_699_338),
    ("hamiltonian1202", {"between": "bias"}, 9_654_746),
    ("midpoint26", {}, 535_258),
    ("leapfrog26", {}, 535_258),
    ("midpoint62", {}, 1_801_738),
    ("leapfrog62", {}, 1_801_738),
    # 6, 5, 5, 4 blocks of two functions 9 m^2 + 2 m on halves m = 8 to 64, or of one of 9 w^2 + w; stem, head.
    ("hamiltonianstl10", {}, 2 * (6 * 592 + 5 * 2_336 + 5 * 9_280 + 4 * 36_992) - 8 + 464 + 1_546),
    ("midpointstl10", {}, 6 * 2_320 + 5 * 9_248 + 5 * 36_928 + 4 * 147_584 + 464 + 1_546),
    ("leapfrogstl10", {}, 6 * 2_320 + 5 * 9_248 + 5 * 36_928 + 4 * 147_584 + 464 + 1_546),
    ("simplehamiltonian218", {}, 1_751_882),
    ("simplehamiltonian218regularised", {}, 1_751_946),
    ("simplehamiltonian218inception", {}, 458_682),
    ("irevnet163", {}, 6_274_826),
    ("irevnet163", {"num_classes": 100}, 6_320_996),
    ("irevnet301", {"num_classes": 1000}, 125_120_356),
    ("iresnet64", {}, 4_873_178),
    ("iresnet64", {"num_classes": 100}, 4_896_308),
    ("momentumresnet18", {"num_classes": 1000, "large": True}, 11_689_512),
    ("momentumresnet34", {"num_classes": 1000, "large": True}, 21_797_672),
    ("momentumresnet50", {"num_classes": 1000, "large": True}, 25_557_032),
    ("momentumresnet101", {"num_classes": 1000, "large": True}, 44_549_160),
    ("momentumresnet152", {"num_classes": 1000, "large": True}, 60_192_808),
    # Patches 96 (3 * 4^2 + 1), six blocks of 12 * 96^2 + 13 * 96, LayerNorm 2 * 96, classifier 10 (96 + 1).
    ("vit", {}, 676_906),
    ("revvit", {}, 676_906),
    ("momentumvit", {}, 676_906),
    # torchvision's ViT-B/16 and one of width 384 with 6 heads, without learned positions and class token:
    # 86,567,656 - 197 * 768 - 768 and 22,050,664 - 197 * 384 - 384.
    ("vitb16", {"num_classes": 1000}, 86_415_592),
    ("revvitb16", {"num_classes": 1000}, 86_415_592),
    ("vits16", {"num_classes": 1000}, 21_974_632),
    ("revvits16", {"num_classes": 1000}, 21_974_632),
    ("odenet", {"channels": 1}, 208_266),
    ("odenetsmall", {"channels": 1}, 142_538),
    ("odenetresnet", {"channels": 1}, 576_778),
    ("odenetresnetsmall", {"channels": 1}, 511_050),
    ("heunnet32", {}, 464_154),
]
LARGE = ("resnet1202", "hamiltonian1202", "irevnet301", "vitb16", "revvitb16", "reversibleresnet")
SMALL = [n for n in models.names() if n not in LARGE]
STORED = ("resnet", "vit", "odenet", "heunnet")
"""What the names of networks without a reversible chain begin with."""


@pytest.mark.parametrize(("name", "settings", "parameters"), COUNTS)
def test_parameters(name, settings, parameters):
    with torch.device("meta"):
        net = models.create(name, **settings)
    assert sum(p.numel() for p in net.parameters()) == parameters


def test_every_network_has_its_parameters_in_the_table():
    assert {name for name, _, _ in COUNTS} == set(models.names()) - {"reversibleresnet"}


def test_functions_of_the_simple_networks():
    """9 n^2 + n with a 3x3 kernel, 37 q^2 + 5 q with q = n / 4 in an inception kernel."""
    sizes = {n: sum(p.numel() for p in BiasedKernel(n).parameters()) for n in (16, 32, 64)}
    assert sizes == {16: 2_320, 32: 9_248, 64: 36_928}
    sizes = {n: sum(p.numel() for p in Inception(n).parameters()) for n in (16, 32, 64)}
    assert sizes == {16: 612, 32: 2_408, 64: 9_552}


# ---------------------------------------------------------------------- adjoints


def assert_adjoint(kernel, shape, adjoint=None) -> None:
    """<K x, z> = <x, K^T z>; what does not depend on x is no part of K."""
    x, zero = torch.randn(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
    y = kernel(x) - kernel(zero)
    z = torch.randn_like(y)
    back = (adjoint or kernel.adjoint)(z) - (adjoint or kernel.adjoint)(torch.zeros_like(z))
    torch.testing.assert_close((y * z).sum(), (x * back).sum(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "kernel", [Kernel(4), Kernel(4, 5), Kernel(4, hidden=7), BiasedKernel(4), Inception(8)], ids=str
)
def test_convolution_kernels_and_their_adjoints(kernel):
    assert_adjoint(kernel.double(), (2, 8 if isinstance(kernel, Inception) else 4, 6, 6))


def test_dense_kernels_and_their_adjoints():
    assert_adjoint(Kernel(5, None, hidden=7).double(), (3, 5))


def test_the_reports_inception_transpose_is_no_adjoint():
    kernel = Inception(8, published=True).double()
    with pytest.raises(AssertionError):
        assert_adjoint(kernel, (2, 8, 6, 6))


def test_the_reports_bias_is_added_twice():
    torch.manual_seed(0)
    right, published = BiasedKernel(4).double(), BiasedKernel(4, published=True).double()
    published.load_state_dict(right.state_dict())
    nn.init.normal_(right.bias)
    nn.init.ones_(published.bias)
    z = torch.randn(1, 4, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(published.adjoint(z), right.adjoint(z) + 1)


def test_symmetric_functions_have_a_symmetric_jacobian_and_antisymmetric_ones_an_imaginary_spectrum():
    width = 6
    f = Symmetric(Kernel(width, None).double(), Bias(width).double())
    x = torch.randn(1, width, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(f, x).reshape(width, width)
    torch.testing.assert_close(jacobian, jacobian.T)
    assert torch.linalg.eigvalsh(jacobian).min() > -1e-12
    kernel = Kernel(width, None).double()
    field = Antisymmetric(kernel, nn.Identity())
    linear = torch.stack([kernel(e) - kernel.adjoint(e) for e in torch.eye(width, dtype=torch.float64)])
    assert torch.linalg.eigvals(linear).real.abs().max() < 1e-12
    torch.testing.assert_close(field(x), (x @ linear).relu())


# ---------------------------------------------------------------------- networks by hand


def by_hand(net, x: torch.Tensor, h: float) -> torch.Tensor:
    """Chang et al., eq. 11, with the two convolutions written out."""
    x = net.stem(x)

    def f(function, x):
        w = function.kernel.weight
        return F.conv_transpose2d(F.relu(function.inner(F.conv2d(function.outer(x), w, padding=1))), w, padding=1)

    for part in net.stages:
        if isinstance(part, PoolAndPad):
            new = part.padding
            y, z = F.avg_pool2d(x, 2).chunk(2, 1)
            x = torch.cat([F.pad(y, (0, 0, 0, 0, new, new)), F.pad(z, (0, 0, 0, 0, new, new))], 1)
            continue
        y, z = x.chunk(2, 1)
        for one, two in part.blocks:
            y = y + h * f(one, z)
            z = z - h * f(two, y)
        x = torch.cat([y, z], 1)
    return net.head.linear(F.relu(net.head.norm(x)).mean((2, 3)))


@pytest.mark.parametrize("between", ["bias", "batchnorm"])
def test_the_hamiltonian_network_is_the_papers(between):
    net = models.create("hamiltonian74", h=0.3, between=between).double()
    for name, p in net.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(p)
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(net(x), by_hand(net, x, 0.3), rtol=1e-11, atol=1e-11)
    assert [len(part.blocks) for part in net.stages if not isinstance(part, PoolAndPad)] == [7, 6, 5]


@pytest.mark.parametrize("name", SMALL)
def test_training_steps_are_those_of_stored_activations(name):
    torch.manual_seed(0)
    imagenet = name in ("resnet50", "resnet101", "revnet56", "revnet104")
    net = models.create(name).double()
    x = torch.randn(2, 3, *([64, 64] if imagenet else [32, 32]), dtype=torch.float64)
    grads = {}
    for engine in (reversa.Invert(), reversa.Store()):
        chains = [m for m in net.modules() if isinstance(m, reversa.ReversibleSequence)]
        for chain in chains:
            chain.engine = engine
        net.zero_grad()
        torch.manual_seed(1)
        net(x).square().mean().backward()
        grads[type(engine)] = torch.cat([p.grad.flatten() for p in net.parameters()])
    assert bool(chains) != name.startswith(STORED)
    stored, inverted = grads[reversa.Store], grads[reversa.Invert]
    assert (inverted - stored).norm() <= 1e-9 * stored.norm()


def test_memory_is_flat_in_depth():
    from reversa.memory import LiveBytes

    peaks = []
    for blocks in (2, 10):
        net = models.HamiltonianNet(blocks=(blocks,) * 3, widths=(16, 16, 32, 48))
        x = torch.randn(8, 3, 32, 32)
        with LiveBytes(exclude=net) as counted:
            net(x).square().mean().backward()
        peaks.append(counted.peak)
    assert peaks[1] == pytest.approx(peaks[0], rel=0.01)


# ---------------------------------------------------------------------- residual functions


def test_stochastic_depth():
    torch.manual_seed(0)
    f = StochasticDepth(nn.Linear(3, 3), 0.25)
    x = torch.randn(2, 3)
    out = [f(x) for _ in range(400)]
    kept = [bool(y.any()) for y in out]
    assert 60 < sum(kept) < 140
    assert all(torch.equal(y, f.function(x)) for y, k in zip(out, kept, strict=True) if k)
    assert torch.equal(f.eval()(x), 0.25 * f.function(x))
    rule = [at_depth(nn.Identity(), block, 4, 0.5).survival for block in range(1, 5)]
    assert rule == [0.875, 0.75, 0.625, 0.5]
    with pytest.raises(SettingError, match=r"\(0, 1\], got 0"):
        StochasticDepth(nn.Identity(), 0)


@pytest.mark.parametrize("name", ["revnet38", "resnet32", "momentumresnet18"])
def test_stochastic_depth_in_a_network_is_replayed(name):
    torch.manual_seed(0)
    net = models.create(name, survival=0.3).double()
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    grads = []
    for engine in (reversa.Invert(), reversa.Store()):
        for chain in (m for m in net.modules() if isinstance(m, reversa.ReversibleSequence)):
            chain.engine = engine
        net.zero_grad()
        torch.manual_seed(2)
        net(x).square().mean().backward()
        grads.append({n: None if p.grad is None else p.grad.clone() for n, p in net.named_parameters()})
    assert any(g is None for g in grads[0].values())
    for n, g in grads[0].items():
        assert (g is None) == (grads[1][n] is None), n
        if g is not None:
            torch.testing.assert_close(g, grads[1][n], rtol=1e-7, atol=1e-9)


def test_resnext():
    f = bottleneck(64, 64, groups=8)
    middle = [m for m in f if isinstance(m, nn.Conv2d)][1]
    assert (middle.groups, middle.in_channels, middle.weight.shape) == (8, 32, (32, 4, 3, 3))
    for name in ("revnet164", "resnet164", "momentumresnet50"):
        net = models.create(name, groups=4)
        assert net(torch.randn(2, 3, 16, 16)).shape == (2, 10)


def test_a_learned_first_velocity():
    net = models.create("momentumresnet18", init="learned")
    plain = models.create("momentumresnet18")
    more = sum(p.numel() for p in net.parameters()) - sum(p.numel() for p in plain.parameters())
    per_stage = [2 * (9 * c * c + 2 * c) for c in (64, 128, 256, 512)]
    assert more == sum(per_stage)
    net(torch.randn(2, 3, 8, 8)).sum().backward()
    assert all(p.grad is not None for p in net.parameters())


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize("h", [0, -0.1, float("inf"), float("nan"), "0.1"])
@pytest.mark.parametrize("name", ["hamiltonian74", "midpoint26", "leapfrog26", "simplehamiltonian218"])
def test_step_sizes(name, h):
    with pytest.raises(SettingError, match="the step size h must be a positive number"):
        models.create(name, h=h)


def test_sizes_that_do_not_fit():
    with pytest.raises(SettingError, match="new channels"):
        PoolAndPad(16, 19)
    with pytest.raises(SettingError, match="do not divide into 3 groups"):
        bottleneck(32, 32, groups=3)
    with pytest.raises(SettingError, match="four groups"):
        Inception(6)
    with pytest.raises(SettingError, match="side 4 does not keep"):
        Kernel(4, 4)
    with pytest.raises(SettingError, match="'zero' or 'learned'"):
        models.create("momentumresnet18", init="random")
    with pytest.raises(SettingError, match=r"between must be one of bias, batchnorm, got 'none'"):
        models.create("hamiltonian74", between="none")
    with pytest.raises(StateError, match="cannot be halved"):
        models.create("leapfrog26")(torch.randn(2, 3, 2, 2))
    with pytest.raises(SettingError, match=r"unknown setting of revnet38 'depth'"):
        models.create("revnet38", depth=3)

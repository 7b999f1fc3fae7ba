"""i-RevNet as a whole: the paper's blocks by hand, images computed back from features, memory, bad input."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import reversa
from reversa import models
from reversa.errors import BlockError, SettingError, StateError
from reversa.exact import FixedPoint
from reversa.memory import LiveBytes
from reversa.models.invertible import EachHalf, InjectivePad, SpaceToDepth

# Padding comes back with rounding errors from the third step on, and what a step makes of it from the fourth on.
INJECTIVE = {"widths": (8, 32, 128), "blocks": (4, 2, 2), "strides": (1, 2, 2)}
BIJECTIVE = {"widths": None, "blocks": (2, 3), "strides": (2, 2), "squeeze": 2}
WIDER = {"widths": (24, 32, 128), "blocks": (2, 3, 2), "strides": (2, 1, 2), "squeeze": 2}


def lively(net: nn.Module) -> nn.Module:
    """Away from normalisations that begin with scale 1 and bias 0."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
    return net


# ---------------------------------------------------------------------- psi and padding


def test_space_to_depth_is_pixel_unshuffle_but_for_the_order_of_the_channels():
    x = torch.randn(2, 2, 4, 6)
    assert torch.equal(SpaceToDepth(2)(x), F.pixel_unshuffle(x, 2)[:, [0, 4, 1, 5, 2, 6, 3, 7]])
    assert torch.equal(SpaceToDepth(2)(x[:, :1]), F.pixel_unshuffle(x[:, :1], 2))
    x = torch.randn(1, 2, 6, 3)
    order = [0, 9, 1, 10, 2, 11, 3, 12, 4, 13, 5, 14, 6, 15, 7, 16, 8, 17]
    assert torch.equal(SpaceToDepth(3)(x), F.pixel_unshuffle(x, 3)[:, order])


def test_space_to_depth_pixel_by_pixel():
    image = torch.tensor([[[[1, 2], [3, 4]], [[5, 6], [7, 8]]]])
    assert SpaceToDepth(2)(image).flatten().tolist() == [1, 5, 2, 6, 3, 7, 4, 8]
    assert EachHalf(SpaceToDepth(2))(image).flatten().tolist() == [1, 2, 3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize(
    "layer", [SpaceToDepth(1), SpaceToDepth(2), SpaceToDepth(3), EachHalf(SpaceToDepth(2))], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_reshaping_gives_back_every_bit(layer, dtype):
    x = torch.randint(-(2**30), 2**30, (2, 72, 12, 6)).to(dtype)
    assert torch.equal(layer.inverse(layer(x)), x)
    assert torch.equal(layer(layer.inverse(x)), x)


def test_padding():
    x = torch.randn(2, 3, 4, 4)
    padded = InjectivePad(5)(x)
    assert torch.equal(padded[:, :3], x)
    assert torch.equal(padded[:, 3:], torch.zeros(2, 5, 4, 4))
    assert torch.equal(InjectivePad(5).inverse(padded), x)
    assert InjectivePad(3).inverse(x).shape == (2, 0, 4, 4)
    assert torch.equal(InjectivePad(0).inverse(InjectivePad(0)(x)), x)


# ---------------------------------------------------------------------- the paper's network by hand


def psi(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)], 1)


def by_hand(net, x, widths, blocks, strides, squeeze=1, dropout=0.0):
    """Jacobsen et al. 2018, eq. 1 and fig. 2: features and scores, from the parameters in their order."""
    parameters = net.parameters()

    def conv(x, stride=1):
        return F.conv2d(x, next(parameters), stride=stride, padding=1)

    def norm(x):
        return F.batch_norm(x, None, None, next(parameters), next(parameters), training=True).relu()

    x = psi(x) if squeeze == 2 else x
    for stage, (width, number, stride) in enumerate(zip(widths, blocks, strides, strict=True)):
        for block in range(number):
            halves = block == 0 and stride == 2
            if block == 0 and stride == 1:
                x = F.pad(x, (0, 0, 0, 0, 0, 2 * width - x.shape[1]))
            x1, x2 = x.chunk(2, 1)
            value = conv(x2 if stage == block == 0 else norm(x2), 2 if halves else 1)
            value = F.dropout(conv(norm(value)), dropout)
            value = conv(norm(value))
            x = torch.cat((psi(x2), psi(x1) + value) if halves else (x2, x1 + value), 1)
    y = F.batch_norm(x, None, None, next(parameters), next(parameters), training=True).relu().mean((2, 3))
    return x, F.linear(y, next(parameters), next(parameters))


@pytest.mark.parametrize("begun", [lively, lambda net: net], ids=["lively", "fresh"])
@pytest.mark.parametrize(
    ("settings", "widths"),
    [(INJECTIVE, (8, 32, 128)), (BIJECTIVE, (24, 96)), (WIDER, (24, 32, 128))],
    ids=["injective", "bijective", "wider"],
)
def test_the_network_is_the_papers_and_so_are_its_gradients(settings, widths, begun):
    """Also those of a fresh network, where padding meets ReLUs at exactly zero."""
    net = begun(models.IRevNet(7, **settings, dropout=0.3)).double()
    x = torch.randn(3, 3, 16, 16, dtype=torch.float64, requires_grad=True)
    leaves = [x, *net.parameters()]
    torch.manual_seed(3)
    features, scores = by_hand(net, x, **settings | {"widths": widths}, dropout=0.3)
    torch.manual_seed(3)
    torch.testing.assert_close(net.features(x), features, rtol=1e-11, atol=1e-11)
    torch.manual_seed(3)
    got = net(x)
    torch.testing.assert_close(got, scores, rtol=1e-11, atol=1e-11)
    want_grads = torch.autograd.grad(scores.square().sum(), leaves)
    got_grads = torch.autograd.grad(got.square().sum(), leaves)
    for a, b in zip(got_grads, want_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def test_depths_of_the_names():
    """Every convolution and the last layer: 163 and 301."""
    for name, features in (("irevnet163", 512), ("irevnet301", 3072)):
        with torch.device("meta"):
            net = models.create(name)
        assert sum(isinstance(m, nn.Conv2d) for m in net.modules()) + 1 == int(name[-3:])
        assert (net.head.linear.in_features, net.head.norm.momentum) == (features, 0.9)


def test_as_many_numbers_as_the_image_has():
    image = torch.randn(2, 3, 16, 16)
    assert models.IRevNet(**BIJECTIVE).features(image).numel() == image.numel()


# ---------------------------------------------------------------------- from the features to the image


def digits(number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Real digits as images (N, 3, 32, 32) of sixteenths, and their classes."""
    datasets = pytest.importorskip("sklearn.datasets")
    pixels, classes = datasets.load_digits(return_X_y=True)
    images = torch.tensor(pixels[:number], dtype=torch.float32).view(-1, 1, 8, 8) / 16
    return F.interpolate(images, scale_factor=4).repeat(1, 3, 1, 1), torch.tensor(classes[:number])


def trained(net: nn.Module, steps: int = 3) -> nn.Module:
    """After a few steps, so that statistics and weights are not those of the beginning; in eval mode."""
    images, classes = digits(8)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(net(images), classes).backward()
        optimizer.step()
    return net.eval()


def worst(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


@torch.no_grad()
def test_features_of_irevnet163_give_back_the_digits():
    images, _ = digits(8)
    with torch.enable_grad():
        net = trained(models.create("irevnet163"))
    statistics = {n: b.clone() for n, b in net.named_buffers()}
    features = net.features(images)
    assert worst(net.invert(features), images) < 1e-4
    assert worst(net.invert(features + 0.1), images) > 0.01
    assert all(torch.equal(b, statistics[n]) for n, b in net.named_buffers())
    torch.testing.assert_close(net(images), net.head(features))
    net.double()
    assert worst(net.invert(net.features(images.double())), images.double()) < 1e-10


@pytest.mark.parametrize("settings", [{"widths": None, "blocks": (2,) * 4, "strides": (2,) * 4, "squeeze": 2}, WIDER])
@torch.no_grad()
def test_features_of_other_networks_give_back_the_digits(settings):
    images, _ = digits(8)
    with torch.enable_grad():
        net = trained(models.IRevNet(**settings))
    assert worst(net.invert(net.features(images)), images) < 1e-4
    net.double()
    assert worst(net.invert(net.features(images.double())), images.double()) < 1e-10


@torch.no_grad()
def test_exact_features_and_what_is_kept_give_back_every_bit():
    images, _ = digits(8)
    images = images + torch.rand_like(images) * 1e-5  # not of sixteenths, and not of multiples of 2^-40
    with torch.enable_grad():
        net = trained(models.IRevNet(**INJECTIVE, exact=True))
    features, kept = net.forward_state(images)
    assert torch.equal(net.invert(features, kept), images)
    assert all(any(bool(part.any()) for part in rest) for rest in kept), "float32 does not hold 64 bits"
    assert 0 < worst(net.invert(features), images) < 1e-4
    plain = models.IRevNet(**INJECTIVE).eval()
    plain.load_state_dict(net.state_dict())
    torch.testing.assert_close(features, plain.features(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("dtype", "exact"), [(torch.float64, True), (torch.float32, FixedPoint(bits=32, radix=16))], ids=str
)
@torch.no_grad()
def test_exact_features_alone_give_back_every_bit_where_their_type_holds_the_integers(dtype, exact):
    images = digits(8)[0].to(dtype)
    with torch.enable_grad():
        net = trained(models.IRevNet(**INJECTIVE, exact=exact)).to(dtype)
    features, kept = net.forward_state(images)
    assert not any(kept)
    assert torch.equal(net.invert(features), images)


@torch.no_grad()
def test_float_arithmetic_keeps_nothing_besides_the_features():
    net, image = models.IRevNet(**INJECTIVE).eval(), torch.randn(1, 3, 8, 8)
    features, kept = net.forward_state(image)
    assert kept == [(), (), ()]
    assert torch.equal(features, net.features(image))


def test_exact_training_steps_are_those_of_stored_activations():
    x = torch.randn(2, 3, 16, 16)
    grads = []
    for engine in (reversa.Invert(), reversa.Store()):
        torch.manual_seed(0)
        net = models.IRevNet(**INJECTIVE, exact=True, engine=engine)
        net(x).square().mean().backward()
        grads.append([p.grad for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


# ---------------------------------------------------------------------- memory


def in_states(blocks: int, engine: reversa.engine.Engine) -> tuple[float, float]:
    """Held after the forward pass, and at most, in units of the state."""
    net = models.IRevNet(widths=(16, 64, 256), blocks=(blocks,) * 3, engine=engine)
    x, state = torch.randn(4, 3, 32, 32), 4 * 32 * 32 * 32 * 4
    with LiveBytes(exclude=net) as counted:
        loss = net(x).square().mean()
        held = counted.live
        loss.backward()
    return held / state, counted.peak / state


def test_memory_does_not_grow_with_the_blocks_of_a_stage():
    (held, peak), (held_deep, peak_deep) = in_states(3, reversa.Invert()), in_states(10, reversa.Invert())
    assert held_deep == pytest.approx(held, rel=1e-3)
    assert peak_deep == pytest.approx(peak, rel=1e-3)
    assert held_deep <= 3 + 2 + 0.1, "a state for each stage, and what the head keeps"
    assert in_states(3, reversa.Store())[1] > 2 * peak_deep


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: SpaceToDepth(2)(torch.ones(1, 3, 7, 8)), r"7 x 8 pixels do not divide into squares of 2 x 2: crop or"),
        (lambda: SpaceToDepth(2).inverse(torch.ones(1, 6, 4, 4)), "6 channels do not make squares of 2 x 2"),
        (lambda: SpaceToDepth(2)(torch.ones(3, 8, 8)), r"images of shape \(N, C, H, W\), got \(3, 8, 8\)"),
        (lambda: InjectivePad(3).inverse(torch.ones(1, 2, 8, 8)), "3 channels were added.*got 2"),
        (lambda: models.IRevNet(**INJECTIVE)(torch.ones(2, 3, 10, 10)), r"multiples of 4, got \(2, 3, 10, 10\)"),
        (lambda: models.IRevNet(**INJECTIVE)(torch.ones(2, 1, 8, 8)), r"\(N, 3, H, W\).* got \(2, 1, 8, 8\)"),
        (lambda: models.IRevNet(**INJECTIVE).eval().invert(torch.ones(1, 255, 4, 4)), r"shape \(N, 256, h, w\)"),
        (lambda: models.IRevNet(**INJECTIVE).eval().invert(torch.ones(1, 256, 4, 4), [()]), "3 stages; got .* 1 kept"),
    ],
)
def test_inputs_that_do_not_fit(call, told):
    with pytest.raises(StateError, match=told):
        call()


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: SpaceToDepth(0), "from 1 on, got 0"),
        (lambda: SpaceToDepth(True), "from 1 on, got True"),
        (lambda: InjectivePad(-1), "from 0 on, got -1"),
        (lambda: models.IRevNet(squeeze=1.5), "from 1 on, got 1.5"),
        (lambda: models.IRevNet(blocks=(2, 2)), "one number for each stage, got 3, 2 and 3"),
        (lambda: models.IRevNet(blocks=(2, 0, 2)), "at least 1 block"),
        (lambda: models.IRevNet(strides=(1, 3, 2)), "stride 1 or 2, got 3"),
        (lambda: models.IRevNet(widths=(16, 32, 128)), "Use the width 64, or widths=None"),
        (lambda: models.IRevNet(widths=(16, 64, 32), strides=(1, 2, 1)), "Use a width of at least 64"),
        (lambda: models.IRevNet(widths=None), "squeeze=2 makes four"),
        (lambda: models.IRevNet(widths=(6, 24, 96), strides=(2, 2, 2)), "3 channels do not make two equal streams"),
        (lambda: models.IRevNet(widths=(2, 8, 32)), "at least 4 channels"),
    ],
)
def test_settings_that_do_not_fit(call, told):
    with pytest.raises(SettingError, match=told):
        call()


def test_inversion_in_training_mode_is_refused():
    net, image = models.IRevNet(**INJECTIVE), torch.randn(2, 3, 8, 8)
    features = net.eval().features(image)
    net.invert(features)
    for part in (nn.BatchNorm2d, nn.Dropout):
        net.eval()
        next(m for m in net.modules() if isinstance(m, part)).train()
        for call in (lambda: net.invert(features), lambda: net.forward_state(image)):
            with pytest.raises(BlockError, match=r"training mode.*Call net.eval\(\)"):
                call()

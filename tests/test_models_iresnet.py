"""Bounded layers against exact singular values, and i-ResNets against the authors' formulas, and back again."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from scipy.sparse.linalg import LinearOperator, svds
from torch import nn

import reversa
from reversa import models
from reversa.errors import DriftError, SettingError, StateError
from reversa.models.iresnet import ActNorm, Contraction, IResNet
from reversa.models.lipschitz import LipschitzConv2d, LipschitzLinear, prepare, refresh

TINY = {"channels": 1, "width": 2, "widths": (4, 6), "blocks": (2, 2)}


def dense_matrix(layer, shape) -> torch.Tensor:
    """The linear part of a layer as a matrix, in float64."""
    layer = copy.deepcopy(layer).double()
    zero = torch.zeros(1, *shape, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(layer, zero)
    return jacobian.reshape(-1, zero.numel()).detach()


def operator_norm(layer, shape) -> float:
    """By all singular values of the dense matrix."""
    return torch.linalg.matrix_norm(dense_matrix(layer, shape), 2).item()


def large_operator_norm(conv: nn.Conv2d, weight: torch.Tensor, shape) -> float:
    """By ARPACK, for a 3x3 convolution that is too large to be written down."""
    weight = weight.detach().double()
    image = (1, *shape)
    result = (1, conv.out_channels, *shape[1:])

    def there(x):
        return F.conv2d(torch.from_numpy(x.reshape(image).copy()), weight, padding=1).numpy().ravel()

    def back(z):
        return F.conv_transpose2d(torch.from_numpy(z.reshape(result).copy()), weight, padding=1).numpy().ravel()

    size = math.prod(result), math.prod(image)
    operator = LinearOperator(size, matvec=there, rmatvec=back, dtype="float64")
    return float(svds(operator, k=1, return_singular_vectors=False, tol=1e-8)[0])


def ones(conv):
    nn.init.ones_(conv.weight)
    return conv


# ---------------------------------------------------------------------- bounded layers

LAYERS = {
    "3x3": (lambda c: LipschitzConv2d(3, 5, 3, c), (3, 7, 9)),
    "smooth": (lambda c: ones(LipschitzConv2d(1, 1, 3, c)), (1, 24, 24)),  # the spectrum that power iteration creeps on
    "rank1": (lambda c: ones(LipschitzConv2d(4, 6, 3, c)), (4, 6, 6)),
    "5x5": (lambda c: LipschitzConv2d(2, 2, 5, c), (2, 8, 8)),
    "1x1": (lambda c: ones(LipschitzConv2d(6, 4, 1, c)), (6, 5, 5)),
    "stride": (lambda c: LipschitzConv2d(2, 9, 3, c, stride=2), (2, 8, 7)),
    "unpadded": (lambda c: LipschitzConv2d(2, 9, 3, c, padding=0), (2, 8, 8)),
    "groups": (lambda c: LipschitzConv2d(4, 8, 3, c, groups=2), (4, 6, 6)),
    "dilated": (lambda c: LipschitzConv2d(2, 9, 3, c, dilation=2, padding=2), (2, 8, 8)),
    "dense": (lambda c: LipschitzLinear(12, 7, c), (12,)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("bound", [0.9, 0.3])
def test_the_norm_is_bounded(name, bound, dtype):
    make, shape = LAYERS[name]
    layer = make(bound).to(dtype)
    with torch.no_grad():
        layer.weight.mul_(5)
    prepare(layer, torch.zeros(1, *shape, dtype=dtype))
    norm = operator_norm(layer, shape)
    assert bound - 2e-3 <= norm <= bound + 1e-6


@pytest.mark.parametrize("name", LAYERS)
def test_a_weight_within_the_bound_stays_as_it_is(name):
    make, shape = LAYERS[name]
    layer, x = make(0.9), torch.randn(2, *shape)
    with torch.no_grad():
        layer.weight.div_(100)
    prepare(layer, x)
    plain = nn.Linear.forward if isinstance(layer, nn.Linear) else nn.Conv2d.forward
    assert torch.equal(layer(x), plain(layer, x))


def test_torchs_spectral_norm_is_no_bound_for_convolutions():
    torch.manual_seed(0)
    for conv, least in ((ones(nn.Conv2d(1, 1, 3, padding=1)), 2.5), (nn.Conv2d(4, 4, 3, padding=1), 1.2)):
        theirs = torch.nn.utils.parametrizations.spectral_norm(conv, n_power_iterations=100).eval()
        assert torch.linalg.matrix_norm(theirs.weight.flatten(1), 2).item() == pytest.approx(1, abs=1e-4)
        weight = theirs.weight.detach()
        assert large_operator_norm(theirs, weight, (weight.shape[1], 16, 16)) > least


def test_large_convolutions():
    """The sizes of the network's three stages."""
    for inputs, outputs, side in ((16, 32, 32), (64, 64, 16), (256, 128, 8)):
        conv = LipschitzConv2d(inputs, outputs, 3)
        with torch.no_grad():
            conv.weight.mul_(3)
        x = torch.zeros(1, inputs, side, side)
        prepare(conv, x)
        assert 0.9 - 2e-3 <= large_operator_norm(conv, conv.bounded(x), x.shape[1:]) <= 0.9 + 1e-6


def test_the_gradient_goes_through_the_norm():
    conv = LipschitzConv2d(2, 3, 3).double()
    with torch.no_grad():
        conv.weight.mul_(3)
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64)
    weight = conv.weight.detach().clone().requires_grad_()
    basis = torch.eye(32, dtype=torch.float64).view(32, 2, 4, 4)
    sigma = torch.linalg.matrix_norm(F.conv2d(basis, weight, padding=1).flatten(1).T, 2)
    F.conv2d(x, 0.9 / (sigma * 1.001) * weight, conv.bias, padding=1).square().sum().backward()
    prepare(conv, x)
    conv(x).square().sum().backward()
    torch.testing.assert_close(conv.weight.grad, weight.grad, rtol=1e-4, atol=1e-5)


def test_the_norm_depends_on_the_size_of_the_image():
    conv = ones(LipschitzConv2d(1, 1, 3, bias=False)).eval()
    for side in (4, 12):
        prepare(conv, torch.zeros(1, 1, side, side))
        exact = (1 + 2 * math.cos(math.pi / (side + 1))) ** 2
        assert conv.norm().item() == pytest.approx(exact * 1.001, rel=1e-4)
    with pytest.raises(StateError, match=r"\(1, 1, 4, 4\) and was not prepared .* inputs like \(1, 1, 12, 12\): call"):
        conv(torch.zeros(1, 1, 4, 4))
    with pytest.raises(StateError, match="not prepared for its size, but for any input"):
        LipschitzLinear(2, 2)(torch.zeros(2))


def test_a_training_step_makes_one_power_iteration_for_each_new_weight():
    dense = LipschitzLinear(6, 5).double()
    prepare(dense, torch.zeros(1, 6, dtype=torch.float64))
    with torch.no_grad():
        dense.weight.add_(torch.randn(5, 6))
    w, v = dense.weight.detach().clone(), dense.vector
    refresh(dense)
    expected = F.normalize(v @ w.T @ w)
    torch.testing.assert_close(dense.vector, expected)
    once = dense.vector
    refresh(dense)
    assert dense.vector is once
    refresh(dense.eval())
    top = torch.linalg.svd(w).Vh[:1]
    torch.testing.assert_close(dense.vector.abs(), top.abs(), rtol=1e-3, atol=1e-3)
    assert (dense.vector - once).abs().max() > 1e-3
    converged = dense.vector
    refresh(dense.train())
    assert dense.vector is converged


def test_evaluating_a_layer_changes_nothing_in_it():
    conv, x = LipschitzConv2d(2, 2, 3), torch.randn(1, 2, 5, 5)
    prepare(conv, x)
    before = [(t, t._version) for t in conv.state_dict(keep_vars=True).values()]
    conv(x).sum().backward()
    after = [(t, t._version) for t in conv.state_dict(keep_vars=True).values()]
    assert all(a is b and m == n for (a, m), (b, n) in zip(before, after, strict=True))


def test_the_generator_is_left_alone_and_copies_agree():
    conv, x = LipschitzConv2d(2, 2, 3), torch.randn(1, 2, 5, 5)
    state = torch.get_rng_state()
    twin = copy.deepcopy(conv)
    prepare(conv, x)
    prepare(twin, x)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(conv(x), twin(x))
    assert torch.equal(copy.deepcopy(conv)(x), conv(x))


@pytest.mark.parametrize("bound", [0, 1, 1.5, -0.1, float("nan"), "0.9"])
def test_bounds_out_of_range(bound):
    with pytest.raises(SettingError, match=r"bound on the norm must lie in \(0, 1\)"):
        LipschitzConv2d(1, 1, 3, bound)
    with pytest.raises(SettingError, match=r"must lie in \(0, 1\)"):
        IResNet(**TINY, bound=bound)


def test_paddings_without_an_adjoint_here():
    for settings in ({"padding": "same"}, {"padding_mode": "circular"}):
        with pytest.raises(SettingError, match="pads with a number of zeros"):
            LipschitzConv2d(1, 1, 3, **settings)


def test_weights_that_blew_up():
    conv = LipschitzConv2d(1, 1, 3)
    with torch.no_grad():
        conv.weight.fill_(torch.nan)
    with pytest.raises(StateError, match="operator norm of a layer is not finite"):
        prepare(conv, torch.zeros(1, 1, 4, 4))


def test_sixteen_bits():
    for dtype in (torch.bfloat16, torch.float16):
        conv = LipschitzConv2d(3, 5, 3).to(dtype)
        with torch.no_grad():
            conv.weight.mul_(5)
        x = torch.randn(2, 3, 7, 9, dtype=dtype)
        prepare(conv, x)
        assert (conv(x).dtype, conv.norm().dtype) == (dtype, torch.float32)
        assert 0.88 <= large_operator_norm(conv, conv.bounded(x), (3, 7, 9)) <= 0.91
    conv = LipschitzConv2d(3, 5, 3)
    x = torch.randn(2, 3, 7, 9)
    prepare(conv, x)
    norm = conv.norm()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(conv.norm(), norm)
        assert conv(x).dtype == torch.bfloat16


def test_a_layer_of_zeros():
    conv = LipschitzConv2d(1, 1, 3, bias=False)
    nn.init.zeros_(conv.weight)
    prepare(conv, torch.zeros(1, 1, 4, 4))
    conv(torch.ones(1, 1, 4, 4)).sum().backward()
    assert conv.weight.grad.isfinite().all()
    refresh(conv.train())
    assert conv.vector.isfinite().all()


# ---------------------------------------------------------------------- the residual function


def test_actnorm_is_chosen_by_the_first_training_batch_and_by_no_other():
    x = torch.randn(16, 3, 4, 4) * torch.tensor([1.0, 5.0, 0.1]).view(3, 1, 1) + 2
    norm = ActNorm(3).eval()
    prepare(norm, x)
    assert torch.equal(norm(x), x)
    prepare(norm.train(), x)
    y = norm(x)
    torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(y.var((0, 2, 3), correction=0), torch.ones(3), atol=2e-3, rtol=0)
    prepare(norm, 7 * x)
    assert torch.equal(norm(x), y)
    loaded = ActNorm(3)
    loaded.load_state_dict(norm.state_dict())
    prepare(loaded, 7 * x)
    assert torch.equal(loaded(x), y)


def contraction(
    channels: int = 2, hidden: int = 3, side: int = 5, gain: float = 4.0
) -> tuple[Contraction, torch.Tensor]:
    """A function with large weights and uneven scales, and an input."""
    f = Contraction(channels, hidden).double()
    for p in f.parameters():
        nn.init.normal_(p, std=gain)
    nn.init.uniform_(f.norm.log_scale, -2, 2)
    f.norm.chosen.fill_(True)
    x = torch.randn(1, channels, side, side, dtype=torch.float64)
    prepare(f, x)
    return f, x


def test_the_function_contracts_in_the_norm_of_its_scales():
    f, x = contraction()
    scale = f.norm.log_scale.exp().repeat_interleave(25).detach()
    largest = 0.0
    for _ in range(10):
        jacobian = torch.autograd.functional.jacobian(f, 3 * torch.randn_like(x)).reshape(50, 50)
        largest = max(largest, torch.linalg.matrix_norm(scale[:, None] * jacobian / scale, 2).item())
    assert 0.05 < largest <= 0.9**3
    y = torch.randn_like(x)
    image = F.elu(f.norm(y))
    for layer in list(f.layers)[1:]:
        plain = {3: 1, 1: 0}[layer.kernel_size[0]] if isinstance(layer, nn.Conv2d) else None
        image = F.elu(image) if plain is None else F.conv2d(image, layer.bounded(image), layer.bias, padding=plain)
    torch.testing.assert_close(f(y), image / f.norm.log_scale.exp().view(-1, 1, 1))


def test_the_network_is_the_authors_in_other_coordinates():
    """z <- s z + b, z <- z + g(z) between squeezes: what they compute, with the scales that ours are products of."""
    net = IResNet(**TINY).double().eval()
    functions = [f for stage in net.stages for f in stage.chain.blocks]
    for f in functions:
        nn.init.uniform_(f.norm.log_scale, -1, 1)
        nn.init.normal_(f.norm.shift)
    x = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    ours = net.features(x)
    z = F.pad(x, (0, 0, 0, 0, 0, 1))
    total, shift = torch.ones(2, 1, 1), torch.zeros(2, 1, 1)
    for stage in net.stages:
        z = stage.squeeze(z)
        total, shift = (t.repeat(z.shape[1] // t.shape[0], 1, 1) for t in (total, shift))
        for f in stage.chain.blocks:
            new_total, new_shift = f.norm.log_scale.exp().view(-1, 1, 1), f.norm.shifts
            s = new_total / total
            z = s * z + (new_shift - s * shift)
            z = z + f.layers(z)
            total, shift = new_total, new_shift
    torch.testing.assert_close(ours, (z - shift) / total)


# ---------------------------------------------------------------------- the network


def test_the_layers_of_the_papers_network():
    with torch.device("meta"):
        net = IResNet()
    functions = [f for stage in net.stages for f in stage.chain.blocks]
    assert [type(f.layers[0]) for f in functions] == [nn.Identity] + [nn.ELU] * 20
    shapes = [(16, 32)] * 7 + [(64, 64)] * 7 + [(256, 128)] * 7
    for f, (outer, inner) in zip(functions, shapes, strict=True):
        convs = [m for m in f.layers if isinstance(m, LipschitzConv2d)]
        sizes = [(m.in_channels, m.out_channels, m.kernel_size[0], m.bound) for m in convs]
        assert sizes == [(outer, inner, 3, 0.9), (inner, inner, 1, 0.9), (inner, outer, 3, 0.9)]
    assert [stage.squeeze.size for stage in net.stages] == [1, 2, 2]
    assert all(stage.chain.scheme == reversa.IResNet(0.9**3) for stage in net.stages)
    assert models.create("iresnet64", channels=1, width=2, blocks=(1, 1, 1)).stem.channels == 1


def digits_of(number: int) -> tuple[torch.Tensor, torch.Tensor]:
    from reversa.train.data import digits32

    split = digits32().train
    return split.images[:number], split.labels[:number]


def trained(net: nn.Module, images: torch.Tensor, labels: torch.Tensor, steps: int, lr: float = 0.05) -> nn.Module:
    optimizer = torch.optim.SGD(net.parameters(), lr, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(net(images), labels).backward()
        optimizer.step()
    return net


def test_digits_come_back():
    images, labels = digits_of(16)
    net = IResNet(channels=1, widths=(8, 8, 8), blocks=(2, 2, 2))
    for mode in (True, False):
        trained(net.train(), images, labels, 2).train(mode)
        features = net.features(images)
        assert features.shape == (16, 256, 8, 8)
        assert (net.invert(features) - images).abs().max() < 1e-5


def test_digits_come_back_through_the_papers_network():
    images, _ = digits_of(2)
    net = IResNet(channels=1)
    assert (net.invert(net.features(images)) - images).abs().max() < 1e-5


def test_a_run_is_that_of_stored_activations():
    images, labels = torch.randn(4, 1, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 3])
    start = IResNet(**TINY).double()
    with torch.no_grad():  # so that the bounds hold and move
        for p in start.stages.parameters():
            p.mul_(3)
    nets = []
    for engine in (reversa.Invert(), reversa.Invert(anchors=1), reversa.Store()):
        nets.append(copy.deepcopy(start))
        for stage in nets[-1].stages:
            stage.chain.engine = engine
        trained(nets[-1], images, labels, 4)
    assert any(layer.norm() > 1 for layer in nets[0].modules() if isinstance(layer, LipschitzConv2d))
    for name, stored in nets[-1].state_dict().items():
        for net in nets[:-1]:
            torch.testing.assert_close(net.state_dict()[name], stored, rtol=1e-7, atol=1e-9)


def test_the_network_keeps_its_norms_up_to_date():
    net = IResNet(**TINY)
    layers = [m for m in net.modules() if isinstance(m, LipschitzConv2d)]
    x = torch.randn(2, 1, 8, 8)
    trained(net, x, torch.tensor([0, 1]), 1)
    before = [layer.vector for layer in layers]
    net(x)
    new = [layer.vector for layer in layers]
    assert all(not torch.equal(a, b) for a, b in zip(before, new, strict=True))
    net(x)
    assert all(layer.vector is b for layer, b in zip(layers, new, strict=True))


def test_two_forward_passes_before_a_backward_pass_and_a_look_between_them():
    net = IResNet(**TINY).double()
    x, y = torch.randn(2, 3, 1, 8, 8, dtype=torch.float64)
    apart = []
    for images in (x, y):
        net.zero_grad()
        net(images).square().sum().backward()
        apart.append([p.grad.clone() for p in net.parameters()])
    net.zero_grad()
    one, two = net(x), net(y)
    net.eval()(torch.randn(1, 1, 16, 16, dtype=torch.float64))  # other sizes, other vectors
    (one.square().sum() + two.square().sum()).backward()
    for p, a, b in zip(net.parameters(), *apart, strict=True):
        torch.testing.assert_close(p.grad, a + b, rtol=1e-7, atol=1e-9)


def test_the_scales_are_chosen_block_by_block():
    images, _ = digits_of(8)
    net = IResNet(**TINY)
    seen = []
    net.eval()(images)
    assert not any(f.norm.chosen for f in net.stages[0].chain.blocks)
    net.train()(images)
    for f in net.stages[0].chain.blocks:
        f.norm.register_forward_hook(lambda _, __, y: seen.append(y.detach()))
    net.features(images)
    for y in seen:  # the channel of zeros has no variance before the first block
        assert y.mean((0, 2, 3)).abs().max() < 1e-3
        assert (y.var((0, 2, 3))[:1] - 1).abs().max() < 1e-2
    scales = [f.norm.log_scale.clone() for f in net.stages[0].chain.blocks]
    net.eval()(3 * images)
    net.train()(3 * images)
    assert all(torch.equal(f.norm.log_scale, s) for f, s in zip(net.stages[0].chain.blocks, scales, strict=True))


def test_checkpoints_and_copies():
    images, labels = digits_of(8)
    net = trained(IResNet(**TINY), images, labels, 3).eval()
    scores = net(images)
    loaded = IResNet(**TINY)
    loaded.load_state_dict(net.state_dict())
    torch.testing.assert_close(loaded.eval()(images), scores, rtol=1e-5, atol=1e-5)
    assert torch.equal(copy.deepcopy(net)(images), scores)
    torch.testing.assert_close(copy.deepcopy(net).double()(images.double()).float(), scores, rtol=1e-4, atol=1e-4)
    fresh = IResNet(**TINY)
    fresh.load_state_dict(IResNet(**TINY).state_dict())
    assert fresh(images).shape == (8, 10)


def test_every_layer_is_bounded_after_training():
    images, labels = digits_of(8)
    net = trained(IResNet(**TINY), images, labels, 5, lr=0.3).eval()
    net(images)
    bounded = [m for m in net.modules() if isinstance(m, LipschitzConv2d)]
    for layer in bounded:
        weight = layer.bounded(layer.vector)
        if layer.kernel_size == (1, 1):
            assert torch.linalg.matrix_norm(weight.flatten(1), 2) <= 0.9 + 1e-3
        else:
            side = 32 if 2 in (layer.in_channels, layer.out_channels) else 16
            assert large_operator_norm(layer, weight, (layer.in_channels, side, side)) <= 0.9 + 1e-3
    assert len(bounded) == 12


def test_bad_input():
    with pytest.raises(StateError, match="5 x 6 pixels do not divide into squares of 2 x 2"):
        IResNet(**TINY)(torch.randn(2, 1, 5, 6))
    with pytest.raises(StateError, match=r"features of shape \(N, 8, h, w\), got \(2, 3, 4, 4\)"):
        IResNet(**TINY).invert(torch.randn(2, 3, 4, 4))
    with pytest.raises(SettingError, match="Sequential has no layer to prepare"):
        prepare(nn.Sequential(nn.Conv2d(1, 1, 3)), torch.randn(2, 1, 4, 4))
    with pytest.raises(SettingError, match=r"up to width=2.* got images of 3 channels"):
        IResNet(**TINY | {"channels": 3})
    with pytest.raises(SettingError, match=r"blocks=\(2,\), widths=\(4, 6\)"):
        IResNet(**TINY | {"blocks": (2,)})
    with pytest.raises(StateError, match="not prepared"):
        IResNet(**TINY).invert(torch.randn(1, 8, 4, 4))


def test_a_function_that_is_no_contraction():
    net = IResNet(**TINY)
    net.stages[1].chain.blocks[1] = nn.Conv2d(8, 8, 3, padding=1)
    nn.init.constant_(net.stages[1].chain.blocks[1].weight, 0.5)
    features = net.features(torch.randn(2, 1, 8, 8))
    with pytest.raises(DriftError, match=r"did not converge .* times the one before"):
        net.invert(features)

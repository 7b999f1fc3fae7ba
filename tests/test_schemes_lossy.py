"""BDIA and Dr2Net (an ordinary network that is reversible), affine coupling, i-ResNet, reversible solvers."""

from __future__ import annotations

import copy
import math
from functools import partial

import pytest
import torch
import torchvision
from torch import nn

import reversa
from cases import assert_same, conv, error, gradients, mlp, step
from reversa import BDIA, AffineCoupling, Dr2Net, Invert, IResNet, McCallumFoster, ReversibleHeun, Store
from reversa.errors import DriftError, SettingError, StateError
from reversa.exact import FixedPoint
from reversa.models.runge_kutta import RungeKutta, runge_kutta

DOUBLE = torch.float64


def functions(depth: int, width: int = 6) -> list[nn.Module]:
    return [mlp(width).double() for _ in range(depth)]


def residual(fs, x):
    for f in fs:
        x = x + f(x)
    return x


class Linear(nn.Module):
    """y' = A y, a damped turn."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.tensor([[-0.1, 2.0], [-2.0, -0.3]], dtype=DOUBLE))

    def forward(self, x):
        return x @ self.matrix.T


# ---------------------------------------------------------------------- an ordinary network behind


@pytest.mark.parametrize("exact", [False, True])
def test_bdia_in_eval_is_the_residual_network(exact):
    fs, x = functions(6), torch.randn(4, 6, dtype=DOUBLE, requires_grad=True)
    seq = reversa.ReversibleSequence(fs, BDIA(), exact=exact).eval()
    assert error(seq(x), residual(fs, x)) < (1e-10 if exact else 1e-14)
    expected = step(residual, fs, x)
    ours = step(lambda fs, x: reversa.ReversibleSequence(fs, BDIA(), exact=exact).eval()(x), fs, x)
    assert_same(ours, expected, 1e-8 if exact else 1e-12)


def test_bdia_averages_otherwise_for_each_sample_and_step():
    seq = reversa.ReversibleSequence(functions(6), BDIA())
    x = torch.randn(1, 6, dtype=DOUBLE).expand(64, 6)
    drawn = seq.scheme_for(x).drawn
    assert drawn.shape == (6, 64, 1)
    assert sorted(drawn.unique().tolist()) == [-1, 1]
    assert len({tuple(row) for row in drawn[..., 0].T.tolist()}) > 16
    rows = seq(x)
    assert len({tuple(row) for row in rows.tolist()}) == len({tuple(row) for row in drawn[1:, :, 0].T.tolist()})
    torch.manual_seed(7)
    once = seq(x)
    torch.manual_seed(7)
    assert torch.equal(seq(x), once)


def test_dr2net_starts_as_the_residual_network():
    fs, x = functions(6), torch.randn(4, 6, dtype=DOUBLE, requires_grad=True)
    start = Dr2Net(0.3, 0.7).at(0)
    assert error(reversa.ReversibleSequence(fs, start)(x), residual(fs, x)) < 1e-14
    assert Dr2Net(0.3, 0.7).at(1) == Dr2Net(0.3, 0.7)
    for progress in (0.0, 0.01, 0.5, 1.0):  # little comes back at first: more states are kept
        scheme = Dr2Net(0.3, 0.7).at(progress)
        ours, stored = (
            step(lambda fs, x, e=e, s=scheme: reversa.ReversibleSequence(fs, s, engine=e)(x), fs, x)
            for e in (Invert(), Store())
        )
        assert_same(ours, stored, 1e-10)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("scheme", [BDIA(), Dr2Net(1, 0)], ids=str)
def test_a_pretrained_model_keeps_its_outputs(scheme, exact):
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=10).double().eval()
    x = torch.randn(2, 3, 32, 32, dtype=DOUBLE)
    expected = model(x)
    reversa.convert(model, scheme=scheme, exact=exact)
    assert error(model(x), expected) < (1e-9 if exact else 1e-12)


@pytest.mark.parametrize("scheme", [BDIA(), Dr2Net()], ids=str)
def test_a_converted_model_trains(scheme):
    torch.manual_seed(0)
    model = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [3, 3, 1, 1], num_classes=10).double()
    reversa.convert(model, scheme=scheme)
    x, results = torch.randn(2, 3, 32, 32, dtype=DOUBLE), []
    for engine in (Invert(), Store()):
        twin = copy.deepcopy(model)
        reversa.restore(twin)
        reversa.convert(twin, scheme=scheme, engine=engine)
        torch.manual_seed(1)
        twin(x).square().mean().backward()
        results.append(gradients(twin))
    assert_same(*results, 1e-8)


def test_what_is_wiped_out_cannot_be_computed_back():
    fs, x = functions(3), torch.randn(4, 6, dtype=DOUBLE)
    seq = reversa.ReversibleSequence(fs, Dr2Net(1, 0))
    with pytest.raises(StateError, match=r"wipes out .* exact=True keeps it"):
        seq.inverse_state(seq.forward_state((x, x)))
    with pytest.raises(DriftError, match="without anchors"):
        reversa.ReversibleSequence(fs, Dr2Net(1, 0), engine=Invert(anchors=None))(x.requires_grad_())
    exact = reversa.ReversibleSequence(fs, Dr2Net(1, 0), exact=True)
    assert torch.equal(exact.inverse_state(exact.forward_state((x, x)))[1], x)
    drawn = reversa.ReversibleSequence(fs, BDIA())
    with pytest.raises(StateError, match="random=False"):
        drawn.inverse_state(drawn.forward_state((x, x)))


@pytest.mark.parametrize(("scheme", "bits"), [(BDIA(), 1.0), (Dr2Net(0.3, 0.7), math.log2(1 / 0.7))], ids=str)
def test_bits_that_are_spilled(scheme, bits):
    exact = reversa.exact.exact_scheme(scheme, FixedPoint())
    for steps in (1, 64, 512):
        assert abs(8 * exact.spilled_bytes(steps) - bits * steps) <= 16 + bits


# ---------------------------------------------------------------------- affine coupling


def pairs(depth: int = 4, width: int = 3) -> list[tuple[nn.Module, nn.Module]]:
    return [(mlp(width).double(), mlp(width).double()) for _ in range(depth)]


def test_the_log_determinant_is_the_jacobians():
    seq = reversa.ReversibleSequence(pairs(), AffineCoupling(bound=0.7))
    x = torch.randn(5, 6, dtype=DOUBLE)
    told = seq.scheme.log_determinant(seq.forward_state(seq.scheme.open(x))).detach()
    for row, want in zip(x, told, strict=True):
        jacobian = torch.autograd.functional.jacobian(lambda r: seq(r[None])[0], row)
        assert float(torch.linalg.slogdet(jacobian)[1]) == pytest.approx(float(want), abs=1e-12)
    assert float(told.abs().min()) > 1e-3


def test_density_estimation_has_the_right_gradients():
    fs, x = pairs(6), torch.randn(5, 6, dtype=DOUBLE, requires_grad=True)
    results = []
    for engine in (Invert(), Invert(group=1), Invert(anchors=3), Store()):
        seq = reversa.ReversibleSequence(copy.deepcopy(fs), AffineCoupling(), engine=engine)
        one, two, total = seq.forward_state(seq.scheme.open(x))
        loss = (one**2 + two**2).sum() - total.sum()
        results.append(gradients(seq) | {"x": torch.autograd.grad(loss, x, retain_graph=True)[0]})
        loss.backward()
        results[-1] |= gradients(seq)
        x.grad = None
    for ours in results[:-1]:
        assert_same(ours, results[-1], 1e-12)


def test_a_frozen_input_and_frozen_scales():
    """Autograd saves other tensors then."""
    fs = pairs(4)
    for f, _ in fs:
        f.requires_grad_(False)
    x = torch.randn(5, 6, dtype=DOUBLE)
    functions = [f for pair in fs for f in pair]

    def run(engine, fs, x):
        return reversa.ReversibleSequence([*zip(fs[::2], fs[1::2], strict=True)], AffineCoupling(), engine=engine)(x)

    assert_same(step(partial(run, Invert()), functions, x), step(partial(run, Store()), functions, x), 1e-12)


def test_scales_stay_within_their_bound():
    seq = reversa.ReversibleSequence([(nn.Linear(2, 2), nn.Linear(2, 2))], AffineCoupling(bound=0.5))
    nn.init.constant_(seq.blocks[0][0].bias, 1e6)
    state = seq.forward_state(seq.scheme.open(torch.randn(3, 4)))
    assert torch.allclose(state[2], torch.tensor(0.5))
    with pytest.raises(SettingError, match="bound"):
        AffineCoupling(bound=0)
    with pytest.raises(SettingError, match="no exact arithmetic"):
        reversa.ReversibleSequence(pairs(), AffineCoupling(), exact=True)


# ---------------------------------------------------------------------- i-ResNet


def test_an_iresnet_step_is_undone_to_its_tolerance():
    fs = [nn.Sequential(nn.Linear(6, 6, bias=False), nn.ELU()).double() for _ in range(5)]
    for f in fs:
        f[0].weight.data *= 0.8 / torch.linalg.matrix_norm(f[0].weight.data, 2)
    x = torch.randn(4, 6, dtype=DOUBLE)
    for tolerance, least in ((None, 1e-13), (1e-6, 1e-4)):
        seq = reversa.ReversibleSequence(fs, IResNet(0.8, tolerance=tolerance))
        (back,) = seq.inverse_state(seq.forward_state((x,)))
        assert error(back, x) < least


def test_what_is_no_contraction_is_refused():
    seq = reversa.ReversibleSequence([nn.Linear(4, 4, bias=False)], IResNet(0.9))
    seq.blocks[0].weight.data = 1.5 * torch.eye(4)
    x = torch.randn(2, 4, requires_grad=True)
    with pytest.raises(DriftError, match=r"did not converge in 200 iterations.*1\.5 times.*Lipschitz bound"):
        seq(x).sum().backward()
    for number in (0, 1, 1.5, -0.1):
        with pytest.raises(SettingError, match="Lipschitz constant must lie in"):
            IResNet(number)
    with pytest.raises(SettingError, match="tolerance"):
        IResNet(tolerance=0.0)
    with pytest.raises(SettingError, match="iteration"):
        IResNet(iterations=0)
    with pytest.raises(SettingError, match="no exact arithmetic"):
        reversa.ReversibleSequence(functions(1), IResNet(), exact=True)


def test_an_inverse_that_multiplies_errors_has_anchors():
    assert "one every 3 steps" in repr(reversa.ReversibleSequence([nn.Linear(2, 2)] * 9, IResNet(0.9)))


# ---------------------------------------------------------------------- solvers


@torch.no_grad()
def solved(method, steps: int) -> torch.Tensor:
    f, x = Linear(), torch.tensor([[1.0, 0.5]], dtype=DOUBLE)
    h = 1 / steps
    if method is ReversibleHeun:
        return reversa.ReversibleSequence([f] * (steps + 1), ReversibleHeun(h))(x)
    return reversa.ReversibleSequence([runge_kutta(f, h, method)] * steps, McCallumFoster())(x)


@pytest.mark.parametrize(
    ("method", "order"), [(ReversibleHeun, 2), ("euler", 1), ("midpoint", 2), ("heun", 2), ("rk4", 4)]
)
def test_orders_of_convergence(method, order):
    f, x = Linear(), torch.tensor([[1.0, 0.5]], dtype=DOUBLE)
    exact = x @ torch.linalg.matrix_exp(f.matrix.detach()).T
    coarse, fine = (float((solved(method, steps) - exact).norm()) for steps in (32, 64))
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.2)


def test_increments_are_the_textbooks():
    f, x, h = mlp().double(), torch.randn(2, 6, dtype=DOUBLE), 0.3
    k1 = f(x)
    k2 = f(x + h / 2 * k1)
    k3 = f(x + h / 2 * k2)
    k4 = f(x + h * k3)
    assert error(RungeKutta(f, h, "rk4")(x), h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)) < 1e-14
    assert error(RungeKutta(f, h, "heun")(x), h / 2 * (k1 + f(x + h * k1))) < 1e-14
    assert error(RungeKutta(f, h, "midpoint")(x), h * k2) < 1e-14
    there, back = runge_kutta(f, h, "heun")
    k1 = f(x)
    assert error(back(x), h / 2 * (k1 + f(x - h * k1))) < 1e-14
    assert there.f is back.f


def test_a_shared_function_gets_the_sum_of_its_gradients():
    x, results = torch.randn(3, 2, dtype=DOUBLE, requires_grad=True), []
    for engine in (Invert(), Store()):
        torch.manual_seed(0)
        f = mlp(2).double()
        seq = reversa.ReversibleSequence([runge_kutta(f, 0.2, "rk4")] * 8, McCallumFoster(), engine=engine)
        seq(x).square().sum().backward()
        results.append(gradients(f) | {"x": x.grad})
        x.grad = None
    assert_same(*results, 1e-11)


def test_settings_outside_their_range():
    for number in (0, 1.5, -1):
        with pytest.raises(SettingError, match="coupling must lie in"):
            McCallumFoster(number)
    for number in (0.0, 1.0, -0.5):
        with pytest.raises(SettingError, match="gamma must lie in"):
            BDIA(number)
    with pytest.raises(SettingError, match="beta must lie in"):
        Dr2Net(0.5, 1.5)
    with pytest.raises(SettingError, match="alpha must be"):
        Dr2Net(-0.5, 0.5)
    with pytest.raises(SettingError, match="progress"):
        Dr2Net().at(2)
    with pytest.raises(SettingError, match="step size h"):
        ReversibleHeun(0)
    with pytest.raises(SettingError, match="Did you mean: heun"):
        runge_kutta(nn.Identity(), 0.1, "huen")
    with pytest.raises(SettingError, match="step size h"):
        runge_kutta(nn.Identity(), -0.1)


@pytest.mark.parametrize("scheme", [BDIA(), Dr2Net(0.5, 0.5)], ids=str)
def test_bits_of_convolutions_come_back(scheme):
    """BatchNorm in training, 64 steps, float32: every gradient has the bits of stored activations."""
    results = []
    for engine in (Invert(), Store()):
        torch.manual_seed(0)
        seq = reversa.ReversibleSequence([conv() for _ in range(64)], scheme, exact=True, engine=engine)
        x = torch.randn(3, 4, 5, 5, requires_grad=True)
        (0.1 * seq(x)).square().sum().backward()
        results.append(gradients(seq) | {"x": x.grad})
    assert all(torch.equal(results[0][name], want) for name, want in results[1].items())

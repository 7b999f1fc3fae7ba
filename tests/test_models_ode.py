"""Neural ODEs, the limit of Momentum ResNets, ODE-Net and HeunNet: against closed forms and loops written by hand."""

from __future__ import annotations

import math
import sys
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import reversa
from reversa import models
from reversa.errors import BlockError, MissingExtra, SettingError, StateError
from reversa.models import Autonomous, HeunNet, HeunSequence, NeuralODE, ODENet, ODEResNet, SecondOrderODE, ode
from reversa.models.odenet import ODEFunction

TIGHT = {"rtol": 1e-10, "atol": 1e-10}


class Linear(nn.Module):
    """f(z) = A z, for rows z."""

    def __init__(self, matrix: torch.Tensor) -> None:
        super().__init__()
        self.matrix = nn.Parameter(matrix)

    def forward(self, z):
        return z @ self.matrix.T


class Times(nn.Module):
    """c f(z), or c times each number where there is no f."""

    def __init__(self, c, f: nn.Module | None = None) -> None:
        super().__init__()
        self.c, self.f = c, f or nn.Identity()

    def forward(self, z):
        return self.c * self.f(z)


class Rate(nn.Module):
    """f(t, z) = a t z, whose flow is z exp(a t^2 / 2)."""

    def __init__(self, a: float) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(a, dtype=torch.float64))

    def forward(self, t, z):
        return self.a * t * z


def tanh_layer(width: int = 3) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 8), nn.Tanh(), nn.Linear(8, width)).double()


def gradients(loss, module, *others):
    return [g.clone() for g in torch.autograd.grad(loss, [*module.parameters(), *others])]


def assert_all_close(got, want, tolerance):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------------- first order


@pytest.mark.parametrize("adjoint", [True, False])
@pytest.mark.parametrize(("method", "steps"), [("dopri5", None), ("rk4", 60)])
def test_a_linear_flow_is_the_matrix_exponential_and_so_are_its_gradients(method, steps, adjoint):
    matrix = torch.randn(4, 4, dtype=torch.float64)
    flow = NeuralODE(Autonomous(Linear(matrix)), 1.5, method, steps=steps, adjoint=adjoint, **TIGHT)
    z = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    exact = matrix.clone().requires_grad_()
    want = z @ torch.linalg.matrix_exp(1.5 * exact).T
    got = flow(z)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    got = gradients(got.square().sum(), flow, z)
    assert_all_close(got, torch.autograd.grad(want.square().sum(), [exact, z]), 1e-5)


@pytest.mark.parametrize("adjoint", [True, False])
def test_time_reaches_the_function_in_both_directions(adjoint):
    flow = NeuralODE(Rate(0.8), time=2.0, adjoint=adjoint, **TIGHT)
    z = torch.randn(3, dtype=torch.float64)
    factor = math.exp(0.8 * 2.0**2 / 2)
    torch.testing.assert_close(flow(z), z * factor, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(flow.inverse(z), z / factor, rtol=1e-7, atol=1e-7)
    (grad,) = gradients(flow(z).sum(), flow)
    torch.testing.assert_close(grad, (2.0 * z * factor).sum(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("method", "steps", "order"),
    [("euler", 20, 1), ("midpoint", 20, 2), ("heun2", 20, 2), ("heun3", 20, 3), ("rk4", 10, 4)],
)
def test_equal_steps_have_the_order_of_their_method(method, steps, order):
    z = torch.randn(3, dtype=torch.float64)
    errors = [
        (NeuralODE(Rate(0.8), method=method, steps=n)(z) - z * math.exp(0.4)).norm().item() for n in (steps, 2 * steps)
    ]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.2)


@pytest.mark.parametrize("adjoint", [True, False])
def test_evaluations_are_counted(adjoint):
    for method, stages in (("euler", 1), ("heun2", 2), ("rk4", 4)):
        flow = NeuralODE(Rate(1.0), method=method, steps=49, adjoint=adjoint)
        z = torch.ones(2, dtype=torch.float64, requires_grad=True)
        out = flow(z)
        assert flow.evaluations == 49 * stages
        out.sum().backward()
        assert flow.evaluations == 49 * stages
        flow.inverse(z)
        assert flow.evaluations == 49 * stages
    flow = NeuralODE(Rate(1.0), adjoint=adjoint)
    flow(z)
    assert flow.evaluations % 6 == 2  # two to choose the first step, then six for each
    loose = flow.evaluations
    flow.rtol = flow.atol = 1e-10
    flow(z)
    assert flow.evaluations > loose


def test_memory_of_the_adjoint_does_not_grow_with_the_steps():
    from reversa.memory import LiveBytes

    peaks = {}
    for adjoint in (True, False):
        for steps in (4, 40):
            flow = NeuralODE(Autonomous(tanh_layer(64)), method="rk4", steps=steps, adjoint=adjoint)
            z = torch.randn(512, 64, dtype=torch.float64, requires_grad=True)
            with LiveBytes(exclude=flow) as counted:
                flow(z).sum().backward()
            peaks[adjoint, steps] = counted.peak
    assert peaks[True, 40] == pytest.approx(peaks[True, 4], rel=0.02)
    assert peaks[False, 40] > 5 * peaks[False, 4]


def test_solvers_are_torchdiffeqs():
    from torchdiffeq._impl.odeint import SOLVERS
    from torchdiffeq._impl.solvers import FixedGridODESolver

    fixed = {name for name, kind in SOLVERS.items() if issubclass(kind, FixedGridODESolver)}
    assert set(ode.FIXED) == fixed - {"fixed_adams"}  # an old name of implicit_adams
    assert set(ode.ADAPTIVE) == set(SOLVERS) - fixed - {"scipy_solver"}  # which has no gradients
    for method in ode.ADAPTIVE + ode.FIXED:
        flow = NeuralODE(Rate(1.0), method=method, steps=20 if method in ode.FIXED else None)
        assert flow(torch.ones(1, dtype=torch.float64)).item() == pytest.approx(math.exp(0.5), rel=0.05)


@pytest.mark.parametrize("adjoint", [True, False])
def test_under_autocast_the_flow_keeps_its_precision(adjoint):
    flow = NeuralODE(Autonomous(tanh_layer().float()), adjoint=adjoint)
    z = torch.randn(2, 3).bfloat16()
    want = flow(z.float())
    wanted = gradients(want.square().sum(), flow)
    with torch.autocast("cpu", torch.bfloat16):
        got = flow(z)
        loss = got.square().sum()
    assert got.dtype == torch.float32
    assert torch.equal(got, want)
    assert_all_close(gradients(loss, flow), wanted, 1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert flow(z.double().float()).dtype == torch.float32


# ---------------------------------------------------------------------- second order


def psi(epsilon: float, a: torch.Tensor) -> torch.Tensor:
    """x(1) for epsilon x'' + x' = a x, x(0) = 1, x'(0) = 0."""
    s = (a / epsilon + 1 / (4 * epsilon**2)).to(torch.complex128).sqrt()
    return math.exp(-1 / (2 * epsilon)) * (s.cosh() + s.sinh() / (2 * epsilon * s)).real


# Their least values; see Sander et al., section 4.2.
LEAST = {0.1: -0.010833, 0.5: -0.383322, 1: -0.613499, 2: -0.781147, 5: -0.905287, 10: -0.951349, 100: -0.995014}


@pytest.mark.parametrize("epsilon", LEAST)
def test_the_linear_second_order_flow_is_the_papers(epsilon):
    """A batch of scalar equations: one rate a for each number."""
    frequencies = torch.linspace(2, 7, 20_001, dtype=torch.float64)
    a = -epsilon * (frequencies**2 + 1 / (4 * epsilon**2))
    at = psi(epsilon, a).argmin()
    assert psi(epsilon, a)[at].item() == pytest.approx(LEAST[epsilon], abs=1e-6)
    rates = torch.cat([a[::2000], a[at - 3 : at + 4], torch.tensor([-3.0, 0.5, 2.0])])
    flow = SecondOrderODE(Autonomous(Times(rates)), epsilon, **TIGHT)
    got = flow(torch.ones_like(rates))
    torch.testing.assert_close(got, psi(epsilon, rates), rtol=1e-6, atol=1e-8)
    assert got.min().item() == pytest.approx(LEAST[epsilon], abs=1e-6)


def test_psi_1_of_minus_7():
    flow = SecondOrderODE(Autonomous(Times(-7.0)), 1.0, method="dopri8", rtol=1e-12, atol=1e-12)
    assert flow(torch.ones(1, dtype=torch.float64)).item() == pytest.approx(-0.4587616572, abs=1e-10)


def momentum_of(f, depth, epsilon, time, init):
    """The layers that SecondOrderODE's docstring derives."""
    h = time / depth
    scheme = reversa.Momentum(1 - h / epsilon, "zero" if init == "zero" else Times(h, init))
    return reversa.ReversibleSequence([Times(h, f)] * depth, scheme)


@pytest.mark.parametrize("init", ["zero", "module"])
def test_momentum_networks_tend_to_it_with_first_order(init):
    epsilon, time = 0.7, 1.3
    f, init = tanh_layer(), init if init == "zero" else tanh_layer()
    for p in f.parameters():
        p.data *= 2
    flow = SecondOrderODE(Autonomous(f), epsilon, time, init, **TIGHT)
    x = torch.randn(4, 3, dtype=torch.float64)
    want = flow(x)
    wanted = torch.cat([g.flatten() for g in gradients(want.square().sum(), f)])
    errors, slopes = [], []
    for depth in (50, 100, 200, 400):
        got = momentum_of(f, depth, epsilon, time, init)(x)
        slope = torch.cat([g.flatten() for g in gradients(got.square().sum(), f)])
        errors.append((got - want).norm().item())
        slopes.append((slope - wanted).norm().item())
    assert errors[-1] < 0.01 * want.norm()
    for measured in (errors, slopes):
        for coarse, fine in pairwise(measured):
            assert coarse / fine == pytest.approx(2, abs=0.05)


def test_the_second_order_flow_runs_back():
    flow = SecondOrderODE(Autonomous(tanh_layer()), 0.8, time=1.2, **TIGHT)
    state = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    last = flow.forward_state(state)
    assert (last[0] - state[0]).norm() > 0.1
    assert_all_close(flow.inverse_state(last), state, 1e-7)
    assert flow.evaluations > 8
    at_rest = state[0], torch.zeros_like(state[0])
    torch.testing.assert_close(flow(state[0]), flow.forward_state(at_rest)[0])


# ---------------------------------------------------------------------- ODE-Net


def small_odenet(**settings):
    torch.manual_seed(0)
    net = ODENet(num_classes=5, channels=1, width=4, halvings=1, **settings).double()
    for p in net.parameters():
        nn.init.normal_(p, std=0.5)
    return net, torch.randn(2, 1, 8, 8, dtype=torch.float64)


def derivative_by_hand(f: ODEFunction, t: float, z: torch.Tensor) -> torch.Tensor:
    """The first of the weights' input channels is the time's."""
    for norm, conv in zip(f.norms[:2], f.convs, strict=True):
        z = F.relu(F.group_norm(z, z.shape[1], norm.weight, norm.bias))
        of_time = F.conv2d(torch.ones_like(z[:, :1]), conv.weight[:, :1], padding=1)
        z = F.conv2d(z, conv.weight[:, 1:], conv.bias, padding=1) + t * of_time
    last = f.norms[2]
    return F.group_norm(z, z.shape[1], last.weight, last.bias)


def rk4_by_hand(net, x, steps, time=1.0):
    """Kutta's 3/8 rule, which is torchdiffeq's rk4."""
    z = net.stem[0](x)
    z = net.stem[3](F.relu(net.stem[1](z)))
    f, h = net.stages[0].f, time / steps
    for i in range(steps):
        t = i * h
        k1 = derivative_by_hand(f, t, z)
        k2 = derivative_by_hand(f, t + h / 3, z + h * k1 / 3)
        k3 = derivative_by_hand(f, t + 2 * h / 3, z + h * (k2 - k1 / 3))
        k4 = derivative_by_hand(f, t + h, z + h * (k1 - k2 + k3))
        z = z + h * (k1 + 3 * k2 + 3 * k3 + k4) / 8
    linear = net.head[2]
    return F.relu(net.head[0](z)).mean((2, 3)) @ linear.weight.T + linear.bias


def test_odenet_is_a_loop_of_runge_kutta_steps():
    net, x = small_odenet(method="rk4", steps=5, adjoint=False, time=0.7)
    want = rk4_by_hand(net, x, 5, 0.7)
    got = net(x)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
    assert_all_close(gradients(got.square().sum(), net), gradients(want.square().sum(), net), 1e-9)


@pytest.mark.parametrize(("kinks", "tolerance"), [(False, 1e-7), (True, 1e-3)])
def test_odenets_adjoint_gradients_are_those_of_stored_steps(kinks, tolerance):
    """Those of the solver, and those of the loop. Where a ReLU switches on the way, no solver has its order."""
    net, x = small_odenet(tolerance=1e-9, time=0.5)
    if not kinks:
        for norm in net.stages[0].f.norms[:2]:
            norm.bias.data += 5
    adjoint = gradients(net(x).square().sum(), net)
    net.stages[0].adjoint = False
    stored = gradients(net(x).square().sum(), net)
    by_hand = gradients(rk4_by_hand(net, x, 100, 0.5).square().sum(), net)
    for want in (stored, by_hand):
        got, want = (torch.cat([g.flatten() for g in gs]) for gs in (adjoint, want))
        assert (got - want).norm() <= tolerance * want.norm()


def test_the_resnet_beside_odenet_is_a_loop_of_residual_blocks():
    net = ODEResNet(channels=1, width=4, blocks=3).double()
    x = torch.randn(2, 1, 16, 16, dtype=torch.float64)
    z = net.stem(x)
    assert z.shape == (2, 4, 3, 3)
    for block in net.stages:
        norm1, _, conv1, norm2, _, conv2 = block.residual
        assert conv1.bias is conv2.bias is None
        z = z + conv2(F.relu(norm2(conv1(F.relu(norm1(z))))))
    torch.testing.assert_close(net(x), net.head[2](F.relu(net.head[0](z))), rtol=1e-12, atol=1e-12)
    assert len(models.create("odenetresnet").stages) == 6


@pytest.mark.parametrize("name", ["odenetsmall", "odenetresnetsmall"])
def test_the_small_networks_learn_from_digits_sized_images(name):
    net = models.create(name, num_classes=2, channels=1, width=8)
    labels = torch.arange(16) % 2
    x = torch.randn(2, 1, 8, 8)[labels] + 0.5 * torch.randn(16, 1, 8, 8)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(25):
        losses.append(F.cross_entropy(net(x), labels))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]


def test_odenet_under_autocast():
    net = ODENet(channels=1, width=8)
    x = torch.randn(2, 1, 28, 28)
    with torch.autocast("cpu", torch.bfloat16):
        loss = net(x).square().sum()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


# ---------------------------------------------------------------------- Heun


@pytest.mark.parametrize(("h", "alpha"), [(1.0, 0.5), (0.3, 0.8), (0.3, 0.0)])
def test_heun_steps_are_the_papers(h, alpha):
    functions = [tanh_layer() for _ in range(4)]
    seq = HeunSequence(functions, h, alpha)
    x = torch.randn(2, 3, dtype=torch.float64)
    want = x
    for n in range(3):
        predicted = want + h * functions[n](want)
        corrector = functions[n + 1](predicted)
        want = want + h * (1 - alpha) * functions[n](want) + h * alpha * corrector
    torch.testing.assert_close(seq(x), want, rtol=1e-12, atol=1e-12)
    used = seq.functions if alpha else seq.functions[:3]
    got = gradients(seq(x).square().sum(), used)
    assert_all_close(got, gradients(want.square().sum(), used), 1e-10)


@pytest.mark.parametrize(("alpha", "order"), [(0.5, 2), (0.8, 1)])
def test_heuns_method_is_of_second_order_and_its_extension_of_first(alpha, order):
    matrix = torch.randn(4, 4, dtype=torch.float64)
    y = torch.randn(3, 4, dtype=torch.float64)
    want = y @ torch.linalg.matrix_exp(matrix).T
    f = Linear(matrix)
    errors = [(HeunSequence([f] * (n + 1), 1 / n, alpha)(y) - want).norm().item() for n in (80, 160, 320)]
    assert len(list(HeunSequence([f] * 5).parameters())) == 1
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.1)


def test_heunnet_is_a_loop_of_its_steps():
    torch.manual_seed(0)
    net = HeunNet(blocks=(2, 3, 4), widths=(4, 4, 8, 16), h=0.5, alpha=0.2).double().eval()
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    z = net.stem(x)
    lengths = []
    for stage in net.stages:
        *transitions, seq = stage
        for block in transitions:
            z = block.residual(z) + block.shortcut(z)
        lengths.append(len(seq.functions))
        for first, second in pairwise(seq.functions):
            slope = first(z)
            z = z + 0.4 * slope + 0.1 * second(z + 0.5 * slope)
    torch.testing.assert_close(net(x), net.head(z), rtol=1e-12, atol=1e-12)
    assert lengths == [2, 2, 3]
    own, resnets = HeunNet().state_dict(), models.create("resnet32").state_dict()
    assert [v.shape for v in own.values()] == [v.shape for v in resnets.values()]


def test_heunnet_with_stages_that_only_change_the_shape():
    net = HeunNet(blocks=(2, 1, 1), widths=(4, 4, 8, 16))
    assert net(torch.randn(2, 3, 8, 8)).shape == (2, 10)


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"method": "dopri"}, r"unknown method 'dopri'. Did you mean: dopri"),
        ({"method": "rk4"}, "rk4 takes equal steps: say how many, for instance steps=20; got None"),
        ({"method": "euler", "steps": 0}, "got 0"),
        ({"method": "euler", "steps": 2.5}, "got 2.5"),
        ({"steps": 3}, "dopri5 chooses its own steps, got steps=3: leave steps out"),
        ({"time": 0}, "time must be a positive number, got 0"),
        ({"time": -1.0}, "time must be a positive number"),
        ({"time": float("inf")}, "time must be a positive number"),
        ({"rtol": 0.0}, "rtol must be a positive number"),
        ({"atol": -1e-3}, "atol must be a positive number"),
        ({"atol": float("nan")}, "atol must be a positive number"),
    ],
)
def test_settings_of_a_solver(settings, told):
    for make in (lambda: NeuralODE(Rate(1.0), **settings), lambda: SecondOrderODE(Rate(1.0), 1.0, **settings)):
        with pytest.raises(SettingError, match=told):
            make()


def test_functions_that_are_no_derivatives():
    for make in (NeuralODE, lambda f: SecondOrderODE(f, 1.0)):
        with pytest.raises(SettingError, match=r"Linear does not take both .*give Autonomous\(f\)"):
            make(nn.Linear(3, 3))
        with pytest.raises(SettingError, match=r"f must be a module of \(t, z\)"):
            make(lambda t, z: z)
        flow = make(Autonomous(nn.Linear(3, 1)))
        with pytest.raises(BlockError, match=r"state of shape \(2, 3\) torch.float32.* returned \(2, 1\)"):
            flow(torch.ones(2, 3))
    with pytest.raises(BlockError, match=r"returned \(1,\) torch.float64"):
        NeuralODE(Autonomous(Times(torch.ones(1, dtype=torch.float64))))(torch.ones(1))


def test_settings_of_the_second_order():
    with pytest.raises(SettingError, match="epsilon must be a positive number, got 0"):
        SecondOrderODE(Rate(1.0), 0)
    with pytest.raises(SettingError, match="init must be 'zero' or a module"):
        SecondOrderODE(Rate(1.0), 1.0, init="learned")
    flow = SecondOrderODE(Autonomous(nn.Linear(3, 3)), 1.0, init=nn.Linear(3, 2))
    with pytest.raises(StateError, match=r"the velocity must be like x, \(2, 3\).*it is \(2, 2\)"):
        flow(torch.ones(2, 3))


@pytest.mark.parametrize("f", [Times(float("nan")), Times(1e30, Times(1e30))])
def test_a_solver_that_cannot_go_on(f):
    with pytest.raises(StateError, match=r"dopri5 gave up after \d+ evaluations of f: .*allow larger tolerances"):
        NeuralODE(Autonomous(f))(torch.ones(3))


def test_without_torchdiffeq_networks_are_built_and_listed_but_not_run(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    net = models.create("odenet")
    with pytest.raises(MissingExtra, match=r"reversa\[ode\]"):
        net(torch.randn(2, 3, 28, 28))


def test_images_and_widths_that_do_not_fit():
    with pytest.raises(StateError, match="at least 10 x 10 pixels, got 8 x 9: use larger images, or fewer halvings"):
        models.create("odenetresnet", channels=1)(torch.randn(2, 1, 8, 9))
    assert models.create("odenetresnet", channels=1)(torch.randn(2, 1, 10, 10)).shape == (2, 10)
    with pytest.raises(SettingError, match="48 channels do not divide into 32 groups"):
        models.create("odenet", width=48)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"functions": [nn.Identity()]}, "takes two residual functions, got 1"),
        ({"functions": []}, "takes two residual functions, got 0"),
        ({"functions": [nn.Identity(), abs]}, "residual functions must be modules"),
        ({"h": 0}, "step size h must be a positive number"),
        ({"alpha": 1.5}, r"alpha must lie in \[0, 1\], got 1.5"),
        ({"alpha": "half"}, r"alpha must lie in \[0, 1\]"),
    ],
)
def test_settings_of_heun(settings, told):
    with pytest.raises(SettingError, match=told):
        HeunSequence(**({"functions": [nn.Identity()] * 2} | settings))


def test_a_heun_step_keeps_the_shape():
    with pytest.raises(BlockError, match=r"residual function 0 made \(2, 4\) of \(2, 3\)"):
        HeunSequence([nn.Linear(3, 4)] * 2)(torch.ones(2, 3))
    with pytest.raises(SettingError, match="takes two residual functions, got 1"):
        models.create("heunnet32", blocks=(2, 2, 2))

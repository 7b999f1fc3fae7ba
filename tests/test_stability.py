"""Spectra, exponents and conditions against closed forms, dense matrices and differences, in float64."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy
import pytest
import torch
from torch import nn

import reversa
from reversa.errors import MissingExtra, OutputError, SettingError, StateError
from reversa.models.functions import Antisymmetric, Bias, Kernel, StochasticDepth, Symmetric, basic
from reversa.stability import (
    condition,
    draw_growth,
    draw_spectrum,
    growth,
    hamiltonian_field,
    jacobian,
    largest_real_part,
    leapfrog_field,
    lyapunov,
    spectrum,
)


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def filled(module):
    """With biases that are not zero."""
    for name, p in module.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(p, std=0.3)
    return module


def symmetric(width, hidden=None, size=None):
    return filled(Symmetric(Kernel(width, size, hidden), Bias(hidden or width), Bias(width)))


def antisymmetric(width, size=None):
    return filled(Antisymmetric(Kernel(width, size), Bias(width)))


def scaled(a):
    """f(x) = a x in one dimension."""
    f = nn.Linear(1, 1, bias=False)
    nn.init.constant_(f.weight, a)
    return f


def differences(f, x, step=1e-6):
    columns = []
    for i in range(x.numel()):
        e = torch.zeros(x.numel())
        e[i] = step
        e = e.view(x.shape)
        columns.append(((f(x + e) - f(x - e)) / (2 * step)).flatten())
    return torch.stack(columns, 1).detach()


# ---------------------------------------------------------------------------------------------- Jacobians and spectra


@pytest.mark.parametrize("f", [basic(3, 3).eval(), antisymmetric(3, 3), symmetric(3, 7, 3)], ids=type)
def test_jacobian_is_that_of_differences(f):
    f, x = f.double(), torch.randn(1, 3, 3, 4)
    J = jacobian(f, x)
    assert J.shape == (36, 36)
    assert J.abs().max() > 0.1
    torch.testing.assert_close(J, differences(f, x), rtol=1e-6, atol=1e-6)


def test_spectrum_of_a_linear_map_is_numpys_in_falling_order():
    f = nn.Linear(9, 9)
    values = spectrum(f, torch.randn(1, 9))
    assert (values.real.diff() <= 0).all()
    expected = numpy.linalg.eigvals(f.weight.detach().numpy())
    assert numpy.allclose(numpy.sort_complex(values.numpy()), numpy.sort_complex(expected))


def factors(f, x):
    """K^T diag(s') K of a Symmetric, from its numbers."""
    K = f.kernel.weight
    D = (K @ (x + f.outer.bias).flatten() + f.inner.bias > 0).double()
    return K.T @ (D[:, None] * K)


def test_the_hamiltonian_field_has_an_imaginary_spectrum():
    f, g = symmetric(4, 24), symmetric(4, 24)
    x = torch.randn(1, 8)
    values = spectrum(hamiltonian_field(f, g), x)
    assert values.real.abs().max() < 1e-10
    products = torch.linalg.eigvals(factors(f, x[:, 4:]) @ factors(g, x[:, :4]))
    assert products.real.min() > 0.01
    expected = torch.cat([products.real.sqrt(), -products.real.sqrt()]).sort().values
    torch.testing.assert_close(values.imag.sort().values, expected)


def test_the_convolutional_hamiltonian_field_has_an_imaginary_spectrum():
    field = hamiltonian_field(symmetric(2, 16, size=3), symmetric(2, 16, size=3))
    values = spectrum(field, torch.randn(1, 4, 5, 5))
    assert values.real.abs().max() < 1e-10
    assert values.imag.abs().max() > 1


def test_where_kernels_are_not_injective_zero_is_defective_and_nothing_else_leaves_the_axis():
    f, g = symmetric(6), symmetric(6)  # a ReLU lets about half of six rows through
    x = torch.randn(1, 12)
    assert torch.linalg.matrix_rank(factors(f, x[:, 6:])) < 6
    J = jacobian(hamiltonian_field(f, g), x)
    assert torch.linalg.matrix_rank(J @ J) < torch.linalg.matrix_rank(J), "no Jordan block: this shows nothing"
    assert spectrum(hamiltonian_field(f, g), x).real.abs().max() < 1e-6  # sqrt(eps) for a block of two


def test_the_leapfrog_field_has_an_imaginary_spectrum():
    f, x = symmetric(5, 30), torch.randn(1, 10)
    values = spectrum(leapfrog_field(f), x)
    assert values.real.abs().max() < 1e-10
    roots = torch.linalg.eigvalsh(factors(f, x[:, :5])).sqrt()
    torch.testing.assert_close(values.imag.sort().values, torch.cat([roots, -roots]).sort().values)


class Field(nn.Module):
    """sigma((K - K^T) x + b) once more, by matrices."""

    def __init__(self, sigma):
        super().__init__()
        self.K, self.b, self.sigma = torch.randn(7, 7), torch.randn(7), sigma

    def forward(self, x):
        return self.sigma(x @ (self.K - self.K.T).T + self.b)


RISING = {"identity": nn.Identity(), "tanh": torch.tanh, "sigmoid": torch.sigmoid, "softplus": nn.functional.softplus}


@pytest.mark.parametrize("sigma", RISING.values(), ids=RISING)
def test_midpoints_field_has_an_imaginary_spectrum_for_rising_activations(sigma):
    values = spectrum(Field(sigma), torch.randn(1, 7))
    assert values.real.abs().max() < 1e-10
    assert values.imag.abs().max() > 0.1


@pytest.mark.parametrize("size", [None, 3])
def test_midpoints_field_has_an_imaginary_spectrum_for_relu(size):
    f = antisymmetric(6, size)
    x = torch.randn(1, 6, *[] if size is None else [5, 5])
    while int((f(x) > 0).sum()) % 2:  # an odd antisymmetric block is singular, and zero may be defective
        x = torch.randn_like(x)
    values = spectrum(f, x)
    assert values.real.abs().max() < 1e-10
    assert values.imag.abs().max() > 1


def test_midpoints_field_leaves_the_axis_where_a_normalisation_turns_signs():
    bn = nn.BatchNorm1d(6).eval()
    with torch.no_grad():
        bn.weight[::2] = -1
        bn.bias.fill_(20)  # every ReLU is open
    f = Antisymmetric(Kernel(6, None), bn)
    assert spectrum(f, torch.randn(1, 6))[0].real > 0.1
    nn.init.ones_(bn.weight)
    assert spectrum(f, torch.randn(1, 6)).real.abs().max() < 1e-10


def test_a_residual_networks_function_has_growing_directions():
    f, x = basic(4, 4).eval(), torch.randn(1, 4, 5, 5)
    assert spectrum(f, x)[0].real > 0.1


@pytest.mark.parametrize("f", [basic(4, 4).eval(), nn.Conv2d(4, 4, 3, padding=1)], ids=["basic", "convolution"])
def test_the_largest_real_part_without_a_jacobian_is_that_of_the_dense_one(f):
    f, x = f.double(), torch.randn(1, 4, 6, 6)
    expected = numpy.linalg.eigvals(differences(f, x).numpy()).real.max()
    assert expected > 0.1
    assert largest_real_part(f, x, dense=0) == pytest.approx(expected, rel=1e-5)
    assert largest_real_part(f, x) == pytest.approx(expected, rel=1e-5)


def test_the_iteration_says_where_it_does_not_converge():
    field = hamiltonian_field(symmetric(2, 16, size=3), symmetric(2, 16, size=3))
    with pytest.raises(StateError, match="Raise dense"):
        largest_real_part(field, torch.randn(1, 4, 5, 5), dense=0, max_products=200)


# ---------------------------------------------------------------------------------------------- chains


def dominant(a, b, w, value):
    """log |mu| of the two-register step (p, c) -> (c, a c + b p + w f c) with f = value: the companion matrix's."""
    return math.log(max(abs(numpy.linalg.eigvals(numpy.array([[0, 1], [b, a + w * value]])))))


GAMMA, H = 0.9, 0.4
LINEAR = [
    (reversa.Momentum(GAMMA), 0.5, dominant(1 + GAMMA, -GAMMA, 1 - GAMMA, 0.5)),
    (reversa.Momentum(0.5), -8.0, dominant(1.5, -0.5, 0.5, -8.0)),
    (reversa.Momentum(0.5), -7.0, dominant(1.5, -0.5, 0.5, -7.0)),
    (reversa.Midpoint(H), 0.7, dominant(0, 1, 2 * H, 0.7)),
    (reversa.Leapfrog(H), -2.0, dominant(2, -1, -(H**2), -2.0)),
    (reversa.Leapfrog(3.0), 0.7, dominant(2, -1, -9.0, 0.7)),
]


@pytest.mark.parametrize(("scheme", "a", "expected"), LINEAR, ids=lambda v: str(v) if not isinstance(v, float) else "")
def test_the_exponent_of_a_linear_chain_is_that_of_its_companion_matrix(scheme, a, expected):
    assert abs(expected) > 0.01
    seq = reversa.ReversibleSequence([scaled(a)] * 300, scheme)
    assert lyapunov(seq, torch.ones(1, 1), skip=200) == pytest.approx(expected, abs=1e-6)


def test_the_exponent_is_zero_within_the_limits_of_stability_and_negative_where_momentum_is_damped():
    stable = reversa.ReversibleSequence([scaled(3.0)] * 2000, reversa.Leapfrog(0.5))
    assert abs(lyapunov(stable, torch.ones(1, 1))) < 2e-3
    damped = reversa.ReversibleSequence([scaled(-1.0)] * 2000, reversa.Momentum(0.9))
    assert lyapunov(damped, torch.ones(1, 1)) == pytest.approx(0.5 * math.log(0.9), abs=2e-3)  # |mu|^2 = gamma


def mlp(width):
    return nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))


SCHEMES = [
    (reversa.Momentum(0.7), 4, 1),
    (reversa.RevNet(), 2, 2),
    (reversa.Hamiltonian(0.3), 2, 2),
    (reversa.Midpoint(0.2), 4, 1),
    (reversa.Leapfrog(0.5, init="euler"), 4, 1),
]


def chain_of(scheme, width, per_block):
    blocks = [mlp(width) if per_block == 1 else (mlp(width), mlp(width)) for _ in range(4)]
    return reversa.ReversibleSequence(blocks, scheme)


def state_map(seq):
    """The chain's own map from state to state, on the streams as one tensor."""
    return lambda streams: torch.stack(seq.forward_state(tuple(streams.unbind())))


def first_state(seq, x):
    return torch.stack(seq.scheme.open(x)).detach()


@pytest.mark.parametrize(("scheme", "width", "per_block"), SCHEMES, ids=lambda v: str(v))
def test_growth_adds_up_to_that_of_a_small_difference(scheme, width, per_block):
    seq, x = chain_of(scheme, width, per_block), torch.randn(1, 4)
    state = first_state(seq, x)
    direction = torch.randn(state.shape, generator=torch.Generator().manual_seed(0))
    direction /= direction.norm()
    move = 1e-6 * direction
    grown = (state_map(seq)(state + move) - state_map(seq)(state - move)).norm() / 2e-6
    logs = growth(seq, x)
    assert logs.shape == (len(seq.functions),)
    assert logs.sum().exp().item() == pytest.approx(grown.item(), rel=1e-6)


@pytest.mark.parametrize("dense", [1024, 0])
@pytest.mark.parametrize(("scheme", "width", "per_block"), SCHEMES, ids=lambda v: str(v))
def test_condition_is_that_of_the_dense_singular_values(scheme, width, per_block, dense):
    seq, x = chain_of(scheme, width, per_block), torch.randn(1, 4)
    values = torch.linalg.svdvals(differences(state_map(seq), first_state(seq, x)))
    assert values[0] / values[-1] > 1.3
    assert condition(seq, x, dense) == pytest.approx((values[0] / values[-1]).item(), rel=1e-4)


def test_condition_of_momentum_grows_as_gamma_says():
    # f = 0: the velocity is multiplied by gamma in each of L steps, and nothing brings that back but 1 / gamma^L.
    seq = reversa.ReversibleSequence([scaled(0.0)] * 100, reversa.Momentum(0.5))
    J = numpy.array([[1, sum(0.5**k for k in range(1, 101))], [0, 0.5**100]])
    spread = numpy.linalg.svd(J)[1][0] * numpy.linalg.norm([[2.0**100, -J[0, 1] * 2.0**100], [0, 1]], 2) / 2.0**100
    assert condition(seq, torch.ones(1, 1)) == pytest.approx(spread * 2.0**100, rel=1e-6)


def test_an_exact_chain_is_looked_at_in_floating_point():
    fs, x = [mlp(4) for _ in range(3)], torch.randn(1, 4)
    plain, exact = (reversa.ReversibleSequence(fs, reversa.Momentum(0.9), exact=e) for e in (False, True))
    assert torch.equal(growth(plain, x), growth(exact, x))
    assert condition(plain, x) == condition(exact, x)


# ---------------------------------------------------------------------------------------------- refusals, pictures


def test_what_cannot_be_looked_at_is_refused():
    x = torch.randn(1, 4)
    with pytest.raises(StateError, match=r"made \(1, 3\) of \(1, 4\)"):
        spectrum(nn.Linear(4, 3), x)
    with pytest.raises(StateError, match="largest_real_part"):
        jacobian(torch.tanh, torch.zeros(5000))
    with pytest.raises(SettingError, match="float32 or float64"):
        jacobian(torch.square, torch.ones(2, dtype=torch.int64))
    for layer in (nn.Dropout(), nn.BatchNorm1d(4), StochasticDepth(nn.Identity(), 0.5)):
        f = nn.Sequential(nn.Linear(4, 4), layer)
        seq = reversa.ReversibleSequence([f], reversa.Momentum(0.9))
        for call in (lambda f=f: spectrum(f, x), lambda s=seq: growth(s, x), lambda s=seq: condition(s, x)):
            with pytest.raises(SettingError, match=r"Call eval\(\) first"):
                call()
        assert growth(seq.eval(), x).isfinite().all()
    for skip in (-1, 1):
        with pytest.raises(SettingError, match="skip must leave one of the 1 steps"):
            lyapunov(seq, x, skip=skip)
    for field in (hamiltonian_field(torch.tanh, torch.tanh), leapfrog_field(torch.tanh)):
        with pytest.raises(StateError, match="odd"):
            field(torch.zeros(1, 3))


def test_without_scipy_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.sparse.linalg", None)
    with pytest.raises(MissingExtra, match=r"reversa\[train\]"):
        largest_real_part(torch.tanh, torch.zeros(4), dense=0)
    assert largest_real_part(torch.tanh, torch.zeros(4)) == 1


def test_drawn_spectra_hold_the_eigenvalues(tmp_path):
    values = {"one": torch.tensor([1 + 2j, -1j]), "two": torch.tensor([3 + 0j]), "three": torch.zeros(2) + 0j}
    figure = draw_spectrum(values, tmp_path / "spectra.png")
    assert (tmp_path / "spectra.png").read_bytes().startswith(b"\x89PNG")
    assert [axes.get_title() for axes in figure.axes] == list(values)
    for axes, expected in zip(figure.axes, values.values(), strict=True):
        points = next(line for line in axes.lines if line.get_marker() == ".").get_xydata()
        assert numpy.array_equal(points, numpy.stack([expected.real, expected.imag], 1))
        assert axes.get_xlim() == figure.axes[0].get_xlim()
    assert len(draw_spectrum(values["one"], tmp_path / "one.svg").axes) == 1


def test_drawn_growth_is_the_size_by_depth(tmp_path):
    figure = draw_growth({"one": torch.tensor([0.0, math.log(2)]), "two": torch.ones(3)}, tmp_path / "growth.png")
    one, two = (line.get_xydata() for line in figure.axes[0].lines)
    assert numpy.allclose(one, [[0, 1], [1, 1], [2, 2]])
    assert numpy.allclose(two[:, 1], [math.exp(k) for k in range(4)])
    assert figure.axes[0].get_yscale() == "log"
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["one", "two"]


def test_pictures_that_cannot_be_written_are_refused(tmp_path):
    for name in ("missing/a.png", "a.nonsense"):
        with pytest.raises(OutputError, match="cannot write"):
            draw_growth(torch.ones(3), tmp_path / name)


def test_the_pages_pictures_are_there_and_small():
    docs = Path(__file__).parent.parent / "docs"
    for name in ("crossing.png", "spectra.png"):
        assert f"images/{name}" in (docs / "stability.md").read_text()
        assert (docs / "images" / name).stat().st_size < 60_000


def test_what_is_no_chain():
    for tool in (growth, lyapunov, condition):
        with pytest.raises(SettingError, match=r"ReversibleSequence is needed, .* got Sequential"):
            tool(nn.Sequential(nn.Tanh()), torch.zeros(1, 3))


def test_bdia_in_eval_grows_as_its_residual_network_does():
    f = nn.Linear(3, 3, bias=False).double()
    seq = reversa.ReversibleSequence([f] * 200, reversa.BDIA()).eval()
    largest = torch.linalg.eigvals(torch.eye(3, dtype=torch.float64) + f.weight.detach()).abs().max().log()
    assert lyapunov(seq, torch.zeros(1, 3, dtype=torch.float64), skip=100) == pytest.approx(float(largest), abs=1e-2)
    with pytest.raises(SettingError, match="has no inverse"):
        condition(seq, torch.zeros(1, 3, dtype=torch.float64))

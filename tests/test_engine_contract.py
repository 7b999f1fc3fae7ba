"""The contract: every scheme, under every engine, trains as the papers' formulas do with stored activations."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import oracle
import reversa
from cases import CASES, DEPTH, ENGINES, FAMILIES, TOLERANCE, Case, assert_same, mlp, step
from reversa.schemes import SCHEMES, Scheme
from reversa.schemes.coupling import Duplicated


def _all(cls: type) -> set[type]:
    return {cls}.union(*(_all(sub) for sub in cls.__subclasses__()))


def test_the_tables_are_complete():
    ours = {cls for cls in _all(Scheme) if "source" in vars(cls) and cls.__module__.startswith("reversa.schemes")}
    ours -= {Duplicated}  # of conversion alone: tests/test_convert_streams.py has its oracles
    assert ours == set(SCHEMES.values()), "a scheme is not in reversa.schemes.SCHEMES"
    assert ours == {type(case.scheme) for case in CASES.values()}, "a scheme has no oracle in tests/cases.py"
    policies = {cls for engine in ENGINES.values() for cls in type(engine).__mro__}
    engines = {cls for cls in _all(reversa.engine.Engine) if cls.__module__.startswith("reversa.")}
    assert engines <= policies, "an engine is not in tests/cases.py"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", CASES)
def test_one_training_step(case, engine, family, dtype):
    case, family = CASES[case], FAMILIES[family]
    fs, x, extras = family.functions(dtype=dtype), case.input(*family.shape, dtype=dtype), family.extras(dtype)
    expected = step(case.rule, fs, x, **extras)
    tolerance = case.tolerance(TOLERANCE[dtype], ENGINES[engine])
    assert_same(step(case.with_engine(ENGINES[engine]), fs, x, **extras), expected, tolerance)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("depth", [1, 2, 3, 17])
def test_any_depth(case, engine, depth):
    case = CASES[case]
    fs, x = [mlp().double() for _ in range(depth * case.scheme.functions_per_block)], case.input(4, 6)
    tolerance = case.tolerance(1e-12, ENGINES[engine], depth)
    assert_same(step(case.with_engine(ENGINES[engine]), fs, x), step(case.rule, fs, x), tolerance)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_learned_first_velocity(engine):
    *fs, init = [mlp().double() for _ in range(DEPTH + 1)]
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)

    def ours(modules, x):
        scheme = reversa.Momentum(0.9, init=modules[-1])
        seq = reversa.ReversibleSequence(modules[:-1], scheme, engine=ENGINES[engine])
        assert {id(p) for p in modules[-1].parameters()} <= {id(p) for p in seq.parameters()}
        return seq(x)

    expected = step(lambda modules, x: oracle.momentum(modules[:-1], x, init=modules[-1]), [*fs, init], x)
    assert_same(step(ours, [*fs, init], x), expected, 1e-12)


@pytest.mark.parametrize("dim", [1, 2, -1, -2])
@pytest.mark.parametrize("name", ["revnet", "additive"])
def test_streams_along_any_dimension(name, dim):
    fs = [nn.Conv1d(4 if dim in (2, -1) else 2, 4 if dim in (2, -1) else 2, 3, padding=1).double() for _ in range(4)]
    x = torch.randn(3, 4, 6, dtype=torch.float64, requires_grad=True)
    case = Case(SCHEMES[name](dim=dim), partial(getattr(oracle, name), dim=dim))
    assert_same(step(case.with_engine(reversa.Invert()), fs, x), step(case.rule, fs, x), 1e-12)


@pytest.mark.parametrize("engine", ENGINES)
def test_gamma_one_gives_f_no_influence_and_no_gradient(engine):
    fs, x = [mlp().double() for _ in range(3)], torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    y = reversa.ReversibleSequence(fs, reversa.Momentum(1.0), engine=ENGINES[engine])(x)
    y.sum().backward()
    assert torch.equal(y, x)
    assert torch.equal(x.grad, torch.ones_like(x))
    assert all(not p.grad.any() for f in fs for p in f.parameters())


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "expanded", "empty batch"])
@pytest.mark.parametrize("case", ["momentum", "revnet"])
def test_memory_layouts(case, layout):
    case, fs = CASES[case], FAMILIES["conv-bn"].functions(4)
    x = case.input(3, 4, 5, 5).detach()
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    elif layout == "transposed":
        x = x.transpose(2, 3)
    elif layout == "expanded":
        x = x[:1].expand(3, -1, -1, -1)
    else:
        x, fs = x[:0], [nn.Conv2d(4, 4, 3, padding=1).double() for _ in range(4)]
    expected = step(case.rule, fs, x)
    assert_same(step(case.with_engine(reversa.Invert()), fs, x), expected, 1e-12)


@given(
    name=st.sampled_from(["momentum", "revnet", "additive"]),
    engine=st.sampled_from(sorted(ENGINES)),
    gamma=st.floats(0.05, 0.999),
    depth=st.integers(1, 12),
    batch=st.integers(1, 4),
    width=st.integers(1, 5),
    seed=st.integers(0, 1000),
)
def test_any_shape_depth_and_gamma(name, engine, gamma, depth, batch, width, seed):
    torch.manual_seed(seed)
    momentum = Case(reversa.Momentum(gamma), partial(oracle.momentum, gamma=gamma))
    case = momentum if name == "momentum" else CASES[name]
    fs = [mlp(width).double() for _ in range(depth * case.scheme.functions_per_block)]
    x = case.input(batch, width)
    assert_same(step(case.with_engine(ENGINES[engine]), fs, x), step(case.rule, fs, x), 1e-9)

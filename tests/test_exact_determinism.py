"""Where the same bits cannot be had twice, exact arithmetic refuses, and says what to do."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import reversa
from cases import FAMILIES
from exact_cases import assert_bit_equal, step
from reversa.errors import BlockError


class Scattered(nn.Module):
    """Its sums depend on the order in which threads arrive: PyTorch has no deterministic algorithm for ``put_``."""

    def forward(self, x):
        return torch.zeros_like(x).put_(torch.arange(x.numel()), 0.1 * x.flatten())


class Uncaring(nn.Module):
    """Scattered, but for its second evaluation only."""

    def forward(self, x):
        y = 0.1 * x.sin()
        return Scattered()(y) if reversa.is_replaying() else y


class Products(nn.Module):
    """What PyTorch says of CUDA's matrix products where it is not set up for the same bits."""

    def forward(self, x):
        raise RuntimeError(
            "Deterministic behavior was enabled with `torch.use_deterministic_algorithms(True)`, but this operation "
            "is not deterministic because it uses CuBLAS. You must set CUBLAS_WORKSPACE_CONFIG=:4096:8"
        )


def chain(f: nn.Module, exact: object = True, **engine) -> reversa.ReversibleSequence:
    return reversa.ReversibleSequence([f, f], reversa.Momentum(0.5), engine=reversa.Invert(**engine), exact=exact)


def gradient(seq: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(seq(x).sum(), x)[0]


def ones() -> torch.Tensor:
    return torch.ones(3, 4, requires_grad=True)


@pytest.fixture(autouse=True)
def settings_stay():
    memory = torch.utils.deterministic
    before = torch.get_deterministic_debug_mode(), memory.fill_uninitialized_memory
    yield
    after = torch.get_deterministic_debug_mode(), memory.fill_uninitialized_memory
    torch.set_deterministic_debug_mode(before[0])
    assert after == before


def test_an_operation_without_a_deterministic_algorithm_is_refused():
    with pytest.raises(BlockError, match=r"put_ has no deterministic algorithm on cpu.*exact=False.*verify=True"):
        chain(Scattered())(ones())


def test_it_is_refused_in_the_backward_pass_too():
    y = chain(Uncaring())(ones())
    with pytest.raises(BlockError, match="put_ has no deterministic algorithm"):
        y.sum().backward()


def test_it_is_refused_step_by_step():
    steps = reversa.Invert().begin(reversa.exact.exact_scheme(reversa.Momentum(0.5), reversa.exact.FixedPoint()))
    state = steps.scheme.open(ones())
    with pytest.raises(BlockError, match="put_ has no deterministic algorithm"):
        steps.step(Scattered(), state)


def test_matrix_products_that_cuda_was_not_set_up_for():
    with pytest.raises(BlockError, match=r"matrix products.*export CUBLAS_WORKSPACE_CONFIG=:4096:8"):
        chain(Products())(ones())


def test_other_errors_are_the_functions_own():
    class Broken(nn.Module):
        def forward(self, x):
            raise RuntimeError("out of order")

    with pytest.raises(RuntimeError, match=r"^out of order$"):
        chain(Broken())(ones())


def test_float_chains_are_asked_nothing():
    assert gradient(chain(Scattered(), exact=False), ones()).any()


def test_a_user_who_wants_to_be_warned_is_warned():
    x, seq = ones(), chain(Scattered(), verify=True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with pytest.warns(UserWarning, match="put_ does not have a deterministic implementation"):
            gradient(seq, x)
        assert torch.get_deterministic_debug_mode() == 1
    finally:
        torch.use_deterministic_algorithms(False)


def test_functions_are_evaluated_deterministically_both_times():
    met = []

    class Asking(nn.Module):
        def forward(self, x):
            met.append(torch.are_deterministic_algorithms_enabled())
            return 0.1 * x.sin()

    chain(Asking())(ones()).sum().backward()
    assert met == [True] * 4


def test_threads_leave_the_setting_as_it_was():
    """They enter and leave in any order, and PyTorch has one setting for all of them."""
    first_is_in, second_is_in, first_is_out = (threading.Event() for _ in range(3))

    class Early(nn.Module):
        def forward(self, x):
            first_is_in.set()
            assert second_is_in.wait(10)
            return 0.1 * x

    class Late(nn.Module):
        def forward(self, x):
            second_is_in.set()
            assert first_is_out.wait(10)
            assert torch.are_deterministic_algorithms_enabled()
            return 0.1 * x

    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(lambda: chain(nn.Sequential(Early()))(ones()))
        assert first_is_in.wait(10)
        two = pool.submit(lambda: chain(nn.Sequential(Late()))(ones()))
        one.result(20)
        first_is_out.set()
        two.result(20)
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["mlp", "conv-bn", "attention"])
@pytest.mark.parametrize("scheme", [reversa.Momentum(0.9), reversa.RevNet()], ids=str)
def test_on_cuda(scheme, family, monkeypatch):
    """Run with CUBLAS_WORKSPACE_CONFIG=:4096:8, which PyTorch reads once."""
    if "CUBLAS_WORKSPACE_CONFIG" not in os.environ:
        pytest.skip("needs CUBLAS_WORKSPACE_CONFIG=:4096:8")
    shape = {"mlp": (4, 12), "conv-bn": (3, 8, 5, 5), "attention": (2, 6, 8)}[family]
    fs = FAMILIES[family].functions(64)
    x = torch.randn(shape, device="cuda", requires_grad=True)
    seq = reversa.ReversibleSequence(fs, scheme, exact=True).cuda()
    torch.use_deterministic_algorithms(True)
    try:
        assert_bit_equal(step(seq, x, reversa.Invert(verify=True)), step(seq, x, reversa.Store()))
    finally:
        torch.use_deterministic_algorithms(False)

"""LiveBytes against counts done by hand, and against the allocator's own trace."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from allocator import allocator_peak
from reversa.errors import SettingError
from reversa.memory import LiveBytes

UNIT = 1024 * 4  # bytes of one float32 tensor of 1024 elements


def unit(**options: bool) -> torch.Tensor:
    return torch.zeros(1024, **options)


def test_allocation_and_freeing():
    with LiveBytes() as counted:
        a = unit()
        b = unit()
        assert counted.live == 2 * UNIT
        del a
        assert counted.live == UNIT
        assert counted.peak == 2 * UNIT
        counted.reset_peak()
        assert counted.peak == UNIT
        c = b + 1
        assert (counted.live, counted.peak) == (2 * UNIT, 2 * UNIT)
    del b, c
    assert (counted.live, counted.peak) == (0, 2 * UNIT)


def test_peak_includes_tensors_that_live_for_one_operation():
    x = unit()
    with LiveBytes() as counted:
        y = (x + 1) * 2
    assert (counted.live, counted.peak) == (UNIT, 2 * UNIT)
    del y


def test_views_and_in_place_operations_cost_nothing():
    with LiveBytes() as counted:
        a = unit()
        views = [a[:10], a.view(32, 32).t(), a.unsqueeze(0).expand(50, 1024), a.detach()]
        a.add_(1).mul_(2)
        assert counted.peak == UNIT
        del a
        assert counted.live == UNIT, "a view keeps its whole storage alive"
        del views
        assert counted.live == 0


def test_expanded_tensor_costs_its_storage():
    with LiveBytes() as counted:
        _x = torch.zeros(()).expand(1000, 1000)
        assert counted.live == 4


def test_what_was_there_before_is_not_counted():
    outside = unit()
    with LiveBytes() as counted:
        _view = outside[:5]
        outside.add_(1)
        _same = outside.view(2, 512).reshape(-1)
        assert counted.peak == 0


def test_nothing_is_counted_after_the_block_but_frees():
    with LiveBytes() as counted:
        a = unit()
    b = unit()
    assert counted.live == UNIT
    del a, b
    assert counted.live == 0


def test_tensors_made_of_python_data_are_counted():
    with LiveBytes() as counted:
        _a = torch.tensor([1.0] * 1024)
        assert counted.live == UNIT


def test_resized_storages_count_their_new_size():
    with LiveBytes() as counted:
        a = unit()
        a.untyped_storage().resize_(0)
        assert counted.live == 0
        b = unit()  # the peak must not see a's old bytes
        assert counted.peak == UNIT
        a.untyped_storage().resize_(4 * UNIT)
        assert counted.live == 5 * UNIT
        b.resize_(2048)
        assert counted.peak == 6 * UNIT
    del a, b
    assert counted.live == 0


def test_storage_that_was_replaced_by_set():
    with LiveBytes() as counted:
        a, b = unit(), unit()
        a.set_(b)
        assert counted.live == UNIT
        del b
        assert counted.live == UNIT


@pytest.mark.filterwarnings("ignore:Sparse CS. tensor support is in beta")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr, torch.sparse_csc], ids=str)
def test_sparse_tensors_cost_indices_and_values(layout):
    outside = torch.eye(64).to_sparse(layout=layout)
    with LiveBytes() as counted:
        sparse = outside.clone()
        index = 2 * 64 * 8 if layout is torch.sparse_coo else (65 + 64) * 8
        assert counted.live == 64 * 4 + index
        del sparse
        assert counted.live == 0


@pytest.mark.filterwarnings("ignore:.*nested tensors.*")
def test_jagged_tensors_cost_the_tensors_inside():
    values, offsets = torch.zeros(1024), torch.tensor([0, 24, 1024])
    with LiveBytes() as counted:
        nested = torch.nested.nested_tensor_from_jagged(values, offsets)
        assert counted.live < 100, "made of tensors that were there, and a few numbers"
        few = counted.live
        doubled = nested * 2
        assert counted.live - few == UNIT
        del doubled
        assert counted.live == few


def test_stored_activations_and_backward_counted_by_hand():
    x = unit(requires_grad=True)
    with LiveBytes() as counted:
        y = x
        for _ in range(10):
            y = y.tanh()
        assert counted.live == 10 * UNIT
        loss = y.sum()
        del y
        counted.reset_peak()
        loss.backward()
        # The gradient of sum() is an expanded scalar (4 bytes); each tanh makes one gradient while it holds its own
        # output and the gradient given to it. The first two steps are the peak.
        assert counted.peak == 11 * UNIT + loss.nbytes + 4
        assert counted.live == x.grad.nbytes + loss.nbytes


def test_gradients_of_excluded_tensors_are_left_out_once_accumulated():
    model = nn.Sequential(*[nn.Linear(64, 64, bias=False) for _ in range(8)])
    x = torch.zeros(1, 64, requires_grad=True)
    weight = 64 * 64 * 4
    with LiveBytes(exclude=[model, x]) as counted:
        model(x).sum().backward()
        assert counted.live == 0
    assert weight <= counted.peak < 2 * weight, "one parameter's gradient at a time"
    for parameter in model.parameters():
        parameter.grad = None
    with LiveBytes() as counted:
        model(x).sum().backward()
        assert counted.live == 8 * weight


def test_excluded_gradients_that_exist_or_are_shared_or_freed():
    layer = nn.Linear(64, 64, bias=False)
    model = nn.Sequential(layer, layer)
    for _ in range(2):  # the first time .grad is made, the second time it is there
        with LiveBytes(exclude=model) as counted:
            model(torch.zeros(1, 64)).sum().backward()
            assert counted.live == 0
    with LiveBytes(exclude=model) as counted:
        model(torch.zeros(1, 64)).sum().backward()
        layer.weight.grad = None
        assert counted.live == 0


def test_gradients_given_back_by_grad_are_counted():
    layer = nn.Linear(64, 64, bias=False)
    with LiveBytes(exclude=layer) as counted:
        gradients = torch.autograd.grad(layer(torch.zeros(1, 64)).sum(), list(layer.parameters()))
        assert counted.live == gradients[0].nbytes


def test_counting_changes_no_number_and_leaves_no_hook():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.5), nn.Linear(16, 16))
    x = torch.randn(4, 16)

    def gradients() -> list[torch.Tensor]:
        torch.manual_seed(1)
        model.zero_grad(set_to_none=True)
        model(x).square().sum().backward()
        return [p.grad for p in model.parameters()]

    want = gradients()
    with LiveBytes(exclude=model):
        got = gradients()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_hooks_and_mode_go_when_the_block_raises():
    model = nn.Linear(2, 2)
    counted = LiveBytes(exclude=model)
    with pytest.raises(ZeroDivisionError), counted:
        raise ZeroDivisionError
    assert not model.weight._post_accumulate_grad_hooks
    _a = unit()
    assert counted.live == 0


def test_blocks_nest_and_can_be_entered_again():
    with LiveBytes() as outer:
        a = unit()
        with LiveBytes() as inner:
            b = unit()
        c = unit()
        assert (inner.live, outer.live) == (UNIT, 3 * UNIT)
    with inner:
        d = unit()
    assert (inner.live, outer.live) == (2 * UNIT, 3 * UNIT)
    del a, b, c, d
    assert (inner.live, outer.live) == (0, 0)


def test_device():
    with LiveBytes(device="cpu") as cpu, LiveBytes(device="meta") as meta, LiveBytes() as everywhere:
        _a, _b = unit(), torch.zeros(2048, device="meta")
        assert (cpu.live, meta.live, everywhere.live) == (UNIT, 2 * UNIT, UNIT)


def test_exclude_takes_modules_and_tensors_alone():
    with pytest.raises(SettingError, match="takes modules and tensors, got str"):
        LiveBytes(exclude=["weight"])


def step(model: nn.Module, x: torch.Tensor, recompute: bool = False) -> None:
    y = x
    for layer in model:
        y = checkpoint(layer, y, use_reentrant=False, preserve_rng_state=False) if recompute else layer(y)
    y.square().mean().backward()


def small_model() -> nn.Sequential:
    return nn.Sequential(*[nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64)) for _ in range(6)])


@pytest.mark.parametrize("recompute", [False, True], ids=["stored", "checkpointed"])
def test_peak_is_the_allocators(recompute):
    torch.manual_seed(0)
    model, x = small_model(), torch.randn(512, 64)
    step(model, x, recompute)  # what is made once per process is made here
    model.zero_grad(set_to_none=True)
    want = allocator_peak(lambda: step(model, x, recompute))
    model.zero_grad(set_to_none=True)
    with LiveBytes() as counted:
        step(model, x, recompute)
    assert counted.peak == pytest.approx(want, rel=0.002)


def test_fake_tensors_take_no_memory_but_stand_for_some():
    def peak(device: str | None) -> int:
        model, x = small_model(), torch.randn(512, 64)
        with LiveBytes(exclude=model, device=device) as counted:
            step(model, x)
        return counted.peak

    with FakeTensorMode():
        nothing, fake = peak(None), peak("meta")
    assert nothing == 0
    assert fake == peak(None)


@pytest.mark.gpu
def test_backward_on_another_thread_is_counted():
    """CUDA's backward pass runs on autograd's own thread; the allocator rounds each tensor up to 512 bytes."""
    torch.cuda.init()
    model, x = small_model().cuda(), torch.randn(4096, 64, device="cuda")
    step(model, x)
    model.zero_grad(set_to_none=True)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with LiveBytes() as counted:
        step(model, x)
    assert counted.peak == pytest.approx(torch.cuda.max_memory_allocated() - before, rel=0.02)

"""The private names of PyTorch that the engine stands on do what it expects of them, in every supported version."""

from __future__ import annotations

import pytest
import torch

from reversa.engine import _torch


def test_hooks_see_what_autograd_saves_and_give_it_back():
    packed, x = [], torch.randn(3, requires_grad=True)

    def pack(tensor):
        packed.append(tensor.detach().clone())
        return len(packed) - 1

    _torch.push_hooks(pack, lambda index: packed[index])
    try:
        y = x.exp()
    finally:
        _torch.pop_hooks()
    z = y * x  # saved in the ordinary way again
    assert len(packed) == 1
    packed[0].fill_(2.0)  # autograd believes what it is given back
    (g,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    assert torch.equal(g, torch.full_like(x, 2.0))
    assert z.requires_grad


def test_hooks_may_be_switched_off():
    assert _torch.hooks_allowed()
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        assert not _torch.hooks_allowed()
        assert _torch.under_transform()
    assert not _torch.under_transform()
    seen = []
    torch.func.grad(lambda x: (seen.append(_torch.under_transform()), x.sum())[1])(torch.ones(2))
    assert seen == [True]


def test_a_backward_pass_has_a_number_and_says_whether_its_graph_is_kept():
    seen, x = [], torch.ones(2, requires_grad=True)
    y = x * 2
    y.register_hook(lambda g: seen.append((_torch.graph_task(), _torch.graph_is_kept())))
    assert _torch.graph_task() == -1
    y.sum().backward(retain_graph=True)
    y.sum().backward()
    (one, kept), (two, freed) = seen
    assert one != two
    assert min(one, two) >= 0
    assert (kept, freed) == (True, False)


@pytest.mark.parametrize("old", [False, True], ids=["this version", "without _make_saved_tensor"])
def test_a_held_tensor_comes_back_unless_it_was_changed(old, monkeypatch):
    if old:
        monkeypatch.delattr(torch._C._autograd, "_make_saved_tensor", raising=False)
    x = torch.randn(3)
    held = _torch.hold(x)
    assert torch.equal(held.unpack(), x)
    assert torch.equal(held.unpack(), x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        held.unpack()


@pytest.mark.parametrize("old", [False, True], ids=["this version", "without _make_saved_tensor"])
def test_hooks_of_others_see_a_held_tensor(old, monkeypatch):
    if old:
        monkeypatch.delattr(torch._C._autograd, "_make_saved_tensor", raising=False)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t * 0 + 5, lambda t: t):
        held = _torch.hold(torch.ones(2))
    assert torch.equal(held.unpack(), torch.full((2,), 5.0))


def test_autocast_and_gradient_mode():
    assert not _torch.any_autocast()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert _torch.any_autocast()
    _torch.set_grad_enabled(False)
    try:
        assert not torch.is_grad_enabled()
    finally:
        _torch.set_grad_enabled(True)

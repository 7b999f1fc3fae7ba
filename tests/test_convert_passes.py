"""Several passes over converted blocks: in turn, side by side, interrupted, in threads, outside any module."""

from __future__ import annotations

import threading
from functools import partial

import pytest
import torch

from cases import assert_same, error, gradients, no_collector
from convert_cases import (
    EXACTLY,
    GAMMA,
    Block,
    Looped,
    assert_right,
    by_rule,
    leaf,
    looped,
    pair,
    ruled,
    straight,
    taps,
    train,
)
from reversa.convert import convert
from reversa.errors import StateChanged
from reversa.memory import LiveBytes


def walked(model: Looped, x):
    """The user's own loop over the blocks, outside the model."""
    return straight(list(model.blocks), x)


def test_blocks_called_in_a_loop_outside_any_module():
    model, reference = pair(looped(p=0.2))
    expected = train(reference, lambda x: straight(by_rule(reference.blocks, GAMMA), x), x := leaf(4, 6))
    assert_same(train(model, partial(walked, model), x), expected, EXACTLY)
    assert_same(train(model, partial(walked, model), x), expected, EXACTLY)


def test_outside_any_module_nothing_outlives_the_carried_tensor():
    model, x = convert(looped()), leaf(4, 6)
    walked(model, x)
    with no_collector(), LiveBytes(exclude=[model, x]) as counted:
        y = walked(model, x)
        y.sum().backward()
        del y
        assert counted.live == 0
        y = walked(model, x)  # and without a backward pass
        del y
        assert counted.live == 0


def test_a_block_called_alone():
    """The first block begins a pass; a later one has no velocity to go on with."""
    model, reference = pair(looped())
    x = leaf(4, 6)
    assert error(model.blocks[0](x), by_rule(reference.blocks, GAMMA)[0](x)) < EXACTLY
    with pytest.raises(StateChanged, match=r"blocks.2 \(block 2 of stage 'blocks'\)"):
        model.blocks[2](x)


# ---------------------------------------------------------------------- several passes


def test_two_forwards_before_one_backward():
    model, reference = pair(looped(p=0.3))
    x, y = leaf(4, 6), leaf(3, 6)
    assert_same(
        train(model, lambda x, y: (model(x), model(y)), x, y),
        train(reference, lambda x, y: (ruled(reference, GAMMA)(x), ruled(reference, GAMMA)(y)), x, y),
        EXACTLY,
    )


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["first in, first out", "last in, first out"])
def test_two_forwards_and_two_backwards(order):
    model, reference = pair(looped(p=0.3))
    inputs = leaf(4, 6), leaf(3, 6)
    results = []
    for module, call in ((model, model), (reference, ruled(reference, GAMMA))):
        torch.manual_seed(1)
        outputs = [call(x) for x in inputs]
        for i in order:
            outputs[i].square().sum().backward()
        results.append(gradients(module))
    assert_same(*results, EXACTLY)


def test_calls_in_between_that_record_nothing():
    model, reference = pair(looped(p=0.3))
    x = leaf(4, 6)

    def disturbed(x):
        y = model(x)
        state = torch.get_rng_state()
        with torch.no_grad():
            model(x)
        with torch.inference_mode():
            model.eval()(x)
        torch.set_rng_state(state)
        return y  # the backward pass finds the model in evaluation mode

    assert_same(train(model, disturbed, x), train(reference, ruled(reference, GAMMA), x), EXACTLY)


def test_a_preview_from_within_a_pass():
    """The rest of the network is run without gradients in the middle of a pass, as a stopping rule does it."""
    model, reference = pair(looped(depth=6))
    previews = []

    def previewing(blocks, x):
        x = straight(blocks[:3], x)
        with torch.no_grad():
            previews.append(model(x.clone()))
        return straight(blocks[3:], x)

    x = leaf(4, 6)
    expected = train(reference, ruled(reference, GAMMA), x)
    model.loop = lambda blocks, x: straight(blocks, x) if not torch.is_grad_enabled() else previewing(blocks, x)
    assert_same(train(model, model, x), expected, EXACTLY)
    with torch.no_grad():
        middle = straight(by_rule(reference.blocks, GAMMA)[:3], x)
        assert error(previews[0], ruled(reference, GAMMA)(middle)) < EXACTLY, "a pass of its own, with v = 0"


def siamese(blocks, x, y):
    """Two passes side by side through the same blocks."""
    for block in blocks:
        x, y = block(x), block(y)
    return x, y


def test_two_passes_side_by_side():
    model, reference = pair(looped(siamese, p=0.3))

    def by_hand(x, y):
        for one, other in zip(by_rule(reference.blocks, GAMMA), by_rule(reference.blocks, GAMMA), strict=True):
            x, y = one(x), other(y)
        return x, y

    args = leaf(4, 6), leaf(4, 6)
    assert_same(train(model, model, *args), train(reference, by_hand, *args), EXACTLY)


def test_a_graph_that_is_kept_and_used_twice():
    model, reference = pair(looped(p=0.3))
    x = leaf(4, 6)
    results = []
    for module, call in ((model, model), (reference, ruled(reference, GAMMA))):
        torch.manual_seed(1)
        loss = call(x).square().sum()
        loss.backward(retain_graph=True)
        loss.backward()
        results.append(gradients(module))
    assert_same(*results, EXACTLY)


@pytest.mark.parametrize("loop", [straight, taps], ids=lambda f: f.__name__)
def test_gradients_of_gradients(loop):
    model, reference = pair(looped(loop, depth=4, p=0.2))
    x = leaf(3, 6)
    results = []
    for module, call in ((model, model), (reference, ruled(reference, GAMMA))):
        torch.manual_seed(1)
        y = call(x)
        loss = sum(t.square().sum() for t in y) if isinstance(y, list) else y.square().sum()
        (g,) = torch.autograd.grad(loss, x, create_graph=True)
        g.square().sum().backward()
        results.append(gradients(module) | {"of x": x.grad})
        x.grad = None
    assert_same(*results, EXACTLY)


def test_a_subset_of_the_gradients():
    model, reference = pair(looped())
    x = leaf(4, 6)
    wanted = ("blocks.1.body.0.weight", "blocks.3.body.3.bias")
    actual = torch.autograd.grad(model(x).square().sum(), [model.get_parameter(n) for n in wanted])
    expected = torch.autograd.grad(
        ruled(reference, GAMMA)(x).square().sum(), [reference.get_parameter(n) for n in wanted]
    )
    assert all(error(a, b) < EXACTLY for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_an_exception_inside_the_loop(kind):
    fail = [False]

    def failing(blocks, x):
        for i, block in enumerate(blocks):
            if i == 3 and fail[0]:
                raise kind("in the middle")
            x = block(x)
        return x

    model, reference = pair(looped(failing, p=0.2))
    x = leaf(4, 6)
    model(x)
    fail[0] = True
    with no_collector(), LiveBytes(exclude=[model, x]) as counted:
        try:
            model(x)
        except kind as error:
            error.__traceback__ = None
        assert counted.live == 0
    fail[0] = False
    assert_same(train(model, model, x), train(reference, ruled(reference, GAMMA), x), EXACTLY)


def test_a_block_that_fails_once_and_is_called_again():
    """The chain is as it was before the block that failed."""

    class Failing(Block):
        fail = False

        def forward(self, x):
            y = super().forward(x)
            if self.fail:
                self.fail = False
                raise ValueError("once")
            return y

    def persistent(blocks, x):
        for block in blocks:
            try:
                x = block(x)
            except ValueError:
                x = block(x)
        return x

    model, reference = pair(looped(persistent, kind=Failing))
    model.blocks[2].fail = True
    assert_same(train(model, model, x := leaf(4, 6)), train(reference, ruled(reference, GAMMA), x), EXACTLY)


def test_threads_on_one_model():
    model, reference = pair(looped(depth=8))
    inputs = [leaf(4, 6) for _ in range(4)]
    actual: dict[int, torch.Tensor] = {}
    begin = threading.Barrier(4)

    def work(i: int) -> None:
        begin.wait()
        for walk in (model, partial(walked, model)) * 3:
            actual[i] = torch.autograd.grad(walk(inputs[i]).square().sum(), inputs[i])[0]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, x in enumerate(inputs):
        (expected,) = torch.autograd.grad(ruled(reference, GAMMA)(x).square().sum(), x)
        assert error(actual[i], expected) < EXACTLY


# ---------------------------------------------------------------------- frozen parameters and inputs


@pytest.mark.parametrize("frozen", ["first half", "last half", "weights", "all but one"])
@pytest.mark.parametrize("input_gradient", [True, False])
def test_frozen_parameters(frozen, input_gradient):
    model = looped(depth=6, p=0.2)
    for name, p in model.named_parameters():
        index = int(name.split(".")[1])
        p.requires_grad_(
            not {
                "first half": index < 3,
                "last half": index >= 3,
                "weights": "weight" in name,
                "all but one": index != 4,
            }[frozen]
        )
    assert_right(model, leaf(4, 6).detach().requires_grad_(input_gradient))

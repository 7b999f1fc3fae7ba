"""Conversion inside other people's loops: what happens between the blocks is right, or an error; never a wrong number."""

from __future__ import annotations

import copy
import threading
from functools import partial

import pytest
import torch
from torch import nn

from cases import assert_same, error, gradients, no_collector
from convert_cases import (
    Block,
    ExtraBlock,
    KeywordBlock,
    Looped,
    TupleBlock,
    by_rule,
    leaf,
    looped,
    perturbed,
    ruled,
    straight,
    train,
)
from reversa import Invert, Momentum, ReversaError
from reversa.convert import convert, explain
from reversa.errors import ReplayError, StateChanged
from reversa.memory import LiveBytes

GAMMA = 0.8
EXACTLY = 1e-12


def pair(model: Looped, **settings):
    """The converted model, and a copy from before for the oracle."""
    reference = copy.deepcopy(model)
    return convert(model, Momentum(GAMMA), **settings), reference


def assert_right(model: Looped, *args, example=None, key: int | str = 0, between: str = "error", **kwargs) -> None:
    """Outputs, gradients of parameters and inputs, generator and buffers are those of the same loop over the rule."""
    model, reference = pair(model, example=example, between=between)
    actual = train(model, model, *args, **kwargs)
    assert_same(actual, train(reference, ruled(reference, GAMMA, key), *args, **kwargs), EXACTLY)
    assert_same(train(model, model, *args, **kwargs), actual, 0)  # and nothing is left over for the next step


# ---------------------------------------------------------------------- loops that leave the carried tensor alone


def taps(blocks, x):
    """A loss on every hidden state."""
    return [x := block(x) for block in blocks]


def middle_tap(blocks, x):
    """The loss sees the state after two blocks, and the loop goes on to its end."""
    return taps(blocks, x)[1]


def early_exit(blocks, x):
    return straight(blocks[:3], x)


def skip_first(blocks, x):
    return straight(blocks[2:], x)


def skip_some(blocks, x):
    return straight([blocks[1], blocks[2], blocks[4]], x)


def first_alone(blocks, x):
    return blocks[0](x)


def last_alone(blocks, x):
    return blocks[-1](x)


def layer_drop(blocks, x):
    return straight([block for block in blocks if torch.rand(()) > 0.4], x)


def twice(blocks, x):
    """The second round begins with v = 0, as the first one did."""
    return straight(blocks, straight(blocks, x).tanh())


def twice_from_the_same(blocks, x):
    return straight(blocks, x) + straight(blocks, x)


def seen_another_way(blocks, x):
    for block in blocks:
        x = block(x).view_as(x)
    return x


def looked_at_between(blocks, x):
    norms = []
    for block in blocks:
        x = block(x)
        norms.append(x.square().sum(1))
    return x, torch.stack(norms)


def other_random_draws(blocks, x):
    """The user draws from the generator between dropouts."""
    for block in blocks:
        x = block(x)
        torch.rand(3)
    return x


KEEPING = [
    straight,
    taps,
    middle_tap,
    early_exit,
    skip_first,
    skip_some,
    first_alone,
    last_alone,
    layer_drop,
    twice,
    twice_from_the_same,
    seen_another_way,
    looked_at_between,
    other_random_draws,
]


@pytest.mark.parametrize("loop", KEEPING, ids=lambda f: f.__name__)
@pytest.mark.parametrize("p", [0.0, 0.3], ids=["plain", "dropout"])
def test_a_loop_over_the_blocks(loop, p):
    assert_right(looped(loop, p=p), leaf(4, 6))


@pytest.mark.parametrize("engine", [Invert(), Invert(keep=2), Invert(anchors=2)], ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_layer_drop(engine, seed):
    """Which blocks run is another draw in every step."""
    model, reference = pair(looped(layer_drop, depth=8, p=0.2), engine=engine)
    x = leaf(4, 6)
    assert_same(train(model, model, x, seed=seed), train(reference, ruled(reference, GAMMA), x, seed=seed), EXACTLY)


def test_detached_between_blocks():
    """The value goes on without its graph; the velocity keeps its own, as it does in a hand-written loop."""

    def detaching(blocks, x):
        for i, block in enumerate(blocks):
            x = block(x if i != 3 else x.detach())
        return x

    assert_right(looped(detaching), leaf(4, 6))


# ---------------------------------------------------------------------- blocks of every kind


def test_extra_arguments_by_position_and_by_keyword():
    assert_right(looped(kind=ExtraBlock), leaf(4, 6), leaf(4, 1), shift=leaf(6))
    assert_right(looped(kind=ExtraBlock), leaf(4, 6), 0.5, shift=None)


def test_each_block_gets_its_own_arguments():
    def own_arguments(blocks, x, scales, shifts):
        for i, block in enumerate(blocks):
            x = block(x, scales[i], shift=shifts[i] if i % 2 else None)
        return x

    assert_right(looped(own_arguments, kind=ExtraBlock), leaf(4, 6), leaf(5, 1), leaf(5, 6))


def test_arguments_made_by_the_blocks_before():
    """T5's position bias: an argument with a graph that reaches back into the chain."""

    def bias_of_the_first(blocks, x):
        bias = None
        for block in blocks:
            x = block(x, shift=bias)
            bias = x.mean(0) * 0.1 if bias is None else bias
        return x

    assert_right(looped(bias_of_the_first, kind=ExtraBlock), leaf(4, 6))
    model, x = convert(looped(bias_of_the_first, kind=ExtraBlock), Momentum(0.999)), leaf(4, 6)
    model(x)
    with no_collector(), LiveBytes() as counted:
        out = model(x)
        del out
        assert counted.live == 0, "arguments must not close a cycle"


def test_tuples_and_what_else_a_block_returns():
    def with_extras(blocks, x):
        extras = []
        for block in blocks:
            x, extra, nothing = block(x)
            extras.append(extra)
            assert nothing is None
        return x, extras

    assert_right(looped(with_extras, kind=TupleBlock), leaf(4, 6))


def by_name(blocks, x, memory):
    for block in blocks:
        x = block(memory=memory, hidden=x)
    return x


def by_place(blocks, x, memory):
    for block in blocks:
        x = block(memory, x)
    return x


@pytest.mark.parametrize(("loop", "key"), [(by_name, "hidden"), (by_place, 1)])
def test_the_carried_tensor_need_not_come_first(loop, key):
    args = leaf(4, 6), leaf(4, 6)
    assert_right(looped(loop, kind=KeywordBlock), *args, example=args, key=key)


def test_where_the_carried_tensor_cannot_be_guessed_there_is_an_error():
    """The structure alone suggests the first argument, of the same shape: the memory. That must not pass."""
    model = convert(looped(by_place, kind=KeywordBlock))
    with pytest.raises(ReversaError):
        model(leaf(4, 6), leaf(4, 6))


class Attributes(nn.Module):
    """No list: blocks that are attributes, called one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(3, 6)
        self.b1, self.b2, self.b3, self.b4 = (Block(p=0.2) for _ in range(4))
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.b4(self.b3(self.b2(self.b1(self.stem(x))))))


def test_blocks_that_are_attributes():
    model, x = perturbed(Attributes()), leaf(4, 3)
    reference = copy.deepcopy(model)
    convert(model, Momentum(GAMMA), example=x)
    assert [stage.name for stage in explain(model).stages] == ["b1-b4"]

    def by_hand(x):
        blocks = reference.b1, reference.b2, reference.b3, reference.b4
        return reference.head(straight(by_rule(blocks, GAMMA), reference.stem(x)))

    assert_same(train(model, model, x), train(reference, by_hand, x), EXACTLY)


class Nested(nn.Module):
    """Stages as Sequentials inside a Sequential; the last one is walked through by its owner."""

    def __init__(self) -> None:
        super().__init__()
        first = nn.Sequential(*(Block(6) for _ in range(3)))
        second = nn.Sequential(*(Block(4) for _ in range(4)))
        self.body = nn.Sequential(first, nn.Linear(6, 4), second)
        self.last = nn.Sequential(*(Block(4) for _ in range(3)), nn.ReLU())

    def forward(self, x):
        x = self.body(x)
        for layer in self.last:
            x = layer(x)
        return x


@pytest.mark.parametrize("example", [None, torch.zeros(2, 6)], ids=["by structure", "by example"])
def test_sequentials_called_nested_and_walked_through(example):
    model, x = perturbed(Nested()), leaf(4, 6)
    reference = copy.deepcopy(model)
    convert(model, Momentum(GAMMA), example=None if example is None else example.double())
    assert [(s.name, len(s.blocks)) for s in explain(model).stages] == [("body.0", 3), ("body.2", 4), ("last", 3)]

    def by_hand(x):
        first, between, second = reference.body
        x = straight(by_rule(second, GAMMA), between(straight(by_rule(first, GAMMA), x)))
        return reference.last[3](straight(by_rule(list(reference.last)[:3], GAMMA), x))

    assert_same(train(model, model, x), train(reference, by_hand, x), EXACTLY)


# ---------------------------------------------------------------------- outside any container


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


# ---------------------------------------------------------------------- loops that change the carried tensor


def plus_embedding(blocks, x):
    for i, block in enumerate(blocks):
        x = block(x if i != 2 else x + torch.linspace(0, 1, 6, dtype=x.dtype))
    return x


def in_place(blocks, x):
    for i, block in enumerate(blocks):
        if i == 2:
            x.add_(1.0)
        x = block(x)
    return x


def cloned(blocks, x):
    for i, block in enumerate(blocks):
        x = block(x if i != 2 else x.clone())
    return x


def normalised(blocks, x):
    for block in blocks:
        x = block(nn.functional.layer_norm(x, (6,)))
    return x


def used_twice(blocks, x):
    y = blocks[1](x := blocks[0](x))
    return blocks[2](x) + blocks[2](y)


def gone_back(blocks, x):
    x = straight(blocks[:3], x)
    return blocks[1](x)


def other_order(blocks, x):
    return straight([blocks[0], blocks[2], blocks[1], blocks[3]], x)


def part_of_the_batch(blocks, x):
    x = straight(blocks[:2], x)
    return straight(blocks[2:], x[:2])


CHANGING = {
    plus_embedding: (2, 1),
    in_place: (2, 1),
    cloned: (2, 1),
    normalised: (1, 0),
    used_twice: (2, 1),
    gone_back: (1, None),
    other_order: (1, None),
    part_of_the_batch: (2, 1),
}


@pytest.mark.parametrize("mode", ["train", "eval", "no_grad"])
@pytest.mark.parametrize("loop", CHANGING, ids=lambda f: f.__name__)
def test_a_loop_that_changes_the_carried_tensor_is_an_error(loop, mode):
    """In every mode: evaluation computes what training computes."""
    model, x = convert(looped(loop)), leaf(4, 6)
    model.train(mode == "train")
    block, before = CHANGING[loop]
    with torch.set_grad_enabled(mode != "no_grad"), pytest.raises(StateChanged) as caught:
        model(x)
    message = str(caught.value)
    assert f"blocks.{block} (block {block} of stage 'blocks')" in message
    assert before is None or f"block {before} " in message
    assert "between='carry'" in message


def test_after_the_error_the_model_is_as_it_was():
    model, reference = pair(looped(cloned))
    with pytest.raises(StateChanged):
        model(leaf(4, 6))
    model.loop = reference.loop = straight
    assert_same(train(model, model, x := leaf(4, 6)), train(reference, ruled(reference, GAMMA), x), EXACTLY)


@pytest.mark.parametrize("loop", [plus_embedding, cloned, normalised], ids=lambda f: f.__name__)
@pytest.mark.parametrize("p", [0.0, 0.3], ids=["plain", "dropout"])
def test_the_velocity_goes_on_where_that_is_asked_for(loop, p):
    assert_right(looped(loop, depth=6, p=p), leaf(4, 6), between="carry")


def test_a_state_changed_in_place_is_never_a_wrong_gradient():
    """The chain before the change needs the state that was overwritten."""
    model = convert(looped(in_place), between="carry")
    with pytest.raises(ReplayError):
        model(leaf(4, 6)).sum().backward()


def ends_in_place(blocks, x):
    return straight(blocks, x).relu_()


def exits_in_place(blocks, x):
    return straight(blocks[:3], x).relu_()


def followed_in_place(blocks, x):
    return nn.functional.relu(straight(blocks, x), inplace=True)


@pytest.mark.parametrize("loop", [ends_in_place, exits_in_place, followed_in_place], ids=lambda f: f.__name__)
@pytest.mark.parametrize("engine", [Invert(), Invert(keep=1), Invert(anchors=1)], ids=str)
@pytest.mark.parametrize("between", ["error", "carry"])
def test_the_output_changed_in_place_inside_the_model_is_never_a_wrong_gradient(loop, engine, between):
    """A backward pass from such a state would begin with the wrong one."""
    model, reference = pair(looped(loop), engine=engine, between=between)
    x = leaf(4, 6)
    expected = train(reference, ruled(reference, GAMMA), x)
    if engine.keep and loop is not exits_in_place:  # the last step stored its activations and needs no state
        assert_same(train(model, model, x), expected, EXACTLY)
    else:
        with pytest.raises(ReplayError, match="in place"):
            train(model, model, x)


def test_the_output_changed_in_place_outside_the_model_is_never_a_wrong_gradient():
    model = convert(looped())
    with pytest.raises(ReplayError, match="in place"):
        model(leaf(4, 6)).mul_(2).sum().backward()


def test_a_parameter_changed_before_the_backward_pass():
    model, x = convert(looped()), leaf(4, 6)
    loss = model(x).sum()
    with torch.no_grad():
        model.blocks[1].body[0].bias.add_(0.1)
    with pytest.raises(ReplayError, match=r"'bias' of Linear.*changed in place"):
        loss.backward()

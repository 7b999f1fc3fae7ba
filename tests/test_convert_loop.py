"""Conversion inside other people's loops over blocks of every kind."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from cases import assert_same, no_collector
from convert_cases import (
    EXACTLY,
    GAMMA,
    Block,
    ExtraBlock,
    KeywordBlock,
    TupleBlock,
    assert_right,
    bias_of_the_first,
    by_rule,
    leaf,
    looped,
    pair,
    perturbed,
    ruled,
    straight,
    taps,
    train,
)
from reversa import Invert, Momentum, ReversaError
from reversa.convert import convert, explain
from reversa.memory import LiveBytes


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

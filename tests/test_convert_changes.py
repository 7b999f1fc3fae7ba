"""Loops that change the carried tensor: an error that names the blocks, or the velocity goes on; no wrong number."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cases import assert_same
from convert_cases import (
    EXACTLY,
    GAMMA,
    assert_right,
    leaf,
    looped,
    pair,
    ruled,
    straight,
    train,
)
from reversa import Invert
from reversa.convert import convert
from reversa.errors import ReplayError, StateChanged


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

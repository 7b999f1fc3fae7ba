"""Converted models under torch.compile: the numbers are right, and blocks compiled in place share one graph."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from torch._dynamo.testing import CompileCounterWithBackend

from cases import assert_same, error
from convert_cases import (
    EXACTLY,
    GAMMA,
    TupleBlock,
    leaf,
    looped,
    pair,
    perturbed,
    ruled,
    train,
)
from reversa import Momentum
from reversa.convert import convert

quiet = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
    "ignore:The .grad attribute of a Tensor that is not a leaf",  # Dynamo looks at it
)


@pytest.fixture
def compiler():
    torch.compiler.reset()
    yield CompileCounterWithBackend("aot_eager")
    torch.compiler.reset()


@quiet
@pytest.mark.parametrize("p", [0.0, 0.3], ids=["plain", "dropout"])
def test_blocks_compiled_in_place_share_one_graph(compiler, p):
    """One graph serves every block, the forward pass and the replay; its code is the same in both directions."""
    model, reference = pair(looped(depth=6, p=p))
    for block in model.blocks:
        block.compile(backend=compiler)
    x = leaf(4, 6)
    expected = train(reference, ruled(reference, GAMMA), x)
    for _ in range(3):
        assert_same(train(model, model, x), expected, EXACTLY)
    assert compiler.frame_count == 1, "the blocks differ by their parameters alone"


@quiet
def test_compiled_blocks_that_return_tuples(compiler):
    def loop(blocks, x):
        extras = []
        for block in blocks:
            x, extra, _ = block(x)
            extras.append(extra)
        return x, extras

    model, reference = pair(looped(loop, kind=TupleBlock))
    for block in model.blocks[1:]:  # and one that is not
        block.compile(backend=compiler)
    x = leaf(4, 6)
    expected = train(reference, ruled(reference, GAMMA), x)
    for _ in range(2):  # a first call may be made without the compiler, to look at the block
        assert_same(train(model, model, x), expected, EXACTLY)
    assert compiler.frame_count > 0


@quiet
@pytest.mark.parametrize("used", [False, True], ids=["fresh", "after a step"])
def test_the_whole_model_compiled(compiler, used):
    """Right; the frame with the loop runs as ordinary Python."""
    model, reference = pair(looped())
    x = leaf(4, 6)
    expected = train(reference, ruled(reference, GAMMA), x)
    if used:
        train(model, model, x)
    compiled = torch.compile(model, backend=compiler)
    for _ in range(2):
        assert_same(train(model, compiled, x), expected, EXACTLY)
    with torch.no_grad():
        assert error(compiled(x), ruled(reference, GAMMA)(x)) < EXACTLY


@quiet
@pytest.mark.slow
def test_a_whole_resnet_compiled(compiler):
    model = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [3, 1, 1, 1], num_classes=5)
    model = perturbed(model)
    x = torch.randn(2, 3, 48, 48, dtype=torch.float64)
    convert(model, Momentum(GAMMA))
    plain = copy.deepcopy(model)
    expected = train(plain, plain, x)
    assert_same(train(model, torch.compile(model, backend=compiler), x), expected, 1e-10)
    assert compiler.frame_count > 0, "the stem and the head are compiled"


@quiet
@pytest.mark.parametrize("used", [False, True], ids=["fresh", "after a step"])
def test_a_block_put_back_compiled(compiler, used):
    """``torch.compile(block)`` instead of ``block.compile()``: another module stands in the list."""
    model, reference = pair(looped())
    x = leaf(4, 6)
    expected = train(reference, ruled(reference, GAMMA), x)
    if used:
        train(model, model, x)
    for i in range(5):
        model.blocks[i] = torch.compile(model.blocks[i], backend=compiler)
    actual = train(model, model, x)
    assert_same({k.replace("_orig_mod.", ""): v for k, v in actual.items()}, expected, EXACTLY)

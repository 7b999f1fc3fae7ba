"""What the tests of exact arithmetic share: one training step, and bits to compare."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

import reversa
from cases import gradients, loss_of
from reversa.engine import Engine
from reversa.exact import FixedPoint

Result = dict[str, Any]  # tensors, and None where there is no gradient
FIXED = {"int64": FixedPoint(), "int32": FixedPoint(bits=32)}


def trained(
    seq: reversa.ReversibleSequence,
    x: Tensor,
    under: AbstractContextManager[Any] | None = None,
    seed: int = 5,
    **extras: Any,
) -> Result:
    """One training step: the output, all gradients, buffers and the generator's next draw.

    Args:
        seq: the chain.
        x: its input.
        under: what the forward pass runs under.
        seed: of the generator.
        extras: further arguments of the chain.
    """
    torch.manual_seed(seed)
    with under or nullcontext():
        output = seq(x, **extras)
    loss_of(output).backward()
    result: Result = {"output": output[0] if isinstance(output, tuple) else output, "x": x.grad}
    result["random"] = torch.rand(3)
    result |= {f"extra {name}": t.grad for name, t in extras.items() if isinstance(t, Tensor)}
    return result | gradients(seq) | dict(seq.named_buffers())


def step(seq: reversa.ReversibleSequence, x: Tensor, engine: Engine, **extras: Any) -> Result:
    """One training step over copies of everything, with that engine."""
    seq, x, extras = copy.deepcopy((seq, x, extras))
    seq.engine = engine
    return trained(seq, x, **extras)


def assert_bit_equal(actual: Result, expected: Result) -> None:
    assert list(actual) == list(expected)
    pairs = {name: (actual[name], want) for name, want in expected.items()}
    wrong = [name for name, (have, want) in pairs.items() if not same_bits(have, want)]
    assert not wrong, wrong


def same_bits(actual: Tensor | None, expected: Tensor | None) -> bool:
    if actual is None or expected is None:
        return actual is expected
    return actual.dtype == expected.dtype and torch.equal(actual, expected)

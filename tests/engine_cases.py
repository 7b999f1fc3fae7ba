"""What the tests of the engines share: over what they run, and a chain beside the oracle."""

from __future__ import annotations

import copy

import pytest
import torch

from cases import CASES, DEPTH, ENGINES, INVERTERS, mlp
from oracle import Plain
from reversa.engine.sample import Sample
from reversa.schemes import Scheme

NAMES = ["momentum", "revnet"]

everywhere = pytest.mark.parametrize("engine", ENGINES)
inverting = pytest.mark.parametrize("engine", INVERTERS)
both = pytest.mark.parametrize("case", NAMES)


def pair(case: str, engine: str, depth: int = DEPTH):
    """A chain and the oracle over a copy of its functions, and one input for each."""
    found = CASES[case]
    seq = found.sequence([mlp().double() for _ in range(depth)], ENGINES[engine])
    plain = Plain(copy.deepcopy(seq.blocks), found.rule)
    x = found.input(4, 6)
    return seq, plain, x, x.detach().clone().requires_grad_()


def sample_bytes(scheme: Scheme, x: torch.Tensor, depth: int = 1) -> int:
    """What a chain holds of its arguments once more, to compare with what comes back: of steps 0, 16, 128, ..."""
    state = scheme.open(x.detach())
    sample = Sample(scheme.argument(state, 0), state, tolerance=0.0)
    number = sum(step < depth for step in (0, 16, 128, 1024))
    return number * sum(part.nbytes for part in vars(sample).values() if isinstance(part, torch.Tensor))

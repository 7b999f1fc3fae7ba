"""A model that somebody else wrote, with the momentum rule inside: its own loops and arguments, ordinary autograd."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from convert_cases import by_rule


def with_skip(call: Any) -> Any:
    """The rule subtracts x from what a block returns: for a block without a skip connection, give it one."""

    def block(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return call(x, *args, **kwargs) + x

    return block


def ruled(model: nn.Module, layers: Iterable[str], gamma: float, first: int = 0, residual: bool = False) -> nn.Module:
    """A copy in which the blocks of the named layers, from the first one on, hand on what the rule makes of them.

    Nothing of the library is in it: every block's ``forward`` is replaced by a plain function.
    """
    model = copy.deepcopy(model)
    for name in layers:
        blocks = [*model.get_submodule(name).children()][first:]
        calls = [with_skip(block.forward) if residual else block.forward for block in blocks]
        for block, rule in zip(blocks, by_rule(calls, gamma), strict=True):
            block.forward = rule  # type: ignore[method-assign]
    return model

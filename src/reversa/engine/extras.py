"""The arguments of a residual function beside the tensor that it carries on, recorded for the backward pass."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from reversa.errors import ReplayError


class _Argument:
    """Stands for the carried tensor inside recorded extra arguments."""


_ARGUMENT = _Argument()


class Extras:
    """The arguments of a residual function beside the carried tensor.

    They are recorded as detached aliases: an argument with a graph of its own would close a reference cycle through
    autograd's nodes that no garbage collector sees. An alias shares its tensor's version counter.
    """

    __slots__ = ("_flat", "_recorded", "args", "kwargs")

    def __init__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.args = args
        self.kwargs = kwargs
        self._flat: tuple[list[Any], TreeSpec] | None = None
        self._recorded: Recorded | None = None

    def record(self, argument: Tensor) -> Recorded | None:
        """The arguments without their graphs, and with a placeholder where the carried tensor itself is among them."""
        if not (self.args or self.kwargs):
            return None
        if self._flat is None:
            self._flat = tree_flatten((self.args, dict(self.kwargs)))
        leaves, spec = self._flat
        if any(leaf is argument for leaf in leaves):
            return Recorded(leaves, spec, argument)
        if self._recorded is None:
            self._recorded = Recorded(leaves, spec, None)
        return self._recorded


class Recorded:
    """Extra arguments as detached aliases, and the versions that they had."""

    __slots__ = ("leaves", "spec", "versions")

    def __init__(self, leaves: list[Any], spec: TreeSpec, argument: Tensor | None) -> None:
        self.leaves = [_alias(leaf, argument) for leaf in leaves]
        self.spec = spec
        tensors = [leaf for leaf in self.leaves if isinstance(leaf, Tensor) and not leaf.is_inference()]
        self.versions = [(tensor, tensor._version) for tensor in tensors]

    def given(self, argument: Tensor, where: object) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments for another evaluation.

        Raises:
            ReplayError: one of them was changed in place since.
        """
        for tensor, version in self.versions:
            if tensor._version != version:
                raise ReplayError(
                    f"{where}: an extra argument of shape {tuple(tensor.shape)} was changed in place between the "
                    "forward and the backward pass. Change a copy of it, or call backward() first."
                )
        leaves = [argument if leaf is _ARGUMENT else leaf for leaf in self.leaves]
        return cast(tuple[tuple[Any, ...], dict[str, Any]], tree_unflatten(leaves, self.spec))


def _alias(leaf: Any, argument: Tensor | None) -> Any:
    if leaf is argument and argument is not None:
        return _ARGUMENT
    return leaf.detach().requires_grad_(leaf.requires_grad) if isinstance(leaf, Tensor) else leaf

"""Modules of a block that are switched off for one call: they return zeros, and the block itself is not touched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from reversa.engine.steps import first_tensor
from reversa.errors import BlockError


@dataclass(frozen=True)
class Zeros:
    """What stands for a tensor that a module would return: zeros of these sizes.

    Attributes:
        sizes: None for a size that is the given tensor's along the same dimension.
        dtype: None for the given tensor's.
        carried: the block goes on with it, and may write to it.
    """

    sizes: tuple[int | None, ...]
    dtype: torch.dtype | None
    carried: bool

    def like(self, given: Tensor) -> Tensor:
        sizes = [given.shape[i] if size is None else size for i, size in enumerate(self.sizes)]
        return given.new_zeros(sizes if self.carried else (), dtype=self.dtype).expand(sizes)


@dataclass(frozen=True)
class Off:
    """A module that is switched off, and the form of what it returns then."""

    form: Any


Switches: TypeAlias = "dict[str, Off | Switches]"
"""The modules of a block that are switched off, by their names: a dictionary stands for a module that holds some."""


class Silent(nn.Module):
    """In a module's place: returns zeros in the form of its output. Its attributes are the module's."""

    def __init__(self, module: nn.Module, form: Any) -> None:
        # Made in every evaluation: what nn.Module sets up is the same for all of them.
        self.__dict__.update(_BLANK, training=module.training, form=form, _silenced=module)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = first_given(args, kwargs)
        return tree_map_only(Zeros, lambda zeros: zeros.like(given), self.form)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_silenced"], name)


def _nothing(*_: Any) -> None:
    pass


# Blocks with a fused kernel (torch.nn's), which computes everything whatever is switched off, take it where no hook is.
_BLANK = {**nn.Module().__dict__, "_forward_pre_hooks": {0: _nothing}}


def first_given(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The first tensor among a module's arguments, after which its zeros are made; None where there is none."""
    return next((leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)), None)


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def without(module: nn.Module, off: Switches) -> nn.Module:
    """The module with some of those inside it switched off: a shallow copy, which shares everything else with it.

    The copy itself has no hooks: those of a module inside a block see it when it computes something.

    >>> block = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True, norm_first=True)
    >>> x = torch.randn(1, 3, 4)
    >>> off = {"linear2": Off(Zeros((None, None, 4), None, True))}
    >>> y = without(block, off)(x)
    >>> attended = block.norm1(x)
    >>> torch.allclose(y, x + block.self_attn(attended, attended, attended)[0], atol=1e-6)
    True
    """
    shallow = object.__new__(type(module))
    shallow.__dict__.update(module.__dict__, **{hooks: {} for hooks in _HOOKS})
    inside = shallow.__dict__["_modules"] = dict(module._modules)
    for name, what in off.items():
        child: Any = inside[name]
        inside[name] = Silent(child, what.form) if isinstance(what, Off) else without(child, what)
    return shallow


def refuse_hooks(module: nn.Module, off: Switches) -> None:
    """Before such a call: hooks of a module that holds parts of both functions would see half of it each time.

    Raises:
        BlockError: there is one.
    """
    for name, what in off.items():
        child: Any = module._modules[name]
        if isinstance(what, Off):
            continue
        if child._forward_hooks or child._forward_pre_hooks:
            raise BlockError(
                f"{name} ({type(child).__name__}) has forward hooks, and holds modules of both of a block's functions: "
                "each call would show them half of it. Put the hooks on modules inside it, or on the block."
            )
        refuse_hooks(child, what)


def refuse_written(module: nn.Module, shallow: nn.Module) -> None:
    """After a call of the shallow copy: whatever it has set on itself would be lost.

    Raises:
        BlockError: it has set an attribute.
    """
    own, left = module.__dict__, shallow.__dict__
    for name in left:
        if name not in ("_modules", *_HOOKS) and own.get(name, left) is not left[name]:
            raise BlockError(
                f"{type(module).__name__} sets its attribute {name!r} when it is called, and two streams call it "
                "twice, with a part of its modules at a time. Return the value, set it in a module inside, or use "
                "another scheme, such as Momentum(gamma)."
            )


def form_of(output: Any, given: Tensor) -> Any:
    """What a module returns while it is switched off, from what it returned once for that tensor."""
    carried = first_tensor(output)

    def form(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            like = (i < given.dim() and given.shape[i] == size for i, size in enumerate(leaf.shape))
            sizes = tuple(None if same else size for same, size in zip(like, leaf.shape, strict=True))
            return Zeros(sizes, None if leaf.dtype == given.dtype else leaf.dtype, leaf is carried)
        return leaf if isinstance(leaf, (bool, int, float, str)) else None

    return tree_map(form, output)

"""The private names of PyTorch that exact arithmetic uses, in one place."""

# pyright: reportPrivateUsage=false, reportUnknownMemberType=false

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

_F: Any = torch._C._functorch  # type: ignore[attr-defined]


transforms_active = cast(Callable[[], bool], torch._C._are_functorch_transforms_active)  # type: ignore[attr-defined]


def maps_or_pushes_forward() -> bool:
    """Whether ``torch.func`` maps over a batch or differentiates forwards; ``torch.func.grad`` does neither."""
    stack = _F.get_interpreter_stack() or []
    other = (_F.TransformType.Vmap, _F.TransformType.Jvp)
    return forward_ad._current_level >= 0 or any(interpreter.key() in other for interpreter in stack)


def compile_graph(function: Callable[..., Any], examples: Sequence[Tensor]) -> Callable[..., Any]:
    """The function of tensors with these shapes, strides, types and devices, compiled by Inductor without Dynamo.

    Dynamo's guards look at each argument in each call, which takes longer than the arithmetic itself.
    """
    import torch._inductor
    from torch.fx.experimental.proxy_tensor import make_fx

    graph = cast(Any, make_fx)(function)(*examples)
    return cast(Callable[..., Any], cast(Any, torch._inductor).compile(graph, list(examples)))

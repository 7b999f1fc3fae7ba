"""The private names of PyTorch that exact arithmetic uses, in one place."""

# pyright: reportPrivateUsage=false, reportUnknownMemberType=false

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch.autograd import forward_ad

_F: Any = torch._C._functorch  # type: ignore[attr-defined]


transforms_active = cast(Callable[[], bool], torch._C._are_functorch_transforms_active)  # type: ignore[attr-defined]


def maps_or_pushes_forward() -> bool:
    """Whether ``torch.func`` maps over a batch or differentiates forwards; ``torch.func.grad`` does neither."""
    stack = _F.get_interpreter_stack() or []
    other = (_F.TransformType.Vmap, _F.TransformType.Jvp)
    return forward_ad._current_level >= 0 or any(interpreter.key() in other for interpreter in stack)

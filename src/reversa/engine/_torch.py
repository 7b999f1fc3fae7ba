"""The private names of PyTorch that the engine uses, in one place; a test pins them over the supported versions.

The public context managers around the saved-tensor hooks cost several microseconds a step; these do not.
"""

# pyright: reportPrivateUsage=false, reportUnknownMemberType=false

from __future__ import annotations

import atexit
import sys
from collections.abc import Callable, Iterable
from functools import wraps
from types import CodeType
from typing import Any, ParamSpec, Protocol, TypeVar, cast

import torch
from torch import Tensor

_C: Any = torch._C
_A: Any = _C._autograd

push_hooks = cast(
    Callable[[Callable[[Tensor], Any], Callable[[Any], Tensor]], None], _A._push_saved_tensors_default_hooks
)
pop_hooks = cast(Callable[[], None], _A._pop_saved_tensors_default_hooks)
hooks_allowed = cast(Callable[[], bool], _A._saved_tensors_hooks_is_enabled)
set_grad_enabled = cast(Callable[[bool], None], _C._set_grad_enabled)
any_autocast = cast(Callable[[], bool], _C._is_any_autocast_enabled)
graph_task = cast(Callable[[], int], _C._current_graph_task_id)
graph_is_kept = cast(Callable[[], bool], _A._get_current_graph_task_keep_graph)


class SavedTensor(Protocol):
    """A tensor in autograd's keeping: hooks of whoever is outside (a checkpoint, another chain) see it."""

    def unpack(self) -> Tensor: ...


class _FunctionHold(torch.autograd.Function):
    """Autograd's keeping without ``_make_saved_tensor`` (older PyTorch): the context of a node that is never run."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, needed: Tensor) -> Tensor:
        ctx.save_for_backward(tensor)
        return needed.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return None, None


class _HeldTensor:
    """A :class:`SavedTensor` made of a custom Function's node."""

    def __init__(self, tensor: Tensor) -> None:
        with torch.enable_grad():
            # The output keeps the node, and the node what it saved.
            self.output: Any = _FunctionHold.apply(tensor, torch.zeros((), requires_grad=True))

    def unpack(self) -> Tensor:
        return self.output.grad_fn.saved_tensors[0]


def hold(tensor: Tensor) -> SavedTensor:
    """Give a detached tensor into autograd's keeping, with its version checked when it is taken out again."""
    make = getattr(_A, "_make_saved_tensor", None)
    return cast(SavedTensor, make(tensor, is_output=False) if make else _HeldTensor(tensor))


def under_transform() -> bool:
    """Whether ``torch.func`` transforms are active, or saved-tensor hooks are switched off."""
    return not hooks_allowed() or _C._functorch.peek_interpreter_stack() is not None


def outside_dynamo(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, run by Python even where ``torch.compile`` traces its caller (imports Dynamo at first use only)."""
    return cast(Callable[..., Any], torch._disable_dynamo(function))  # type: ignore[attr-defined]


R = TypeVar("R")
P = ParamSpec("P")


def orderly(hook: Callable[P, R]) -> Callable[P, R]:
    """A hook of the backward pass that may raise.

    What is left of the graph then stays in autograd's queue until the thread's next backward pass, or its end: by then
    Python is gone, and taking the hooks apart crashes. So a backward pass of nothing is made before Python goes.
    """

    @wraps(hook)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return hook(*args, **kwargs)
        except BaseException:
            atexit.unregister(_empty_queue)
            atexit.register(_empty_queue)
            raise

    return run


def _empty_queue() -> None:
    with torch.enable_grad():
        torch.zeros((), device="cpu", requires_grad=True).neg().backward()


_skipped: set[CodeType] = set()


def skip_in_dynamo(codes: Iterable[CodeType]) -> None:
    """Keep Dynamo from compiling the hooks themselves when a compiled residual function calls them."""
    if "torch._dynamo" in sys.modules:
        from torch._dynamo.eval_frame import skip_code

        for code in set(codes) - _skipped:
            _skipped.add(code)
            skip_code(code)

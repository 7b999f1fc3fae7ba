"""One evaluation of a residual function, and the same evaluation once more.

The second evaluation happens in the backward pass, much later, and has to see what the first one saw: the same
parameters and buffers, extra arguments, training flags, random numbers and autocast. What can be put back is put
back for its duration; what was changed in place meanwhile is a :class:`~reversa.errors.ReplayError`. And it must
leave no trace: statistics move once, the generator ends where it was.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from reversa.engine import _torch
from reversa.engine.conditions import RandomState, autocast_as, autocast_now, random_state, restore_random_state
from reversa.engine.extras import Extras
from reversa.engine.steps import Place, first_tensor
from reversa.engine.watch import Watch
from reversa.errors import ReplayError
from reversa.schemes import Scheme, State

CHANGED_OUTPUT = (
    "the output of {where}, where a reversible chain ends, was changed in place before the backward pass, which starts "
    "from it. Use an out-of-place operation there (for instance ReLU(inplace=False))."
)

_replaying: ContextVar[bool] = ContextVar("reversa_replaying", default=False)


@contextmanager
def replaying() -> Generator[None]:
    """Inside, :func:`is_replaying`."""
    token = _replaying.set(True)
    try:
        yield
    finally:
        _replaying.reset(token)


def is_replaying() -> bool:
    """Whether a residual function is being evaluated for the second time, in the backward pass.

    Forward hooks of the functions run in both evaluations; a hook that must act once asks this.

    >>> is_replaying()
    False
    """
    return _replaying.get()


class Evaluation(Place):
    """One evaluation of one residual function, recorded so that it can be made again."""

    __slots__ = (
        *("autocast", "device", "extras", "f", "needs_grad", "random", "stand_ins", "streams_need_grad", "stride"),
        "watch",
    )

    def __init__(self, f: Callable[..., Any], argument: Tensor, extras: Extras, module: Any, number: int) -> None:
        self.f = f
        self.module = module
        self.number = number
        self.device = argument.device
        self.needs_grad = argument.requires_grad
        self.stride = argument.stride()
        self.extras = extras.record(argument)
        self.watch = Watch(module)
        self.autocast = autocast_now(argument.device)
        self.random: RandomState | None = None  # None: f drew no random numbers
        self.stand_ins: Sequence[Tensor] = ()
        self.streams_need_grad: tuple[bool, ...] = ()  # where the scheme multiplies them

    def as_given(self, argument: Tensor) -> Tensor:
        """A recovered argument, laid out in memory as the first one was: kernels and compiled code depend on it."""
        if argument.stride() == self.stride or 0 in self.stride:
            return argument.detach()
        return torch.empty_strided(argument.shape, self.stride, dtype=argument.dtype, device=argument.device).copy_(
            argument
        )

    def again(self, argument: Tensor) -> Any:
        """``f`` at ``argument`` under the conditions of the first evaluation, without side effects.

        Raises:
            ReplayError: a parameter, buffer or extra argument was changed in place since.
        """
        args, kwargs = ((), {}) if self.extras is None else self.extras.given(argument, self)
        undo: list[Callable[[], Any]] = []
        try:
            self.stand_ins = self.watch.install(undo, self)
            if self.random is not None:
                undo.append(partial(restore_random_state, random_state(self.device), self.device))
                restore_random_state(self.random, self.device)
            if self.autocast is None and not _torch.any_autocast():
                return self.f(argument, *args, **kwargs)
            with autocast_as(self.autocast, self.device):
                return self.f(argument, *args, **kwargs)
        finally:
            for action in reversed(undo):
                action()

    def value(self, argument: Tensor) -> Tensor:
        """What ``f`` returns there, without a graph."""
        value = first_tensor(self.again(self.as_given(argument)))
        return value if value.dtype == argument.dtype else value.to(argument.dtype)

    def multiplied(self, scheme: Scheme, state: State, value: Tensor) -> State:
        """The scheme's own part of a step, of which autograd saves something."""
        self.streams_need_grad = tuple(stream.requires_grad for stream in state)
        return scheme.forward(state, value, self.number)

    def multiplied_again(self, scheme: Scheme, state: State, value: Tensor) -> None:
        """The same with a state that was recovered, and so with the graph that it had."""
        streams = tuple(s.detach().requires_grad_(n) for s, n in zip(state, self.streams_need_grad, strict=True))
        self.stand_ins = (*self.stand_ins, *streams)
        with autocast_as(self.autocast, self.device):
            scheme.forward(streams, value, self.number)


Saved = list[tuple[torch.Size, torch.dtype, int]]
"""Shape, data type and version of every tensor that an evaluation saved, in order."""


class Unit(NamedTuple):
    """What a replayed step saved: the tensors, each until it is asked for, and what they were like then."""

    tensors: list[Tensor | None]
    saved: Saved


def evaluate_again(
    evaluation: Evaluation, scheme: Scheme, argument: Tensor, before: Callable[[Tensor], State], expected: Saved
) -> tuple[Unit, Tensor, State]:
    """Evaluate the ``f`` of a step once more.

    Args:
        evaluation: the first evaluation.
        scheme: the update rule.
        argument: what ``f`` is evaluated at.
        before: makes the state before the step from the value of ``f``.
        expected: what the step saved the first time.

    Returns:
        The tensors that the step saves, the value of ``f``, and the state before the step.

    Raises:
        ReplayError: it saves others than the first time.
    """
    leaf = evaluation.as_given(argument).requires_grad_(evaluation.needs_grad)
    tensors: list[Tensor] = []
    state: State | None = None
    _torch.set_grad_enabled(True)
    _torch.push_hooks(tensors.append, no_backward)
    try:
        value = first_tensor(evaluation.again(leaf))
        value = value if value.dtype == argument.dtype else value.to(argument.dtype)
        if scheme.multiplies:
            with torch.no_grad():
                state = before(value)
            evaluation.multiplied_again(scheme, state, value)
        captured: list[Tensor | None] = [*tensors]
        saved = [(tensor.shape, tensor.dtype, tensor._version) for tensor in tensors]
    finally:
        _torch.pop_hooks()
        _torch.set_grad_enabled(False)
        # Autograd keeps the hook, the hook keeps this list: a graph that it reached would never be freed.
        tensors.clear()
    if saved != expected:
        refuse_other_tensors(evaluation, leaf, expected, saved, captured)
    evaluation.stand_ins = ()
    return Unit(captured, saved), value, before(value) if state is None else state


def refuse_other_tensors(
    evaluation: Evaluation, argument: Tensor, expected: Saved, saved: Saved, captured: Sequence[Tensor | None]
) -> None:
    """Raise where an evaluation did not save what the first one saved.

    The versions of the argument and of buffers' stand-ins differ by right; any other difference is a tensor that was
    changed in place in between.

    Raises:
        ReplayError: tensors of another number, shape or data type, or with another version.
    """
    if [entry[:2] for entry in saved] != [entry[:2] for entry in expected]:
        raise ReplayError(
            f"{evaluation} saved {len(expected)} tensors for its gradient in the forward pass, and "
            f"{'others' if len(saved) == len(expected) else len(saved)} when it was evaluated again. It must compute "
            "the same thing twice: look for branches on state that it changes itself, a cache, or compiled code in "
            "one of the two evaluations only."
        )
    own = {tensor.untyped_storage()._cdata for tensor in (argument, *evaluation.stand_ins)}
    for tensor, (_, _, version), (shape, _, before) in zip(captured, saved, expected, strict=True):
        if version != before and tensor is not None and tensor.untyped_storage()._cdata not in own:
            raise ReplayError(
                f"{evaluation}: a tensor of shape {tuple(shape)} that its gradient needs was changed in place, "
                "later in the function or between the forward and the backward pass. Replace the in-place operation "
                "by an ordinary one, and call backward() before changing parameters."
            )


@_torch.orderly
def refuse_changed_later(evaluation: Evaluation) -> NoReturn:
    """Refuse to hand out a tensor that was written to after its function was evaluated again.

    Raises:
        ReplayError: always.
    """
    raise ReplayError(
        f"{evaluation}: a tensor that its gradient needs is changed in place later in the function. Replace the "
        "in-place operation by an ordinary one."
    )


def no_backward(_: Any) -> Tensor:
    """Refuse to unpack a tensor while its function is still being evaluated.

    Raises:
        ReplayError: always.
    """
    raise ReplayError(
        "a residual function computes gradients inside its own forward (torch.autograd.grad or backward). Its saved "
        "tensors are not kept by a reversible engine: use engine=Store() for this model."
    )

"""Two streams: a block's attention moves the one and its MLP the other, without a change to the block's code.

A pre-norm block computes ``g(x) = x + A(x) + M(x + A(x))``. While the modules of its MLP are switched off, so that they
return zeros, ``g(b) - b = A(b)``; while those of its attention are, ``g(a) - a = M(a)``. The autograd graph of one call
tells which modules these are, whatever their names.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from reversa.convert.branches import Branch, branches_of, parameters_behind
from reversa.convert.caches import stripped
from reversa.convert.find import FoundStage
from reversa.convert.record import Key, record
from reversa.convert.residual import Edge, edge_of
from reversa.convert.silent import Off, Switches, first_given, form_of, without
from reversa.convert.stage import Link, Place, continued, leave_link
from reversa.engine.steps import PlainSteps, first_tensor, with_value
from reversa.exact.joined import joined
from reversa.schemes import State

# ---------------------------------------------------------------------- which modules belong to which branch


@dataclass(frozen=True)
class Branches:
    """The modules of a block's attention, and those of its MLP."""

    attention: Switches
    mlp: Switches


@dataclass(frozen=True)
class _Ran:
    """A call of a module inside a block: where its output was made, and the form that it has."""

    edge: Edge
    form: Any


class _Answers(dict[str, "Branches | str"]):
    """What was found out about each block. It is filled by a copy of a module, which shares it."""

    def __deepcopy__(self, memo: Any) -> _Answers:
        return self


class Trial(nn.Module):
    """A model that is called to take its blocks apart."""

    def __init__(self, model: nn.Module, keys: Mapping[str, Key], answers: _Answers) -> None:
        super().__init__()
        self.model = model
        self.keys = keys
        self.answers = answers

    def forward(self, *args: Any, **kwargs: Any) -> None:
        with ExitStack() as hooks:
            for name, key in self.keys.items():
                block = self.model.get_submodule(name)
                hook = partial(self._take_apart, name, key)
                hooks.enter_context(block.register_forward_hook(hook, with_kwargs=True))
            self.model(*args, **kwargs)

    def _take_apart(
        self, name: str, key: Key, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any
    ) -> None:
        self.answers[name] = _take_apart(block, key, args, kwargs)


def separate(
    model: nn.Module, keys: Mapping[str, Key], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Branches | str]:
    """The branches of blocks, from one call of the model on fake tensors; or why a block has no two branches.

    Args:
        model: any module; it is not changed.
        keys: by the names of the blocks, where the carried tensor stands among their arguments.
        args: positional arguments of the model.
        kwargs: keyword arguments of the model.

    Raises:
        ConversionError: the model cannot be copied, or not be run on fake tensors with these arguments.

    >>> block = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, norm_first=True)
    >>> branches = separate(block, {"": 0}, (torch.zeros(1, 3, 4),), {})[""]
    >>> list(branches.attention), list(branches.mlp)
    (['norm1', 'self_attn', 'dropout1'], ['norm2', 'linear1', 'dropout', 'linear2', 'dropout2'])
    """
    answers = _Answers()
    record(Trial(model, keys, answers), args, kwargs)
    return {name: answers.get(name, "it was not called") for name in keys}


def two_branches(
    model: nn.Module, stages: Sequence[FoundStage], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[dict[str, Branches], dict[str, str]]:
    """The branches of the blocks of those stages in which every block has two; and of the others, why not."""
    answers = separate(model, {name: found.key for found in stages for name in found.blocks}, args, kwargs)
    unfit: dict[str, str] = {}
    for found in stages:
        reason = next((f"{name}: {why}" for name in found.blocks if isinstance(why := answers[name], str)), None)
        if reason is not None:
            unfit[found.name] = reason
    fit = {name: found for name, found in answers.items() if not isinstance(found, str)}
    return fit, unfit


def _take_apart(block: nn.Module, key: Key, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Branches | str:
    """The branches of a block, on fake tensors; or why there are no two."""
    args, kwargs = stripped(args, kwargs)  # a cache would be filled several times
    given = args[key] if isinstance(key, int) else kwargs[key]
    x = given.detach().requires_grad_().clone()  # of which nothing else was made before
    if isinstance(key, int):
        args = (*args[:key], x, *args[key + 1 :])
    else:
        kwargs = {**kwargs, key: x}
    versions = _versions(block)
    with _calls_inside(block) as ran:
        y = first_tensor(type(block).forward(block, *args, **kwargs))
    written = {name for name, version in _versions(block).items() if versions.get(name) != version}
    if not isinstance(y, Tensor) or not y.requires_grad:
        return "it does not return a tensor with a gradient, or a tuple that begins with one"
    found = branches_of(edge_of(y), edge_of(x))
    if isinstance(found, str):
        return found
    mine = [_outermost(one, other, ran) for one, other in (found, found[::-1])]
    for what, branch, off in zip(("attention", "MLP"), found, mine, strict=True):
        if not branch.vanishes_with({ran[name].edge for name in off}):
            return f"its {what} does not end with a module of its own that could be switched off"
        try:
            left = first_tensor(type(block).forward(without(block, _tree(off)), *args, **kwargs))
        except Exception as error:
            reason = str(error).strip().split("\n", 1)[0]
            return f"it does not run with its {what} switched off ({type(error).__name__}: {reason})"
        gone = {id(p) for name in off for p in block.get_submodule(name).parameters()}
        if not isinstance(left, Tensor) or left.shape != x.shape or gone & parameters_behind(left):
            return f"its {what} computes even with its modules switched off"
    shared = [name for name in written if not any(name.startswith(f"{path}.") for off in mine for path in off)]
    if shared:
        return f"it writes to its buffer {shared[0]!r}, which both of its functions would move"
    return Branches(*map(_tree, mine))


def _versions(block: nn.Module) -> dict[str, int]:
    """Of each buffer how often it was written to."""
    return {name: buffer._version for name, buffer in block.named_buffers()}


@contextmanager
def _calls_inside(block: nn.Module) -> Iterator[dict[str, _Ran]]:
    """The modules inside a block that are called once while the context lasts, in the order of their ends."""
    ran: dict[str, _Ran] = {}
    times: Counter[str] = Counter()

    def after(name: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        times[name] += 1
        given, carried = first_given(args, kwargs), first_tensor(output)
        if given is not None and isinstance(carried, Tensor) and carried.requires_grad:
            ran[name] = _Ran(edge_of(carried), form_of(output, given))

    with ExitStack() as hooks:
        for name, module in block.named_modules():
            if name:
                hooks.enter_context(module.register_forward_hook(partial(after, name), with_kwargs=True))
        yield ran
    for name in [name for name, count in times.items() if count > 1]:
        ran.pop(name, None)


def _outermost(branch: Branch, other: Branch, ran: dict[str, _Ran]) -> dict[str, Off]:
    """The modules whose outputs lie in this branch alone, without those inside of others."""
    lie = {name: Off(call.form) for name, call in ran.items() if call.edge in branch.edges - other.edges}
    return {name: off for name, off in lie.items() if not any(name.startswith(f"{outer}.") for outer in lie)}


def _tree(off: Mapping[str, Off]) -> Switches:
    tree: Switches = {}
    for path, what in off.items():
        *parents, name = path.split(".")
        inner: Any = tree
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[name] = what
    return tree


# ---------------------------------------------------------------------- the blocks of a converted model


@dataclass(eq=False)
class Streams(Place):
    """Where a converted block stands whose attention and MLP take a step each."""

    branches: Branches | None = None
    """None until its first call, where the conversion made no pass."""


def streams_of(link: Link, x: Tensor) -> State:
    """The state that the block before left; x is what it returned, or what was put in that one's place.

    Gradients follow the tensor that was really passed. Where it is another over the same memory (detached, or wrapped
    by FSDP2), the mean of the streams has the gradient of that one, and only their difference that of the hidden state.
    """
    if link.head is not None:
        return link.head, *link.hidden
    *rest, a = link.hidden
    b = rest[0]
    if torch.is_grad_enabled() and (x is not link.ref() or x.retains_grad):
        a, b = joined((a.detach(), b.detach()), ((1.0, 1.0), (1.0, -1.0)), x, (a - b) / 2)
    return a, b, *rest[1:]


def left_behind(state: State, y: Tensor) -> State:
    """What a block leaves for the next one, in the form of a :class:`Link`: the tensor that it returns, then the rest.

    The output is none of the streams here, so the first stream is hidden as well. It comes last: what is there for a
    pass that goes on with another tensor in the output's place is the state without it, as everywhere.
    """
    return (y, *state[1:], state[0])


def two_steps(
    block: nn.Module,
    place: Streams,
    functions: Sequence[Callable[..., Any]],
    x: Tensor,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    once: bool,
) -> Any:
    """The steps of a block's attention and of its MLP, within the model's own loop.

    Args:
        block: the converted block.
        place: where it stands.
        functions: the residual functions of its attention and of its MLP.
        x: the carried tensor.
        args: the block's other arguments; both steps are given them.
        kwargs: its keyword arguments.
        once: no step may be evaluated again.

    Returns:
        What the block returns where its attention runs, with the new carried tensor in its place.
    """
    stage = place.stage
    with continued(place, x) as link:
        scheme = stage.scheme_of(link, x, block.training)
        state = scheme.open(x) if link is None else streams_of(link, x)
        steps = stage.begin(scheme) if link is None else link.steps
        before, made = steps.taken, PlainSteps(scheme, steps.taken) if once else steps
        state, output = made.step(functions[0], state, args, kwargs, module=block)
        output = with_value(output, x)  # the value is let go
        try:
            state, _ = made.step(functions[1], state, args, kwargs, module=block)
        except BaseException:
            if link is not None and steps.taken > before:  # half of the block is done, and cannot be undone
                link.steps = stage.afresh(steps, before)
            raise
        if once:
            steps = stage.afresh(steps, made.taken)
    y = scheme.close(state)
    leave_link(place, left_behind(state, y), steps)
    return with_value(output, y)

"""The two branches of a block, read off its autograd graph: what it adds to its input, and what it adds to that sum."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from reversa.convert.residual import ADDITION, PASSING, Edge, after_addition, leads, operands_of

_SUM = re.compile(r"(Add|Sub|Stack|Cat)Backward\d*$")
_PRODUCT = re.compile(r"MulBackward\d*$")
_LINEAR = re.compile(
    rf"{PASSING.pattern}|(Div|Neg|Sum|Mean|Slice|Select|Split(WithSizes)?|Unbind|Roll|Flip|ConstantPadNd)Backward\d*$"
)
_DROPOUT = re.compile(r"Dropout")


@dataclass(frozen=True, eq=False)
class Branch:
    """What a block computes of its carried tensor and adds to it.

    Attributes:
        ends: the places in the graph that are added.
        edges: all places between the carried tensor and the ends.
    """

    ends: list[Edge]
    edges: set[Edge]

    def vanishes_with(self, zeros: set[Edge]) -> bool:
        """Whether what is added is zero where the tensors made at those places are."""
        known: dict[Edge, bool] = dict.fromkeys(zeros, True)
        return all(_vanishes(end, known) for end in self.ends)


def branches_of(output: Edge, source: Edge) -> tuple[Branch, Branch] | str:
    """What the block's last residual addition adds, and what those before it add: the MLP, and the attention.

    Args:
        output: where the block's output was made.
        source: where its input was made, of which nothing else in the graph was made before.

    Returns:
        The attention's branch (of a decoder's block, with that to the encoder's memory) and the MLP's; or why the block
        is not ``x + A(x) + M(x + A(x))``.

    >>> import torch
    >>> from reversa.convert.residual import edge_of
    >>> x = torch.ones(2, requires_grad=True).clone()
    >>> y = x + x.exp()
    >>> attention, mlp = branches_of(edge_of(y + y.tanh()), edge_of(x))
    >>> [edge[0].name() for edge in (*attention.ends, *mlp.ends)]
    ['ExpBackward0', 'TanhBackward0']
    >>> branches_of(edge_of(y), edge_of(x))
    'it has one residual addition, and so no second function for the second stream'
    """
    path, sums = _skip_path(output, source)
    if path[-1] != source:
        acts = after_addition(output, source)
        what = f" ({', '.join(acts)})" if acts else ""
        return (
            "its input does not go through it by residual additions alone: something acts on a sum"
            f"{what}, scales it, or is added that is no function of it"
        )
    if len(sums) < 2:
        number = "one residual addition" if sums else "no residual addition"
        return f"it has {number}, and so no second function for the second stream"
    last, *first = sums
    between = set(path[path.index(last) + 1 : path.index(first[0]) + 1])
    mlp, met = _branch([last], path)
    if not met & set(path) <= between:
        return "its last residual function is not one of the sum before it alone (parallel branches)"
    return _branch(first, path)[0], mlp


def _skip_path(output: Edge, source: Edge) -> tuple[list[Edge], list[Edge]]:
    """The way from a block's output back to its input over additions and views alone, as far as it leads; and the
    residual additions on it, the last one first.
    """
    path, sums = [output], []
    while path[-1] != source:
        operands = _carried(path[-1])
        skip = next((operand for operand in operands if leads(operand, source, _carried)), None)
        if skip is None or not _adds_functions(path[-1], skip, source):
            break
        if any(operand != skip and leads(operand, source, operands_of) for operand in operands):
            sums.append(path[-1])
        path.append(skip)
    return path, sums


def _adds_functions(edge: Edge, skip: Edge, source: Edge) -> bool:
    """Whether a place hands the carried tensor on with nothing but functions of it added: no sign, factor, constant."""
    node, operands = edge[0], edge[0].next_functions
    if not ADDITION.match(node.name()):
        return True
    first = operands[0] == skip
    if not first and (not node.name().startswith("Add") or getattr(node, "_saved_alpha", 1) != 1):
        return False
    others = [operand for operand in operands_of(edge) if operand != skip]
    return len(others) == len(operands) - 1 and all(leads(other, source, operands_of) for other in others)


def _carried(edge: Edge) -> list[Edge]:
    """The operands that a place hands on as they are, but for what is added to them."""
    name = edge[0].name()
    if ADDITION.match(name):
        return operands_of(edge)
    return operands_of(edge)[:1] if PASSING.match(name) and not _DROPOUT.search(name) else []


def _branch(sums: Iterable[Edge], path: list[Edge]) -> tuple[Branch, set[Edge]]:
    """What these additions add; and where on the path it begins."""
    on_path = set(path)
    ends = [operand for edge in sums for operand in operands_of(edge) if operand not in on_path]
    edges, met, waiting = set(ends), set[Edge](), list(ends)
    while waiting:
        for operand in operands_of(waiting.pop()):
            if operand in on_path:
                met.add(operand)
            elif operand not in edges:
                edges.add(operand)
                waiting.append(operand)
    return Branch(ends, edges), met


def _vanishes(edge: Edge, known: dict[Edge, bool]) -> bool:
    """Whether what was made there is zero; what is known of other places is looked up, and added to."""
    if edge not in known:
        known[edge] = False  # a graph has no cycles: only to say that it is being looked at
        known[edge] = _is_zero(edge, known)
    return known[edge]


def _is_zero(edge: Edge, known: dict[Edge, bool]) -> bool:
    name, operands = edge[0].name(), edge[0].next_functions

    def zero(operand: Any) -> bool:
        return operand[0] is not None and _vanishes(operand, known)

    if _SUM.match(name):
        return len(operands) > 1 and all(map(zero, operands))  # one without a gradient is none of the modules'
    if _PRODUCT.match(name):
        return any(map(zero, operands))
    return bool(operands) and _LINEAR.match(name) is not None and zero(operands[0])


def parameters_behind(tensor: Tensor) -> set[int]:
    """Identities of the leaves that the tensor was computed from."""
    start: Any = tensor.grad_fn
    waiting, seen = [start], {start}
    while waiting:
        new = {node for node, _ in waiting.pop().next_functions if node is not None} - seen
        seen |= new
        waiting += new
    return {id(node.variable) for node in seen if hasattr(node, "variable")}

"""Is a block a residual block? Its autograd graph knows: walk back from the output to the input along the skip path.

The skip path may pass through views, copies, scalings, activations and normalisations. Where it meets an addition whose
other side depends on the input too, the block has computed ``x + f(x)``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

Edge = tuple[Node, int]
"""A node of the graph and the number of its output: the place in the graph where one tensor was made."""

ADDITION = re.compile(r"(Add|Sub|Addcmul|IndexAdd)Backward\d*$")
_SCALING = re.compile(r"(Mul|Div)Backward\d*$")
_FACTOR = re.compile(r"AccumulateGrad|RsqrtBackward")
PASSING = re.compile(
    r"(Clone|(Unsafe)?View|ReshapeAlias|Alias|AsStrided|Transpose|Permute|T|(Uns|S)queeze|Expand|Clamp(Min|Max)?|ToCopy"
    r"|NativeDropout)Backward\d*$"
)
_AFTER = {
    re.compile(r"[Rr]elu|Hardtanh|Threshold"): "relu",
    re.compile(r"[Ee]lu|Silu|Hardswish|Hardsigmoid|Mish|Tanh|Sigmoid|Softplus"): "activation",
    re.compile(r"(Layer|Batch|Group|R[Mm][Ss]|Instance)_?[Nn]orm"): "norm",
}


def edge_of(tensor: Tensor) -> Edge:
    """Where a tensor that requires a gradient was made."""
    edge = get_gradient_edge(tensor)
    return edge.node, edge.output_nr


def after_addition(output: Edge, source: Edge) -> tuple[str, ...] | None:
    """What acts on ``x + f(x)`` before it leaves the block, outermost first; None without a residual addition.

    Args:
        output: where the block's output was made.
        source: where its input x was made.

    Returns:
        ``()`` for ``x + f(x)``, ``("relu",)`` for ``relu(x + f(x))``, ``("norm",)`` for ``norm(x + f(x))``.

    >>> import torch
    >>> x = torch.ones(2, requires_grad=True)
    >>> after_addition(edge_of(torch.relu(x + x.exp())), edge_of(x))
    ('relu',)
    >>> after_addition(edge_of(torch.relu(x.exp())), edge_of(x)) is None
    True
    """
    acts: list[str] = []
    edge = output
    while edge != source:
        operands = _skip(edge)
        skip = next((operand for operand in operands if leads(operand, source, _skip)), None)
        if skip is None:
            return None
        if ADDITION.match(edge[0].name()) and _is_residual(operands, skip, source):
            return tuple(acts)
        acts += filter(None, [_act(edge[0])])
        edge = skip
    return None


def _is_residual(operands: list[Edge], skip: Edge, source: Edge) -> bool:
    """Whether the other side of the addition depends on the block's input, too."""
    others = list(operands)
    others.remove(skip)
    return any(leads(other, source, operands_of) for other in others)


def _act(node: Node) -> str | None:
    """What a node of the skip path does to the sum, if it is more than a view or a scaling."""
    name = node.name()
    if _SCALING.match(name) and any("Rsqrt" in operand.name() for operand, _ in operands_of((node, 0))):
        return "norm"  # written by hand: x * rsqrt(mean(x**2) + eps)
    return next((act for pattern, act in _AFTER.items() if pattern.search(name)), None)


def operands_of(edge: Edge) -> list[Edge]:
    """The places where a node's differentiable operands were made."""
    return [(node, number) for node, number in edge[0].next_functions if node is not None]


def _skip(edge: Edge) -> list[Edge]:
    """The operands along which the skip path may go on; none where the node is part of ``f``."""
    name, operands = edge[0].name(), operands_of(edge)
    if ADDITION.match(name):
        return operands
    if _SCALING.match(name):
        scaled = [operand for operand in operands if not _FACTOR.search(operand[0].name())]
        return scaled if len(scaled) == 1 else []
    return operands[:1] if PASSING.match(name) or _act(edge[0]) else []


def leads(start: Edge, goal: Edge, follow: Callable[[Edge], Iterable[Edge]]) -> bool:
    """Whether some walk from one place in the graph reaches the other."""
    waiting, seen = [start], {start}
    while waiting:
        edge = waiting.pop()
        if edge == goal:
            return True
        new = [operand for operand in follow(edge) if operand not in seen]
        seen.update(new)
        waiting += new
    return False

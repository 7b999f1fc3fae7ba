"""A training step, and the same with the momentum rule over stored activations, written without the library."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from zoo_models import Inputs

GAMMA = 0.9

# ------------------------------------------------------------------ the same rule, with stored activations


class Rule:
    """Sander et al. 2021 over the blocks of a stage: ``v' = gamma v + (1 - gamma) (block(x) - x)``, ``x' = x + v'``.

    Here x is the first argument that has the output's shape. The velocity is a lerp, because statistics can be compared
    to the bit only where both sides round alike.
    """

    def __init__(self) -> None:
        self.velocity: Tensor | None = None
        self.drew = False
        """Whether a block took random numbers."""

    def step(self, block: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        generator = torch.get_rng_state()
        output = block(*args, **kwargs)
        self.drew |= not torch.equal(generator, torch.get_rng_state())
        y = output[0] if isinstance(output, tuple) else output
        x = next(a for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and a.shape == y.shape)
        before = torch.zeros_like(x) if self.velocity is None else self.velocity
        self.velocity = torch.lerp(y - x, before, GAMMA)
        moved = x + self.velocity
        return (moved, *output[1:]) if isinstance(output, tuple) else moved


@contextmanager
def ruled(model: nn.Module, stages: Iterable[Sequence[str]]) -> Iterator[list[Rule]]:
    """For one forward pass: the blocks of each stage share a velocity, which begins at zero."""
    rules: list[Rule] = []
    blocks = [[model.get_submodule(name) for name in names] for names in stages]
    for stage in blocks:
        rules.append(Rule())
        for block in stage:
            block.forward = partial(rules[-1].step, block.forward)
    try:
        yield rules
    finally:
        for block in (block for stage in blocks for block in stage):
            del block.forward


# ------------------------------------------------------------------ one training step


def outputs_of(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """The floating-point tensors of the output, without a cache, which nobody trains with."""
    output = model(*inputs[0], **inputs[1])
    if hasattr(output, "past_key_values"):
        output.past_key_values = None
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def loss_of(outputs: list[Tensor]) -> Tensor:
    """Each element of each output has a weight of its own."""
    weighted = [(y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape) + y**2 / 2).sum() for y in outputs]
    return torch.stack(weighted).sum()


@dataclass
class Step:
    """What a training step leaves behind."""

    outputs: list[Tensor]
    gradients: dict[str, Tensor | None]
    state: dict[str, Tensor]

    @property
    def everything(self) -> list[Tensor | None]:
        return [*self.outputs, *self.gradients.values(), *self.state.values()]


def step(model: nn.Module, inputs: Inputs, seed: int = 5) -> Step:
    leaves = {f"input {i}": t for i, t in enumerate(tree_leaves(inputs)) if isinstance(t, Tensor) and t.requires_grad}
    leaves |= dict(model.named_parameters())
    for leaf in leaves.values():
        leaf.grad = None
    torch.manual_seed(seed)
    outputs = outputs_of(model, inputs)
    loss_of(outputs).backward()
    state = {name: buffer.clone() for name, buffer in model.named_buffers()} | {"next random number": torch.rand(3)}
    return Step([y.detach() for y in outputs], {name: leaf.grad for name, leaf in leaves.items()}, state)


def same(one: Iterable[Tensor | None], other: Iterable[Tensor | None]) -> bool:
    pairs = zip(one, other, strict=True)
    return all(a is b if a is None or b is None else torch.equal(a, b) for a, b in pairs)


def worst_error(actual: Step, expected: Step) -> float:
    """Over all outputs and gradients; infinite where one has a gradient and the other none."""
    tensors = [t for t in expected.gradients.values() if t is not None]
    least = 1e-6 * max(float(t.abs().max()) for t in tensors)
    errors = [relative(a, b, 0.0) for a, b in zip(actual.outputs, expected.outputs, strict=True)]
    errors += [relative(actual.gradients[name], expected.gradients[name], least) for name in expected.gradients]
    return max(errors)


def relative(actual: Tensor | None, expected: Tensor | None, least: float) -> float:
    if actual is None or expected is None:
        return 0.0 if actual is expected else float("inf")
    difference = float((actual - expected).abs().max())
    return difference / max(float(expected.abs().max()), least) if difference == difference else float("inf")

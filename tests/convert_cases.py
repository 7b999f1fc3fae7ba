"""What the tests of conversion share: home-made blocks and loops, the rule as plain functions, one training step.

The oracle never runs the library: the same user's loop goes over plain functions that apply the momentum rule to the
blocks' own outputs, with ordinary autograd and one velocity.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from cases import Result, assert_same, gradients, loss_of
from oracle import carried, rejoin
from reversa import Momentum
from reversa.convert import convert

Loop = Callable[..., Any]


def perturbed(model: nn.Module) -> nn.Module:
    """The model in float64, with nothing left at zero or one, so that no branch hides behind its initialisation."""
    model.double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
        for name, b in model.named_buffers():
            if name.endswith("running_mean"):
                b.normal_(std=0.1)
            elif name.endswith("running_var"):
                b.uniform_(0.5, 1.5)
    return model


# ---------------------------------------------------------------------- blocks and the modules around them


class Block(nn.Module):
    """A residual block without a name that anybody knows."""

    def __init__(self, width: int = 6, p: float = 0.0) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Dropout(p), nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class ExtraBlock(Block):
    """Extra arguments with gradients, by position and by keyword."""

    def forward(self, x: Tensor, scale: Tensor | float = 1.0, *, shift: Tensor | None = None) -> Tensor:
        y = self.body(x) * scale
        return x + (y if shift is None else y + shift)


class TupleBlock(Block):
    """The carried tensor first, then something that the user wants to see."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, None]:
        y = self.body(x)
        return x + y, y.sigmoid(), None


class KeywordBlock(Block):
    """The carried tensor is the second argument, given by its name."""

    def forward(self, memory: Tensor, hidden: Tensor) -> Tensor:
        return hidden + self.body(hidden) * memory


class Looped(nn.Module):
    """A list of blocks and the user's loop over them."""

    def __init__(self, blocks: Iterable[nn.Module], loop: Loop) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.loop = loop

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.loop(list(self.blocks), x, *args, **kwargs)


def straight(blocks: Sequence[Loop], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    for block in blocks:
        x = block(x, *args, **kwargs)
    return x


def looped(loop: Loop = straight, depth: int = 5, kind: Callable[..., nn.Module] = Block, **settings: Any) -> Looped:
    return perturbed(Looped((kind(**settings) for _ in range(depth)), loop))  # type: ignore[return-value]


# ---------------------------------------------------------------------- the oracle


def by_rule(blocks: Iterable[Callable[..., Any]], gamma: float, key: int | str = 0) -> list[Loop]:
    """The blocks as plain functions with one velocity: v' = gamma v + (1 - gamma) (block(x) - x), x' = x + v'.

    The first block, or whichever runs first, begins with v = 0.
    """
    velocity: Tensor | None = None

    def step(first: bool, block: Loop, *args: Any, **kwargs: Any) -> Any:
        nonlocal velocity
        x = args[key] if isinstance(key, int) else kwargs[key]
        if first or velocity is None:
            velocity = torch.zeros_like(x)
        output = block(*args, **kwargs)
        velocity = gamma * velocity + (1 - gamma) * (carried(output, x) - x)
        return rejoin(output, x + velocity)

    return [partial(step, i == 0, block) for i, block in enumerate(blocks)]


def ruled(model: Looped, gamma: float, key: int | str = 0) -> Loop:
    """The model's own loop over the rule; a new velocity with every call."""
    return lambda *args, **kwargs: model.loop(by_rule(model.blocks, gamma, key), *args, **kwargs)


# ---------------------------------------------------------------------- one training step


def train(module: nn.Module, call: Loop, *args: Any, seed: int = 5, **kwargs: Any) -> Result:
    """One training step: outputs, every gradient (inputs too), buffers, and the generator's next draw."""
    args, kwargs = copy.deepcopy((args, kwargs))
    module.zero_grad()
    torch.manual_seed(seed)
    output = call(*args, **kwargs)
    loss_of(output).backward()
    result: Result = {"next random": torch.rand(3)}
    for i, leaf in enumerate(tree_leaves(output)):
        result[f"output {i}"] = leaf.detach() if isinstance(leaf, Tensor) else None
    for i, leaf in enumerate(tree_leaves((args, kwargs))):
        result[f"gradient of input {i}"] = leaf.grad if isinstance(leaf, Tensor) else None
    result |= gradients(module)
    result |= {f"buffer {name}": b.clone() for name, b in module.named_buffers()}
    return result


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


GAMMA = 0.8
EXACTLY = 1e-12


def pair(model: Looped, **settings: Any) -> tuple[Looped, Looped]:
    """The converted model, and a copy from before for the oracle."""
    reference = copy.deepcopy(model)
    return convert(model, Momentum(GAMMA), **settings), reference


def assert_right(model: Looped, *args, example=None, key: int | str = 0, between: str = "error", **kwargs: Any) -> None:
    """Outputs, gradients of parameters and inputs, generator and buffers are those of the same loop over the rule."""
    model, reference = pair(model, example=example, between=between)
    actual = train(model, model, *args, **kwargs)
    assert_same(actual, train(reference, ruled(reference, GAMMA, key), *args, **kwargs), EXACTLY)
    assert_same(train(model, model, *args, **kwargs), actual, 0)  # and nothing is left over for the next step


def taps(blocks: Sequence[Loop], x: Tensor) -> list[Tensor]:
    """For a loss on every hidden state."""
    return [x := block(x) for block in blocks]


def bias_of_the_first(blocks: Sequence[Loop], x: Tensor) -> Tensor:
    """T5's position bias: an argument with a graph that reaches back into the chain."""
    bias = None
    for block in blocks:
        x = block(x, shift=bias)
        bias = x.mean(0) * 0.1 if bias is None else bias
    return x


# ---------------------------------------------------------------------- torchvision's ResNets


def by_hand(model, x, stages, gamma):
    """A torchvision ResNet's forward pass once more, with the rule in the blocks of the stages."""
    x = model.maxpool(model.relu(model.bn1(model.conv1(x))))
    for i, layer in enumerate((model.layer1, model.layer2, model.layer3, model.layer4)):
        inside = stages[i] if i < len(stages) else ()
        v = torch.zeros(())
        for k, block in enumerate(layer):
            if k in inside:
                v = gamma * v + (1 - gamma) * (block(x) - x)
                x = x + v
            else:
                x = block(x)
    return model.fc(torch.flatten(model.avgpool(x), 1))


def images(batch: int = 3, side: int = 64) -> torch.Tensor:
    return torch.randn(batch, 3, side, side, dtype=torch.float64, requires_grad=True)


def small() -> nn.Module:
    """A ResNet-32 of narrow bottlenecks: a stage in layer1 and layer2, and lone blocks behind."""
    bottleneck = torchvision.models.resnet.Bottleneck
    return perturbed(torchvision.models.ResNet(bottleneck, [3, 3, 2, 2], num_classes=7, width_per_group=16))


def anatomy(model: nn.Module) -> dict[str, object]:
    """Of every module: its class and the names of what the instance holds."""
    return {name: (type(m), sorted(vars(m))) for name, m in model.named_modules()}

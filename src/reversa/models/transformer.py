"""Pre-norm Transformers on a trunk with stored activations, or on one of two reversible trunks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reversa.engine import Engine
from reversa.errors import SettingError, StateError
from reversa.exact import Arithmetic
from reversa.models.layers import check_sizes
from reversa.schemes import Momentum, RevNet
from reversa.sequence import ReversibleSequence

# Shapes in this file: N sequences, L tokens, D features (the width).

Trunk = Literal["residual", "revnet", "momentum"]
Block = tuple["SelfAttention", "FeedForward"]


def norm(width: int) -> nn.LayerNorm:
    """Layer normalisation with the eps of Vision Transformers, 1e-6."""
    return nn.LayerNorm(width, eps=1e-6)


def linear(narrow: int, wide: int) -> nn.Linear:
    """With Glorot's uniform weights, as in the ViT authors' code, and biases of zero."""
    layer = nn.Linear(narrow, wide)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class SelfAttention(nn.Module):
    r"""Pre-norm multi-head self-attention as a residual function: (N, L, D) -> (N, L, D).

    .. math:: f(x) = W_o \, \mathrm{softmax}\big(q k^\top / \sqrt{D / \text{heads}}\big) \, v, \qquad
              (q, k, v) = W \, \mathrm{LN}(x)

    each head for itself. Dropout acts on the attention's weights and on the result; the engine replays its masks.

    Args:
        width: D.
        heads: number of heads; each has D / heads features.
        dropout: the probability of a zero, in training.
        causal: no token sees those behind it.

    Raises:
        SettingError: heads do not divide the width, or dropout outside [0, 1).

    Source: Vaswani et al., 2017, arXiv:1706.03762; pre-norm as in Dosovitskiy et al., 2021, arXiv:2010.11929.

    >>> SelfAttention(8, heads=2)(torch.randn(2, 5, 8)).shape
    torch.Size([2, 5, 8])
    """

    def __init__(self, width: int, heads: int, dropout: float = 0.0, causal: bool = False) -> None:
        super().__init__()
        check_sizes(width=width, heads=heads)
        if width % heads:
            raise SettingError(
                f"{heads} heads do not divide a width of {width}: choose a width that is a multiple of {heads}, "
                "or another number of heads"
            )
        self.heads, self.causal = heads, causal
        self.norm = norm(width)
        self.project = linear(width, 3 * width)
        self.out = linear(width, width)
        self.dropout = _dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        dropout = self.dropout.p if self.training else 0.0
        seen = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=self.causal)
        return self.dropout(self.out(seen.transpose(1, 2).flatten(2)))


class FeedForward(nn.Sequential):
    r"""The pre-norm multilayer perceptron as a residual function: (N, L, D) -> (N, L, D).

    .. math:: f(x) = W_2 \, \mathrm{GELU}(W_1 \, \mathrm{LN}(x) + b_1) + b_2

    with ``hidden`` features in between, and dropout behind GELU and behind the last layer.

    Raises:
        SettingError: a size below 1, or dropout outside [0, 1).

    Source: Dosovitskiy et al., 2021, arXiv:2010.11929.

    >>> sum(p.numel() for p in FeedForward(8, 32).parameters())
    568
    """

    def __init__(self, width: int, hidden: int, dropout: float = 0.0) -> None:
        check_sizes(width=width, hidden=hidden)
        first = (norm(width), linear(width, hidden), nn.GELU(), _dropout(dropout))
        super().__init__(*first, linear(hidden, width), _dropout(dropout))


def _dropout(probability: float) -> nn.Dropout:
    if not 0 <= probability < 1:
        raise SettingError(f"dropout must lie in [0, 1), got {probability}")
    return nn.Dropout(probability)


class Residual(nn.Module):
    r"""One residual function after another, with stored activations.

    .. math:: x' = x + f(x)

    ``blocks`` are residual functions, which extra arguments all reach. Parameters have the names that they have in a
    ``ReversibleSequence`` of the same functions, so that weights can be exchanged with a Momentum chain.

    Source: He, Zhang, Ren, Sun: Deep Residual Learning, CVPR 2016, arXiv:1512.03385.

    >>> Residual([nn.Identity(), nn.Identity()])(torch.ones(1, 1))
    tensor([[4.]])
    """

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        for f in self.blocks:
            x = x + f(x, *args)
        return x


def through(trunk: Residual | ReversibleSequence, x: Tensor, *args: Any) -> Tensor:
    """The trunk's output, of x's shape, whatever its scheme makes of a state.

    Where the scheme splits a tensor in two, both streams begin as x, and their mean comes out.

    >>> through(ReversibleSequence([(nn.Identity(), nn.Identity())], RevNet(dim=-1)), torch.ones(1, 1))
    tensor([[2.5000]])
    """
    if isinstance(trunk, Residual) or trunk.scheme.carries_input:
        return trunk(x, *args)
    one, two = trunk(torch.cat((x, x), -1), *args).chunk(2, -1)
    return (one + two) / 2


class Transformer(nn.Module):
    r"""Pre-norm Transformer: attention and perceptron in turn on a trunk, then LayerNorm. (N, L, D) -> (N, L, D).

    With F the attention and G the perceptron of a block, the trunk is one of

    .. code-block:: text

        residual   x' = x + F(x), then x' = x + G(x)             activations are stored, whatever the engine
        revnet     y1 = x1 + F(x2), y2 = x2 + G(y1)              from x1 = x2 = x; the mean of both comes out
        momentum   v' = gamma v + (1 - gamma) f(x), x' = x + v'  with f = F, then with f = G

    All three have the same parameters. ``residual`` and ``momentum`` have the same names in ``state_dict``, too. The
    inverse of each step is that of :class:`reversa.RevNet` and of :class:`reversa.Momentum`.

    Args:
        width: D.
        depth: blocks, each of two residual functions.
        heads: heads of the attention.
        hidden: features inside the perceptron, 4 D where not given.
        trunk: ``"residual"``, ``"revnet"`` or ``"momentum"``.
        gamma: weight of the old velocity of a momentum trunk, 0.9 where not given.
        dropout: the probability of a zero in the residual functions, in training.
        causal: no token sees those behind it.
        engine: how the backward pass of a reversible trunk gets its states, :class:`reversa.Invert` where not given.
        exact: as in :class:`reversa.ReversibleSequence`.

    Raises:
        SettingError: heads do not divide the width, an unknown trunk, or a setting that the trunk does not have.
        StateError: (when called) x is not (N, L, width).

    Source: ``revnet`` is Rev-ViT, Mangalam et al.: Reversible Vision Transformers, CVPR 2022, arXiv:2302.04869. The
    mean is the choice ``avg`` of the authors' code for joining the two streams; their published configurations
    concatenate them, which doubles the width of the last LayerNorm and of the classifier.

    >>> net = Transformer(16, depth=3, heads=2, trunk="momentum")
    >>> net(torch.randn(2, 5, 16)).shape
    torch.Size([2, 5, 16])
    """

    def __init__(
        self,
        width: int,
        depth: int,
        heads: int,
        hidden: int | None = None,
        trunk: Trunk = "residual",
        gamma: float | None = None,
        dropout: float = 0.0,
        causal: bool = False,
        engine: Engine | None = None,
        exact: bool | Arithmetic = False,
    ) -> None:
        super().__init__()
        check_sizes(width=width, depth=depth)
        hidden = 4 * width if hidden is None else hidden
        pairs = [
            (SelfAttention(width, heads, dropout, causal), FeedForward(width, hidden, dropout)) for _ in range(depth)
        ]
        self.width = width
        self.trunk = _trunk(trunk, pairs, gamma, engine, exact)
        self.norm = norm(width)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 3 or x.shape[-1] != self.width:
            raise StateError(f"this Transformer needs x of shape (N, L, {self.width}), got {tuple(x.shape)}")
        return self.norm(through(self.trunk, x))


def _trunk(
    trunk: str, pairs: Sequence[Block], gamma: float | None, engine: Engine | None, exact: bool | Arithmetic
) -> Residual | ReversibleSequence:
    if trunk not in ("residual", "revnet", "momentum"):
        raise SettingError(f"the trunk must be 'residual', 'revnet' or 'momentum', got {trunk!r}")
    if gamma is not None and trunk != "momentum":
        raise SettingError(f"a {trunk} trunk has no gamma, got {gamma}: leave it out, or choose trunk='momentum'")
    if trunk == "revnet":
        return ReversibleSequence(pairs, RevNet(dim=-1), exact, engine)
    functions = [f for pair in pairs for f in pair]
    if trunk == "momentum":
        return ReversibleSequence(functions, Momentum(0.9 if gamma is None else gamma), exact, engine)
    if exact:
        raise SettingError("a residual trunk is not inverted and has no exact: leave it out, or choose another trunk")
    return Residual(functions)


def sines(positions: Tensor, width: int) -> Tensor:
    r"""The position code of Transformers, without parameters: (L,) -> (L, width).

    .. math:: c_k(p) = \sin(p \, \omega_k), \quad c_{k + D/2}(p) = \cos(p \, \omega_k), \quad
              \omega_k = 10000^{-2k / D}, \quad k = 0, \dots, D/2 - 1

    Raises:
        SettingError: an odd width D.

    Source: Vaswani et al., 2017, arXiv:1706.03762, whose order of the features is another.

    >>> sines(torch.tensor([0.0]), 4)
    tensor([[0., 0., 1., 1.]])
    """
    if width % 2:
        raise SettingError(
            f"a position code has sines and cosines in pairs, got a width of {width}: choose an even one"
        )
    exponents = torch.arange(width // 2, dtype=positions.dtype, device=positions.device) / (width // 2)
    angles = positions[:, None] * 10_000**-exponents
    return torch.cat((angles.sin(), angles.cos()), -1)


class TransformerLM(nn.Module):
    r"""A small language model: tokens (N, L) -> scores (N, L, vocabulary) for the token behind each.

    .. math:: s = E \, \mathrm{Transformer}\big(\sqrt{D} \, E_{t} + c\big)

    with a causal :class:`Transformer`, one matrix E for the embedding and for the scores, and the position code c of
    :func:`sines`, so that any length works.

    Args:
        vocabulary: number of tokens.
        width: D; even.
        depth, heads, settings: as in :class:`Transformer`, for instance ``trunk="revnet"``.

    Raises:
        SettingError: an odd width, or what :class:`Transformer` refuses.

    Source: Vaswani et al., 2017, arXiv:1706.03762; one matrix for both: Press, Wolf, 2017, arXiv:1608.05859.

    >>> net = TransformerLM(50, width=16, depth=2, heads=2, trunk="revnet")
    >>> net(torch.tensor([[3, 1, 4]])).shape
    torch.Size([1, 3, 50])
    """

    def __init__(self, vocabulary: int, width: int = 128, depth: int = 6, heads: int = 4, **settings: Any) -> None:
        super().__init__()
        check_sizes(vocabulary=vocabulary)
        self.transformer = Transformer(width, depth, heads, causal=True, **settings)
        sines(torch.zeros(1), width)  # an odd width is refused here, not in the first forward pass
        self.embedding = nn.Parameter(torch.randn(vocabulary, width) / math.sqrt(width))

    def forward(self, tokens: Tensor) -> Tensor:
        width = self.transformer.width
        positions = torch.arange(tokens.shape[-1], dtype=self.embedding.dtype, device=tokens.device)
        x = math.sqrt(width) * F.embedding(tokens, self.embedding) + sines(positions, width)
        return F.linear(self.transformer(x), self.embedding)

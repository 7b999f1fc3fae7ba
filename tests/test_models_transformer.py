"""Transformers on three trunks: PyTorch's own layer, formulas by hand, stored activations, memory, bad input."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import reversa
from reversa import models
from reversa.errors import SettingError, StateError
from reversa.memory import LiveBytes
from reversa.models.transformer import FeedForward, SelfAttention, Transformer, TransformerLM, sines
from reversa.models.vit import PatchEmbedding, VisionTransformer

TRUNKS = ["residual", "revnet", "momentum"]
WIDTH, HEADS, HIDDEN = 12, 3, 20
close = {"rtol": 1e-11, "atol": 1e-11}


def transformer(trunk: str = "residual", depth: int = 3, **settings) -> Transformer:
    """In float64, and away from the first state: biases and scales are random, too."""
    torch.manual_seed(0)
    net = Transformer(WIDTH, depth, HEADS, HIDDEN, trunk=trunk, **settings).double()
    for p in net.parameters():
        if p.dim() == 1:
            nn.init.normal_(p)
    return net


def tokens(length: int = 5) -> torch.Tensor:
    return torch.randn(2, length, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def layers_of_pytorch(net: Transformer, causal: bool = False, dropout: float = 0.0):
    """The same network out of ``nn.TransformerEncoderLayer``, with the same weights."""
    weights = [list(f.parameters()) for f in net.trunk.blocks]
    made = []
    for (n1, m1, qkv, qkv_bias, out, out_bias), mlp in zip(weights[::2], weights[1::2], strict=True):
        layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, HIDDEN, dropout, "gelu", layer_norm_eps=1e-6, batch_first=True, norm_first=True
        ).double()
        (n2, m2, w1, b1, w2, b2), a = mlp, layer.self_attn
        own = (a.in_proj_weight, a.in_proj_bias, a.out_proj.weight, a.out_proj.bias, layer.norm1.weight)
        own += (layer.norm1.bias, layer.norm2.weight, layer.norm2.bias)
        own += (layer.linear1.weight, layer.linear1.bias, layer.linear2.weight, layer.linear2.bias)
        with torch.no_grad():
            for mine, theirs in zip(own, (qkv, qkv_bias, out, out_bias, n1, m1, n2, m2, w1, b1, w2, b2), strict=True):
                mine.copy_(theirs)
        made.append(layer)

    def run(x):
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype) if causal else None
        for layer in made:
            x = layer(x, mask, is_causal=causal)
        return net.norm(x)

    return run


# ---------------------------------------------------------------------- values


@pytest.mark.parametrize("causal", [False, True])
def test_the_residual_trunk_is_pytorchs_encoder(causal):
    net, x = transformer(causal=causal), tokens()
    torch.testing.assert_close(net(x), layers_of_pytorch(net, causal)(x), **close)


def test_attention_and_perceptron_by_hand():
    """With loops over heads and queries, and nothing of PyTorch's attention."""
    torch.manual_seed(0)
    x = torch.randn(1, 4, 6, dtype=torch.float64)
    for causal in (False, True):
        f = SelfAttention(6, heads=2, causal=causal).double()
        normed = F.layer_norm(x[0], (6,), f.norm.weight, f.norm.bias, 1e-6)
        q, k, v = (normed @ f.project.weight.T + f.project.bias).split(6, 1)
        seen = torch.zeros(4, 6, dtype=torch.float64)
        for head in (slice(0, 3), slice(3, 6)):
            for i in range(4):
                last = i + 1 if causal else 4
                weights = torch.exp(q[i, head] @ k[:last, head].T / math.sqrt(3))
                seen[i, head] = (weights / weights.sum()) @ v[:last, head]
        torch.testing.assert_close(f(x)[0], seen @ f.out.weight.T + f.out.bias, **close)
    g = FeedForward(6, 10).double()
    inner = F.layer_norm(x, (6,), eps=1e-6) @ g[1].weight.T + g[1].bias
    inner = inner * (1 + torch.erf(inner / math.sqrt(2))) / 2
    torch.testing.assert_close(g(x), inner @ g[4].weight.T + g[4].bias, **close)


def test_the_revnet_trunk_by_hand():
    net, x = transformer("revnet"), tokens()
    one = two = x
    for attention, perceptron in net.trunk.blocks:
        assert isinstance(attention, SelfAttention)
        one = one + attention(two)
        two = two + perceptron(one)
    torch.testing.assert_close(net(x), F.layer_norm((one + two) / 2, (WIDTH,), *net.norm.parameters(), 1e-6), **close)


def test_the_momentum_trunk_by_hand():
    net, x = transformer("momentum", gamma=0.7), tokens()
    want, v = x, torch.zeros_like(x)
    for f in net.trunk.blocks:
        v = 0.7 * v + 0.3 * f(want)
        want = want + v
    torch.testing.assert_close(net(x), F.layer_norm(want, (WIDTH,), *net.norm.parameters(), 1e-6), **close)


def test_a_small_gamma_makes_the_momentum_trunk_the_residual_one():
    plain, x = transformer(), tokens()
    errors = []
    for gamma in (1e-2, 1e-3, 1e-4):
        momentum = transformer("momentum", gamma=gamma)
        momentum.load_state_dict(plain.state_dict())
        errors.append(((momentum(x) - plain(x)).norm() / plain(x).norm()).item())
    assert errors[0] < 0.1
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.2)  # of first order in gamma
    assert errors[1] / errors[2] == pytest.approx(10, rel=0.2)


def test_all_trunks_have_the_parameters_of_pytorchs_encoder():
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, HIDDEN)
    want = 3 * sum(p.numel() for p in layer.parameters()) + 2 * WIDTH
    assert {sum(p.numel() for p in transformer(trunk).parameters()) for trunk in TRUNKS} == {want}
    shapes = [[tuple(p.shape) for p in transformer(trunk).parameters()] for trunk in TRUNKS]
    assert shapes[0] == shapes[1] == shapes[2]


# ---------------------------------------------------------------------- gradients


def gradients(net: nn.Module, x: torch.Tensor, engine=None) -> torch.Tensor:
    for module in net.modules():
        if isinstance(module, reversa.ReversibleSequence):
            module.engine = engine
    x = x.clone().requires_grad_(x.is_floating_point())
    torch.manual_seed(3)
    grads = torch.autograd.grad(net(x).square().sum(), [*net.parameters(), *[x] * x.requires_grad])
    return torch.cat([g.flatten() for g in grads])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("trunk", ["revnet", "momentum"])
@pytest.mark.parametrize("engine", [reversa.Invert(), reversa.Recompute()], ids=str)
def test_gradients_with_dropout_are_those_of_stored_activations(trunk, engine, causal):
    net, x = transformer(trunk, dropout=0.3, causal=causal), tokens()
    stored = gradients(net, x, reversa.Store())
    torch.testing.assert_close(gradients(net, x, engine), stored, rtol=1e-8, atol=1e-9)
    net.eval()
    assert not torch.allclose(gradients(net, x, engine), stored, rtol=1e-2)  # there was dropout


def test_dropout_leaves_out_the_asked_share_and_scales_the_rest():
    torch.manual_seed(0)
    f = FeedForward(40, 40, dropout=0.25)
    f[4] = nn.Identity()
    f[1], f[2] = nn.Identity(), nn.Identity()
    x = F.layer_norm(torch.randn(500, 1, 40), (40,))
    ratio = f(x) / F.layer_norm(x, (40,), eps=1e-6)
    assert sorted(set(ratio.round(decimals=2).flatten().tolist())) == pytest.approx([0, 1.78], abs=0.01)
    assert (ratio != 0).float().mean() == pytest.approx(0.75**2, abs=0.02)
    attention = SelfAttention(8, 2, dropout=0.5).double()
    nn.init.ones_(attention.out.bias)
    assert (attention(torch.randn(50, 20, 8, dtype=torch.float64)) == 0).double().mean() == pytest.approx(0.5, abs=0.03)
    x = torch.randn(4, 6, 8, dtype=torch.float64)
    mean = torch.stack([attention(x) for _ in range(3000)]).mean(0)
    assert (mean - attention.eval()(x)).abs().max() < 0.1


@pytest.mark.parametrize("trunk", ["revnet", "momentum"])
def test_exact_arithmetic(trunk):
    torch.manual_seed(0)
    net = VisionTransformer(width=16, depth=6, heads=2, trunk=trunk, exact=True)
    x = torch.randn(2, 3, 8, 8)
    chain = net.stages[0].trunk
    inside = net.stem(x) if trunk == "momentum" else torch.cat([net.stem(x)] * 2, -1)
    first = chain.scheme.open(inside)
    last = chain.forward_state(first)
    for came, was in zip(chain.inverse_state(last), first, strict=False):
        assert torch.equal(came, was)
    assert torch.equal(gradients(net, x, reversa.Invert()), gradients(net, x, reversa.Store()))


@pytest.mark.parametrize("trunk", ["revnet", "momentum"])
def test_under_autocast_the_state_stays_in_the_parameters_data_type(trunk):
    torch.manual_seed(0)
    net = VisionTransformer(width=16, depth=2, heads=2, trunk=trunk)
    x, seen = torch.randn(2, 3, 8, 8), []
    net.stages[0].trunk.functions[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        inverted, stored = (gradients(net, x, engine) for engine in (reversa.Invert(), reversa.Store()))
    assert set(seen) == {torch.float32}
    assert (inverted - stored).norm() < 1e-2 * stored.norm()


# ---------------------------------------------------------------------- memory


def peak(trunk: str, depth: int) -> float:
    """In units of the tokens: half a megabyte, since the engine replays small states in groups."""
    torch.manual_seed(0)
    net = Transformer(32, depth, 2, trunk=trunk)
    x = torch.randn(32, 128, 32)
    with LiveBytes(exclude=net) as counted:
        net(x).square().mean().backward()
    return counted.peak / x.nbytes


@pytest.mark.parametrize("trunk", TRUNKS)
def test_memory_is_flat_in_depth_but_for_stored_activations(trunk):
    shallow, deep = peak(trunk, 4), peak(trunk, 16)
    if trunk == "residual":
        assert deep > 3 * shallow
    else:
        assert deep == pytest.approx(shallow, rel=0.01)
        assert deep < peak("residual", 16) / 4


# ---------------------------------------------------------------------- position codes, images, language


def test_the_position_code_is_vaswanis_with_sines_first():
    code = sines(torch.arange(7, dtype=torch.float64), 6)
    for p in range(7):
        for k in range(3):
            angle = p / 10_000 ** (2 * k / 6)
            assert code[p, k] == pytest.approx(math.sin(angle), abs=1e-12)
            assert code[p, k + 3] == pytest.approx(math.cos(angle), abs=1e-12)


def test_patches_by_hand():
    """Each token from its own patch of pixels, and from where it is."""
    torch.manual_seed(0)
    stem = PatchEmbedding(3, 8, patch=2).double()
    nn.init.normal_(stem.conv.bias)
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    got = stem(x)
    assert got.shape == (2, 6, 8)
    assert got.is_contiguous()
    for i in range(2):
        for j in range(3):
            pixels = x[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].flatten(1)
            where = [
                angle for at in (i, j) for angle in (math.sin(at), math.sin(at / 100), math.cos(at), math.cos(at / 100))
            ]
            want = pixels @ stem.conv.weight.flatten(1).T + stem.conv.bias + torch.tensor(where, dtype=torch.float64)
            torch.testing.assert_close(got[:, i * 3 + j], want, **close)


@pytest.mark.parametrize("trunk", TRUNKS)
def test_vision_transformers_take_images_of_any_size(trunk):
    net = VisionTransformer(num_classes=7, channels=1, width=16, depth=2, heads=2, trunk=trunk)
    for sides in ((8, 8), (32, 32), (12, 20)):
        x = torch.randn(2, 1, *sides)
        scores = net(x)
        assert scores.shape == (2, 7)
        mean = net.stages[0](net.stem(x)).mean(1)
        torch.testing.assert_close(scores, mean @ net.head.linear.weight.T + net.head.linear.bias)
        scores.sum().backward()
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize(
    ("name", "heads", "width"), [("vitb16", 12, 768), ("revvitb16", 12, 768), ("vits16", 6, 384), ("revvits16", 6, 384)]
)
def test_published_sizes_are_torchvisions_but_for_the_position_code_and_the_class_token(name, heads, width):
    torchvision = pytest.importorskip("torchvision")
    with torch.device("meta"):
        theirs = torchvision.models.VisionTransformer(224, 16, 12, heads, width, 4 * width)
        ours = models.create(name, num_classes=1000)
    learned = {"class_token", "encoder.pos_embedding"}
    want = sorted(tuple(p.shape) for n, p in theirs.named_parameters() if n not in learned)
    assert sorted(tuple(p.shape) for p in ours.parameters()) == want


@pytest.mark.parametrize("trunk", TRUNKS)
def test_the_language_model_does_not_look_ahead_and_learns_a_cycle(trunk):
    torch.manual_seed(0)
    net = TransformerLM(11, width=16, depth=2, heads=2, trunk=trunk)
    text = torch.randint(11, (3, 9))
    changed = text.clone()
    changed[:, 6:] = (text[:, 6:] + 1) % 11
    torch.testing.assert_close(net(text)[:, :6], net(changed)[:, :6])
    assert not torch.allclose(net(text)[:, 6:], net(changed)[:, 6:])
    assert len([p for p in net.parameters() if 11 in p.shape]) == 1
    text = (torch.arange(12) + torch.arange(11)[:, None]) % 11
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    losses = []
    for _ in range(40):
        loss = F.cross_entropy(net(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 2
    assert losses[-1] < 0.5


def test_the_language_model_by_hand():
    torch.manual_seed(0)
    net = TransformerLM(5, width=8, depth=1, heads=2).double()
    text = torch.tensor([[4, 0, 2]])
    place = torch.tensor([[f(p / 10 ** (k)) for f in (math.sin, math.cos) for k in range(4)] for p in range(3)])
    x = math.sqrt(8) * net.embedding[text] + place.double()
    torch.testing.assert_close(net(text), net.transformer(x) @ net.embedding.T, rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Transformer(10, 2, 3), "3 heads do not divide a width of 10: choose a width that is a multiple of 3"),
        (lambda: Transformer(10, 0, 2), "depth must be at least 1, got 0"),
        (lambda: Transformer(10, 2, 0), "heads must be at least 1, got 0"),
        (lambda: Transformer(10, 2, 2, hidden=0), "hidden must be at least 1"),
        (lambda: Transformer(10, 2, 2, trunk="midpoint"), "'residual', 'revnet' or 'momentum', got 'midpoint'"),
        (
            lambda: Transformer(10, 2, 2, trunk="revnet", gamma=0.5),
            "a revnet trunk has no gamma, got 0.5: leave it out",
        ),
        (lambda: Transformer(10, 2, 2, trunk="momentum", gamma=0), r"gamma must lie in \(0, 1\]"),
        (lambda: Transformer(10, 2, 2, exact=True), "a residual trunk is not inverted and has no exact: leave it out"),
        (lambda: Transformer(10, 2, 2, dropout=1.0), r"dropout must lie in \[0, 1\), got 1.0"),
        (lambda: models.create("vit", width=30, heads=3), "a width of 30: choose a multiple of 4"),
        (lambda: models.create("vit", patch=0), "patch must be at least 1"),
        (lambda: models.create("vit", num_classes=0), "num_classes must be at least 1"),
        (lambda: models.create("revvit", gamma=0.5), "a revnet trunk has no gamma"),
        (lambda: TransformerLM(0), "vocabulary must be at least 1"),
        (lambda: TransformerLM(5, width=9, heads=3), "a width of 9: choose an even one"),
    ],
)
def test_bad_settings(make, told):
    with pytest.raises(SettingError, match=told):
        make()


def test_inputs_that_do_not_fit():
    with pytest.raises(StateError, match=r"x of shape \(N, L, 8\), got \(2, 8\)"):
        Transformer(8, 1, 2)(torch.randn(2, 8))
    with pytest.raises(StateError, match=r"\(N, L, 8\), got \(2, 3, 6\)"):
        Transformer(8, 1, 2)(torch.randn(2, 3, 6))
    for sides in ((30, 32), (32, 30), (2, 2)):
        with pytest.raises(StateError, match="do not divide into patches of 4 x 4: resize or pad them"):
            models.create("revvit", depth=1)(torch.randn(1, 3, *sides))

"""Conversion to two streams: the numbers are those of the rule, written out by hand from the blocks' own modules.

The oracle patches the blocks of a copy, so that the model's own loop goes over plain functions: two streams in a cell,
ordinary autograd, attention and MLP called by their names. It knows neither the library nor how it tells them apart.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import hf_models
from cases import Result, error, gradients, loss_of, no_collector
from convert_cases import Looped, anatomy, perturbed, straight
from copies import COPIES
from reversa import (
    AdditiveCoupling,
    Invert,
    Mixed,
    Momentum,
    Offload,
    Recompute,
    RevNet,
    Store,
    check,
    convert,
    explain,
    restore,
)
from reversa.convert import find
from reversa.convert.silent import without
from reversa.convert.streams import Branches, separate
from reversa.engine.steps import first_tensor
from reversa.errors import ConversionError, SettingError
from reversa.memory import LiveBytes

Part = Callable[..., Any]


# ---------------------------------------------------------------------- the oracle


def by_hand(blocks: Sequence[nn.Module], attention: Part, mlp: Part) -> None:
    """a' = a + A(b), b' = b + M(a'), and (a' + b') / 2 goes on through the model's loop; the first block begins with a
    = b = x. ``attention`` may return more than its value, which the block then returns as well.
    """
    streams: list[tuple[Tensor, Tensor]] = []

    def step(first: bool, block: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        a, b = (x, x) if first else streams.pop()
        value = attention(block, b, *args, **kwargs)
        value, others = (value[0], value[1:]) if isinstance(value, tuple) else (value, ())
        a = a + value
        b = b + mlp(block, a)
        streams.append((a, b))
        mean = (a + b) / 2
        return (mean, *others) if others else mean

    for i, block in enumerate(blocks):
        block.forward = partial(step, i == 0, block)


def run(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], seed: int = 5) -> Result:
    """One training step: the loss, every gradient, and the generator's next draw."""
    model.zero_grad()
    torch.manual_seed(seed)
    output = model(*args, **kwargs)
    loss = loss_of(output) if getattr(output, "loss", None) is None else output.loss
    loss.backward()
    return {"loss": loss.detach(), "next random": torch.rand(3), **gradients(model)}


def assert_near(actual: Result, expected: Result, tolerance: float = 1e-9) -> None:
    """Relative to each tensor's own size; of those without a gradient but rounding (a key's bias), to the others'."""
    assert list(actual) == list(expected)
    size = max(float(t.abs().max()) for name, t in expected.items() if t is not None and "gradient" in name)
    wrong = {}
    for name, want in expected.items():
        have = actual[name]
        assert (have is None) == (want is None), name
        if want is not None and have is not None:
            scale = max(float(want.abs().max()), 1e-4 * size)
            difference = float((have - want).abs().max()) / scale
            if not difference <= tolerance:
                wrong[name] = difference
    assert not wrong, wrong


# ---------------------------------------------------------------------- the families, by hand

Family = Callable[[], tuple[nn.Module, tuple[Any, ...], dict[str, Any], Callable[[nn.Module], None]]]
"""A model with arguments, and what makes a copy of it run by hand."""

IMAGE = {"img_size": 16, "patch_size": 8, "num_classes": 5, "embed_dim": 12, "depth": 3, "num_heads": 2}


def images(side: int = 16) -> tuple[Tensor]:
    return (torch.randn(3, 3, side, side, dtype=torch.float64),)


def timm_vit(name: str = "vit_tiny_patch16_224", **settings: Any):
    model = timm.create_model(name, **{**IMAGE, "proj_drop_rate": 0.1, **settings})

    def attention(block, b):
        return block.drop_path1(block.ls1(block.attn(block.norm1(b))))

    def mlp(block, a):
        return block.drop_path2(block.ls2(block.mlp(block.norm2(a))))

    return model, images(), {}, lambda model: by_hand(model.blocks, attention, mlp)


def deit3():
    return timm_vit("deit3_small_patch16_224", drop_path_rate=0.4)


def torchvision_vit():
    model = torchvision.models.VisionTransformer(16, 8, 3, 2, 12, 24, dropout=0.1, attention_dropout=0.1, num_classes=5)

    def attention(block, b):
        n = block.ln_1(b)
        return block.dropout(block.self_attention(n, n, n, need_weights=False)[0])

    def mlp(block, a):
        return block.mlp(block.ln_2(a))

    return model, images(), {}, lambda model: by_hand(list(model.encoder.layers), attention, mlp)


def encoder(layers: int = 3):
    layer = nn.TransformerEncoderLayer(12, 2, 24, batch_first=True, norm_first=True)
    model = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
    padding = torch.zeros(3, 4, dtype=torch.bool)
    padding[0, 3] = True

    def attention(block, b, src_mask, is_causal, src_key_padding_mask):
        n = block.norm1(b)
        masks = {"attn_mask": src_mask, "key_padding_mask": src_key_padding_mask}
        return block.dropout1(block.self_attn(n, n, n, is_causal=is_causal, **masks)[0])

    def mlp(block, a):
        return block.dropout2(block.linear2(block.dropout(block.activation(block.linear1(block.norm2(a))))))

    x = torch.randn(3, 4, 12, dtype=torch.float64)
    return model, (x,), {"src_key_padding_mask": padding}, lambda model: by_hand(model.layers, attention, mlp)


def llama():
    model, kwargs = hf_models.llama(3, double=True)

    def attention(block, b, **kwargs):
        return block.self_attn(hidden_states=block.input_layernorm(b), **kwargs)[0]

    def mlp(block, a):
        return block.mlp(block.post_attention_layernorm(a))

    return model, (), {**kwargs, "use_cache": False}, lambda model: by_hand(model.model.layers, attention, mlp)


def gpt2():
    """The cache, None here, is a positional argument; the additions are written with the branch first."""
    model, kwargs = hf_models.gpt2(3, double=True)

    def attention(block, b, cache, mask, *_, encoder_attention_mask=None, **kwargs):
        return block.attn(block.ln_1(b), past_key_values=cache, attention_mask=mask, **kwargs)[0]

    def mlp(block, a):
        return block.mlp(block.ln_2(a))

    return model, (), {**kwargs, "use_cache": False}, lambda model: by_hand(model.transformer.h, attention, mlp)


def hf_vit():
    """One dropout serves both branches and is never switched off: it would draw numbers for zeros, too."""
    model, kwargs = hf_models.vit(3, double=True, hidden_dropout_prob=0.0)

    def attention(block, b, mask=None, **kwargs):
        return block.dropout(block.attention(block.layernorm_before(b), mask, **kwargs)[0])

    def mlp(block, a):
        return block.dropout(block.mlp(block.layernorm_after(a)))

    return model, (), kwargs, lambda model: by_hand(model.vit.layers, attention, mlp)


def t5():
    """Encoder and decoder, each of whose blocks returns a position bias; attention to the memory is attention, too."""
    model, kwargs = hf_models.t5(3, double=True)

    def attention(block, b, mask, bias, memory, memory_mask, memory_bias, *, past_key_values=None, **kwargs):
        one = block.layer[0]
        value, bias, _ = one.SelfAttention(one.layer_norm(b), mask=mask, position_bias=bias, **kwargs)
        value = one.dropout(value)
        if len(block.layer) == 3:
            two = block.layer[1]
            seen = two.layer_norm(b + value)
            more, memory_bias, _ = two.EncDecAttention(
                seen, mask=memory_mask, key_value_states=memory, position_bias=memory_bias, **kwargs
            )
            value = value + two.dropout(more)
        return value, bias, memory_bias

    def mlp(block, a):
        last = block.layer[-1]
        return last.dropout(last.DenseReluDense(last.layer_norm(a)))

    def patch(model):
        by_hand(model.encoder.block, attention, mlp)
        by_hand(model.decoder.block, attention, mlp)

    return model, (), {**kwargs, "use_cache": False}, patch


FAMILIES: dict[str, Family] = {
    make.__name__: make for make in (timm_vit, deit3, torchvision_vit, encoder, llama, gpt2, hf_vit, t5)
}


def given(family: Family, **settings: Any):
    """The converted model, a copy that runs by hand, and their arguments."""
    torch.manual_seed(0)
    model, args, kwargs, patch = family()
    model = perturbed(model)
    reference = copy.deepcopy(model)
    patch(reference)
    example = args[:1] if args else None
    return convert(model, RevNet(), example=example, **settings), reference, args, kwargs


def stages_of(model: nn.Module) -> set[Any]:
    return {module.__dict__["_reversa"].stage for module in model.modules() if "_reversa" in module.__dict__}


@pytest.mark.parametrize("name", FAMILIES)
def test_numbers_are_those_of_two_streams_by_hand(name):
    model, reference, args, kwargs = given(FAMILIES[name])
    expected = run(reference, args, kwargs)
    assert_near(run(model, args, kwargs), expected)
    assert_near(run(model, args, kwargs), expected)  # nothing is left over for the next step
    assert all(stage.length == 6 for stage in stages_of(model))


def images_of(name: str, side: int = 16, **settings: Any) -> tuple[nn.Module, dict[str, Any]]:
    model = timm.create_model(name, img_size=side, num_classes=5, **settings)
    return model, {"x": torch.randn(2, 3, side, side)}


WINDOWS = {"embed_dim": 8, "depths": (2, 2), "num_heads": (2, 2), "window_size": 4}
OTHERS: dict[str, Callable[[], tuple[nn.Module, dict[str, Any]]]] = {
    "beit": partial(images_of, "beit_base_patch16_224", embed_dim=16, depth=2, num_heads=2),
    "eva02": partial(images_of, "eva02_base_patch16_clip_224", embed_dim=16, depth=2, num_heads=2),
    "cait": partial(images_of, "cait_xxs24_224", embed_dim=16, depth=2, num_heads=2),
    "swinv2": partial(images_of, "swinv2_tiny_window8_256", side=32, **WINDOWS),
    **{make.__name__: partial(make, 2) for make in (hf_models.gemma3, hf_models.mistral, hf_models.dinov2)},
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_block_is_its_attention_and_then_its_mlp(name):
    """g(x) = x + A(x) + M(x + A(x)), in numbers: what runs with the one switched off, and then with the other."""
    model, kwargs = OTHERS[name]()
    model = perturbed(model).eval()
    kwargs = {k: v.double() if v.is_floating_point() else v for k, v in kwargs.items()}
    seen: dict[str, tuple[Any, ...]] = {}
    findings = find(model, kwargs)
    keys = {block: stage.key for stage in findings.stages for block in stage.blocks}
    for block in keys:
        hook = partial(lambda block, module, *call: seen.update({block: (module, *call)}), block)
        model.get_submodule(block).register_forward_hook(hook, with_kwargs=True)
    branches = separate(model, keys, (), kwargs)  # with a cache, which is left out
    model(**kwargs, **({"use_cache": False} if "input_ids" in kwargs else {}))
    assert len(seen) == len(keys) > 0
    for block, (module, args, named, output) in seen.items():
        found = branches[block]
        assert isinstance(found, Branches), found
        middle = first_tensor(without(module, found.mlp)(*args, **named))
        assert error(middle, first_tensor(output)) > 1e-3
        named = {key: middle if value is named.get(keys[block]) else value for key, value in named.items()}
        args = tuple(middle if i == keys[block] else value for i, value in enumerate(args))
        result = first_tensor(without(module, found.attention)(*args, **named))
        assert error(result, first_tensor(output)) < 1e-12


ENGINES = {
    "store": Store(),
    "recompute": Recompute(),
    "offload": Offload(),
    "keep": Invert(keep=3),
    "anchors": Invert(anchors=1),
    "group": Invert(group=4),
    "one by one": Invert(group=1),
    "mixed": Mixed([(Invert(), 3), (Recompute(), 1), (Store(), 2)]),
}


@pytest.mark.parametrize("engine", ENGINES)
def test_with_every_engine(engine):
    model, reference, args, kwargs = given(deit3)
    (stage,) = stages_of(model)
    stage.engine = ENGINES[engine]
    assert_near(run(model, args, kwargs), run(reference, args, kwargs))


# ---------------------------------------------------------------------- other arithmetic, other modes


def test_exact_arithmetic_gives_the_gradients_of_stored_activations_to_the_bit():
    model, reference, args, kwargs = given(deit3, exact=True, engine=Invert(verify=True))
    actual = run(model, args, kwargs)
    (stage,) = stages_of(model)
    stage.engine = Store()
    stored = run(model, args, kwargs)
    assert all(torch.equal(actual[name], stored[name]) for name in stored)
    assert_near(actual, run(reference, args, kwargs))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("family", [deit3, encoder, llama])
def test_eval_computes_by_the_same_rule(family, context):
    """torch.nn's fused kernel for eval() would compute a whole block, whatever is switched off: it is not taken."""
    model, reference, args, kwargs = given(family)
    model.eval(), reference.eval()
    with context():
        have, want = model(*args, **kwargs), reference(*args, **kwargs)
    have, want = (getattr(y, "logits", y) for y in (have, want))
    assert error(have.detach(), want.detach()) < 1e-12


def test_autocast():
    model, reference, args, _ = given(partial(timm_vit, proj_drop_rate=0.0))
    model, reference, x = model.float(), reference.float(), args[0].float()
    with torch.autocast("cpu", torch.bfloat16):
        have = run(model, (x,), {})
        (stage,) = stages_of(model)
        stage.engine = Store()
        stored, want = run(model, (x,), {}), run(reference, (x,), {})
    assert_near(have, stored, 0.02)
    assert_near(have, want, 0.1)


def test_text_is_written_with_and_without_a_cache():
    model, reference, _, kwargs = given(llama)
    model.eval(), reference.eval()
    tokens = kwargs["input_ids"][1:]
    settings = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5}
    with_cache = model.generate(tokens, **settings)
    assert torch.equal(with_cache, model.generate(tokens, use_cache=False, **settings))
    assert torch.equal(with_cache, reference.generate(tokens, use_cache=False, **settings))


def test_check_finds_nothing_wrong():
    model, _, args, kwargs = given(encoder)
    report = check(model, *args, **kwargs)
    assert report.ok, report


# ---------------------------------------------------------------------- home-made blocks


class Prenorm(nn.Module):
    """A block that takes and returns more than the carried tensor."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix = nn.Linear(width, width)
        self.up, self.act, self.down = nn.Linear(width, 2 * width), nn.ReLU(inplace=True), nn.Linear(2 * width, width)

    def attend(self, x: Tensor, scale: Any = 1.0) -> tuple[Tensor, Tensor]:
        mixed = self.mix(self.norm1(x)).roll(1, 0)
        return 0.5 * mixed * scale, mixed.sigmoid()

    def mlp(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(self.norm2(x))))

    def forward(self, x: Tensor, scale: Any = 1.0) -> Any:
        value, extra = self.attend(x, scale)
        x = x + value
        return x + self.mlp(x), extra


def attend(block: Prenorm, b: Tensor, scale: Any = 1.0) -> tuple[Tensor, Tensor]:
    return block.attend(b, scale)


def feed(block: Prenorm, a: Tensor) -> Tensor:
    return block.mlp(a)


def prenorm(loop: Callable[..., Any], depth: int = 3, width: int = 6, **settings: Any) -> tuple[Looped, Looped]:
    """The converted model, and the copy by hand."""
    model = perturbed(Looped((Prenorm(width) for _ in range(depth)), loop))
    reference = copy.deepcopy(model)
    by_hand(reference.blocks, attend, feed)
    return convert(model, RevNet(), **settings), reference


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def with_extras(blocks: Sequence[Part], x: Tensor, scale: Tensor) -> list[Tensor]:
    """A loss on every hidden state, and on what the blocks return besides."""
    outputs = []
    for block in blocks:
        x, extra = block(x, scale=scale)
        outputs += [x, extra]
    return outputs


def firsts(blocks: Sequence[Part], x: Tensor) -> Tensor:
    for block in blocks:
        x, _ = block(x)
    return x


def test_taps_extra_arguments_and_extra_outputs():
    model, reference = prenorm(with_extras)
    x, scale = leaf(4, 6), leaf(6)
    results = []
    for each in (model, reference):
        x.grad = scale.grad = None
        results.append({**run(each, (x, scale), {}), "of x": x.grad, "of scale": scale.grad})
    assert_near(*results)


class Modulated(Prenorm):
    """What both branches are scaled by comes from one module, as in a diffusion transformer; and in place."""

    def __init__(self) -> None:
        super().__init__()
        self.modulation = nn.Linear(3, 12)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        one, two = self.modulation(condition).chunk(2, -1)
        x = x + self.mix(self.norm1(x)).mul_(one)
        return x + two * self.down(self.up(self.norm2(x)))


def test_a_module_that_serves_both_branches_stays_on():
    def attention(block, b, condition):
        return block.mix(block.norm1(b)) * block.modulation(condition).chunk(2, -1)[0]

    def mlp(block, a):
        return block.down(block.up(block.norm2(a))) * block.modulation(conditions[0]).chunk(2, -1)[1]

    model = perturbed(Looped((Modulated() for _ in range(3)), straight))
    reference, conditions = copy.deepcopy(model), [leaf(5, 1, 3)]
    by_hand(reference.blocks, attention, mlp)
    convert(model, RevNet(), example=(torch.randn(2, 3, 6).double(), torch.randn(2, 1, 3).double()))
    x, results = leaf(5, 7, 6), []  # other sizes than the example's
    for each in (model, reference):
        conditions[0].grad = None
        results.append({**run(each, (x, conditions[0]), {}), "of the condition": conditions[0].grad})
    assert_near(*results)


class Reversed(torch.autograd.Function):
    """The same memory, and the gradient with the other sign."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return -grad


BETWEEN = {"detached": Tensor.detach, "reversed": Reversed.apply}


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("name", BETWEEN)
def test_gradients_follow_the_tensor_that_was_really_passed(name, exact):
    """The mean of the streams goes on with it; their difference is hidden, and goes on with its own graph."""

    def loop(blocks, x):
        x, _ = blocks[0](x)
        return firsts(blocks[1:], BETWEEN[name](x))

    model, reference = prenorm(loop, exact=exact)
    blocks, x = reference.blocks, leaf(4, 6)

    def by_rule(x):
        a = b = x
        for i, block in enumerate(blocks):
            if i == 1:
                mean, half = BETWEEN[name]((a + b) / 2), (a - b) / 2
                a, b = mean + half, mean - half
            a = a + block.attend(b)[0]
            b = b + block.mlp(a)
        return (a + b) / 2

    reference.forward = by_rule
    results = []
    for each in (model, reference):
        x.grad = None
        results.append({**run(each, (x,), {}), "of x": x.grad})
    assert_near(*results)


@pytest.mark.parametrize("exact", [False, True])
def test_the_second_stream_goes_on_where_another_tensor_is_given(exact):
    def loop(blocks, x):
        return firsts(blocks[1:], 2 * blocks[0](x)[0] + 1)

    model, reference = prenorm(loop, exact=exact, between="carry")
    blocks, x = reference.blocks, leaf(4, 6)

    def by_rule(x):
        a = b = x
        for i, block in enumerate(blocks):
            a = a + block.attend(b)[0]
            b = b + block.mlp(a)
            a = a + b + 1 if i == 0 else a
        return (a + b) / 2

    reference.forward = by_rule
    assert_near(run(model, (x,), {}), run(reference, (x,), {}))
    with pytest.raises(Exception, match="was not given the tensor that block 0 returned"):
        prenorm(loop)[0](x)


def test_a_block_that_fails_half_way_can_be_called_again():
    def loop(blocks, x):
        for block in blocks:
            try:
                x, _ = block(x)
            except KeyError:
                x, _ = block(x)
        return x

    calls: list[int] = []

    def once(module: nn.Module, args: Any) -> None:
        calls.append(1)
        if len(calls) == 1:  # the attention has made its step
            raise KeyError("half way")

    model, reference = prenorm(loop, depth=4)
    x = leaf(4, 6)
    model.blocks[2].up.register_forward_pre_hook(once)
    assert_near(run(model, (x,), {}), run(reference, (x,), {}))
    assert len(calls) > 1


# ---------------------------------------------------------------------- what conversion leaves as it was


def test_names_modules_and_checkpoints_stay():
    model, _ = prenorm(firsts)
    plain = perturbed(Looped((Prenorm() for _ in range(3)), firsts))
    untouched, modules = copy.deepcopy(plain), list(plain.named_modules())
    before = anatomy(plain)
    convert(plain, RevNet())
    plain(leaf(4, 6))
    assert list(model.state_dict()) == list(plain.state_dict()) == list(untouched.state_dict())
    assert all(a == b and m is n for (a, m), (b, n) in zip(modules, plain.named_modules(), strict=True))
    assert list(model.load_state_dict(plain.state_dict())) == [[], []]
    x = leaf(4, 6)
    assert torch.equal(model(x), plain(x))
    assert anatomy(restore(plain)) == before
    assert torch.equal(plain(x), untouched(x))


@pytest.mark.parametrize("copied", COPIES)
def test_a_copy_is_a_converted_model_of_its_own(copied):
    model, _, args, kwargs = given(encoder)
    twin = COPIES[copied](model)
    assert_near(run(twin, args, kwargs), run(model, args, kwargs), 0)
    assert stages_of(twin).isdisjoint(stages_of(model))


def test_hooks_inside_a_block_see_what_is_computed_once():
    model, _, args, kwargs = given(encoder)
    seen: list[str] = []
    for name, module in model.layers[1].named_modules():
        if name and "." not in name:
            module.register_forward_hook(lambda *_, name=name: seen.append(name))
    with torch.no_grad():
        model(*args, **kwargs)
    assert sorted(seen) == sorted(set(seen))
    assert {"self_attn", "linear1", "linear2", "norm1", "norm2"} <= set(seen)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:The .grad attribute")
def test_compiled_blocks():
    """Two graphs, one for each function, serve every block in both directions."""
    torch.compiler.reset()
    compiler = CompileCounterWithBackend("aot_eager")
    model, reference = prenorm(firsts)
    for block in model.blocks:
        block.compile(backend=compiler)
    x = leaf(4, 6)
    expected = run(reference, (x,), {})
    for _ in range(2):
        assert_near(run(model, (x,), {}), expected)
    torch.compiler.reset()
    assert compiler.frame_count == 2


def test_memory_does_not_grow_with_depth():
    def bytes_of(depth: int) -> tuple[int, int, int]:
        model = convert(Looped((Prenorm(32) for _ in range(depth)), firsts), RevNet())
        x = torch.randn(1024, 32)
        model(x).mean().backward()
        with no_collector(), LiveBytes(exclude=[model, x]) as counted:
            loss = model(x).mean()
            held = counted.live
            loss.backward()
            peak = counted.peak
            del loss
        return peak, held, counted.live

    shallow, deep = bytes_of(4), bytes_of(16)
    assert deep[0] == pytest.approx(shallow[0], rel=2e-3)
    assert deep[1] == pytest.approx(shallow[1], rel=1e-2)
    assert deep[1] < 3.1 * 4 * 1024 * 32, "two streams and the output"
    assert deep[2] == 0


# ---------------------------------------------------------------------- what cannot be made of two streams


class Parallel(Prenorm):
    def forward(self, x):
        return x + self.attend(x)[0] + self.mlp(x)


class One(Prenorm):
    def forward(self, x):
        return x + self.mlp(x)


class Postnorm(Prenorm):
    def forward(self, x):
        x = self.norm1(x + self.mix(x))
        return self.norm2(x + self.down(self.up(x)))


class Scaled(Prenorm):
    def forward(self, x):
        x = x + self.attend(x)[0]
        return 0.5 * (x + self.mlp(x))


class Dropped(Prenorm):
    def forward(self, x):
        x = x + self.attend(x)[0]
        return torch.native_dropout(x + self.mlp(x), 0.1, True)[0]  # what F.dropout becomes on a GPU


class Shifted(Prenorm):
    """Its MLP gives more than zeros where its modules do."""

    def forward(self, x):
        x = x + self.attend(x)[0]
        return x + (self.mlp(x) - 1).exp()


class Held(Prenorm):
    """A list holds its modules as well, and it is the list that is used."""

    def __init__(self):
        super().__init__()
        self.parts = [self.up, self.act, self.down]

    def mlp(self, x):
        x = self.norm2(x)
        for part in self.parts:
            x = part(x)
        return x


REFUSED = {
    Parallel: r"not one of the sum before it alone \(parallel branches\)",
    One: "one residual addition, and so no second function",
    Postnorm: r"something acts on a sum \(norm\)",
    Scaled: r"something acts on a sum",
    Dropped: r"something acts on a sum",
    Shifted: "its MLP does not end with a module of its own",
    Held: "its MLP computes even with its modules switched off",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_blocks_that_have_no_two_branches(kind):
    model = Looped((kind() for _ in range(3)), straight if kind is not Held else firsts)
    before = anatomy(model)
    with pytest.raises(ConversionError, match=rf"(?s)pre-norm.*Momentum\(gamma\).*{REFUSED[kind]}"):
        convert(model, RevNet(), example=torch.randn(2, 6))
    assert anatomy(model) == before
    guessed = convert(model, RevNet())  # by structure alone: its first call tells
    with pytest.raises(ConversionError, match=rf"(?s)blocks.0 cannot be made of two streams.*{REFUSED[kind]}"):
        guessed(torch.randn(2, 6))


@pytest.mark.parametrize("make", [hf_models.bert, hf_models.convnextv2])
def test_models_of_other_blocks(make):
    with pytest.raises(ConversionError, match="RevNet needs pre-norm transformer blocks"):
        convert(make(2)[0], RevNet())  # two additions with a norm behind them; one addition


def test_stages_that_do_not_fit_are_left_with_the_reason():
    def model():
        parts = [nn.Sequential(*(kind() for _ in range(2))) for kind in (One, Tuned)]
        return nn.Sequential(*parts)

    class Tuned(Prenorm):
        def forward(self, x):
            return super().forward(x)[0]

    x = torch.randn(2, 6)
    converted = convert(model(), RevNet(), example=x)
    report = explain(converted)
    assert [stage.name for stage in report.stages] == ["1"]
    assert dict(report.left)["0"].endswith("no second function for the second stream")
    assert "a' = a + A(b), b' = b + M(a')" in str(report)
    with pytest.raises(ConversionError, match="RevNet needs"):
        convert(model(), RevNet(), stages=["0", "1"], example=x)


def test_other_couplings_are_refused():
    model = Looped((Prenorm() for _ in range(2)), firsts)
    with pytest.raises(SettingError, match=r"cannot take over another model's blocks.*for transformers also RevNet"):
        convert(model, AdditiveCoupling())
    assert convert(model, Momentum(0.9)) is model

"""Converted models of Hugging Face in training: what their loops hand to the blocks, and take from them.

The oracle is the same model, never converted, in which every block's ``forward`` is the momentum rule over the block
itself, with one velocity for each list of blocks and stored activations.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cases import Result, Storages, assert_same, error, no_collector
from convert_cases import by_rule, perturbed, train
from hf_models import GROUPED, HF_MODELS, Made, gpt2, llama, made, spoken, t5, transformers, whisper
from reversa import Invert, Momentum, Recompute, Store
from reversa.convert import convert, explain, restore
from reversa.errors import ConversionWarning, ReversaError
from reversa.memory import LiveBytes

GAMMA = 0.8
TIGHT = 1e-9

# The lists of blocks of each model; of a ResNet the first one changes the shape, and stays as it is.
LISTS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("llama", "mistral", "qwen3", "gemma3"), ("model.layers",)),
    "gpt2": ("transformer.h",),
    "bert": ("bert.encoder.layer",),
    "roberta": ("roberta.encoder.layer",),
    "t5": ("encoder.block", "decoder.block"),
    "whisper": ("model.encoder.layers", "model.decoder.layers"),
    "vit": ("vit.layers",),
    "dinov2": ("dinov2.encoder.layer",),
    "swin": ("swin.encoder.layers.0.blocks", "swin.encoder.layers.1.blocks"),
    "convnextv2": ("convnextv2.encoder.stages.0.layers", "convnextv2.encoder.stages.1.layers"),
    "resnet": ("resnet.encoder.stages.0.layers", "resnet.encoder.stages.1.layers"),
}

quiet = pytest.mark.filterwarnings("ignore::reversa.errors.ConversionWarning")


def ruled(model: nn.Module, name: str, gamma: float = GAMMA) -> Callable[..., Any]:
    """The model's own call with the rule in its blocks; a new velocity with every call."""

    def call(*args: Any, **kwargs: Any) -> Any:
        blocks = []
        for path in LISTS[name]:
            run = list(model.get_submodule(path))[1 if name == "resnet" else 0 :]
            steps = by_rule([type(block).forward.__get__(block) for block in run], gamma)
            blocks += zip(run, steps, strict=True)
        for block, step in blocks:
            block.forward = step
        try:
            return model(*args, **kwargs)
        finally:
            for block, _ in blocks:
                del block.forward

    return call


def pair(fresh: Made, **settings: Any) -> tuple[nn.Module, nn.Module, dict[str, Any]]:
    """The converted model, a copy from before for the oracle, and arguments."""
    model, kwargs = fresh
    perturbed(model)
    return convert(copy.deepcopy(model), Momentum(GAMMA), **settings), model, kwargs


def everything(output: Any) -> dict[str, Any]:
    """All that a model returns but its cache; numbers as vectors."""
    kept = {name: value for name, value in output.items() if name != "past_key_values"}
    return {
        name: value[None] if isinstance(value, Tensor) and value.dim() == 0 else value for name, value in kept.items()
    }


def step(
    module: nn.Module, call: Callable[..., Any], taken: Callable[[Any], Any] = everything, **kwargs: Any
) -> Result:
    """One training step, with a loss on what is taken from the output.

    A bias of all keys alike changes no attention: its gradient is zero but for rounding, and is made zero.
    """
    result = train(module, lambda **given: taken(call(**given)), **kwargs)
    gradients = {key: g for key, g in result.items() if key.startswith("gradient of") and g is not None}
    largest = max(g.abs().max() for g in gradients.values())
    idle = {key: torch.zeros_like(g) for key, g in gradients.items() if g.abs().max() < 1e-13 * largest}
    return result | idle


def assert_right(fresh: Made, name: str, taken: Callable[[Any], Any] = everything, **more: Any) -> Result:
    """Loss, outputs, every gradient, buffers and generator are those of the rule; so they are in a second step."""
    model, reference, kwargs = pair(fresh)
    kwargs |= more
    for _ in range(2):
        actual = step(model, model, taken, **kwargs)
        assert_same(actual, step(reference, ruled(reference, name), taken, **kwargs), TIGHT)
    return actual


@quiet
@pytest.mark.parametrize("name", HF_MODELS)
def test_gradients_are_those_of_the_rule(name):
    """With dropout, padding, and the cache where the model's configuration asks for one."""
    result = assert_right(HF_MODELS[name](double=True), name)
    idle = [key for key, g in result.items() if key.startswith("gradient of") and g is not None and not g.any()]
    assert not [key for key in idle if not key.endswith(("key.bias", "k_proj.bias"))], "every branch takes part"


@quiet
@pytest.mark.parametrize("engine", [Invert(anchors=2), Recompute(), Store()], ids=str)
def test_other_engines(engine):
    model, reference, kwargs = pair(gpt2(double=True), engine=engine)
    assert_same(step(model, model, **kwargs), step(reference, ruled(reference, "gpt2"), **kwargs), TIGHT)


# ---------------------------------------------------------------------- what the blocks give on the way


def middle(output: Any) -> Any:
    """One state, from which nothing leads to the last blocks."""
    states = output.hidden_states if "hidden_states" in output else output.decoder_hidden_states
    return states[2]


@quiet
@pytest.mark.parametrize("taken", [everything, middle], ids=["all", "a middle one"])
@pytest.mark.parametrize("name", ["llama", "bert", "t5", "whisper"])
def test_a_loss_on_hidden_states_and_attention_maps(name, taken):
    fresh = HF_MODELS[name](double=True, attn_implementation="eager")
    asked = {"output_hidden_states": True, "output_attentions": True}
    result = assert_right(fresh, name, taken, **asked)
    if taken is not middle:
        assert sum(key.startswith("output") for key in result) > 2 + 2 * 4


@quiet
def test_the_hidden_states_that_are_given_are_the_chain_s():
    """Five states of a chain of four steps, and what the norm behind makes of the last."""
    model, _, kwargs = pair(llama(double=True, attention_dropout=0.0))
    seen: list[Tensor] = []
    for block in model.model.layers:
        block.register_forward_hook(lambda module, args, output: seen.append(output))
    states = model(**kwargs, output_hidden_states=True).hidden_states
    assert len(states) == 5
    assert all(torch.equal(a, b) for a, b in zip(states[1:], seen[:3], strict=False))
    assert torch.equal(states[-1], model.model.norm(seen[3]))


@quiet
@pytest.mark.parametrize("seed", range(4))
def test_layer_drop(seed):
    """Each list leaves out about half of its blocks, the first among them."""
    model, reference, kwargs = pair(whisper(layers=5, double=True))
    for part in (*model.modules(), *reference.modules()):
        if hasattr(part, "layerdrop"):
            part.layerdrop = 0.5
    by_hand = ruled(reference, "whisper")
    expected = step(reference, by_hand, **kwargs, seed=seed)
    assert any(g is None for key, g in expected.items() if "layers" in key), "some blocks were left out"
    assert_same(step(model, model, **kwargs, seed=seed), expected, TIGHT)


@pytest.mark.parametrize(
    "drop",
    [0.0, 0.5],
)
def test_whisper_s_default_inputs_reach_its_decoder(drop):
    stages = explain(whisper(encoder_layerdrop=drop, decoder_layerdrop=drop)[0]).stages
    assert [stage.name for stage in stages] == ["model.encoder.layers", "model.decoder.layers"]
    assert [len(stage.blocks) for stage in stages] == [4, 4]


@quiet
def test_t5_s_memory_and_position_biases_have_gradients():
    """Block 0 makes the bias of all blocks; its own is an argument of theirs with a graph back into the chain."""
    fresh = t5(double=True)
    memory = torch.randn(2, 6, 16, dtype=torch.float64, requires_grad=True)
    encoded = transformers.modeling_outputs.BaseModelOutput(last_hidden_state=memory)
    result = assert_right(fresh, "t5", encoder_outputs=encoded)
    gradients = [g for key, g in result.items() if key.startswith("gradient of input") and g is not None]
    assert len(gradients) == 1
    assert gradients[0].any()
    (bias,) = (g for key, g in result.items() if "decoder" in key and "relative_attention_bias" in key)
    assert bias is not None
    assert bias.any()


# ---------------------------------------------------------------------- caches


@contextmanager
def told() -> Iterator[list[str]]:
    """Reversa's warnings, whatever was shown before."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        messages: list[str] = []
        yield messages
    messages += [str(w.message) for w in caught if issubclass(w.category, ConversionWarning)]


@pytest.mark.parametrize(("make", "stages"), [(llama, 1), (gpt2, 1), (t5, 1), (whisper, 1)])
def test_an_empty_cache_is_dropped_in_training_and_that_is_said_once(make, stages):
    model, kwargs = make()
    convert(model)
    with told() as messages:
        for _ in range(3):
            cache = model(**kwargs, use_cache=True).past_key_values
            assert cache.get_seq_length() == 0
    assert len(messages) == stages
    assert "use_cache=False" in messages[0]
    with told() as messages:
        model(**kwargs, use_cache=False)
        model.eval()(**kwargs, use_cache=True)
    assert not messages


@quiet
@pytest.mark.parametrize("make", [llama, gpt2, t5, whisper], ids=lambda make: make.__name__)
def test_what_a_model_with_its_default_cache_holds_does_not_grow_with_depth(make):
    """At this gamma no depth here needs an anchor."""

    def held(layers: int) -> int:
        model, kwargs = make(layers)
        convert(model, Momentum(0.999))
        with no_collector(), LiveBytes(exclude=[model, *kwargs.values()]) as counted:
            output = model(**kwargs)
            loss = output.loss
            del output
            return counted.live if loss.requires_grad else -1

    assert held(12) == held(4) > 0


def test_where_nothing_is_evaluated_twice_a_cache_is_filled():
    model, kwargs = llama()
    convert(model, engine=Store())
    with told() as messages:
        assert model(**kwargs, use_cache=True).past_key_values.get_seq_length(3) == 6
        convert(restore(model))
        with torch.no_grad():
            assert model(**kwargs, use_cache=True).past_key_values.get_seq_length(3) == 6
    assert not messages


def prefix(layers: int = 4, heads: int = 1) -> tuple[Any, list[Tensor]]:
    """A cache with three learned keys and values for every layer."""
    leaves = [torch.randn(2, heads, 3, 8, dtype=torch.float64, requires_grad=True) for _ in range(2 * layers)]
    return transformers.DynamicCache(list(zip(leaves[::2], leaves[1::2], strict=True))), leaves


@pytest.mark.parametrize(("name", "heads", "exact"), [("llama", 1, False), ("llama", 1, True), ("gpt2", 2, False)])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_learned_prefix(name, heads, exact, mode):
    """Prefix tuning: the cache is filled before the call, and has gradients."""
    model, reference, kwargs = pair(HF_MODELS[name](double=True), exact=exact)
    kwargs.pop("attention_mask")
    results = []
    for module, call in ((model, model), (reference, ruled(reference, name))):
        torch.manual_seed(3)
        cache, leaves = prefix(heads=heads)
        result = step(module.train(mode == "train"), partial(call, past_key_values=cache), **kwargs)
        assert cache.get_seq_length(3) == 3 + 6
        results.append(result | {f"gradient of prefix {i}": leaf.grad for i, leaf in enumerate(leaves)})
    assert_same(*results, 1e-5 if exact else TIGHT)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_two_calls_that_share_a_cache_with_gradients(name):
    """In evaluation mode: the second call's loss goes back into the first call through keys and values."""
    model, reference, kwargs = pair(HF_MODELS[name](double=True))
    tokens = kwargs["input_ids"]

    def twice(call: Callable[..., Any]) -> Callable[[], list[Tensor]]:
        def both() -> list[Tensor]:
            first = call(input_ids=tokens[:, :4], use_cache=True)
            second = call(input_ids=tokens[:, 4:], past_key_values=first.past_key_values)
            return [second.logits]

        return both

    actual = train(model.eval(), twice(model))
    assert_same(actual, train(reference.eval(), twice(ruled(reference, name))), TIGHT)
    whole = model(input_ids=tokens, use_cache=False).logits[:, 4:]
    assert error(actual["output 0"], whole) < 1e-12, "a velocity belongs to its token"


def test_a_decoder_s_cache_that_holds_the_encoder_s_keys_alone():
    """They stay, and their gradients with them; the decoder's own keys come behind."""
    model, reference, kwargs = pair(t5(double=True))
    results = []
    for module, call in ((model, model), (reference, ruled(reference, "t5"))):
        torch.manual_seed(3)
        cross, leaves = prefix(heads=2)
        cache = transformers.EncoderDecoderCache(transformers.DynamicCache(), cross)
        kwargs["attention_mask"] = torch.ones(2, 3, dtype=torch.long)
        memory = transformers.modeling_outputs.BaseModelOutput(torch.zeros(2, 3, 16, dtype=torch.float64))
        given = {**kwargs, "encoder_outputs": memory, "use_cache": True}
        result = step(module, partial(call, past_key_values=cache), **given)
        assert cache.get_seq_length(3) == 5
        results.append(result | {f"gradient of key {i}": leaf.grad for i, leaf in enumerate(leaves)})
    assert_same(*results, TIGHT)


def test_a_filled_cache_of_recurrent_layers():
    """They have a state without a length; a first call fills it without gradients, a second one learns."""
    settings = {**GROUPED, "num_hidden_layers": 4, "layer_types": ["conv", "conv", "full_attention", "conv"]}
    model, reference, kwargs = pair(made("Lfm2ForCausalLM", settings, spoken(), double=True))
    tokens, results = kwargs["input_ids"], []
    for module, call in ((model, model), (reference, ruled(reference, "llama"))):
        with torch.no_grad():
            cache = call(input_ids=tokens[:, :5], use_cache=True).past_key_values
        results.append(step(module, partial(call, past_key_values=cache), input_ids=tokens[:, 5:]))
    assert_same(*results, TIGHT)


@quiet
def test_a_cache_that_some_layers_have_filled():
    """The chain ends where steps are stored, and a new one goes on with the velocity behind them."""
    model, reference, _ = pair(llama(layers=6, double=True))
    keys = torch.randn(2, 1, 3, 8, dtype=torch.float64)
    evaluations = [0] * 6
    for i, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(lambda *_, i=i: evaluations.__setitem__(i, evaluations[i] + 1))

    def walk(layers: Any, x: Tensor) -> Tensor:
        cache = transformers.DynamicCache()
        for i in (2, 3):
            cache.update(keys, keys, i)
        rotary = reference.model.rotary_emb(x, torch.arange(6)[None])
        for layer in layers:
            x = layer(x, position_embeddings=rotary, past_key_values=cache, use_cache=True)
        return x

    x = torch.randn(2, 6, 16, dtype=torch.float64, requires_grad=True)
    actual = train(model, partial(walk, model.model.layers), x)
    assert_same(actual, train(reference, partial(walk, by_rule(reference.model.layers, GAMMA)), x), TIGHT)
    assert evaluations == [2, 2, 1, 1, 2, 2]


def test_a_cache_that_was_allocated_beforehand_stays():
    """Its masks are made for all keys that it could have."""
    model, reference, kwargs = pair(llama(double=True, attention_dropout=0.0))
    kwargs.pop("attention_mask")

    def static(call: Callable[..., Any]) -> Callable[..., Any]:
        return lambda **given: call(
            **given, past_key_values=transformers.StaticCache(config=reference.config, max_cache_len=8)
        )

    with told() as messages:
        actual = step(model, static(model), **kwargs)
    assert_same(actual, step(reference, static(ruled(reference, "llama")), **kwargs), TIGHT)
    assert not messages


# ---------------------------------------------------------------------- the models' own checkpointing


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("when", "reentrant"),
    [
        ("after", False),
        ("after", True),
        ("before", False),
        ("before", True),
    ],
)
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_the_models_own_checkpointing_does_nothing_in_a_stage(name, when, reentrant):
    model, kwargs = HF_MODELS[name](double=True)
    perturbed(model)
    kwargs["use_cache"] = False
    reference = copy.deepcopy(model)
    settings = {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    if when == "before":
        model.gradient_checkpointing_enable(**settings)
    convert(model, Momentum(GAMMA))
    if when == "after":
        model.gradient_checkpointing_enable(**settings)
    calls = [0]
    model.get_submodule(LISTS[name][0])[1].register_forward_pre_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    with told() as messages:
        actual = step(model, model, **kwargs)
        actual = step(model, model, **kwargs)
    assert_same(actual, step(reference, ruled(reference, name), **kwargs), TIGHT)
    assert calls == [2], "no checkpoint called the block again"
    assert len(messages) == len(LISTS[name])
    assert all("gradient_checkpointing_disable" in message for message in messages)


# ---------------------------------------------------------------------- the model remains a model


@quiet
@pytest.mark.parametrize("make", [gpt2, t5], ids=lambda make: make.__name__)
def test_saved_and_loaded(make, tmp_path):
    model, kwargs = make()
    plain = copy.deepcopy(model)
    convert(model, Momentum(GAMMA)).eval()
    assert model.num_parameters() == plain.num_parameters()
    assert inspect.signature(model.forward) == inspect.signature(plain.forward)
    model.save_pretrained(tmp_path / "converted")
    plain.save_pretrained(tmp_path / "plain")
    files = [(tmp_path / kind / "model.safetensors").read_bytes() for kind in ("converted", "plain")]
    assert files[0] == files[1]
    loaded = type(plain).from_pretrained(tmp_path / "converted").eval()
    assert "reversible" not in repr(loaded)
    assert torch.equal(loaded(**kwargs).logits, plain.eval()(**kwargs).logits)
    assert torch.equal(convert(loaded, Momentum(GAMMA))(**kwargs).logits, model(**kwargs).logits)
    assert torch.equal(restore(model)(**kwargs).logits, plain(**kwargs).logits)


@quiet
def test_resized_embeddings():
    model, reference, kwargs = pair(llama(double=True))
    for module in (model, reference):
        torch.manual_seed(4)
        module.resize_token_embeddings(60)
    kwargs["input_ids"] = kwargs["input_ids"] + 9
    result = step(model, model, **kwargs)
    assert result["gradient of model.embed_tokens.weight"].shape == (60, 16)
    assert_same(result, step(reference, ruled(reference, "llama"), **kwargs), TIGHT)


@quiet
def test_nothing_is_left_over_after_a_hundred_steps():
    """T5's bias is an argument with a graph: with the collector off, what a cycle held would add up."""
    model, kwargs = t5(layers=2)
    convert(model)
    model(**kwargs).loss.backward()
    with no_collector(), Storages() as storages:
        for step in range(100):
            loss = model(**kwargs).loss
            if step % 2:  # and without a backward pass
                loss.backward()
                model.zero_grad(set_to_none=True)
            del loss
        assert storages.alive() == 0


# ---------------------------------------------------------------------- the fast path of torch.nn's encoder


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor:UserWarning", "ignore:The PyTorch API of nested:UserWarning")
def test_the_fast_path_of_torch_s_encoder_follows_the_rule(norm_first, nested):
    """In evaluation mode, with padding: fused kernels and nested tensors, against the rule over the layers' parts."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=norm_first)
    encoder = perturbed(nn.TransformerEncoder(layer, 4, enable_nested_tensor=nested)).eval()
    x, padded = torch.randn(3, 6, 16, dtype=torch.float64), torch.zeros(3, 6, dtype=torch.bool)
    padded[0, 4:] = padded[2, 3:] = True

    def by_parts(layer: nn.TransformerEncoderLayer, x: Tensor) -> Tensor:
        attend = lambda y: layer.self_attn(y, y, y, key_padding_mask=padded, need_weights=True)[0]  # noqa: E731
        forward = lambda y: layer.linear2(torch.relu(layer.linear1(y)))  # noqa: E731
        if norm_first:
            x = x + attend(layer.norm1(x))
            return x + forward(layer.norm2(x))
        x = layer.norm1(x + attend(x))
        return layer.norm2(x + forward(x))

    expected = x
    for step in by_rule([lambda x, k=k: by_parts(encoder.layers[k], x) for k in range(4)], GAMMA):
        expected = step(expected)
    expected = expected.detach()
    convert(encoder, Momentum(GAMMA))
    with torch.no_grad():
        fast = encoder(x, src_key_padding_mask=padded)
    slow = encoder(x.requires_grad_(), src_key_padding_mask=padded)
    kept = ~padded
    assert error(slow[kept], expected[kept]) < 1e-12
    assert error(fast[kept], expected[kept]) < 1e-12
    with pytest.raises(ReversaError):
        convert(encoder)

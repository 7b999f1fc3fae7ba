"""Converted models that write text: with a cache token by token what they compute without one at once."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from cases import error
from convert_cases import perturbed
from hf_models import HF_MODELS, transformers
from reversa import Invert, Momentum
from reversa.convert import convert

GAMMA = 0.8
NEW = 8


def writer(name: str, **settings) -> tuple[nn.Module, nn.Module, Tensor]:
    """A converted model in float64, the original, and tokens (of an image or of sound: features) to begin with."""
    model, kwargs = HF_MODELS[name](double=True)
    perturbed(model).eval()
    given = kwargs.get("input_features", kwargs.get("input_ids"))
    return convert(copy.deepcopy(model), Momentum(GAMMA), **settings), model, given


def written(model: nn.Module, given: Tensor, **settings) -> Tensor:
    torch.manual_seed(2)
    return model.generate(given, max_new_tokens=NEW, min_new_tokens=NEW, pad_token_id=0, **settings)


WRITERS = ["llama", "mistral", "qwen3", "gemma3", "gpt2", "t5", "whisper"]


@pytest.mark.parametrize("name", WRITERS)
def test_with_a_cache_the_same_tokens_are_written(name):
    model, original, given = writer(name)
    assert torch.equal(written(model, given), written(model, given, use_cache=False))
    assert written(model, given).shape == written(original, given).shape


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("settings", [{"num_beams": 3}, {"do_sample": True}], ids=["beams", "sampled"])
def test_other_ways_to_choose_a_token(name, settings):
    model, _, given = writer(name)
    assert torch.equal(written(model, given, **settings), written(model, given, use_cache=False, **settings))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("cache", ["static", "dynamic"])
def test_kinds_of_caches(name, cache):
    model, _, given = writer(name)
    kept = {"cache_implementation": cache, "disable_compile": True}
    assert torch.equal(written(model, given, **kept), written(model, given, use_cache=False))


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("name", WRITERS[:5])
def test_token_by_token_as_all_at_once(name, exact):
    """A velocity belongs to one token, and keys and values come from the chain's own states."""
    model, original, tokens = writer(name, exact=exact)
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        whole = model(tokens, use_cache=False).logits
        single = [model(tokens[:, i : i + 1], past_key_values=cache).logits for i in range(tokens.shape[1])]
        plain = original(tokens, use_cache=False).logits
    assert error(torch.cat(single, 1), whole) < (1e-4 if exact else 1e-12)
    assert error(plain, whole) > 1e-3, "the rule is not the original's"


def test_a_decoder_token_by_token():
    """The encoder's keys and values are kept as well."""
    model, _, given = writer("t5")
    tokens = torch.randint(3, 50, (2, 6))
    cache = transformers.EncoderDecoderCache(transformers.DynamicCache(), transformers.DynamicCache())
    with torch.no_grad():
        memory = model.encoder(given)
        whole = model(encoder_outputs=memory, decoder_input_ids=tokens, use_cache=False).logits
        single = [
            model(
                encoder_outputs=memory, decoder_input_ids=tokens[:, i : i + 1], past_key_values=cache, use_cache=True
            ).logits
            for i in range(6)
        ]
    assert error(torch.cat(single, 1), whole) < 1e-12


@pytest.mark.parametrize("name", ["llama", "t5"])
@pytest.mark.filterwarnings("ignore::reversa.errors.ConversionWarning")
def test_writing_between_steps_of_training(name):
    """As a trainer does it that looks at examples: in training mode or not, the model writes and goes on to learn."""
    model, kwargs = HF_MODELS[name](double=True)
    convert(perturbed(model), Momentum(GAMMA), engine=Invert(anchors=2))
    losses = []
    for between in (False, True):
        twin = copy.deepcopy(model)
        optimizer = torch.optim.SGD(twin.parameters(), lr=0.02)
        for _ in range(3):
            torch.manual_seed(7)
            loss = twin(**kwargs).loss
            if between:
                written(twin, kwargs["input_ids"])
                written(twin.eval(), kwargs["input_ids"])
                twin.train()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert losses[:3] == losses[3:]
    assert losses[2] < losses[0]

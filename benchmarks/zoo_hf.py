"""Hugging Face's networks in the zoo."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from reversa.errors import import_extra
from zoo_models import CLASSES, Case, Inputs, floats

WORDS = 40
SPECIAL: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 1}


def tokens(length: int = 6, **others: Any) -> Inputs:
    """Token ids, the second row padded at its end."""
    ids = torch.randint(1, WORDS, (2, length))
    mask = torch.ones(2, length, dtype=torch.long)
    mask[1, -2:] = 0
    return (), {"input_ids": ids, "attention_mask": mask, "labels": ids, **others}


def pixels(side: int) -> Inputs:
    (images,), _ = floats(3, side, side)
    return (), {"pixel_values": images, "labels": torch.tensor([0, 2, 4])}


def sound() -> Inputs:
    (features,), _ = floats(8, 16, batch=2)
    return (), {"input_features": features, "labels": torch.randint(1, WORDS, (2, 5))}


def hugging_face(
    model: str, stages: tuple[int, ...], inputs: Callable[[], Inputs], depth: Callable[[int], dict[str, Any]],
    config: str = "", random: bool = True, **settings: Any,
) -> Case:  # fmt: skip
    """The model's class, and its configuration with few layers, and so many more."""

    def make(more: int) -> nn.Module:
        transformers = import_extra("transformers", "hf")
        made = getattr(transformers, config)(**settings, **depth(more))
        return getattr(transformers, model)(made)

    return Case(model, make, inputs, stages, random)


def whisper(**settings: Any) -> Case:
    sizes: dict[str, Any] = {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "num_mel_bins": 8, "d_model": 16}
    sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": WORDS} | SPECIAL
    sizes |= {"max_source_positions": 8, "max_target_positions": 8, "dropout": 0.1, "attention_dropout": 0.1}
    return hugging_face(
        "WhisperForConditionalGeneration", (3, 3), sound,
        lambda n: {"encoder_layers": 3 + n, "decoder_layers": 3 + n}, "WhisperConfig", **sizes, **settings,
    )  # fmt: skip


def hugging_face_cases() -> list[Case]:
    layers: dict[str, Any] = {"depth": lambda n: {"num_hidden_layers": 4 + n}, "stages": (4,)}
    text = layers | {"inputs": tokens, "vocab_size": WORDS, "hidden_size": 16, "intermediate_size": 32}
    text |= {"num_attention_heads": 4, "max_position_embeddings": 16, "pad_token_id": 0}
    llamas = text | {"num_key_value_heads": 2, "attention_dropout": 0.1, "head_dim": 4}
    kinds = ["sliding_attention", "full_attention"]
    masks = {"sliding_window": 3, "depth": lambda n: {"num_hidden_layers": 4 + n, "layer_types": kinds * (2 + n // 2)}}
    views = layers | {"inputs": partial(pixels, 32), "image_size": 32, "patch_size": 8, "hidden_size": 16}
    views |= {"num_attention_heads": 2, "intermediate_size": 32, "hidden_dropout_prob": 0.1, "num_labels": CLASSES}
    views |= {"attention_probs_dropout_prob": 0.1}
    deep: dict[str, Any] = {"depth": lambda n: {"depths": [3, 3 + n]}, "stages": (3, 3), "num_labels": CLASSES}
    deep |= {"inputs": partial(pixels, 64), "hidden_sizes": [8, 16]}
    same_width: dict[str, Any] = deep | {"stages": (3, 2)}  # the first stage begins with the stem's width
    hf = hugging_face
    return [
        hf("BertForMaskedLM", config="BertConfig", **text),
        hf("RobertaForMaskedLM", config="RobertaConfig", **text),
        hf("GPT2LMHeadModel", (4,), tokens, lambda n: {"n_layer": 4 + n}, "GPT2Config", vocab_size=WORDS, n_embd=16,
           n_head=2, n_positions=16, bos_token_id=1, eos_token_id=2),
        hf("LlamaForCausalLM", config="LlamaConfig", **llamas),
        hf("MistralForCausalLM", config="MistralConfig", **llamas, sliding_window=4),
        hf("Qwen2ForCausalLM", config="Qwen2Config", **{k: v for k, v in llamas.items() if k != "head_dim"}),
        hf("Qwen3ForCausalLM", config="Qwen3Config", **llamas | masks, use_sliding_window=True),
        hf("Gemma3ForCausalLM", config="Gemma3TextConfig", **llamas | masks),
        hf("ViTForImageClassification", config="ViTConfig", **views),
        hf("Dinov2ForImageClassification", config="Dinov2Config", **views, mlp_ratio=2, drop_path_rate=0.5),
        hf("SwinForImageClassification", (2, 4), partial(pixels, 32), lambda n: {"depths": [2, 4 + n]}, "SwinConfig",
           image_size=32, embed_dim=8, num_heads=[2, 4], window_size=4, hidden_dropout_prob=0.1, num_labels=CLASSES,
           drop_path_rate=0.5),
        hf("ConvNextV2ForImageClassification", config="ConvNextV2Config", **deep, num_stages=2, drop_path_rate=0.5),
        hf("ResNetForImageClassification", config="ResNetConfig", **same_width, random=False,
           embedding_size=8, layer_type="bottleneck"),
        hf("T5ForConditionalGeneration", (4, 4), tokens, lambda n: {"num_layers": 4 + n}, "T5Config", **SPECIAL,
           vocab_size=WORDS, d_model=16, d_kv=4, d_ff=32, num_heads=4, dropout_rate=0.1),
        whisper(),
        replace(whisper(encoder_layerdrop=0.3, decoder_layerdrop=0.3), name="Whisper with LayerDrop"),
    ]  # fmt: skip

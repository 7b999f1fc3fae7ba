"""Hugging Face's models, tiny: from a configuration, with random weights, and arguments for one training step.

Every function makes ``(model, kwargs)``: the model in training mode, and keyword arguments for its forward, with labels
where it has them. ``double`` makes both in float64. Further settings go to the configuration. Nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers", reason="needs the extra: pip install 'reversa[hf]'")

Made = tuple[nn.Module, dict[str, Any]]

VOCABULARY = 50
LENGTH = 6
SIDE = 32

SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TEXT = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, **SPECIAL}
GROUPED = {**TEXT, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64}
DROPOUT = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
PATCHES = {"image_size": SIDE, "patch_size": 8, "hidden_size": 16, "num_attention_heads": 2, **DROPOUT}
STAGES = {"num_channels": 3, "hidden_sizes": [8, 16], "num_labels": 5}


def made(name: str, settings: dict[str, Any], kwargs: dict[str, Any], double: bool) -> Made:
    """A model of the class of that name, as a constructor would make it: in training mode."""
    kind = getattr(transformers, name)
    model = kind(kind.config_class(**settings)).train()
    if not double:
        return model, kwargs
    return model.double(), {key: v.double() if torch.is_floating_point(v) else v for key, v in kwargs.items()}


def ids(batch: int = 2, length: int = LENGTH) -> Tensor:
    """Tokens without the special ones."""
    return torch.randint(3, VOCABULARY, (batch, length))


def padding(batch: int = 2, length: int = LENGTH) -> Tensor:
    """A mask that leaves out the last two tokens of the first sample."""
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, -2:] = 0
    return mask


def spoken() -> dict[str, Any]:
    """Text to be continued, with padding at the end."""
    tokens, mask = ids(), padding()
    return {"input_ids": tokens, "attention_mask": mask, "labels": tokens.masked_fill(mask == 0, -100)}


def shown() -> dict[str, Any]:
    """Images with classes."""
    return {"pixel_values": torch.randn(2, 3, SIDE, SIDE), "labels": torch.randint(5, (2,))}


# ---------------------------------------------------------------------- text


def llama(layers: int = 4, double: bool = False, **settings: Any) -> Made:
    defaults = {**GROUPED, "num_hidden_layers": layers, "attention_dropout": 0.1}
    return made("LlamaForCausalLM", defaults | settings, spoken(), double)


def mistral(layers: int = 4, double: bool = False, **settings: Any) -> Made:
    defaults = {**GROUPED, "num_hidden_layers": layers, "attention_dropout": 0.1, "sliding_window": 4}
    return made("MistralForCausalLM", defaults | settings, spoken(), double)


def qwen3(layers: int = 4, double: bool = False, **settings: Any) -> Made:
    """Layers with a sliding window and with full attention in turn, each with a mask of its own."""
    defaults = {
        **GROUPED,
        "num_hidden_layers": layers,
        "attention_dropout": 0.1,
        "use_sliding_window": True,
        "sliding_window": 4,
        "layer_types": ["sliding_attention" if i % 2 == 0 else "full_attention" for i in range(layers)],
    }
    return made("Qwen3ForCausalLM", defaults | settings, spoken(), double)


def gemma3(layers: int = 4, double: bool = False, **settings: Any) -> Made:
    """Mask and rotary embedding differ from layer to layer."""
    defaults = {
        **GROUPED,
        "num_hidden_layers": layers,
        "attention_dropout": 0.1,
        "query_pre_attn_scalar": 8,
        "sliding_window": 4,
        "layer_types": ["full_attention" if i % 3 == 2 else "sliding_attention" for i in range(layers)],
    }
    return made("Gemma3ForCausalLM", defaults | settings, spoken(), double)


def gpt2(layers: int = 4, double: bool = False, **settings: Any) -> Made:
    """The cache is the second positional argument of its blocks."""
    defaults = {
        **SPECIAL,
        "vocab_size": VOCABULARY,
        "n_embd": 16,
        "n_layer": layers,
        "n_head": 2,
        "n_positions": 64,
    }
    return made("GPT2LMHeadModel", defaults | settings, spoken(), double)


def bert(layers: int = 4, double: bool = False, **settings: Any) -> Made:
    """Post-norm blocks."""
    defaults = {**TEXT, **DROPOUT, "num_hidden_layers": layers, "max_position_embeddings": 64}
    return made("BertForMaskedLM", defaults | settings, spoken(), double)


def roberta(layers: int = 4, double: bool = False, **settings: Any) -> Made:
    defaults = {**TEXT, **DROPOUT, "num_hidden_layers": layers, "max_position_embeddings": 64}
    return made("RobertaForMaskedLM", defaults | settings, spoken(), double)


# ---------------------------------------------------------------------- encoders and decoders


def t5(layers: int = 4, double: bool = False, **settings: Any) -> Made:
    """Block 0 makes a position bias for all others; the decoder's blocks are given the encoder's output."""
    defaults = {
        "vocab_size": VOCABULARY,
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 32,
        "num_layers": layers,
        "num_heads": 2,
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 16,
        "decoder_start_token_id": 0,
    }
    kwargs = {"input_ids": ids(), "attention_mask": padding(), "labels": ids(length=5)}
    return made("T5ForConditionalGeneration", defaults | settings, kwargs, double)


def whisper(layers: int = 4, double: bool = False, **settings: Any) -> Made:
    frames = 10
    defaults = {
        **SPECIAL,
        "vocab_size": VOCABULARY,
        "d_model": 16,
        **{f"{part}_layers": layers for part in ("encoder", "decoder")},
        **{f"{part}_attention_heads": 2 for part in ("encoder", "decoder")},
        **{f"{part}_ffn_dim": 32 for part in ("encoder", "decoder")},
        "num_mel_bins": 8,
        "max_source_positions": frames,
        "max_target_positions": 32,
        "decoder_start_token_id": 1,
        "dropout": 0.1,
    }
    kwargs = {"input_features": torch.randn(2, 8, 2 * frames), "labels": ids()}
    return made("WhisperForConditionalGeneration", defaults | settings, kwargs, double)


# ---------------------------------------------------------------------- images


def vit(layers: int = 4, double: bool = False, **settings: Any) -> Made:
    defaults = {**PATCHES, "intermediate_size": 32, "num_hidden_layers": layers, "num_labels": 5}
    return made("ViTForImageClassification", defaults | settings, shown(), double)


def dinov2(layers: int = 4, double: bool = False, **settings: Any) -> Made:
    """Every branch is scaled for each channel, and left out for some samples."""
    defaults = {
        **PATCHES,
        "mlp_ratio": 2,
        "num_hidden_layers": layers,
        "num_labels": 5,
        "drop_path_rate": 0.1,
        "layerscale_value": 0.5,
    }
    return made("Dinov2ForImageClassification", defaults | settings, shown(), double)


def swin(layers: int = 3, double: bool = False, **settings: Any) -> Made:
    """Two stages of that many blocks, with a window that shifts."""
    defaults = {
        **DROPOUT,
        "image_size": SIDE,
        "patch_size": 4,
        "embed_dim": 8,
        "depths": [layers, layers],
        "num_heads": [2, 2],
        "window_size": 4,
        "num_labels": 5,
    }
    return made("SwinForImageClassification", defaults | settings, shown(), double)


def convnextv2(layers: int = 3, double: bool = False, **settings: Any) -> Made:
    """Two stages of that many blocks."""
    defaults = {**STAGES, "depths": [layers, layers], "num_stages": 2, "patch_size": 4, "drop_path_rate": 0.1}
    return made("ConvNextV2ForImageClassification", defaults | settings, shown(), double)


def resnet(layers: int = 4, double: bool = False, **settings: Any) -> Made:
    """Two stages of that many blocks, of which the first changes the shape."""
    defaults = {**STAGES, "embedding_size": 8, "depths": [layers, layers], "downsample_in_first_stage": True}
    return made("ResNetForImageClassification", defaults | settings, shown(), double)


HF_MODELS: dict[str, Callable[..., Made]] = {
    make.__name__: make
    for make in (
        llama,
        mistral,
        qwen3,
        gemma3,
        gpt2,
        bert,
        roberta,
        t5,
        whisper,
        vit,
        dinov2,
        swin,
        convnextv2,
        resnet,
    )
}

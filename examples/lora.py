"""LoRA adapters from peft on a reversible Llama: train them, then merge them into the weights.

``python examples/lora.py`` fine-tunes on bytes of Python's own standard library. Only the adapters are trained. Convert
before ``get_peft_model`` or after it, which is the same. With a small gamma the model stays close to the pretrained
one, and integers make its inverse exact.
"""

from __future__ import annotations

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from small_data import pieces
from transformers import LlamaConfig, LlamaForCausalLM

import reversa


def make_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=8,
        num_attention_heads=4,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def with_adapters(model: LlamaForCausalLM) -> PeftModel:
    return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))


def main(steps: int = 20, convert_first: bool = True) -> list[float]:
    if convert_first:
        model = with_adapters(reversa.convert(make_model(), scheme=reversa.Momentum(0.1), exact=True))
    else:
        model = with_adapters(make_model())
        reversa.convert(model.get_base_model(), scheme=reversa.Momentum(0.1), exact=True)
    model.print_trainable_parameters()

    adapters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(adapters, lr=1e-2)
    losses = []
    for tokens in pieces(steps):
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"loss {losses[0]:.3f} before, {losses[-1]:.3f} after {steps} steps")

    (tokens,) = pieces(1)
    with torch.no_grad():
        adapted = model(input_ids=tokens).logits
        merged = model.merge_and_unload()
        print(f"merged: logits differ by {(merged(input_ids=tokens).logits - adapted).abs().max():.1e}")
    return losses


if __name__ == "__main__":
    main()

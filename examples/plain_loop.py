"""A Llama in a plain PyTorch loop: bf16 autocast, accumulated gradients, clipped gradients.

``python examples/plain_loop.py`` trains a small Llama on bytes of Python's own standard library. It prints the
memory of a training step before and after conversion, and the loss. Nothing in the loop knows that the model is
reversible. In bfloat16 recovered states drift far: ``exact=True`` has the very bits of the forward pass instead.
"""

from __future__ import annotations

import torch
from small_data import pieces
from torch.nn.utils import clip_grad_norm_
from transformers import LlamaConfig, LlamaForCausalLM

import reversa
from reversa.memory import estimate


def make_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=12,
        num_attention_heads=4,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def print_memory(model: LlamaForCausalLM, name: str) -> None:
    (tokens,) = pieces(1)
    step = estimate(model, {"input_ids": tokens, "labels": tokens}, lambda output: output.loss, precision="bf16")
    print(f"{name}: {step.peak_bytes / 2**20:.1f} MiB at the peak of a training step")


def main(steps: int = 20, accumulate: int = 2) -> list[float]:
    model = make_model()
    print_memory(model, "as it was")
    model = reversa.convert(model, scheme=reversa.Momentum(0.9), exact=True)
    print_memory(model, "reversible")

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    batches, losses = pieces(steps * accumulate), []
    for _ in range(steps):
        total = 0.0
        for _ in range(accumulate):
            tokens = next(batches)
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(input_ids=tokens, labels=tokens).loss / accumulate
            loss.backward()
            total += loss.item()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    print(f"loss {losses[0]:.3f} before, {losses[-1]:.3f} after {steps} steps of {accumulate} batches")
    return losses


if __name__ == "__main__":
    main()

"""A reversible GPT-2 as a function of its parameters: sharpness-aware minimisation by ``torch.func.functional_call``.

``python examples/functional.py`` trains on bytes of Python's own standard library. The gradient is taken at
p + rho g / ||g||, where g is the gradient at p (Foret et al., 2021, arXiv:2010.01412). The model's parameters are never
moved there and back.
"""

from __future__ import annotations

import torch
from small_data import pieces
from torch import Tensor
from torch.func import functional_call
from transformers import GPT2Config, GPT2LMHeadModel

import reversa


def make_model() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=256,
        n_positions=64,
        n_embd=64,
        n_layer=6,
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    return GPT2LMHeadModel(config)


def uphill(parameters: dict[str, Tensor], gradients: tuple[Tensor, ...], rho: float) -> dict[str, Tensor]:
    """The same parameters a step of length rho up the gradient; gradients reach them through it."""
    norm = torch.stack([g.norm() for g in gradients]).norm()
    return {name: p + rho * g / norm for (name, p), g in zip(parameters.items(), gradients, strict=True)}


def main(steps: int = 20, rho: float = 0.05) -> list[float]:
    model = reversa.convert(make_model(), scheme=reversa.Momentum(0.9))
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    def loss_at(parameters: dict[str, Tensor], tokens: Tensor) -> Tensor:
        return functional_call(model, parameters, kwargs={"input_ids": tokens, "labels": tokens}).loss

    losses = []
    for tokens in pieces(steps):
        loss = loss_at(parameters, tokens)
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        optimizer.zero_grad()
        loss_at(uphill(parameters, gradients, rho), tokens).backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"loss {losses[0]:.3f} before, {losses[-1]:.3f} after {steps} steps")
    return losses


if __name__ == "__main__":
    main()

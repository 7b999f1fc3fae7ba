"""A Llama under FSDP2: parameters, gradients and optimizer state are sharded, block by block.

``torchrun --nproc-per-node 2 examples/fsdp2.py`` trains on bytes of Python's own standard library. Convert, then
``fully_shard`` each block, then the model. On the CPU it takes torch 2.9 or later.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from small_data import pieces
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

import reversa


def make_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=6,
        num_attention_heads=4,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def main(steps: int = 20) -> list[float]:
    dist.init_process_group("gloo")
    rank, processes = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (processes,))  # on GPUs leave it out
    model = reversa.convert(make_model(), scheme=reversa.Momentum(0.9))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    losses = []
    for tokens in pieces(steps):
        mine = tokens[rank::processes]
        loss = model(input_ids=mine, labels=mine).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(loss := loss.detach())
        losses.append(loss.item() / processes)
    if rank == 0:
        whole = sum(p.numel() for p in model.parameters())
        mine = sum(p.to_local().numel() for p in model.parameters() if isinstance(p, DTensor))
        print(f"loss {losses[0]:.3f} before, {losses[-1]:.3f} after {steps} steps in {processes} processes")
        print(f"{whole:,} parameters, {mine:,} of them in this process")
    dist.barrier()  # none leaves while another still talks
    dist.destroy_process_group()
    return losses


if __name__ == "__main__":
    main()

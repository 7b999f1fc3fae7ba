"""A GPT-2 in DistributedDataParallel: every process has a part of each batch, and gradients are averaged.

``torchrun --nproc-per-node 2 examples/ddp.py`` trains on bytes of Python's own standard library, in as many processes
as you say: the losses are the same. Convert before DDP, which collects the parameters and wraps the model.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from small_data import pieces
from torch.nn.parallel import DistributedDataParallel
from transformers import GPT2Config, GPT2LMHeadModel

import reversa


def make_model() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=256,
        n_positions=64,
        n_embd=32,
        n_layer=6,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    return GPT2LMHeadModel(config)


def main(steps: int = 20) -> list[float]:
    dist.init_process_group("gloo")
    rank, processes = dist.get_rank(), dist.get_world_size()
    model = DistributedDataParallel(reversa.convert(make_model(), scheme=reversa.Momentum(0.9)))
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
        print(f"loss {losses[0]:.3f} before, {losses[-1]:.3f} after {steps} steps in {processes} processes")
    dist.barrier()  # none leaves while another still talks
    dist.destroy_process_group()
    return losses


if __name__ == "__main__":
    main()

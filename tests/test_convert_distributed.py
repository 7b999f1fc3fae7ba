"""Converted models in two gloo processes: DDP, and FSDP2 for each block."""

from __future__ import annotations

import copy

import torch
from torch import nn

from cases import assert_same, gradients
from convert_cases import (
    GAMMA,
    Block,
    by_rule,
    perturbed,
    straight,
)
from processes import WORLD, in_processes, in_two_processes, needs_fsdp2
from reversa import Momentum, Store
from reversa.convert import convert, restore

pytestmark = in_processes
BATCH = 3


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(6, 6), nn.Linear(6, 3)
        self.blocks = nn.ModuleList(Block() for _ in range(5))

    def forward(self, x):
        return self.head(straight(list(self.blocks), self.stem(x)))


def _models(example: bool = False) -> tuple[Model, Model, torch.Tensor]:
    torch.manual_seed(0)
    model, x = perturbed(Model()), torch.randn(WORLD * BATCH, 6, dtype=torch.float64)
    reference = copy.deepcopy(model)
    return convert(model, Momentum(GAMMA), example=x if example else None), reference, x  # type: ignore[return-value]


def _expected(reference: Model, x: torch.Tensor):
    reference.zero_grad()
    y = reference.head(straight(by_rule(reference.blocks, GAMMA), reference.stem(x)))
    y.square().mean().backward()
    return gradients(reference)


def _mine(rank: int) -> slice:
    return slice(rank * BATCH, (rank + 1) * BATCH)


def _ddp(rank: int) -> None:
    mine = _mine(rank)
    for settings in ({}, {"static_graph": True, "gradient_as_bucket_view": True}):
        model, reference, x = _models()
        ddp = nn.parallel.DistributedDataParallel(model, bucket_cap_mb=1e-3, **settings)
        expected = _expected(reference, x)
        for _ in range(2):
            model.zero_grad()
            ddp(x[mine]).square().mean().backward()
            assert_same(gradients(model), expected, 1e-12)


def _fsdp(rank: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mine = _mine(rank)
    mesh = init_device_mesh("cpu", (WORLD,))

    def shard(model: Model, reshard: bool) -> None:
        for block in model.blocks:
            fully_shard(block, mesh=mesh, reshard_after_forward=reshard)
        fully_shard(model, mesh=mesh)

    for example, reshard, sharded_first in ((True, True, False), (False, False, False), (False, True, True)):
        model, reference, x = _models(example)
        if sharded_first:
            restore(model)
        shard(model, reshard)
        if sharded_first:
            convert(model, Momentum(GAMMA))
        optimisers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, reference)]
        for _ in range(2):
            model.zero_grad()
            model(x[mine]).square().mean().backward()
            expected = _expected(reference, x)
            actual = {f"gradient of {name}": p.grad.full_tensor() for name, p in model.named_parameters()}
            assert_same(actual, expected, 1e-11)
            for optimiser in optimisers:
                optimiser.step()


def _tapped(rank: int) -> None:
    """A loss on the second block alone, then on all, then on the second again; and a model that was sharded first."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mine, mesh = _mine(rank), init_device_mesh("cpu", (WORLD,))
    for exact in (False, True):
        model, reference, x = _models()
        convert(restore(model), Momentum(GAMMA), exact=exact, example=x)
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        taps: list[torch.Tensor] = []
        model.blocks[1].register_forward_hook(lambda *call, taps=taps: taps.append(call[-1]))
        rule = by_rule(reference.blocks, GAMMA)
        optimisers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, reference)]
        for tapped in (True, False, True):
            taps.clear()
            y = model(x[mine])
            (taps[0] if tapped else y).square().mean().backward()
            states = [reference.stem(x)]
            for block in rule:
                states.append(block(states[-1]))
            (states[2] if tapped else reference.head(states[-1])).square().mean().backward()
            for p, q in zip(model.parameters(), reference.parameters(), strict=True):
                if q.grad is not None:
                    torch.testing.assert_close(p.grad.full_tensor(), q.grad, rtol=1e-9, atol=1e-6 if exact else 1e-11)
            for optimiser in optimisers:
                optimiser.step()
                optimiser.zero_grad()


@needs_fsdp2
def test_a_loss_on_a_middle_tap_under_fsdp2(tmp_path):
    in_two_processes(tmp_path, _tapped)


def _sharded_first(rank: int) -> None:
    """A model of Hugging Face that FSDP2 has sharded cannot be copied: its blocks are found by structure."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    import hf_models

    torch.manual_seed(0)
    model, inputs = hf_models.llama(layers=3, double=True, attention_dropout=0.0, use_cache=False)
    reference = convert(copy.deepcopy(model), Momentum(GAMMA), engine=Store())
    mesh = init_device_mesh("cpu", (WORLD,))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    convert(model, Momentum(GAMMA))
    for _ in range(2):
        for m in (model, reference):
            m.zero_grad()
            m(**inputs).loss.backward()
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p.grad.full_tensor(), q.grad, rtol=1e-6, atol=1e-8)


@needs_fsdp2
def test_a_hugging_face_model_that_was_sharded_first(tmp_path):
    in_two_processes(tmp_path, _sharded_first)


def test_ddp(tmp_path):
    in_two_processes(tmp_path, _ddp)


@needs_fsdp2
def test_fsdp2_for_each_block(tmp_path):
    in_two_processes(tmp_path, _fsdp)

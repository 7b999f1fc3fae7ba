"""Two gloo processes: DDP and FSDP2 see the gradients that one process computes, when they expect them."""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
from torch import nn

import reversa
from cases import CASES, Attention, assert_same, gradients, mlp
from oracle import Plain
from processes import WORLD, in_processes, in_two_processes, needs_fsdp2

pytestmark = in_processes
BATCH = 4
ENGINES = {"invert": reversa.Invert(), "one by one": reversa.Invert(group=1), "keep": reversa.Invert(keep=2)}


class Model(nn.Module):
    def __init__(self, chain: nn.Module, width: int) -> None:
        super().__init__()
        self.stem, self.chain, self.head = nn.Linear(width, width), chain, nn.Linear(width, 3)

    def forward(self, x, **kwargs):
        return self.head(self.chain(self.stem(x), **kwargs))


def models(case: str, engine=None, make=mlp, depth: int = 6) -> tuple[Model, Model]:
    """The same model with a chain of ours, and with the oracle's."""
    torch.manual_seed(0)
    found = CASES[case]
    model = Model(
        found.sequence([make() for _ in range(depth)], engine), (8 if make is Attention else 6) * (1 + found.halves)
    )
    model = model.double()
    plain = copy.deepcopy(model)
    plain.chain = Plain(plain.chain.blocks, found.rule)
    return model, plain


def batch(width: int, *between: int) -> torch.Tensor:
    """The whole batch; each process takes its part."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(WORLD * BATCH, *between, width, dtype=torch.float64, generator=generator)


def mean_loss(y: torch.Tensor) -> torch.Tensor:
    return (y.sin() * torch.arange(y.shape[-1])).mean()


# ---------------------------------------------------------------------- DDP


def _ddp(model: nn.Module, x: torch.Tensor, **settings):
    """Three steps: the gradients, and in which order gradients became ready and buckets were launched."""
    ddp = nn.parallel.DistributedDataParallel(model, bucket_cap_mb=1e-3, **settings)
    log: list[str] = []

    def launched(state, bucket):
        log.append(f"bucket {bucket.index()} of {len(bucket.parameters())}")
        bucket.buffer().div_(WORLD)
        return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda f: f.value()[0])

    ddp.register_comm_hook(None, launched)
    for name, p in model.named_parameters():
        p.register_post_accumulate_grad_hook(lambda p, name=name: log.append(name))
    for _ in range(3):
        model.zero_grad()
        log.append("step")
        mean_loss(ddp(x)).backward()
    return gradients(model), log


def _ddp_work(rank: int) -> None:
    for case, engine, static in (
        ("momentum", "one by one", False),
        ("revnet", "invert", True),
        ("revnet", "keep", False),
    ):
        model, plain = models(case, ENGINES[engine])
        single = copy.deepcopy(plain)
        x = batch(model.stem.in_features)
        part = x[rank * BATCH : (rank + 1) * BATCH]
        ours, order = _ddp(model, part, static_graph=static)
        theirs, plain_order = _ddp(plain, part, static_graph=static)
        mean_loss(single(x)).backward()
        assert order == plain_order, (case, engine, static)
        assert len([line for line in order if line.startswith("bucket")]) > 6  # there was something to overlap
        assert_same(ours, theirs, 1e-12)
        assert_same(ours, gradients(single), 1e-12)


def test_ddp_launches_its_buckets_as_in_plain_training(tmp_path):
    in_two_processes(tmp_path, _ddp_work)


# ---------------------------------------------------------------------- FSDP2


def _full(model: nn.Module):
    return {n: None if p.grad is None else p.grad.full_tensor() for n, p in model.named_parameters()}


def _sharded(model: Model, reshard: bool) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (WORLD,))
    for f in model.chain.functions:
        fully_shard(f, mesh=mesh, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh)


def _fsdp_work(rank: int) -> None:
    mine = slice(rank * BATCH, (rank + 1) * BATCH)
    for case, make, engine, reshard in (
        ("momentum", Attention, "invert", True),
        ("momentum", Attention, "one by one", False),
        ("revnet", mlp, "invert", True),
        ("revnet", mlp, "keep", True),
    ):
        model, plain = models(case, ENGINES[engine], make)
        _sharded(model, reshard)
        x, extras = (batch(8, 3), {"memory": batch(8, 5)}) if make is Attention else (batch(12), {})
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, plain)]
        for _ in range(2):
            for optimizer in optimizers:
                optimizer.zero_grad()
            mean_loss(model(x[mine], **{name: extra[mine] for name, extra in extras.items()})).backward()
            mean_loss(plain(x, **extras)).backward()
            assert all(isinstance(p.grad, torch.distributed.tensor.DTensor) for p in model.parameters())
            assert_same(_full(model), {name: p.grad for name, p in plain.named_parameters()}, 1e-11)
            for optimizer in optimizers:
                optimizer.step()


@needs_fsdp2
def test_fsdp2_for_each_function(tmp_path):
    in_two_processes(tmp_path, _fsdp_work)

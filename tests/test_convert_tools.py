"""Converted models under what people use around models: compilers, functional transforms, distribution, memory counters."""

from __future__ import annotations

import copy
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torchvision
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import checkpoint

from cases import assert_same, error, gradients, no_collector
from convert_cases import Block, Looped, TupleBlock, by_rule, leaf, looped, perturbed, ruled, straight, train
from reversa import Invert, Momentum, Store
from reversa.convert import convert
from reversa.memory import LiveBytes

GAMMA = 0.8
TOLERANCE = 1e-12


def pair(model: Looped, **settings):
    reference = copy.deepcopy(model)
    return convert(model, Momentum(GAMMA), **settings), reference


# ---------------------------------------------------------------------- compilers

quiet = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
    "ignore:The .grad attribute of a Tensor that is not a leaf",  # Dynamo looks at it
)


@pytest.fixture
def compiler():
    torch.compiler.reset()
    yield CompileCounterWithBackend("aot_eager")
    torch.compiler.reset()


@quiet
@pytest.mark.parametrize("p", [0.0, 0.3], ids=["plain", "dropout"])
def test_blocks_compiled_in_place_share_one_graph(compiler, p):
    """One graph serves every block, the forward pass and the replay; its code is the same in both directions."""
    model, reference = pair(looped(depth=6, p=p))
    for block in model.blocks:
        block.compile(backend=compiler)
    x = leaf(4, 6)
    expected = train(reference, ruled(reference, GAMMA), x)
    for _ in range(3):
        assert_same(train(model, model, x), expected, TOLERANCE)
    assert compiler.frame_count == 1, "the blocks differ by their parameters alone"


@quiet
def test_compiled_blocks_that_return_tuples(compiler):
    def loop(blocks, x):
        extras = []
        for block in blocks:
            x, extra, _ = block(x)
            extras.append(extra)
        return x, extras

    model, reference = pair(looped(loop, kind=TupleBlock))
    for block in model.blocks[1:]:  # and one that is not
        block.compile(backend=compiler)
    x = leaf(4, 6)
    assert_same(train(model, model, x), train(reference, ruled(reference, GAMMA), x), TOLERANCE)
    assert compiler.frame_count > 0


@quiet
@pytest.mark.parametrize("used", [False, True], ids=["fresh", "after a step"])
def test_the_whole_model_compiled(compiler, used):
    """Right; the frame with the loop runs as ordinary Python."""
    model, reference = pair(looped())
    x = leaf(4, 6)
    expected = train(reference, ruled(reference, GAMMA), x)
    if used:
        train(model, model, x)
    compiled = torch.compile(model, backend=compiler)
    for _ in range(2):
        assert_same(train(model, compiled, x), expected, TOLERANCE)
    with torch.no_grad():
        assert error(compiled(x), ruled(reference, GAMMA)(x)) < TOLERANCE


@quiet
@pytest.mark.slow
def test_a_whole_resnet_compiled(compiler):
    model = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [3, 1, 1, 1], num_classes=5)
    model = perturbed(model)
    x = torch.randn(2, 3, 48, 48, dtype=torch.float64)
    convert(model, Momentum(GAMMA))
    plain = copy.deepcopy(model)
    expected = train(plain, plain, x)
    assert_same(train(model, torch.compile(model, backend=compiler), x), expected, 1e-10)
    assert compiler.frame_count > 0, "the stem and the head are compiled"


@quiet
@pytest.mark.parametrize("used", [False, True], ids=["fresh", "after a step"])
def test_a_block_put_back_compiled(compiler, used):
    """``torch.compile(block)`` instead of ``block.compile()``: another module stands in the list."""
    model, reference = pair(looped())
    x = leaf(4, 6)
    expected = train(reference, ruled(reference, GAMMA), x)
    if used:
        train(model, model, x)
    for i in range(5):
        model.blocks[i] = torch.compile(model.blocks[i], backend=compiler)
    actual = train(model, model, x)
    assert_same({k.replace("_orig_mod.", ""): v for k, v in actual.items()}, expected, TOLERANCE)


# ---------------------------------------------------------------------- functions of parameters


@pytest.mark.parametrize("used", [False, True], ids=["fresh", "after a step"])
def test_functional_call_with_other_parameters(used):
    model, reference = pair(looped())
    if used:
        model(leaf(4, 6))
    other = {name: (p.detach() * 1.1).requires_grad_() for name, p in model.named_parameters()}
    x = leaf(4, 6)
    ours = torch.autograd.grad(functional_call(model, other, x).square().sum(), list(other.values()))
    with torch.no_grad():
        for p in reference.parameters():
            p.mul_(1.1)
    theirs = torch.autograd.grad(ruled(reference, GAMMA)(x).square().sum(), list(reference.parameters()))
    assert all(error(a, b) < TOLERANCE for a, b in zip(ours, theirs, strict=True))
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("used", [False, True], ids=["fresh", "after a step"])
def test_functional_gradients(used):
    model, reference = pair(looped())
    if used:
        model(leaf(4, 6))
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    x = torch.randn(4, 6, dtype=torch.float64)

    def loss(parameters, x):
        return functional_call(model, parameters, (x,)).square().sum()

    ruled(reference, GAMMA)(x).square().sum().backward()
    expected = {name: p.grad for name, p in reference.named_parameters()}
    assert_same(grad(loss)(parameters, x), expected, TOLERANCE)

    each = vmap(grad(loss), in_dims=(None, 0))(parameters, x[:, None])
    assert_same({name: g.sum(0) for name, g in each.items()}, expected, TOLERANCE)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_around_the_model(reentrant):
    model, reference = pair(looped(p=0.2))
    x = leaf(4, 6)
    expected = train(reference, ruled(reference, GAMMA), x)
    assert_same(train(model, lambda x: checkpoint(model, x, use_reentrant=reentrant), x), expected, TOLERANCE)


def test_a_checkpoint_around_each_block():
    def loop(blocks, x):
        for block in blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return x

    model, reference = pair(looped(p=0.2))
    reference_loop, model.loop = reference.loop, loop
    assert reference_loop is straight
    x = leaf(4, 6)
    assert_same(train(model, model, x), train(reference, ruled(reference, GAMMA), x), TOLERANCE)


# ---------------------------------------------------------------------- several processes

WORLD, BATCH = 2, 3


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


def _ddp(rank: int, mine: slice) -> None:
    for settings in ({}, {"static_graph": True, "gradient_as_bucket_view": True}):
        model, reference, x = _models()
        ddp = nn.parallel.DistributedDataParallel(model, bucket_cap_mb=1e-3, **settings)
        expected = _expected(reference, x)
        for _ in range(2):
            model.zero_grad()
            ddp(x[mine]).square().mean().backward()
            assert_same(gradients(model), expected, 1e-12)


def _fsdp(rank: int, mine: slice) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (WORLD,))

    def shard(model: Model, reshard: bool) -> None:
        for block in model.blocks:
            fully_shard(block, mesh=mesh, reshard_after_forward=reshard)
        fully_shard(model, mesh=mesh)

    for example, reshard in ((True, True), (False, True), (True, False)):
        model, reference, x = _models(example)
        shard(model, reshard)
        optimisers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, reference)]
        for _ in range(2):
            model.zero_grad()
            model(x[mine]).square().mean().backward()
            expected = _expected(reference, x)
            actual = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
            assert_same(actual, expected, 1e-11)
            for optimiser in optimisers:
                optimiser.step()


def _process(rank: int, folder: str, work) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    try:
        work(rank, slice(rank * BATCH, (rank + 1) * BATCH))
    finally:
        dist.destroy_process_group()


needs_gloo = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="PyTorch is built without gloo"
)


@needs_gloo
@pytest.mark.slow
@pytest.mark.distributed
def test_ddp(tmp_path):
    mp.spawn(_process, args=(str(tmp_path), _ddp), nprocs=WORLD)


@needs_gloo
@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 9), reason="FSDP2 on the CPU needs torch >= 2.9"
)
def test_fsdp2_for_each_block(tmp_path):
    mp.spawn(_process, args=(str(tmp_path), _fsdp), nprocs=WORLD)


# ---------------------------------------------------------------------- memory


def wide(depth: int) -> Looped:
    return Looped((Block(64) for _ in range(depth)), straight)


def measure(model: nn.Module, x: torch.Tensor) -> tuple[float, float, float]:
    """Live bytes of a training step in units of x: at the peak, after the forward pass, after the step."""
    model(x).mean().backward()
    with no_collector(), LiveBytes(exclude=[model, x]) as counted:
        loss = model(x).mean()
        held = counted.live
        loss.backward()
        peak = counted.peak
        del loss
    return peak / x.nbytes, held / x.nbytes, counted.live / x.nbytes


def test_memory_does_not_grow_with_depth():
    """At this gamma no depth here needs an anchor. What is the same to three digits is 0.1 % of a step."""
    x = torch.randn(2048, 64)
    shallow, deep = (measure(convert(wide(depth), Momentum(0.999)), x) for depth in (8, 64))
    assert deep[0] == pytest.approx(shallow[0], rel=1e-3)
    assert deep[1] == pytest.approx(shallow[1], rel=2e-3)
    assert deep[1] < 3.01
    assert deep[2] == 0
    one, two = (measure(wide(depth), x) for depth in (8, 64))
    assert two[1] - one[1] > 56, "the original stores an activation in each block"
    assert two[0] > 4 * deep[0]


def test_memory_of_a_resnet_does_not_grow_with_its_blocks():
    def peak(blocks: int) -> float:
        net = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, blocks, 1, 1], num_classes=3)
        return measure(convert(net, Momentum(0.999)), torch.randn(2, 3, 64, 64))[0]

    assert peak(12) == pytest.approx(peak(4), rel=0.02)  # statistics of the norms, per block, are what differs


def test_inputs_kept_for_each_tap_cost_their_states_alone():
    """A loss on every hidden state keeps the hidden states; no velocity with them."""
    x = torch.randn(2048, 64)

    def taps(blocks, x):
        return torch.stack([(x := block(x)).square().mean() for block in blocks])

    held = []
    for depth in (8, 24):
        model = convert(Looped((Block(64) for _ in range(depth)), taps), Momentum(0.999))
        held.append(measure(model, x)[1])
    assert held[1] - held[0] == pytest.approx(16, abs=0.05)


def test_storing_is_what_it_says():
    x = torch.randn(2048, 64)
    stored, inverted = (measure(convert(wide(16), Momentum(0.999), engine=engine), x) for engine in (Store(), Invert()))
    assert stored[1] > inverted[1] + 16


def test_importing_the_conversion_loads_torch_alone():
    code = (
        "import sys, reversa.convert\n"
        "third = {'torchvision', 'timm', 'transformers', 'lightning', 'jsonargparse', 'rich', 'sklearn', 'matplotlib'}\n"
        "print(sorted(third & {name.partition('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

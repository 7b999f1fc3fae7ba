"""Exact chains under everything that an engine meets: the oracle stores every activation of the same exact forward."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import reversa
from cases import (
    FAMILIES,
    Attention,
    Function,
    Parts,
    Storages,
    chain,
    conv,
    gradients,
    input_for,
    loss_of,
    mlp,
    no_collector,
)
from exact_cases import assert_bit_equal, step
from processes import WORLD, in_processes, in_two_processes, needs_fsdp2
from reversa.errors import ReplayError, ReversaError
from reversa.exact import FixedPoint

SCHEMES = {
    "momentum": reversa.Momentum(0.9),
    "momentum-0.01": reversa.Momentum(0.01),
    "revnet": reversa.RevNet(),
    "additive": reversa.AdditiveCoupling(),
}
ENGINES = {
    "invert": reversa.Invert(),
    "one by one": reversa.Invert(group=1),
    "group3": reversa.Invert(group=3),
    "keep2": reversa.Invert(keep=2),
    "keep all": reversa.Invert(keep=99),
    "anchors3": reversa.Invert(anchors=3),
    "without anchors": reversa.Invert(anchors=None),
    "recompute1": reversa.Recompute(every=1),
    "recompute3": reversa.Recompute(every=3),
    "offload": reversa.Offload(),
    "mixed": Parts(),
}
INVERTERS = ["invert", "one by one", "keep2", "anchors3"]
STORE = reversa.Store()
DEPTH = 10

every_scheme = pytest.mark.parametrize("scheme", SCHEMES)
both = pytest.mark.parametrize("scheme", ["momentum-0.01", "revnet"])
every_engine = pytest.mark.parametrize("engine", ENGINES)
inverting = pytest.mark.parametrize("engine", INVERTERS)


def sequence(scheme: str, fs, engine="invert", exact=True) -> reversa.ReversibleSequence:
    return chain(SCHEMES[scheme], fs, exact, ENGINES[engine])


def input_of(scheme: str, *shape: int, **settings) -> torch.Tensor:
    return input_for(SCHEMES[scheme], *shape, **settings)


def assert_exact(seq, x, **extras) -> None:
    engine = seq.engine
    assert_bit_equal(step(seq, x, engine, **extras), step(seq, x, STORE, **extras))


def run(module, call, *inputs, seed: int = 5):
    """One training step of any call over copies: every output, gradient and buffer, and the generator's next draw."""
    module, inputs = copy.deepcopy((module, inputs))
    torch.manual_seed(seed)
    output = call(module, *inputs)
    loss_of(output).backward()
    result = {"random": torch.rand(3)}
    result |= {f"output {i}": t.detach() for i, t in enumerate(tree_leaves(output)) if isinstance(t, torch.Tensor)}
    result |= {f"input {i}": t.grad for i, t in enumerate(inputs)}
    return result | gradients(module) | {name: b.clone() for name, b in module.named_buffers()}


def assert_exact_under(call, seq, *inputs) -> None:
    """The call gives the same bits with an exact chain and with its stored oracle."""
    stored = copy.deepcopy(seq)
    for module in stored.modules():
        if isinstance(module, reversa.ReversibleSequence) and module.exact:
            module.engine = STORE
    expected = run(stored, call, *inputs)
    assert_bit_equal(run(seq, call, *inputs), expected)
    assert any(t is not None and t.any() for name, t in expected.items() if name.startswith("gradient"))


# ---------------------------------------------------------------------- engines, kinds of functions, extra arguments


@every_engine
@every_scheme
def test_every_engine(scheme, engine):
    fs = [mlp(p=0.3) for _ in range(DEPTH)]
    assert_exact(sequence(scheme, fs, engine), input_of(scheme, 4, 6))


@inverting
@pytest.mark.parametrize("family", FAMILIES)
@every_scheme
def test_kinds_of_functions(scheme, family, engine):
    """Dropout, BatchNorm, attention with a memory and a mask as keyword arguments, tuples."""
    family, dtype = FAMILIES[family], torch.float32
    assert_exact(
        sequence(scheme, family.functions(6, dtype), engine), input_of(scheme, *family.shape), **family.extras(dtype)
    )


@pytest.mark.parametrize("exact", [True, FixedPoint(), FixedPoint(bits=32)], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@both
def test_autocast(scheme, family, exact):
    """The loss is outside, as it should be."""
    family, dtype = FAMILIES[family], torch.float32
    extras = family.extras(dtype)

    def call(seq, x):
        with torch.autocast("cpu", torch.bfloat16):
            return seq(x, **extras)

    seq = sequence(scheme, family.functions(6, dtype), exact=exact)
    assert_exact_under(call, seq, input_of(scheme, *family.shape))


@both
def test_models_of_16_bits(scheme):
    fs = FAMILIES["mlp"].functions(6, torch.bfloat16)
    assert_exact(sequence(scheme, fs), input_of(scheme, 4, 6, dtype=torch.bfloat16))


class Shifted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = mlp(p=0.1)

    def forward(self, x, shift, scale=1.0, *, mask=None):
        y = self.body(x + shift) * scale
        return y if mask is None else y.masked_fill(mask, 0.5)


@every_engine
@both
def test_extra_arguments(scheme, engine):
    """By position and by keyword, with a graph of their own, and every step adds to their gradients."""
    mask = torch.rand(4, 6) > 0.7

    def call(seq, x, shift, scale):
        return seq(x, shift.tanh(), scale=scale.exp(), mask=mask)

    seq = sequence(scheme, [Shifted() for _ in range(DEPTH)], engine)
    shift, scale = (torch.randn(n, 6, requires_grad=True) for n in (1, 4))
    assert_exact_under(call, seq, input_of(scheme, 4, 6), shift, scale)


@pytest.mark.parametrize(
    "frozen", [range(DEPTH), range(5), range(5, DEPTH), range(0, DEPTH, 2), [0], [DEPTH - 1]], ids=str
)
@pytest.mark.parametrize("input_wants", [True, False])
@inverting
@both
def test_frozen_parameters(scheme, engine, frozen, input_wants):
    fs = [mlp() for _ in range(DEPTH)]
    for i in frozen:
        fs[i].requires_grad_(False)
    seq, x = sequence(scheme, fs, engine), input_of(scheme, 4, 6).detach().requires_grad_(input_wants)
    if len(frozen) == DEPTH and not input_wants:
        assert not seq(x).requires_grad
    else:
        assert_exact(seq, x)


@inverting
@both
def test_frozen_biases_and_weights(scheme, engine):
    fs = [mlp() for _ in range(DEPTH)]
    for i, f in enumerate(fs):
        (f[0].weight if i % 2 else f[2].bias).requires_grad_(False)
    assert_exact(sequence(scheme, fs, engine), input_of(scheme, 4, 6))


@inverting
@both
def test_shared_modules_and_parameters(scheme, engine):
    shared, fs = mlp(p=0.2), [mlp() for _ in range(DEPTH)]
    fs[1] = fs[4] = fs[5] = shared
    fs[7][0].weight = fs[2][0].weight
    assert_exact(sequence(scheme, fs, engine), input_of(scheme, 4, 6))


@both
def test_layouts(scheme):
    """Convolutions compute other bits over another layout."""
    fs = [conv(8).to(memory_format=torch.channels_last) for _ in range(DEPTH)]
    x = input_of(scheme, 3, 8, 9, 9).detach()
    for layout in (torch.contiguous_format, torch.channels_last):
        assert_exact(sequence(scheme, fs, "one by one"), x.clone(memory_format=layout).requires_grad_())


class Permuted(nn.Module):
    """ConvNeXt's block: what it returns is laid out as channels last, whatever it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise, self.pointwise = nn.Conv2d(4, 4, 7, padding=3, groups=4), mlp(4)

    def forward(self, x):
        return self.pointwise(self.depthwise(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@every_scheme
def test_functions_that_change_the_layout(scheme):
    seq, x = sequence(scheme, [Permuted() for _ in range(DEPTH)]), input_of(scheme, 2, 4, 9, 9)
    assert_exact(seq, x)
    first = SCHEMES[scheme].open(x.detach())
    back = seq.inverse_state(seq.forward_state(first))
    assert all(torch.equal(b, f) for b, f in zip(back, first, strict=False))


# ---------------------------------------------------------------------- backward passes of every kind


@inverting
@both
def test_a_second_backward(scheme, engine):
    def call(seq, x):
        y = seq(x)
        loss_of(y).backward(retain_graph=True)
        return y.sin()

    assert_exact_under(call, sequence(scheme, [mlp(p=0.3) for _ in range(DEPTH)], engine), input_of(scheme, 4, 6))


@both
def test_a_second_backward_without_asking_is_an_error(scheme):
    y = sequence(scheme, [mlp() for _ in range(DEPTH)])(input_of(scheme, 4, 6))
    loss_of(y).backward(retain_graph=False)
    with pytest.raises((ReplayError, RuntimeError)):
        loss_of(y).backward()


def gradients_of(seq, x, wanted, engine):
    seq.engine = engine
    torch.manual_seed(3)
    return torch.autograd.grad(loss_of(seq(x)), [f[0].weight for f in (seq.functions[i] for i in wanted)])


@pytest.mark.parametrize("wanted", [[0], [9], [5], [2, 7], [7, 2]], ids=str)
@inverting
@both
def test_gradients_of_some(scheme, engine, wanted):
    seq, x = sequence(scheme, [mlp(p=0.2) for _ in range(DEPTH)]), input_of(scheme, 4, 6)
    ours, theirs = (gradients_of(seq, x, wanted, e) for e in (ENGINES[engine], STORE))
    assert all(map(torch.equal, ours, theirs))


@inverting
@both
def test_gradients_of_some_over_one_graph(scheme, engine):
    """In any order: each backward pass walks from the end again."""
    seq, x = sequence(scheme, [mlp(p=0.2) for _ in range(DEPTH)]), input_of(scheme, 4, 6)
    results = []
    for seq.engine in (ENGINES[engine], STORE):
        torch.manual_seed(3)
        loss = loss_of(seq(x))
        order = [6, 2, 9, 0, 2, 8]
        results.append([torch.autograd.grad(loss, seq.functions[i][0].weight, retain_graph=True)[0] for i in order])
    assert all(map(torch.equal, *results))


def penalty(seq, x):
    y = seq(x)
    (g,) = torch.autograd.grad(loss_of(y), x, create_graph=True)
    return y, g


def smooth(width: int = 6) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 2 * width), nn.Tanh(), nn.Linear(2 * width, width))


@inverting
@every_scheme
def test_a_gradient_penalty(scheme, engine):
    fs = [smooth().double() for _ in range(DEPTH)]
    assert_exact_under(penalty, sequence(scheme, fs, engine), input_of(scheme, 4, 6, dtype=torch.float64))


@both
def test_a_gradient_penalty_is_that_of_the_formula(scheme):
    """Held against the float chain: the second derivative goes through the rule, not around it."""
    fs, x = [smooth().double() for _ in range(DEPTH)], input_of(scheme, 4, 6, dtype=torch.float64)
    exact = run(sequence(scheme, fs), penalty, x)
    for name, want in run(chain(SCHEMES[scheme], fs, False, STORE), penalty, x).items():
        assert torch.allclose(exact[name], want, rtol=1e-6, atol=1e-6), name


@inverting
@both
def test_two_forwards_before_one_backward(scheme, engine):
    def call(seq, x, other):
        first, second = seq(x), seq(other)
        return first.tanh() * seq(x + second)

    fs = [mlp(p=0.2) for _ in range(DEPTH)]
    assert_exact_under(call, sequence(scheme, fs, engine), input_of(scheme, 4, 6), input_of(scheme, 4, 6))


@inverting
@both
def test_two_shapes_before_one_backward(scheme, engine):
    def call(seq, x, other):
        first, second = seq(x), seq(other)
        return second, first

    fs = [mlp() for _ in range(DEPTH)]
    assert_exact_under(call, sequence(scheme, fs, engine), input_of(scheme, 4, 6), input_of(scheme, 2, 6))


@both
def test_threads(scheme):
    """Chains that run at the same time share nothing."""
    seq, results = sequence(scheme, [mlp() for _ in range(DEPTH)]), {}
    inputs = [input_of(scheme, 4 + i, 6) for i in range(4)]

    def work(i: int, engine) -> None:
        copied = copy.deepcopy(seq)
        copied.engine = engine
        y = copied(inputs[i])
        results[i, str(engine)] = torch.autograd.grad(loss_of(y), [inputs[i], *copied.parameters()])

    threads = [threading.Thread(target=work, args=(i, e)) for i in range(4) for e in (ENGINES["invert"], STORE)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(4):
        assert all(map(torch.equal, results[i, "Invert()"], results[i, "Store()"]))


# ---------------------------------------------------------------------- in and around other things


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = mlp(p=0.3)

    def forward(self, x):
        return checkpoint(self.body, x, use_reentrant=False)


@inverting
@both
def test_a_checkpoint_inside(scheme, engine):
    assert_exact(sequence(scheme, [Checkpointed() for _ in range(DEPTH)], engine), input_of(scheme, 4, 6))


@pytest.mark.parametrize("reentrant", [True, False])
@inverting
@both
def test_a_chain_inside_a_checkpoint(scheme, engine, reentrant):
    def call(seq, x):
        return checkpoint(lambda x: seq(x.sin()), x, use_reentrant=reentrant).cos()

    assert_exact_under(call, sequence(scheme, [mlp(p=0.3) for _ in range(DEPTH)], engine), input_of(scheme, 4, 6))


@pytest.mark.parametrize("inner_exact", [True, False])
@inverting
@both
def test_a_chain_of_chains(scheme, engine, inner_exact):
    fs = [chain(SCHEMES["revnet"], [mlp(3) for _ in range(4)], inner_exact, reversa.Invert(group=1)) for _ in range(4)]
    seq = sequence(scheme, fs, engine)
    assert_exact_under(lambda seq, x: seq(x), seq, input_of(scheme, 4, 6))


def test_chains_one_after_another():
    model = nn.Sequential(
        *(sequence(scheme, [mlp(6 if "momentum" in scheme else 3) for _ in range(6)]) for scheme in SCHEMES)
    )
    assert_exact_under(lambda model, x: model(x), model, torch.randn(4, 6, requires_grad=True))


@both
def test_without_gradients_the_same_numbers(scheme):
    seq, x = sequence(scheme, [Attention() for _ in range(6)]), input_of(scheme, 2, 3, 8)
    expected = seq(x).detach()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            for seq.engine in (ENGINES["invert"], STORE):
                assert torch.equal(seq(x.detach().clone()), expected)
    seq.eval()
    assert torch.equal(seq(x), expected)
    assert_exact(seq, x)


@both
def test_evaluation_with_statistics_of_its_own(scheme):
    seq, x = sequence(scheme, [conv() for _ in range(6)]), input_of(scheme, 3, 4, 5, 5)
    seq(x)
    seq.eval()
    assert_exact(seq, x)
    expected = step(seq, x, STORE)["output"]
    with torch.no_grad():
        assert torch.equal(seq(x), expected)


@both
@inverting
def test_hooks_see_what_they_see_without_us(scheme, engine):
    seen = []

    def call(seq, x):
        seen.clear()
        for i, f in enumerate(seq.functions):
            f[2].weight.register_hook(lambda g, i=i: seen.append((i, g.clone())))
            f.register_full_backward_hook(lambda m, gi, go, i=i: seen.append((i, go[0].clone())))
        return seq(x)

    seq, x, logs = sequence(scheme, [mlp() for _ in range(DEPTH)], engine), input_of(scheme, 4, 6), []
    for seq.engine in (ENGINES[engine], STORE):
        run(seq, call, x)
        logs.append(list(seen))
    assert [i for i, _ in logs[0]] == [i for i, _ in logs[1]]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(*logs, strict=True))


@both
def test_functional_calls(scheme):
    seq, x = sequence(scheme, [mlp() for _ in range(DEPTH)]), input_of(scheme, 4, 6)
    results = []
    for seq.engine in (ENGINES["invert"], STORE):
        leaves = {n: (p.detach() * 0.7).requires_grad_() for n, p in seq.named_parameters()}
        y = functional_call(seq, {n: p * 1.1 for n, p in leaves.items()}, (x,))
        results.append(torch.autograd.grad(loss_of(y), [x, *leaves.values()]))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("engine", ["invert", "offload"])
@both
def test_functional_gradients(scheme, engine):
    """torch.func.grad differentiates the formula; nothing is computed back there."""
    seq, x = sequence(scheme, [mlp().double() for _ in range(6)], engine), input_of(scheme, 4, 6, dtype=torch.float64)
    parameters = {n: p.detach() for n, p in seq.named_parameters()}
    ours = torch.func.grad(lambda ps: functional_call(seq, ps, (x.detach(),)).sin().sum())(parameters)
    seq.engine = STORE
    theirs = torch.autograd.grad(seq(x.detach()).sin().sum(), list(seq.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(ours.values(), theirs, strict=True))


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")  # PyTorch's own, in its rules for jvp
@both
def test_vmap_and_forward_mode_are_right_or_refused(scheme):
    fs = [mlp().double() for _ in range(6)]
    seq, x = sequence(scheme, fs), input_of(scheme, 4, 6, dtype=torch.float64).detach()
    plain = chain(SCHEMES[scheme], fs, False, STORE)
    direction = torch.randn_like(x)
    for transform in (
        lambda m: torch.func.vmap(m)(x[:, None])[:, 0],
        lambda m: torch.func.jvp(m, (x,), (direction,))[1],
        lambda m: torch.func.vmap(torch.func.grad(lambda x: m(x[None]).sin().sum()))(x),
    ):
        try:
            found = transform(seq)
        except ReversaError:
            continue
        assert torch.allclose(found, transform(plain), rtol=1e-6, atol=1e-6)


def test_parameters_changed_before_the_backward_pass():
    seq = sequence("momentum", [mlp() for _ in range(DEPTH)])
    loss = loss_of(seq(input_of("momentum", 4, 6)))
    with torch.no_grad():
        seq.functions[3][0].weight.mul_(1.1)
    with pytest.raises(ReplayError, match="changed in place"):
        loss.backward()


@both
def test_the_output_changed_in_place(scheme):
    """Either the state is safe from it, or there is an error: never another gradient."""
    seq, x = sequence(scheme, [mlp() for _ in range(DEPTH)]), input_of(scheme, 4, 6)

    def call(seq, x):
        return seq(x).mul_(2)

    try:
        ours = run(seq, call, x)
    except ReplayError:
        return
    seq.engine = STORE
    assert_bit_equal(ours, run(seq, call, x))


# ---------------------------------------------------------------------- what is held


def train_once(seq, x) -> None:
    loss_of(seq(x, torch.randn(6, requires_grad=True).tanh())).backward()
    x.grad = None
    seq.zero_grad()


@inverting
@every_scheme
def test_nothing_is_held_after_a_step(scheme, engine):
    seq, x = sequence(scheme, [Shifted() for _ in range(DEPTH)], engine), input_of(scheme, 4, 6)
    train_once(seq, x)
    with no_collector(), Storages() as storages:
        train_once(seq, x)
        assert storages.alive() == 0


@inverting
@every_scheme
def test_nothing_is_held_without_a_backward(scheme, engine):
    seq, x = sequence(scheme, [Shifted() for _ in range(DEPTH)], engine), input_of(scheme, 4, 6)
    with no_collector(), Storages() as storages:
        y = seq(x, torch.randn(6, requires_grad=True).tanh())
        assert storages.alive() > 0
        del y
        assert storages.alive() == 0


@both
def test_nothing_is_held_after_a_gradient_penalty(scheme):
    seq, x = sequence(scheme, [smooth() for _ in range(DEPTH)]), input_of(scheme, 4, 6)
    with no_collector(), Storages() as storages:
        y, g = penalty(seq, x)
        (g**2).sum().backward()
        x.grad = None
        seq.zero_grad()
        del y, g
        assert storages.alive() == 0


@pytest.mark.parametrize("where", ["forward", "replay"])
@both
def test_nothing_is_held_after_an_exception(scheme, where):
    def boom(module, x, y):
        if where == "forward" or reversa.is_replaying():
            raise KeyError("boom")
        return y

    fs = [Function(boom if i == 4 else None) for i in range(DEPTH)]
    seq, x = sequence(scheme, fs), input_of(scheme, 4, 6)
    with no_collector(), Storages() as storages:
        with pytest.raises(KeyError) as caught:
            loss_of(seq(x)).backward()
        caught.value.__traceback__ = None
        del caught
        x.grad = None
        seq.zero_grad()
        assert storages.alive() == 0


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("gamma", [0.5, 0.9, 1.0])
def test_what_is_held_between_forward_and_backward(gamma, bits):
    """X, V, x, and the spilled words."""
    batch, width, depth = 64, 32, 100
    exact = FixedPoint(bits=bits)
    seq = reversa.ReversibleSequence(
        [mlp(width) for _ in range(depth)], reversa.Momentum(gamma), exact=exact, engine=reversa.Invert(group=1)
    )
    x = torch.randn(batch, width, requires_grad=True)
    with Storages() as storages:
        y = seq(x)
        held = storages.alive(y)
    words = {0.5: 12, 0.9: 1, 1.0: 0}[gamma]
    assert held <= batch * width * (2 * bits // 8 + words) + 64 * depth + 64


# ---------------------------------------------------------------------- two processes


class Model(nn.Module):
    def __init__(self, scheme: str, make, width: int) -> None:
        super().__init__()
        halves = 1 if SCHEMES[scheme].carries_input else 2
        self.stem, self.head = nn.Linear(width * halves, width * halves), nn.Linear(width * halves, 3)
        self.chain = sequence(scheme, [make() for _ in range(6)])

    def forward(self, x):
        return self.head(self.chain(self.stem(x)))


def _pair(scheme: str, make=mlp, width: int = 6):
    torch.manual_seed(0)
    model = Model(scheme, make, width)
    stored = copy.deepcopy(model)
    stored.chain.engine = STORE
    return model, stored, torch.randn(4 * WORLD, *((4,) if make is Attention else ()), model.stem.in_features)


def _losses(model, x):
    for _ in range(2):
        model.zero_grad()
        model(x).sin().mean().backward()


def _ddp_work(rank: int) -> None:
    for scheme, static in (("momentum-0.01", False), ("revnet", True)):
        model, stored, x = _pair(scheme)
        for m in (model, stored):
            _losses(nn.parallel.DistributedDataParallel(m, bucket_cap_mb=1e-3, static_graph=static), x[rank::WORLD])
        assert_bit_equal(gradients(model), gradients(stored))


def _fsdp_work(rank: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (WORLD,))
    for scheme, make, width, reshard in (("momentum-0.01", Attention, 8, True), ("revnet", mlp, 6, True)):
        model, stored, x = _pair(scheme, make, width)
        for m in (model, stored):
            for f in m.chain.functions:
                fully_shard(f, mesh=mesh, reshard_after_forward=reshard)
            fully_shard(m, mesh=mesh)
            _losses(m, x[rank::WORLD])
        full = [{n: p.grad.full_tensor() for n, p in m.named_parameters()} for m in (model, stored)]
        assert_bit_equal(*full)


@pytest.mark.parametrize(
    "work",
    [
        pytest.param(_ddp_work, id="ddp", marks=in_processes),
        pytest.param(_fsdp_work, id="fsdp2", marks=[*in_processes, needs_fsdp2]),
    ],
)
def test_two_processes(tmp_path, work):
    in_two_processes(tmp_path, work)

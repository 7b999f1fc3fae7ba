"""The stage finder against architectures whose blocks are known, toys with one property each, and the live model."""

from __future__ import annotations

import copy
import gc
import logging
import pickle
import random
import time

import pytest
import torch
from torch import nn

from reversa.convert import find as find_without_example
from reversa.convert.example import example_inputs, same_class_runs
from reversa.convert.find import Findings, find_stages
from reversa.errors import ConversionError, SettingError

torchvision = pytest.importorskip("torchvision", reason="needs the extra: pip install 'reversa[vision]'")

EXPECTED = {  # blocks of each stage, without those that change the shape
    "resnet18": {"layer1": 2},
    "resnet50": {"layer1": 2, "layer2": 3, "layer3": 5, "layer4": 2},
    "resnet101": {"layer1": 2, "layer2": 3, "layer3": 22, "layer4": 2},
    "resnet152": {"layer1": 2, "layer2": 7, "layer3": 35, "layer4": 2},
    "resnext50_32x4d": {"layer1": 2, "layer2": 3, "layer3": 5, "layer4": 2},
    "wide_resnet50_2": {"layer1": 2, "layer2": 3, "layer3": 5, "layer4": 2},
    "vit_b_16": {"encoder.layers": 12},
    "swin_t": {"features.1": 2, "features.3": 2, "features.5": 6, "features.7": 2},
    "convnext_tiny": {"features.1": 3, "features.3": 3, "features.5": 9, "features.7": 3},
    "efficientnet_b0": {"features.4": 2, "features.5": 2, "features.6": 3},
    "mobilenet_v2": {"features.5-6": 2, "features.8-10": 3, "features.12-13": 2, "features.15-16": 2},
    "regnet_y_400mf": {"trunk_output.block2": 2, "trunk_output.block3": 5, "trunk_output.block4": 5},
    "r3d_18": {"layer1": 2},
    "densenet121": {},
    "vgg16_bn": {},
}


def library_model(name):
    with torch.device("meta"):  # no weights to draw: the finder reads shapes only
        return torchvision.models.get_model(name, weights=None)


def find(model, *args, **kwargs) -> Findings:
    return find_stages(model, args, kwargs)


def lengths(findings):
    return {stage.name: len(stage.blocks) for stage in findings.stages}


def reasons(findings):
    return {block.name: block.reason for block in findings.left}


# --- models of libraries ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "mode"),
    [*((name, "train") for name in EXPECTED), ("resnet18", "eval"), ("vit_b_16", "eval"), ("swin_t", "eval")],
)
def test_library_models(name, mode):
    try:
        model = library_model(name)
    except (RuntimeError, NotImplementedError):  # constructors that read numbers cannot run on the meta device
        model = torchvision.models.get_model(name, weights=None)
    args, kwargs = example_inputs(model.train(mode == "train"))
    assert lengths(find_stages(model, args, kwargs)) == EXPECTED[name]


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d"])
def test_resnet_stages_hold_every_block_but_those_that_change_the_shape(name):
    model = library_model(name)
    findings = find_stages(model, *example_inputs(model))
    layers = {f"layer{i}": getattr(model, f"layer{i}") for i in (1, 2, 3, 4)}
    keeping = {f"{layer}.{i}" for layer, blocks in layers.items() for i, b in enumerate(blocks) if b.downsample is None}
    everything = {f"{layer}.{i}" for layer, blocks in layers.items() for i in range(len(blocks))}
    found = [block for stage in findings.stages for block in stage.blocks]
    alone = {block.name for block in findings.left if block.reason.startswith("a run of one block")}
    assert set(found) | alone == keeping
    assert {block.name for block in findings.left} == everything - set(found)
    assert found == [name for name, _ in model.named_modules() if name in set(found)]
    assert {stage.after for stage in findings.stages} == {("relu",)}
    assert {stage.key for stage in findings.stages} == {0}


def test_resnet_shapes_and_reasons():
    model = library_model("resnet50")
    findings = find(model, torch.zeros(3, 3, 96, 64, device="meta"))
    assert [stage.shape for stage in findings.stages] == [
        (3, 256, 24, 16),
        (3, 512, 12, 8),
        (3, 1024, 6, 4),
        (3, 2048, 3, 2),
    ]
    assert {stage.dtype for stage in findings.stages} == {torch.float32}
    assert reasons(findings) == {
        "layer1.0": "changes the shape (64, 24, 16) -> (256, 24, 16)",
        "layer2.0": "changes the shape (256, 24, 16) -> (512, 12, 8)",
        "layer3.0": "changes the shape (512, 12, 8) -> (1024, 6, 4)",
        "layer4.0": "changes the shape (1024, 6, 4) -> (2048, 3, 2)",
    }
    assert reasons(find(library_model("resnet18"), torch.zeros(2, 3, 64, 64, device="meta")))["layer2.1"].startswith(
        "a run of one"
    )


def test_a_model_inside_another_and_frozen():
    model = nn.Sequential(nn.Identity(), library_model("resnet50").requires_grad_(False), nn.LazyLinear(3))
    assert lengths(find(model[:2], torch.zeros(2, 3, 64, 64, device="meta"))) == {
        f"1.{name}": count for name, count in EXPECTED["resnet50"].items()
    }


def transformer_layer(kind=nn.TransformerEncoderLayer, **settings):
    return kind(16, 2, 32, batch_first=True, **settings)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("norm_first", [True, False])
def test_torch_transformers(norm_first, mode):
    after = () if norm_first else ("norm",)
    model = nn.Transformer(16, 2, 3, 4, 32, batch_first=True, norm_first=norm_first, dropout=0.1)
    findings = find_stages(model.train(mode == "train"), *example_inputs(model))
    assert {(s.name, len(s.blocks), s.key, s.after) for s in findings.stages} == {
        ("encoder.layers", 3, 0, after),
        ("decoder.layers", 4, 0, after),
    }
    encoder = nn.TransformerEncoder(transformer_layer(norm_first=norm_first), 2, enable_nested_tensor=False)
    mask = torch.zeros(2, 5, dtype=torch.bool)
    findings = find(encoder.train(mode == "train"), torch.zeros(2, 5, 16), src_key_padding_mask=mask)
    assert lengths(findings) == {"layers": 2}


# --- toys, one property each --------------------------------------------------------------------------------------


class Block(nn.Module):
    """x + f(x), with what is given instead of the plain sum."""

    def __init__(self, join=lambda x, f: x + f, width=6):
        super().__init__()
        self.f = nn.Sequential(nn.Linear(width, width), nn.Tanh())
        self.join = join

    def forward(self, x):
        return self.join(x, self.f(x))


def chain(*joins):
    return nn.Sequential(*(Block(join) for join in joins))


X = torch.zeros(4, 6)


class Loop(nn.Module):
    """Blocks b1, b2, ... as plain attributes, and what happens to x after each."""

    def __init__(self, between=lambda model, i, x: x, count=3, block=Block):
        super().__init__()
        self.between, self.count = between, count
        for i in range(1, count + 1):
            setattr(self, f"b{i}", block())
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        for i in range(1, self.count + 1):
            x = self.between(self, i, getattr(self, f"b{i}")(x))
        return self.head(x)


def test_a_sequential_and_attributes():
    (stage,) = find(chain(*[torch.add] * 3), X).stages
    assert (stage.name, stage.blocks, stage.key, stage.shape, stage.after) == ("0-2", ("0", "1", "2"), 0, (4, 6), ())
    (stage,) = find(Loop(), X).stages
    assert (stage.name, stage.blocks) == ("b1-b3", ("b1", "b2", "b3"))


RESIDUAL = {
    "sum": (lambda x, f: x + f, ()),
    "sum the other way round": (lambda x, f: f + x, ()),
    "difference": (lambda x, f: x - f, ()),
    "in place on f": (lambda x, f: f.add_(x), ()),
    "in place on a copy of x": (lambda x, f: x.clone().add_(f), ()),
    "scaled function": (lambda x, f: torch.addcmul(x, torch.full((6,), 1e-4), f), ()),
    "scaled input": (lambda x, f: 0.7 * x + 0.3 * f, ()),
    "weighted sum": (lambda x, f: torch.add(x, f, alpha=0.1), ()),
    "reshaped": (lambda x, f: (x.view(2, 2, 6) + f.view(2, 2, 6)).view(4, 6), ()),
    "transposed": (lambda x, f: (x.t() + f.t()).t().contiguous(), ()),
    "activated first": (lambda x, f: torch.relu(x) + f, ()),
    "two additions": (lambda x, f: (x + f) + (x + f).sin(), ()),
    "norm between two additions": (lambda x, f: (y := nn.functional.layer_norm(x + f, (6,))) + y.sin(), ()),
    "constant added after": (lambda x, f: (x + f) + torch.ones(6), ()),
    "relu after": (lambda x, f: torch.relu(x + f), ("relu",)),
    "relu after, in place": (lambda x, f: torch.relu_(x + f), ("relu",)),
    "norm after": (lambda x, f: nn.functional.layer_norm(x + f, (6,)), ("norm",)),
    "rms norm after": (lambda x, f: nn.functional.rms_norm(x + f, (6,)), ("norm",)),
    "rms norm by hand after": (
        lambda x, f: (y := x + f) * torch.rsqrt(y.pow(2).mean(-1, True) + 1e-6),
        ("norm",),
    ),
    "group norm after": (lambda x, f: nn.functional.group_norm(x + f, 2), ("norm",)),
    "leaky relu after": (lambda x, f: nn.functional.leaky_relu(x + f), ("relu",)),
    "unsqueezed": (lambda x, f: (x.unsqueeze(1) + f.unsqueeze(1)).squeeze(1), ()),
    "dropout after": (lambda x, f: nn.functional.dropout(x + f, 0.5), ()),
    "gelu after": (lambda x, f: nn.functional.gelu(x + f), ("activation",)),
    "relu of a norm after": (lambda x, f: torch.relu(nn.functional.layer_norm(x + f, (6,))), ("relu", "norm")),
}


@pytest.mark.parametrize("case", RESIDUAL)
def test_residual_additions(case):
    join, after = RESIDUAL[case]
    findings = find(chain(join, join), X)
    assert lengths(findings) == {"0-1": 2}, reasons(findings)
    assert findings.stages[0].after == after


def test_a_norm_with_a_weight_after_the_addition():
    class PostNorm(Block):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(6))

        def forward(self, x):
            y = (x + self.f(x)).double()
            return self.weight * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)).float()

    (stage,) = find(nn.Sequential(PostNorm(), PostNorm()), X).stages
    assert stage.after == ("norm",)


NOT_RESIDUAL = {
    "no skip": lambda x, f: f,
    "product": lambda x, f: x * f,
    "gate": lambda x, f: x * torch.sigmoid(f),
    "addition that does not depend on x": lambda x, f: x + torch.ones(6),
    "two functions, no skip": lambda x, f: f + f.sin(),
    "highway": lambda x, f: x * torch.sigmoid(f) + f,
    "skip through a matrix": lambda x, f: x @ torch.eye(6) + f,
    "concatenation": lambda x, f: torch.cat([x[:, :3], f[:, 3:]], 1),
    "addition before a matrix": lambda x, f: (x + f) @ torch.eye(6),
    "detached": lambda x, f: (x + f).detach() * f,
}


@pytest.mark.parametrize("case", NOT_RESIDUAL)
def test_what_is_no_residual_addition(case):
    findings = find(chain(*[NOT_RESIDUAL[case]] * 3), X)
    assert findings.stages == ()
    assert reasons(findings) == dict.fromkeys("012", "no residual addition found")


def test_plain_networks_have_no_stage():
    layers = [nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU()] * 3
    findings = find(nn.Sequential(*map(copy.deepcopy, layers)), X)
    assert findings.stages == ()
    assert reasons(findings) == dict.fromkeys("013467", "no residual addition found")


def test_the_chain_ends_where_a_block_is_no_residual_block():
    plus, none = RESIDUAL["sum"][0], NOT_RESIDUAL["no skip"]
    findings = find(chain(plus, plus, none, plus, none, plus, plus, plus), X)
    assert lengths(findings) == {"0-1": 2, "5-7": 3}
    assert reasons(findings) == {
        "2": "no residual addition found",
        "3": "a run of one block, which would save little",
        "4": "no residual addition found",
    }


def test_a_modules_own_output_must_arrive_at_the_next_one():
    assert lengths(find(Loop(lambda m, i, x: x.detach()), X)) == {}
    assert lengths(find(Loop(lambda m, i, x: x * 2), X)) == {}
    assert lengths(find(Loop(lambda m, i, x: x.view(4, 6)), X)) == {}
    assert lengths(find(Loop(lambda m, i, x: x.mul_(2) if i == 2 else x, count=5), X)) == {"b3-b5": 3}
    assert lengths(find(Loop(lambda m, i, x: nn.Identity()(x)), X)) == {"b1-b3": 3}
    assert lengths(find(Loop(lambda m, i, x: (m.head(x), x)[1]), X)) == {"b1-b3": 3}


def test_taps_do_not_end_a_stage():
    class Unet(Loop):
        def forward(self, x):
            a = self.b1(x)
            b = self.b2(a)
            return self.head(self.b3(b) + a + b)

    assert lengths(find(Unet(), X)) == {"b1-b3": 3}


def test_parallel_branches_are_no_chain():
    class Fork(Loop):
        def forward(self, x):
            x = self.b1(x)
            return self.head(self.b2(x) + self.b3(x))

    assert lengths(find(Fork(), X)) == {"b1-b2": 2}  # b3 was given b1's output, not b2's
    assert reasons(find(Fork(), X))["b3"].startswith("a run of one block")


def test_shared_and_uncalled_blocks_are_left():
    class Shared(Loop):
        def forward(self, x):
            for _ in range(3):
                x = self.b1(x)
            return self.head(self.b2(x))

    findings = find(Shared(), X)
    assert findings.stages == ()
    assert reasons(findings) == {
        "b1": "is called several times in one forward pass",
        "b2": "a run of one block, which would save little",
        "b3": "is not called in the forward pass",
    }


def test_one_shared_block_alone_is_told():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Block()

        def forward(self, x):
            return self.block(self.block(x))

    assert reasons(find(Shared(), X)) == {"block": "is called several times in one forward pass"}


def test_the_addition_in_the_parent_is_not_the_blocks():
    class Adds(Loop):
        def forward(self, x):
            for block in (self.b1, self.b2, self.b3):
                x = x + block.f(x)
            return self.head(x)

    assert find(Adds(), X).stages == ()


class TupleBlock(Block):
    def forward(self, x, bias=None):
        return super().forward(x if bias is None else x + 0 * bias), x.sum(), None


def test_tuple_outputs():
    class Tuples(Loop):
        def forward(self, x):
            bias = None
            for i in (1, 2, 3):
                x, bias, _ = getattr(self, f"b{i}")(x, bias)
            return self.head(x), bias

    (stage,) = find(Tuples(block=TupleBlock), X).stages
    assert (stage.blocks, stage.key) == (("b1", "b2", "b3"), 0)


class AskingBlock(Block):
    def forward(self, other, *, hidden=None):
        return super().forward(hidden) + 0 * other


def test_the_carried_tensor_by_keyword_and_in_another_place():
    class Keywords(Loop):
        def forward(self, memory, x):
            for i in (1, 2, 3):
                x = getattr(self, f"b{i}")(memory, hidden=x)
            return self.head(x)

    (stage,) = find(Keywords(block=AskingBlock), X.sum(), X).stages
    assert (stage.blocks, stage.key) == (("b1", "b2", "b3"), "hidden")


def test_among_arguments_of_one_shape_the_carried_one_has_the_skip_path():
    class Second(Block):
        def forward(self, memory, x):
            return x + self.f(x + memory)

    class Model(Loop):
        def forward(self, memory, x):
            for i in (1, 2, 3):
                x = getattr(self, f"b{i}")(memory, x)
            return self.head(x)

    (stage,) = find(Model(block=Second), X, X).stages
    assert (stage.blocks, stage.key) == (("b1", "b2", "b3"), 1)


def test_among_arguments_that_all_have_a_skip_path_the_carried_one_comes_from_the_block_before():
    class Placed(Block):
        def forward(self, place, x):
            return super().forward(place + x)

    class Model(Loop):
        def forward(self, place, x):
            for i in (1, 2, 3):
                x = getattr(self, f"b{i}")(place, x)
            return self.head(x)

    (stage,) = find(Model(block=Placed), X, X).stages
    assert (stage.blocks, stage.key) == (("b2", "b3"), 1)  # in the first block, either may be the one


def test_a_block_called_in_another_way_than_the_others_is_not_in_their_stage():
    class Mixed(Loop):
        def forward(self, x):
            return self.head(self.b4(self.b3(x=self.b2(x=self.b1(x)))))

    (stage,) = find(Mixed(count=4), X).stages
    assert (stage.blocks, stage.key) == (("b2", "b3"), "x")


def test_types_of_the_carried_tensor():
    model = chain(*[torch.add] * 2).half()
    assert find(model, X.half()).stages[0].dtype is torch.float16
    to_double = chain(lambda x, f: x + f.double())
    assert find(nn.Sequential(to_double[0], Block(torch.add).double(), Block(torch.add).double()), X).stages[
        0
    ].blocks == ("1", "2")
    twins = nn.ModuleList([Block(lambda x, f: (x + f).to(torch.float64))]).append(Block())
    left = reasons(find(nn.Sequential(twins[0], nn.Flatten(), Block().double()), X))
    assert left["0"] == "changes the data type torch.float32 -> torch.float64"


def test_a_block_that_writes_to_its_input_is_left_with_the_one_before():
    class Writes(Block):
        def forward(self, x):
            return x.add_(self.f(x.clone()))

    findings = find(nn.Sequential(Block(), Block(), Block(), Writes(), Block(), Block()), X)
    assert lengths(findings) == {"0-1": 2, "4-5": 2}
    assert reasons(findings) == {"2": "its output is changed in place later on", "3": "changes its input in place"}


def test_the_model_may_write_to_its_input():
    class Writes(Loop):
        def forward(self, x):
            return super().forward(x.sub_(1).div_(2))

    x = torch.ones(4, 6)
    assert lengths(find(Writes(), x)) == {"b1-b3": 3}
    assert torch.equal(x, torch.ones(4, 6))


def test_parts_that_run_without_gradients_are_left():
    class Partly(Loop):
        def forward(self, x):
            with torch.no_grad():
                x = self.b2(self.b1(x))
            return self.head(self.b5(self.b4(self.b3(x))))

    findings = find(Partly(count=5), X)
    assert lengths(findings) == {"b4-b5": 2}
    left = reasons(findings)
    assert left["b1"] == left["b2"] == "runs without gradients"
    assert left["b3"].startswith("is given a tensor without gradient")


def test_of_nested_runs_those_that_save_more_become_stages():
    """Of n blocks of m each a chain of the outer saves n - 1 times m blocks' activations, chains of the inner n (m - 1)
    of them; and each chain keeps a state.
    """

    def pile(outer, inner):
        return nn.Sequential(*(chain(*[torch.add] * inner) for _ in range(outer)))

    assert lengths(find(pile(2, 5), X)) == {"0": 5, "1": 5}
    assert lengths(find(pile(5, 2), X)) == {"0-4": 5}
    assert lengths(find(pile(3, 3), X)) == {"0-2": 3}


def test_a_deep_model_in_little_time():
    findings = find(chain(*[torch.add] * 150), X)
    assert lengths(findings) == {"0-149": 150}


def test_a_model_of_seven_billion_parameters():
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig())
    assert model.num_parameters() > 6.7e9
    start = time.process_time()
    findings = find_without_example(model)
    assert time.process_time() - start < 5
    assert lengths(findings) == {"model.layers": 32}


def test_the_pass_takes_no_memory():
    batch = torch.zeros(1).expand(1_000_000, 3, 224, 224)  # its first convolution alone would fill terabytes
    (stage,) = find(library_model("resnet18").to_empty(device="cpu"), batch).stages
    assert stage.shape == (1_000_000, 64, 56, 56)


def test_tokens_in():
    model = nn.Sequential(nn.Embedding(7, 6), *chain(*[torch.add] * 3))
    for frozen in (False, True):
        model.requires_grad_(not frozen)
        assert find(model, torch.zeros(4, 5, dtype=torch.long)).stages[0].shape == (4, 5, 6)


def test_nothing_is_left_behind_for_the_collector():
    model = Loop()
    find(model, X)  # once, for what PyTorch sets up at first use
    gc.collect()
    gc.disable()
    try:
        find(model, X)
        left = [o for o in gc.get_objects() if issubclass(type(o), Loop) and o is not model]
    finally:
        gc.enable()
    assert left == []


# --- the live model -----------------------------------------------------------------------------------------------


class Everything(nn.Module):
    """Batch statistics, dropout, counters, hooks, LayerDrop from Python's generator, a tensor that is no buffer."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(Block(), nn.BatchNorm1d(6), nn.Dropout(0.5), Block(), Block()).train()
        self.blocks[1].eval()
        self.count, self.plain = 0, torch.zeros(3)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.blocks[0].register_forward_hook(lambda module, args, output: None)
        nn.utils.parametrizations.weight_norm(self.blocks[3].f[0])

    def forward(self, x):
        self.count += 1
        self.steps += 1
        self.plain.add_(1)
        random.random()
        return self.blocks(x + torch.rand_like(x))


def snapshot(model):
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    tensors = [*model.state_dict(keep_vars=True).values(), model.plain]
    return (
        [(t, t._version, t.clone(), t.requires_grad, None if t.grad is None else t.grad.clone()) for t in tensors],
        (hooks, [m.training for m in model.modules()], [type(m) for m in model.modules()], model.count),
        (random.getstate(), torch.is_grad_enabled()),
        torch.get_rng_state(),
    )


def assert_untouched(model, before):
    tensors, others, state, rng = snapshot(model)
    assert (others, state) == before[1:3]
    assert torch.equal(rng, before[3])
    for (t, version, value, needs, grad), (t0, version0, value0, needs0, grad0) in zip(tensors, before[0], strict=True):
        assert t is t0
        assert (version, needs) == (version0, needs0)
        torch.testing.assert_close((value, grad), (value0, grad0), rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(4, 6), (4, 7)], ids=["runs", "fails"])
def test_the_live_model_is_not_touched(shape):
    model = Everything()
    model(torch.randn(4, 6)).sum().backward()
    model.blocks[4].requires_grad_(False)
    before = snapshot(model)
    if shape == (4, 6):
        assert lengths(find(model, torch.zeros(shape))) == {"blocks": 2}
    else:
        with pytest.raises(ConversionError):
            find(model, torch.zeros(shape))
    assert_untouched(model, before)


def test_hooks_on_the_live_model_see_nothing():
    model, seen = Loop(), []
    model.b1.register_forward_hook(lambda module, args, output: seen.append(output))
    model.b2.register_forward_pre_hook(lambda module, args: seen.append(args))
    assert lengths(find(model, X)) == {"b1-b3": 3}
    assert seen == []


def test_the_callers_modes_make_no_difference():
    model = torchvision.models.resnet18()
    x = torch.zeros(2, 3, 64, 64)
    want = find(model, x)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert find(model, x) == want
    with torch.autocast("cpu", torch.bfloat16):
        assert lengths(find(model, x)) == lengths(want)


def test_findings_are_values():
    findings = find(chain(*[torch.add] * 3), X)
    assert pickle.loads(pickle.dumps(findings)) == findings
    assert hash(findings) == hash(copy.deepcopy(findings))
    with pytest.raises(AttributeError):
        findings.stages[0].name = "other"


def test_a_failing_forward_is_one_error_and_no_noise(caplog, capfd):
    with caplog.at_level(logging.DEBUG), pytest.raises(ConversionError, match="example=") as caught:
        find(chain(*[torch.add] * 3), torch.zeros(4, 7))
    assert "Sequential" in str(caught.value)
    assert caught.value.__cause__ is not None
    assert caplog.records == []
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger("torch._subclasses.fake_tensor").filters == []


def test_a_forward_that_reads_numbers_is_told():
    class Reads(Loop):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else x

    with pytest.raises(ConversionError, match="depends on the numbers"):
        find(Reads(), X)


def test_a_model_that_cannot_be_copied_is_told():
    model = chain(*[torch.add] * 3)
    model.generator = (i for i in range(3))
    with pytest.raises(ConversionError, match="could not be copied"):
        find(model, X)


# --- example inputs -----------------------------------------------------------------------------------------------


def test_examples_that_are_given():
    model = chain(torch.add)
    assert example_inputs(model, X) == ((X,), {})
    assert example_inputs(model, (X, 3)) == ((X, 3), {})
    assert example_inputs(model, {"x": X}) == ((), {"x": X})
    with pytest.raises(SettingError, match=r"example must be a tensor.*got list"):
        example_inputs(model, [X])


def test_examples_of_torchvision_models_follow_their_type_and_device():
    (x,), kwargs = example_inputs(library_model("resnet18").double())
    assert (x.shape, x.dtype, x.device.type, kwargs) == ((2, 3, 224, 224), torch.float64, "meta", {})
    vit = torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 32)
    assert example_inputs(vit)[0][0].shape == (2, 3, 32, 32)
    assert lengths(find_stages(vit, *example_inputs(vit))) == {"encoder.layers": 2}

    class Mine(torchvision.models.ResNet):
        pass

    mine = Mine(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1])
    assert example_inputs(mine)[0][0].shape == (2, 3, 224, 224)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("batch_first", [True, False])
def test_examples_of_torch_transformers(batch_first):
    settings = {"batch_first": batch_first, "dim_feedforward": 32}
    for model, count in [
        (nn.Transformer(16, 2, 2, 2, **settings), 2),
        (nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, **settings), 2, enable_nested_tensor=False), 1),
        (nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 2, **settings), 2), 2),
        (nn.TransformerDecoderLayer(16, 2, **settings), 2),
    ]:
        args, kwargs = example_inputs(model)
        assert (len(args), kwargs) == (count, {})
        assert model(*args).shape == args[-1 if isinstance(model, nn.Transformer) else 0].shape
        assert {a.shape[0 if batch_first else 1] for a in args} == {2}


class Config:
    use_cache = True
    vocab_size = 50

    def __init__(self, **settings):
        self.__dict__.update(settings)


def test_examples_of_timm_and_hugging_face_style_models():
    model = chain(torch.add)
    model.default_cfg = {"input_size": (3, 160, 128)}
    assert example_inputs(model)[0][0].shape == (2, 3, 160, 128)

    model = chain(torch.add).half()
    model.main_input_name, model.config = "pixel_values", Config(image_size=(32, 48), num_channels=1)
    args, kwargs = example_inputs(model)
    assert (args, kwargs["pixel_values"].shape, kwargs["use_cache"]) == ((), (2, 1, 32, 48), False)
    assert kwargs["pixel_values"].dtype is torch.float16

    model.main_input_name, model.config = "input_ids", Config(is_encoder_decoder=True)
    _, kwargs = example_inputs(model)
    assert {name: value.dtype for name, value in kwargs.items() if name != "use_cache"} == {
        "input_ids": torch.int64,
        "decoder_input_ids": torch.int64,
    }


def test_without_any_example_the_structure_may_say_enough():
    model = chain(*[torch.add] * 4)
    assert example_inputs(model) is None
    findings = same_class_runs(model)
    assert lengths(findings) == {"0-3": 4}
    assert [(stage.key, stage.shape, stage.dtype) for stage in findings.stages] == [(0, None, None)]


def test_same_class_runs_are_built_alike():
    blocks = nn.ModuleList([Block(width=8), *(Block() for _ in range(3)), nn.Linear(6, 6), nn.Linear(6, 6), Block()])
    assert [stage.blocks for stage in same_class_runs(blocks).stages] == [("1", "2", "3")]

    shared = Block()
    assert same_class_runs(nn.Sequential(shared, shared, shared)).stages == ()
    assert same_class_runs(nn.Sequential(*(nn.Linear(6, 6) for _ in range(4)))).stages == ()

    nested = nn.ModuleDict(
        {"a": nn.ModuleList([transformer_layer(), transformer_layer()]), "b": chain(*[torch.add] * 2)}
    )
    assert [stage.name for stage in same_class_runs(nested).stages] == ["a", "b"]


def test_nothing_known_asks_for_an_example():
    with pytest.raises(ConversionError, match=r"Loop takes.*example="):
        example_inputs(Loop())

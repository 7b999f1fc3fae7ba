"""``reversa.compat.momentumnet``: the published names, the published numbers, and the right ones where those are wrong.

The published package is a witness where it is installed (``pip install --no-deps -r tests/peers.txt``); everywhere else
the oracle is the rule written out, with ordinary autograd in float64.
"""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict
from functools import partial

import pytest
import timm
import torch
import torchvision
from torch import nn

import hf_models
import oracle
import reversa
from by_hand import ruled
from cases import FAMILIES, assert_same, error, gradients, loss_of, mlp, step
from convert_cases import Block, leaf, looped, perturbed, train
from copies import COPIES
from reversa.compat.momentumnet import MomentumNet, transform_to_momentumnet
from reversa.errors import BlockError, ConversionError, ReplayError, SettingError, StateChanged

SAME = 1e-10
"""Relative difference of two computations in float64."""
GAMMAS = [0.0, 0.5, 0.9]

gammas = pytest.mark.parametrize("gamma", GAMMAS)
backprops = pytest.mark.parametrize("use_backprop", [True, False], ids=["backprop", "no-backprop"])


def published():
    return pytest.importorskip("momentumnet", reason="pip install --no-deps -r tests/peers.txt")


def without_skip(f):
    """``f(x) - x``: what is left of a function that holds the skip connection."""
    return lambda x, *args, **kwargs: f(x, *args, **kwargs) - x


def net(fs, x, *args, gamma, **settings):
    """MomentumNet, called like a rule of the oracle."""
    kwargs = {key: settings.pop(key) for key in ("memory", "mask") if key in settings}
    return MomentumNet(fs, gamma, **settings)(x, *args, **kwargs)


def assert_transformed_right(model, layers, *args, gamma=0.9, tolerance=SAME, residual=False, **settings):
    """The transformed model computes what the same model does whose blocks apply the rule, in both modes."""
    kwargs = settings.pop("kwargs", {})
    mine = transform_to_momentumnet(model, layers, gamma=gamma, is_residual=residual, **settings)
    by_hand = ruled(model, layers, gamma, int(settings.get("keep_first_layer", True)), residual)
    for mode in (True, False):
        expected = train(by_hand.train(mode), by_hand, *args, **kwargs)
        assert_same(train(mine.train(mode), mine, *args, **kwargs), expected, tolerance)
    return mine


# ---------------------------------------------------------------------- the published package as a witness


def assert_agree(mine, theirs, x, tolerance):
    """Outputs and gradients, by place: the parameters have other names there, and the same order."""
    results = []
    for model in (mine, theirs):
        given = x.clone().requires_grad_()
        torch.manual_seed(3)
        y = model(given)
        loss_of(y).backward()
        grads = gradients(model).values()
        results.append({"output": y.detach(), "x": given.grad} | {str(i): grad for i, grad in enumerate(grads)})
    assert_same(*results, tolerance)


@backprops
@pytest.mark.parametrize("learned", [False, True], ids=["zero", "learned"])
@pytest.mark.parametrize("is_residual", [True, False], ids=["residual", "with-skip"])
@gammas
def test_the_published_module(gamma, is_residual, learned, use_backprop):
    """The numbers of its ordinary mode."""
    if learned and gamma == 0:
        pytest.skip("the first velocity has no influence")
    fs = FAMILIES["mlp"].functions(6)
    start = {"init_speed": True, "init_function": mlp().double()} if learned else {}
    theirs = copy.deepcopy(published().MomentumNet(fs, gamma, is_residual=is_residual, **start))
    mine = MomentumNet(fs, gamma, use_backprop=use_backprop, is_residual=is_residual, **start)
    assert_agree(mine, theirs, leaf(4, 6).detach(), SAME)


def test_the_published_module_in_single_precision():
    fs = FAMILIES["mlp"].functions(6, torch.float32)
    theirs = copy.deepcopy(published().MomentumNet(fs, 0.9))
    assert_agree(MomentumNet(fs, gamma=0.9, use_backprop=False), theirs, torch.randn(4, 6), 1e-6)


@pytest.mark.parametrize("gamma", [0.5, 0.9])
def test_the_published_module_without_backprop(gamma):
    """It rounds gamma to n / 65536 and the velocity to float32, so the numbers are near and not the same."""
    fs = FAMILIES["mlp"].functions(6)
    theirs = copy.deepcopy(published().MomentumNet(fs, gamma, use_backprop=False))
    assert_agree(MomentumNet(fs, gamma, use_backprop=False), theirs, leaf(4, 6).detach(), 1e-3)


def small_resnet():
    return perturbed(torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [3, 2, 1, 2], num_classes=5))


def images():
    return torch.randn(2, 3, 40, 40, dtype=torch.float64)


@pytest.mark.parametrize("is_residual", [True, False], ids=["residual", "with-skip"])
@gammas
def test_the_published_transformation(gamma, is_residual):
    model, x = small_resnet(), images()
    theirs = published().transform_to_momentumnet(model, gamma=gamma, use_backprop=True, is_residual=is_residual)
    mine = transform_to_momentumnet(model, gamma=gamma, is_residual=is_residual)
    assert_agree(mine, theirs, x, SAME)


@pytest.mark.parametrize("keep_first_layer", [True, False])
def test_the_published_transformation_of_a_vision_transformer(keep_first_layer):
    settings = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 4, "num_heads": 2, "num_classes": 5}
    model = timm.models.VisionTransformer(**settings).double()
    how = {"sub_layers": ["blocks"], "keep_first_layer": keep_first_layer, "gamma": 0.5}
    theirs = published().transform_to_momentumnet(model, use_backprop=True, **how)
    assert_agree(transform_to_momentumnet(model, **how), theirs, torch.randn(2, 3, 16, 16).double(), SAME)


CALLS = {
    MomentumNet: {
        "functions": inspect.Parameter.empty,
        "gamma": inspect.Parameter.empty,
        "init_speed": False,
        "init_function": None,
        "use_backprop": True,
        "is_residual": True,
    },
    transform_to_momentumnet: {
        "model": inspect.Parameter.empty,
        "sub_layers": ["layer1", "layer2", "layer3", "layer4"],
        "keep_first_layer": True,
        "gamma": 0.9,
        "use_backprop": False,
        "is_residual": False,
    },
}


def defaults(function):
    parameters = inspect.signature(function).parameters.values()
    positional = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    return {p.name: list(p.default) if isinstance(p.default, tuple) else p.default for p in positional}


@pytest.mark.parametrize("mine", CALLS, ids=lambda mine: mine.__name__)
def test_arguments_and_defaults(mine):
    assert list(defaults(mine).items()) == list(CALLS[mine].items())


@pytest.mark.parametrize("mine", CALLS, ids=lambda mine: mine.__name__)
def test_arguments_and_defaults_are_the_published_ones(mine):
    assert list(defaults(getattr(published(), mine.__name__)).items()) == list(CALLS[mine].items())


def moved_on(module):
    """Another set of weights and statistics."""
    return perturbed(copy.deepcopy(module))


def test_a_checkpoint_of_the_published_module_is_taken():
    fs, start = FAMILIES["mlp"].functions(3), {"init_speed": True, "init_function": mlp().double()}
    theirs = moved_on(published().MomentumNet(fs, 0.9, **start))
    mine, x = MomentumNet(fs, 0.9, **start), leaf(4, 6)
    assert mine.load_state_dict(theirs.state_dict()) == ([], [])
    assert error(mine(x), theirs(x)) < SAME


@pytest.mark.parametrize("keep_first_layer", [True, False])
def test_a_checkpoint_of_the_published_transformation_is_taken(keep_first_layer):
    """Blocks with names lose them there."""
    model = nn.Sequential(nn.Linear(3, 6), nn.Sequential(OrderedDict((name, Block()) for name in "abc"))).double()
    how = {"sub_layers": ["1"], "keep_first_layer": keep_first_layer, "use_backprop": True}
    theirs = moved_on(published().transform_to_momentumnet(model, **how))
    mine, x = transform_to_momentumnet(model, **how), leaf(4, 3)
    assert mine.load_state_dict(theirs.state_dict()) == ([], [])
    assert error(mine(x), theirs(x)) < SAME


# ---------------------------------------------------------------------- MomentumNet against the rule


@backprops
@pytest.mark.parametrize("family", ["mlp", "dropout", "conv-bn", "attention-memory-mask"])
@gammas
def test_module(gamma, family, use_backprop):
    """Dropout (D6), statistics (D8), keyword arguments and their gradients (D11)."""
    family = FAMILIES[family]
    fs, x, extras = family.functions(6), leaf(*family.shape), family.extras(torch.float64)
    rule = partial(net, gamma=gamma, use_backprop=use_backprop)
    assert_same(step(rule, fs, x, **extras), step(partial(oracle.momentum, gamma=gamma), fs, x, **extras), SAME)


@backprops
@pytest.mark.parametrize("gamma", GAMMAS)
def test_functions_that_hold_the_skip_connection(gamma, use_backprop):
    fs, x = [Block(p=0.2).double() for _ in range(6)], leaf(4, 6)
    actual = step(partial(net, gamma=gamma, use_backprop=use_backprop, is_residual=False), fs, x)
    rule = partial(oracle.momentum, gamma=gamma)
    assert_same(actual, step(lambda fs, x: rule([without_skip(f) for f in fs], x), fs, x), SAME)


def with_init(call, fs, x):
    *fs, init = fs
    return call(fs, x, init)


def test_a_learned_first_velocity_and_a_sequential():
    fs, x = FAMILIES["mlp"].functions(7), leaf(4, 6)

    def mine(fs, x, init):
        made = MomentumNet(nn.Sequential(*fs), 0.9, True, init, False)
        assert made.functions == fs
        assert made.init_function is init
        return made(x)

    def rule(fs, x, init):
        return oracle.momentum(fs, x, gamma=0.9, init=init)

    assert_same(step(partial(with_init, mine), fs, x), step(partial(with_init, rule), fs, x), SAME)


def narrow(module):
    return copy.deepcopy(module).float()


@pytest.mark.parametrize(("gamma", "depth"), [(0.5, 60), (0.9, 160)])
def test_depth_does_not_turn_gradients_into_noise(gamma, depth):
    """D1 to D3: there, errors of 10 (50 steps) and 4.5 (200 steps) in float32, because x comes back with rounding
    errors that every step divides by gamma.
    """
    fs, x = FAMILIES["mlp"].functions(depth), leaf(4, 6)
    exact = step(partial(oracle.momentum, gamma=gamma), fs, x)
    narrowed = [narrow(f) for f in fs]
    given = x.detach().float().requires_grad_()
    actual = step(partial(net, gamma=gamma, use_backprop=False), narrowed, given)
    wide = {name: value.double() if value is not None else None for name, value in actual.items()}
    exact["next random"] = exact["next random"].double()
    assert_same(wide, exact, 1e-4)


def test_autocast():
    """D9: what ran in bfloat16 forwards ran in float32 backwards."""
    fs = [nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(40)]
    x, seen = torch.randn(8, 16, requires_grad=True), []
    for f in fs:
        f.register_forward_hook(lambda module, args, output: seen.append(output.dtype))

    def under(rule):
        def call(fs, x):
            with torch.autocast("cpu", torch.bfloat16):
                return rule(fs, x)

        return call

    actual = step(under(partial(net, gamma=0.9, use_backprop=False)), fs, x)
    assert seen == [torch.bfloat16] * 80
    expected = step(under(partial(oracle.momentum, gamma=0.9)), fs, x)
    norms = {
        name: float((actual[name] - value).norm() / value.norm()) for name, value in expected.items() if "grad" in name
    }
    assert max(norms.values()) < 0.01, norms


def test_an_input_without_a_gradient():
    """D10: the parameters are trained all the same."""
    fs, x = FAMILIES["mlp"].functions(5), leaf(4, 6).detach()
    actual = step(partial(net, gamma=0.9, use_backprop=False), fs, x)
    assert_same(actual, step(partial(oracle.momentum, gamma=0.9), fs, x), SAME)
    assert all(actual[f"gradient of {name}"] is not None for name, _ in nn.ModuleList(fs).named_parameters())


class Extras(nn.Module):
    """Uses those of its arguments that it wants."""

    def __init__(self, wants: bool) -> None:
        super().__init__()
        self.body, self.wants = mlp(), wants

    def forward(self, x, scale=None, shift=None, *, bias=None):
        y = self.body(x) if scale is None else scale * self.body(x)
        return y + shift + bias if self.wants else y


@pytest.mark.parametrize("scale", [None, 0.5, 2])
def test_arguments_of_any_kind_used_or_not(scale):
    """D11, D13: keyword arguments were dropped; None, a number, or a tensor that one function does not use raised."""
    fs, x = [Extras(i != 2).double() for i in range(4)], leaf(4, 6)
    given = {"shift": leaf(6), "bias": leaf(4, 6)}

    def mine(fs, x, shift, bias):
        return MomentumNet(fs, 0.9, use_backprop=False)(x, scale, shift, bias=bias)

    def rule(fs, x, shift, bias):
        return oracle.momentum(fs, x, scale, shift, bias=bias)

    assert_same(step(mine, fs, x, **given), step(rule, fs, x, **given), SAME)


FROZEN = {
    "the first two": lambda i, name: i < 2,
    "the last two": lambda i, name: i > 1,
    "one function": lambda i, name: i == 1,
    "one matrix": lambda i, name: i == 2 and name == "0.weight",
    "the biases": lambda i, name: name.endswith("bias"),
}


@pytest.mark.parametrize("pattern", FROZEN)
def test_frozen_parameters(pattern):
    """D13: every pattern but the uniform one raised."""
    fs, x = FAMILIES["mlp"].functions(4), leaf(4, 6)
    for i, f in enumerate(fs):
        for name, p in f.named_parameters():
            p.requires_grad_(not FROZEN[pattern](i, name))
    expected = step(partial(oracle.momentum, gamma=0.9), fs, x)
    assert_same(step(partial(net, gamma=0.9, use_backprop=False), fs, x), expected, SAME)


@pytest.mark.parametrize("is_residual", [True, False], ids=["residual", "with-skip"])
@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types(dtype, gamma, is_residual):
    """D14: the velocity was float32, and modules of 16 bits raised."""
    fs = [nn.Sequential(nn.Linear(8, 8), nn.Tanh()).to(dtype) for _ in range(4)]
    x = torch.randn(4, 8, dtype=dtype, requires_grad=True)

    def rule(fs, x):
        return oracle.momentum(fs if is_residual else [without_skip(f) for f in fs], x, gamma=gamma)

    actual = step(partial(net, gamma=gamma, use_backprop=False, is_residual=is_residual), fs, x)
    assert_same(actual, step(rule, fs, x), 16 * torch.finfo(dtype).eps)


def used(**settings):
    """A module with a learned first velocity, after a training step."""
    fs = FAMILIES["dropout"].functions(4)
    made = MomentumNet(fs, 0.9, init_speed=True, init_function=mlp().double(), use_backprop=False, **settings)
    made(leaf(4, 6)).sum().backward()
    made.zero_grad()
    return made


@pytest.mark.parametrize("copied", COPIES)
def test_copies_after_a_step(copied):
    """D14: the last velocity stayed on the module, whose copy raised."""
    made, x = used(), leaf(4, 6)
    again = COPIES[copied](made)
    assert not {id(p) for p in again.parameters()} & {id(p) for p in made.parameters()}
    assert_same(train(again, again, x), train(made, made, x), 0)
    assert not [t for m in made.modules() for t in vars(m).values() if isinstance(t, torch.Tensor)]
    assert again.load_state_dict(made.state_dict()) == ([], [])


def of_rule(fs, x, **kwargs):
    return torch.autograd.grad(oracle.momentum(fs, x, gamma=0.9).sin().sum(), [x, *nn.ModuleList(fs).parameters()])


def test_a_graph_used_twice():
    """D14: the backward pass changed its saved tensors."""
    fs, x = FAMILIES["mlp"].functions(4), leaf(4, 6)
    loss = MomentumNet(fs, 0.9, use_backprop=False)(x).sin().sum()
    wanted = [x, *nn.ModuleList(fs).parameters()]
    for retain in (True, False):
        for actual, expected in zip(
            torch.autograd.grad(loss, wanted, retain_graph=retain), of_rule(fs, x), strict=True
        ):
            assert error(actual, expected) < SAME


def test_gradients_of_gradients_and_finite_differences():
    """D14."""
    fs, x = FAMILIES["mlp"].functions(3), leaf(2, 6)
    chain = MomentumNet(fs, 0.9, use_backprop=False)
    second = []
    for call in (chain, partial(oracle.momentum, fs, gamma=0.9)):
        (slope,) = torch.autograd.grad(call(x).sin().sum(), x, create_graph=True)
        second.append(torch.autograd.grad(slope.square().sum(), [x, *chain.parameters()], allow_unused=True))
    for actual, expected in zip(*second, strict=True):
        assert (actual is None) == (expected is None)
        assert actual is None or error(actual, expected) < SAME
    assert torch.autograd.gradcheck(chain, x)


def test_two_forwards_before_one_backward():
    fs, x, z = FAMILIES["dropout"].functions(4), leaf(4, 6), leaf(4, 6)
    expected = step(lambda fs, x, z: [oracle.momentum(fs, t, gamma=0.9) for t in (x, z)], fs, x, z)
    rule = partial(net, gamma=0.9, use_backprop=False)
    assert_same(step(lambda fs, x, z: [rule(fs, t) for t in (x, z)], fs, x, z), expected, SAME)


def test_what_the_module_tells():
    fs, init = FAMILIES["mlp"].functions(3), mlp().double()
    made = MomentumNet(fs, 0.8, 1, init)
    assert (made.gamma, made.use_backprop, made.init_speed) == (0.8, True, 1)
    assert made.functions == fs
    assert made.init_function is init
    assert [p for f in (*fs, init) for p in f.parameters()] == list(made.parameters())
    other = MomentumNet(fs, gamma=0.7, use_backprop=False, is_residual=False)
    assert (other.gamma, other.use_backprop, other.init_speed, other.init_function) == (0.7, False, False, None)
    assert MomentumNet(fs, gamma=0, is_residual=False).gamma == 0
    with pytest.raises(AttributeError):
        made.gamma = 0.5  # would change nothing there


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"gamma": -0.1}, "gamma"),
        ({"gamma": 1.1}, "gamma"),
        ({"gamma": "0.9"}, "gamma"),
        ({"init_speed": True}, "init_function=None"),
        ({"init_function": nn.Identity()}, "init_speed=False"),
        ({"gamma": 0, "init_speed": True, "init_function": nn.Identity()}, "no influence"),
        ({"functions": []}, "at least one block"),
        ({"functions": [torch.tanh]}, "made of modules"),
    ],
)
def test_settings_that_cannot_be(settings, words):
    with pytest.raises(SettingError, match=words):
        MomentumNet(**{"functions": [nn.Linear(2, 2)], "gamma": 0.9} | settings)


def test_without_the_skip_connection_there_is_no_exact_arithmetic():
    """Exact Momentum would leave ``- x`` out."""
    made = MomentumNet(FAMILIES["mlp"].functions(3), 0.9, is_residual=False)
    made.network.exact = True
    with pytest.raises(SettingError, match="exact"):
        made(leaf(4, 6))


# ---------------------------------------------------------------------- transform_to_momentumnet against the rule


@pytest.mark.parametrize("gamma", [0.0, 0.9])
def test_resnet(gamma):
    layers = ["layer1", "layer2", "layer3", "layer4"]
    mine = assert_transformed_right(small_resnet(), layers, images(), gamma=gamma)
    assert [len(stage.blocks) for stage in reversa.explain(mine).stages] == [2, 1, 1]


def test_blocks_without_a_skip_connection():
    model = nn.Sequential(nn.Linear(3, 6), nn.Sequential(*(mlp(p=0.2) for _ in range(4)))).double()
    for keep_first_layer in (True, False):
        how = {"residual": True, "keep_first_layer": keep_first_layer}
        assert_transformed_right(model, ["1"], leaf(4, 3), **how)


def test_a_list_with_the_users_own_loop():
    assert_transformed_right(looped(p=0.2), ["blocks"], leaf(4, 6), keep_first_layer=False)
    assert_transformed_right(looped(p=0.2), ["blocks"], leaf(4, 6), use_backprop=True)


class Trunk(nn.Module):
    """Blocks that their owner walks through, and sometimes not from the start."""

    def __init__(self, trunk):
        super().__init__()
        self.trunk = trunk

    def forward(self, x, first=0):
        for block in list(self.trunk)[first:]:
            x = block(x)
        return x


@pytest.mark.parametrize("first", [0, 2])
@pytest.mark.parametrize("kind", [nn.Sequential, lambda *blocks: nn.ModuleList(blocks)], ids=["Sequential", "list"])
def test_a_loop_that_leaves_out_the_first_blocks(kind, first):
    """LayerDrop and its like: the velocity begins where the pass does."""
    model, x = Trunk(kind(*(Block() for _ in range(4)))).double(), leaf(4, 6)
    mine, by_hand = transform_to_momentumnet(model, ["trunk"], False), ruled(model, ["trunk"], 0.9)
    expected = train(by_hand, by_hand, x, first)
    assert_same(train(mine, mine, x, first), expected, SAME)
    assert_same(train(mine, mine, x, first), expected, SAME)


ENCODER = {"d_model": 16, "nhead": 2, "dim_feedforward": 32, "dropout": 0.1, "batch_first": True}


def encoder(**settings):
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(**ENCODER | settings), 4, enable_nested_tensor=False)


def decoder(**settings):
    return nn.TransformerDecoder(nn.TransformerDecoderLayer(**ENCODER | settings), 4)


def transformer(**settings):
    return nn.Transformer(num_encoder_layers=3, num_decoder_layers=4, **ENCODER | settings)


causal = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
TORCH = {
    "encoder": (encoder, ["layers"], (leaf(2, 5, 16),), {"mask": causal}),
    "decoder": (decoder, ["layers"], (leaf(2, 5, 16), leaf(2, 4, 16)), {"tgt_mask": causal}),
    "transformer": (
        transformer,
        ["encoder.layers", "decoder.layers"],
        (leaf(2, 4, 16), leaf(2, 5, 16)),
        {"tgt_mask": causal, "tgt_is_causal": True},
    ),
}


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("norm_first", [True, False], ids=["pre-norm", "post-norm"])
@pytest.mark.parametrize("kind", TORCH)
def test_transformers_of_torch(kind, norm_first):
    """D12: AttributeError, 'MomentumNet' object has no attribute 'self_attn'. Masks are keyword arguments there."""
    make, layers, args, kwargs = TORCH[kind]
    assert_transformed_right(
        perturbed(make(norm_first=norm_first)), layers, *args, keep_first_layer=False, kwargs=kwargs
    )


@pytest.mark.parametrize(
    ("make", "layer"),
    [(hf_models.gpt2, "transformer.h"), (hf_models.bert, "bert.encoder.layer"), (hf_models.llama, "model.layers")],
    ids=["gpt2", "bert", "llama"],
)
def test_hugging_face(make, layer):
    """D12: each of them raised."""
    model, kwargs = make(double=True)
    for name, p in model.named_parameters():
        p.requires_grad_(not name.endswith("key.bias"))  # whose gradient is nothing but rounding
    kwargs = {"input_ids": kwargs["input_ids"], "attention_mask": kwargs["attention_mask"]}
    if hasattr(model.config, "use_cache"):
        kwargs["use_cache"] = False
    assert_transformed_right(perturbed(model), [layer], keep_first_layer=False, kwargs=kwargs, gamma=0.5)


def test_bfloat16():
    model = nn.Sequential(*(Block() for _ in range(4)))
    model, x = nn.Sequential(model).bfloat16(), torch.randn(4, 6, dtype=torch.bfloat16, requires_grad=True)
    assert_transformed_right(model, ["0"], x, tolerance=16 * torch.finfo(torch.bfloat16).eps)


def test_the_names_of_the_poster():
    model = perturbed(transformer())
    args = leaf(2, 4, 16), leaf(2, 5, 16)
    layers = ["encoder.layers", "decoder.layers"]
    mine = transform_to_momentumnet(model, residual_layers=layers)
    assert_same(train(mine, mine, *args), train(by := ruled(model, layers, 0.9, first=1), by, *args), SAME)


def test_a_new_model_with_the_names_of_the_old_one():
    model = small_resnet()
    before, keys = type(model.layer1[1]), list(model.state_dict())
    mine = transform_to_momentumnet(model)
    assert type(model.layer1[1]) is before
    assert not {id(p) for p in model.parameters()} & {id(p) for p in mine.parameters()}
    assert list(mine.state_dict()) == keys
    assert [name for name, _ in mine.named_parameters()] == [name for name, _ in model.named_parameters()]
    x = images()
    mine.eval(), model.eval()
    assert error(mine(x), model(x)) > 1e-3
    assert torch.equal(reversa.restore(mine)(x), model(x))


@pytest.mark.parametrize("copied", COPIES)
def test_copies_of_a_transformed_model(copied):
    mine, x = transform_to_momentumnet(looped(p=0.2), ["blocks"]), leaf(4, 6)
    train(mine, mine, x)
    again = COPIES[copied](mine)
    assert_same(train(again, again, x), train(mine, mine, x), 0)
    assert again.load_state_dict(mine.state_dict()) == ([], [])


def renamed(state, old, new):
    return {new + key.removeprefix(old) if key.startswith(old) else key: value for key, value in state.items()}


def test_names_of_the_published_package_are_taken():
    model = small_resnet()
    state = moved_on(model).state_dict()
    theirs = state
    for i, name in (("0", "layer1.1"), ("1", "layer1.2")):
        theirs = renamed(theirs, f"{name}.", f"layer1.1.0.network.{i}.")
    for layer in ("layer2", "layer4"):
        theirs = renamed(theirs, f"{layer}.1.", f"{layer}.1.0.network.0.")
    mine, whole = transform_to_momentumnet(model), nn.Sequential(transform_to_momentumnet(model))
    assert mine.load_state_dict(theirs) == ([], [])
    assert whole.load_state_dict({f"0.{key}": value for key, value in theirs.items()}) == ([], [])
    for loaded in (mine, whole[0]):
        assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())
    assert mine.load_state_dict(theirs | {"else": torch.ones(1)}, strict=False).unexpected_keys == ["else"]

    chain = MomentumNet(FAMILIES["mlp"].functions(11), 0.9, True, mlp().double())
    state = moved_on(chain).state_dict()
    theirs = {k.replace("blocks.", "").replace("openers.0", "init"): value for k, value in state.items()}
    assert {"network.10.0.weight", "network.init.0.weight"} <= set(theirs)
    assert chain.load_state_dict(theirs) == ([], [])
    assert all(torch.equal(value, state[key]) for key, value in chain.state_dict().items())


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sub_layers": ["layr2"]}, "unknown layer 'layr2'. Did you mean: layer2"),
        ({"sub_layers": ["layer1", "layer5"]}, "unknown layer 'layer5'"),
        ({"sub_layers": "layer1"}, "list of paths"),
        ({"sub_layers": []}, "list of paths"),
        ({"sub_layers": ["conv1"]}, "it is a Conv2d"),
        ({"sub_layers": ["layer1"], "residual_layers": ["layer2"]}, "two names"),
        ({"gamma": 2}, "gamma"),
    ],
)
def test_transformations_that_cannot_be(settings, words):
    with pytest.raises(SettingError, match=words):
        transform_to_momentumnet(small_resnet(), **settings)


def test_models_that_cannot_be_transformed():
    with pytest.raises(SettingError, match="got function"):
        transform_to_momentumnet(lambda x: x, ["0"])
    model = small_resnet()
    with pytest.raises(ConversionError, match="no block is left"):
        transform_to_momentumnet(model, ["layer3"])
    with pytest.raises(ConversionError, match="converted already"):
        transform_to_momentumnet(transform_to_momentumnet(model), ["layer1"])
    with pytest.raises(ConversionError, match="converted already"):
        reversa.convert(transform_to_momentumnet(model))
    shared = Block()
    with pytest.raises(ConversionError, match="two places"):
        transform_to_momentumnet(nn.Sequential(nn.Sequential(Block(), shared, shared)), ["0"])
    nested = nn.Sequential(Block(), nn.Sequential(*(Block() for _ in range(3))))
    with pytest.raises(ConversionError, match="block of another"):
        transform_to_momentumnet(nn.Sequential(nested), ["0", "0.1"])


def test_blocks_that_change_the_shape():
    model = small_resnet()
    mine = transform_to_momentumnet(model, ["layer2"], keep_first_layer=False)
    with pytest.raises(BlockError, match="BasicBlock"):
        mine(images())


def test_a_loop_that_changes_the_tensor():
    """There, the loop runs over other modules, and what it does between blocks is done at other places."""

    def scaled(blocks, x):
        for block in blocks:
            x = 0.5 * block(x)
        return x

    with pytest.raises(StateChanged, match="was not given the tensor"):
        transform_to_momentumnet(looped(scaled), ["blocks"])(leaf(4, 6))


def test_a_parameter_changed_before_the_backward_pass():
    mine = MomentumNet(FAMILIES["mlp"].functions(3), 0.9, use_backprop=False)
    y = mine(leaf(4, 6))
    with torch.no_grad():
        mine.functions[0][0].weight.mul_(2)
    with pytest.raises(ReplayError):
        y.sum().backward()

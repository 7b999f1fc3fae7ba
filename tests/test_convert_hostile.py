"""What users' blocks and loops do that could make a converted model silently wrong: it is right, or an error."""

from __future__ import annotations

import random
import warnings

import pytest
import torch
from torch import nn

import hf_models
from reversa import Invert, Momentum, RevNet, Store
from reversa.convert import convert
from reversa.errors import BlockError, ConversionError, DriftError, ReversaError, SettingError, StateChanged
from reversa.schedule import Annealing, set_scheme

WIDTH = 8


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.out(nn.functional.scaled_dot_product_attention(*self.qkv(x).chunk(3, -1)))


class Block(nn.Module):
    """A pre-norm block, with places for what a user may do in it."""

    scale = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = Attention()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def between(self, x):
        return x

    def forward(self, x):
        x = self.between(x + self.scale * self.attn(self.norm1(x)))
        return x + self.scale * self.mlp(self.norm2(x))


class Net(nn.Module):
    def __init__(self, block=Block, depth: int = 4) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(block() for _ in range(depth))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def images(dtype=torch.float32):
    return torch.randn(3, 5, WIDTH, dtype=dtype)


# ---------------------------------------------------------------------- another function in the backward pass


@pytest.mark.parametrize("scheme", [Momentum(0.9), RevNet()], ids=str)
@pytest.mark.parametrize(("dtype", "exact"), [(torch.float32, True), (torch.float64, True), (torch.bfloat16, None)])
def test_a_flag_that_is_switched_before_the_backward_pass(scheme, dtype, exact):
    x = images(dtype)
    net = convert(Net().to(dtype), scheme, exact=exact, example=x)
    y = net(x)
    for block in net.blocks:
        block.scale = 0.25
    with pytest.raises(DriftError, match="has not the bits that it had"):
        y.float().square().sum().backward()


def test_random_numbers_of_python_s_own():
    class Rough(Block):
        def between(self, x):
            return x * random.random()

    x = images()
    y = convert(Net(Rough), Momentum(0.9), exact=True, example=x)(x)
    with pytest.raises(DriftError, match="generators do not know"):
        y.square().sum().backward()


def test_adapters_that_are_switched_between_two_losses():
    peft = pytest.importorskip("peft")
    model, inputs = hf_models.llama(layers=3, attention_dropout=0.0)
    convert(model.bfloat16(), Momentum(0.9))
    config = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's own
        both = peft.get_peft_model(model, peft.LoraConfig(**config))
        both.add_adapter("b", peft.LoraConfig(**config))
    losses = []
    for name in ("default", "b"):
        both.set_adapter(name)
        losses.append(both(**inputs, use_cache=False).loss)
    with pytest.raises(ReversaError):
        sum(losses).backward()


# ---------------------------------------------------------------------- two streams


class WithTime(Block):
    """Adds what is no function of the carried tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Parameter(torch.ones(WIDTH))

    def between(self, x):
        return x + self.time


class PlusOne(Block):
    def forward(self, x):
        return super().forward(x) + 1.0


class Halved(Block):
    def forward(self, x):
        x = torch.add(self.attn(self.norm1(x)), x, alpha=0.5)
        return x + self.mlp(self.norm2(x))


class Turned(Block):
    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return self.mlp(self.norm2(x)) - x


@pytest.mark.parametrize("kind", [WithTime, PlusOne, Halved, Turned], ids=lambda kind: kind.__name__)
def test_what_is_not_the_sum_of_two_functions_is_refused(kind):
    with pytest.raises(ConversionError, match="residual additions alone"):
        convert(Net(kind), RevNet(), example=images())


def test_a_factor_of_a_function_is_part_of_it():
    class Scaled(Block):
        def forward(self, x):
            x = torch.add(x, self.attn(self.norm1(x)), alpha=0.5)
            return x - self.mlp(self.norm2(x))

    net, x = Net(Scaled).double(), images(torch.float64)
    a = b = x
    for block in net.blocks:
        a = a + 0.5 * block.attn(block.norm1(b))
        b = b - block.mlp(block.norm2(a))
    torch.testing.assert_close(convert(net, RevNet(), example=x)(x), (a + b) / 2)


def test_attributes_that_a_block_sets_are_not_lost_in_silence():
    class Remembers(Block):
        def between(self, x):
            self.seen = x.mean()
            return x

    net = convert(Net(Remembers), RevNet(), example=images())
    with pytest.raises(BlockError, match="sets its attribute 'seen'"):
        net(images())


def test_buffers_that_both_functions_would_move_are_refused():
    class Counts(Block):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def between(self, x):
            self.calls += 1
            return x

    class SharedNorm(Block):
        def __init__(self) -> None:
            super().__init__()
            self.norm1 = self.norm2 = nn.BatchNorm1d(5)

    for kind in (Counts, SharedNorm):
        with pytest.raises(ConversionError, match="writes to its buffer"):
            convert(Net(kind), RevNet(), example=images())


def test_hooks_on_what_holds_both_functions_are_not_left_out_in_silence():
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Block()

        def forward(self, x):
            return self.inner(x)

    net = convert(Net(Outer), RevNet(), example=images())
    net.blocks[1].inner.register_forward_hook(lambda *_: None)
    with pytest.raises(BlockError, match=r"inner \(Block\) has forward hooks"):
        net(images())


def test_the_gradient_at_a_tapped_state():
    net, x = convert(Net(), RevNet(), example=images()), images()
    plain = Net()
    plain.load_state_dict(net.state_dict())
    taps = []

    def tap(_module, _given, y):
        y.retain_grad()
        taps.append(y)

    for block in net.blocks:
        block.register_forward_hook(tap)
    net(x.requires_grad_()).square().sum().backward()
    assert all(y.grad is not None for y in taps)


def test_a_loop_inside_a_function_takes_no_time_to_be_followed():
    class Recurrent(Block):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.LSTMCell(WIDTH, WIDTH)

        def forward(self, x):
            state, out = (x.new_zeros(len(x), WIDTH),) * 2, []
            for part in self.norm1(x).unbind(1):
                state = self.attn(part, state)
                out.append(state[0])
            x = x + torch.stack(out, 1)
            return x + self.mlp(self.norm2(x))

    with pytest.raises(ConversionError, match=r"could be switched off|no two"):
        convert(Net(Recurrent, 2), RevNet(), example=torch.zeros(2, 24, WIDTH))


# ---------------------------------------------------------------------- loops


def test_a_second_call_with_the_cache_that_training_left_empty():
    model, inputs = hf_models.gpt2(layers=3)
    convert(model, Momentum(0.5))
    ids = inputs["input_ids"]
    with pytest.warns(UserWarning, match="key-value cache"):
        first = model(input_ids=ids[:, :4], use_cache=True)
    model(input_ids=ids)  # another call in between has a cache of its own
    with pytest.raises(StateChanged, match="came back to stage"):
        model(input_ids=ids[:, 4:], past_key_values=first.past_key_values, use_cache=True)
    stored = convert(hf_models.gpt2(layers=3)[0], Momentum(0.5), engine=Store())
    first = stored(input_ids=ids[:, :4], use_cache=True)
    stored(input_ids=ids[:, 4:], past_key_values=first.past_key_values, use_cache=True)


def test_two_passes_at_once_do_not_take_each_other_s_velocity():
    class Two(Net):
        beside = False

        def forward(self, x):
            if not self.beside:
                return super().forward(x)
            h, other = self.blocks[0](x) * 1.1, self.blocks[0](-x)
            return self.blocks[2](self.blocks[1](h) * 1.1) + other

    net = convert(Two(), Momentum(0.9), example=images(), between="carry")
    net.beside = True
    with pytest.raises(StateChanged, match="2 passes over the stage"):
        net(images())


def test_large_activations_of_16_bit_models():
    """Residual streams of language models have outliers of some thousands."""
    x = images(torch.bfloat16)
    x[0, 0, 0] = 3000.0
    results = []
    for engine in (Invert(), Store()):
        torch.manual_seed(0)
        net = convert(Net().bfloat16(), Momentum(0.9), engine=engine, example=x)
        net(x).float().square().mean().backward()
        results.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    assert results[0].isfinite().all()
    assert torch.equal(*results)


# ---------------------------------------------------------------------- schedules


def test_two_converted_parts_with_stages_of_one_name():
    parts = nn.ModuleList(convert(Net(), Momentum(0.01), example=images()) for _ in range(2))
    Annealing(Momentum(0.9), 10).apply(parts, 10)
    assert {block._reversa.stage.scheme.gamma for part in parts for block in part.blocks} == {0.9}
    with pytest.raises(SettingError, match="2 chains of the model are called 'blocks'"):
        set_scheme(parts, {"blocks": Momentum(0.5)})
    set_scheme(parts[0], {"blocks": Momentum(0.5)})
    set_scheme(convert(Net(), RevNet(), example=images()), RevNet())  # no change
    for bad in (None, 3):
        with pytest.raises(SettingError, match="needs a scheme"):
            set_scheme(parts, bad)
    with pytest.raises(SettingError, match="a number of steps"):
        Annealing(Momentum(0.9), "10")

"""reversa.memory.estimate: against measured bytes, against PyTorch's own tracker, and against counts done by hand."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import reversa
from engine_cases import sample_bytes
from reversa.errors import SettingError
from reversa.memory import LiveBytes, MemoryReport, estimate, measure

BATCH, WIDTH = 512, 32
UNIT = BATCH * WIDTH * 4  # bytes of one float32 tensor of a chain's state


def mlp(width: int = WIDTH) -> nn.Module:
    return nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))


def chain(scheme=None, engine=None, exact=False, depth: int = 8) -> reversa.ReversibleSequence:
    scheme = reversa.Momentum(0.999) if scheme is None else scheme
    count = scheme.functions_per_block
    blocks = [mlp() if count == 1 else tuple(mlp(WIDTH // 2) for _ in range(count)) for _ in range(depth)]
    return reversa.ReversibleSequence(blocks, scheme, exact=exact, engine=engine)


def by_momentum(model: nn.Module, **settings) -> nn.Module:
    return reversa.convert(model, scheme=reversa.Momentum(0.9), **settings)


def vision():
    return pytest.importorskip("torchvision.models")


def vgg() -> nn.Module:
    return nn.Sequential(vision().vgg11_bn().features, nn.Flatten(), nn.Linear(512, 10))


def densenet() -> nn.Module:
    return vision().DenseNet(8, (2, 3, 2, 2), 16, num_classes=10)


def vit(dropout: float = 0.0) -> nn.Module:
    return vision().VisionTransformer(32, 8, 3, 4, 32, 64, dropout=dropout, num_classes=10)


def swin() -> nn.Module:
    return vision().SwinTransformer([2, 2], 16, [2, 2], [2, 4], [4, 4], num_classes=10)


def convnext() -> nn.Module:
    setting = vision().convnext.CNBlockConfig
    return vision().ConvNeXt([setting(16, 32, 2), setting(32, None, 2)], num_classes=10)


def transformer() -> nn.Module:
    return nn.Transformer(32, 4, 2, 2, 64, dropout=0.1, batch_first=True)


def sgd(parameters) -> torch.optim.SGD:
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9)


def with_frozen_parts() -> nn.Module:
    model = nn.Sequential(*(mlp() for _ in range(4)))
    return model.requires_grad_(False).append(mlp())


IMAGES = (2, 3, 32, 32)
CASES = {
    "resnet18": (lambda: vision().resnet18(num_classes=10), IMAGES),
    "resnet50": (lambda: vision().resnet50(num_classes=10), IMAGES),
    "vgg11_bn": (vgg, IMAGES),
    "densenet": (densenet, IMAGES),
    "mobilenet_v3_small": (lambda: vision().mobilenet_v3_small(num_classes=10), IMAGES),
    "vision transformer": (vit, IMAGES),
    "swin transformer": (swin, IMAGES),
    "convnext": (convnext, IMAGES),
    "resnet50, momentum": (lambda: by_momentum(vision().resnet50(num_classes=10)), IMAGES),
    "vision transformer, momentum, dropout": (lambda: by_momentum(vit(0.1)), IMAGES),
    "vision transformer, momentum, exact": (lambda: by_momentum(vit(), exact=True), IMAGES),
    "vision transformer, BDIA": (lambda: reversa.convert(vit(), scheme=reversa.BDIA()), IMAGES),
    "revnet38": (lambda: reversa.models.create("revnet38", widths=(8, 8, 16, 16)), IMAGES),
    "hamiltonian74": (lambda: reversa.models.create("hamiltonian74", widths=(8, 8, 16, 16)), IMAGES),
    "momentumresnet18": (lambda: reversa.models.create("momentumresnet18"), IMAGES),
    "revvit": (lambda: reversa.models.create("revvit"), IMAGES),
    "encoder and decoder, dropout": (transformer, ((4, 10, 32), (4, 7, 32))),
    "frozen parts": (with_frozen_parts, (BATCH, WIDTH)),
    "invert": (chain, (BATCH, WIDTH)),
    "invert, groups": (chain, (4, WIDTH)),
    "invert, anchors": (lambda: chain(engine=reversa.Invert(anchors=4)), (BATCH, WIDTH)),
    "store": (lambda: chain(engine=reversa.Store()), (BATCH, WIDTH)),
    "recompute": (lambda: chain(engine=reversa.Recompute()), (BATCH, WIDTH)),
    "recompute, 3": (lambda: chain(engine=reversa.Recompute(every=3)), (BATCH, WIDTH)),
    "offload": (lambda: chain(engine=reversa.Offload()), (BATCH, WIDTH)),
    "exact momentum": (lambda: chain(reversa.Momentum(0.5), exact=True), (BATCH, WIDTH)),
    "exact ratio": (lambda: chain(reversa.Momentum(0.9), exact=reversa.exact.Ratio(9, 10)), (BATCH, WIDTH)),
    "exact revnet": (lambda: chain(reversa.RevNet(), exact=True), (BATCH, WIDTH)),
    "affine": (lambda: chain(reversa.schemes.AffineCoupling()), (BATCH, WIDTH)),
    "dr2net": (lambda: chain(reversa.Dr2Net(0.5, 0.5)), (BATCH, WIDTH)),
}


@pytest.mark.parametrize("case", CASES)
def test_estimate_is_what_is_measured(case):
    make, inputs = CASES[case]
    model = make()
    want = measure(model, inputs, optimizer=sgd, repeats=1)
    have = estimate(model, inputs, optimizer=sgd)
    assert have.peak_bytes == pytest.approx(want.peak_bytes, rel=0.01)
    assert have.held_bytes == pytest.approx(want.held_bytes, rel=0.01)
    for mine, theirs in ((have.peak, want.peak), (have.after_forward, want.after_forward)):
        assert mine.kinds == pytest.approx(theirs.kinds, rel=0.01, abs=1024)
    assert [s.name for s in have.stages] == [s.name for s in want.stages]
    for mine, theirs in zip(have.stages, want.stages, strict=True):
        assert mine.held_by_block == pytest.approx(theirs.held_by_block, rel=0.01, abs=64)
    assert have.flops == want.flops


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_autocast_is_counted_in_its_type(precision):
    model = nn.Sequential(*(mlp() for _ in range(4)))
    have = estimate(model, (BATCH, WIDTH), precision=precision)
    want = measure(model, (BATCH, WIDTH), precision=precision, repeats=1)
    assert (have.peak, have.after_forward) == (want.peak, want.after_forward)
    # Every linear map's input, x among them now, and the loss's; the weights but the first, which no gradient passes.
    assert have.held_bytes == (9 * BATCH * WIDTH + 7 * WIDTH * WIDTH + 1) * 2
    assert estimate(model, (BATCH, WIDTH)).held_bytes == (8 * BATCH * WIDTH + 1) * 4


# ---------------------------------------------------------------------- by other means


@pytest.mark.parametrize("engine", [reversa.Store(), reversa.Recompute()], ids=str)
def test_peak_is_that_of_pytorchs_own_tracker(engine):
    tracker = pytest.importorskip("torch.distributed._tools.mem_tracker")

    def network() -> nn.Module:
        return nn.Sequential(nn.Linear(WIDTH, WIDTH), chain(engine=engine, depth=4), nn.Linear(WIDTH, 8))

    with FakeTensorMode():
        model, x, counted = network(), torch.empty(BATCH, WIDTH), tracker.MemTracker()
        counted.track_external(model, x)
        with counted:
            model(x).square().mean().backward()
    want = counted.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    assert estimate(network(), (BATCH, WIDTH), loss=lambda y: y.square().mean()).peak_bytes == want


def test_a_small_network_counted_by_hand():
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))
    model.register_buffer("table", torch.zeros(100))
    weights = sum(p.nbytes for p in model.parameters())
    x = torch.zeros(BATCH, WIDTH)
    report = estimate(model, x, loss=lambda y: y.sum(), optimizer=torch.optim.Adam)
    now = report.after_forward.kinds
    assert now.pop("activations") == UNIT + 4 == report.held_bytes  # what Tanh returned, and the loss
    assert now == {
        "parameters": weights,
        "buffers": 400,
        "optimizer_state": 2 * weights + 4 * 4,  # two moments, and a count for each parameter
        "inputs": UNIT,
        "gradients": 0,
        "temporary": 0,
        "unseen": 0,
    }
    assert report.peak.total == sum(report.peak.kinds.values()) == report.peak_bytes
    forward = 2 * 2 * BATCH * WIDTH * WIDTH
    assert report.flops.forward == forward
    assert report.flops.backward == 2 * forward - forward // 2, "the input needs no gradient"


def test_at_the_peak_of_the_optimizers_step_all_gradients_are_there():
    model = nn.Sequential(nn.Linear(1000, 1000, bias=False), nn.Linear(1000, 1, bias=False))
    report = estimate(model, (1, 1000), optimizer=torch.optim.AdamW)
    assert report.peak.when == "optimizer step"
    assert report.peak.gradients == report.peak.parameters == sum(p.nbytes for p in model.parameters())
    assert report.peak.activations == 0
    assert estimate(model, (1, 1000), optimizer=torch.optim.SGD).peak.optimizer_state == 0
    momentum = estimate(model, (1, 1000), optimizer=lambda ps: torch.optim.SGD(ps, momentum=0.9))
    assert momentum.peak.optimizer_state == report.peak.parameters


def test_gradients_of_inputs_are_gradients():
    x = torch.zeros(BATCH, WIDTH, requires_grad=True)
    report = estimate(nn.Linear(WIDTH, 1), x, optimizer=torch.optim.SGD)
    assert report.peak.inputs == UNIT
    assert report.flops.backward == 2 * report.flops.forward
    assert x.grad is None


def test_tied_weights_count_once():
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
    model[1].weight = model[0].weight
    assert estimate(model, (2, WIDTH)).peak.parameters == (WIDTH + 2) * WIDTH * 4


# ---------------------------------------------------------------------- stages and blocks


def test_a_stored_block_holds_its_activations_and_an_inverted_one_a_number():
    stored = estimate(chain(engine=reversa.Store()), (BATCH, WIDTH)).stages[0]
    assert stored.blocks == tuple(f"blocks.{i}" for i in range(8))
    assert stored.bytes_per_block == 2 * UNIT, "Tanh's output, and the state's x that the next function is given"
    (inverted,) = estimate(chain(), (BATCH, WIDTH)).stages
    sample = sample_bytes(reversa.Momentum(0.999), torch.ones(BATCH, WIDTH))
    assert inverted.held_by_block[:-1] == (4 * 64 + sample, *[0] * 6), "room for a number of each of 64 steps"
    assert inverted.held_by_block[-1] == pytest.approx(2 * UNIT, rel=0.01), "x and v at the end"
    (anchored,) = estimate(chain(engine=reversa.Invert(anchors=4)), (BATCH, WIDTH)).stages
    assert [round(held / UNIT) for held in anchored.held_by_block] == [0, 0, 0, 2] * 2


@pytest.mark.parametrize(("gamma", "bits"), [(0.5, 1.0), (0.25, 2.0)])
def test_spilled_words_are_held(gamma, bits):
    (stage,) = estimate(chain(reversa.Momentum(gamma), exact=True, depth=33), (BATCH, WIDTH)).stages
    assert stage.bytes_per_block == pytest.approx(BATCH * WIDTH * bits / 8, rel=0.02)


def test_stages_of_an_original_and_of_its_conversion_are_the_same_blocks():
    original = estimate(vision().resnet50(), IMAGES)
    converted = estimate(by_momentum(vision().resnet50()), IMAGES)
    assert [s.name for s in original.stages] == ["layer1", "layer2", "layer3", "layer4"]
    assert [(s.name, s.blocks) for s in original.stages] == [(s.name, s.blocks) for s in converted.stages]
    assert original.stages[2].bytes_per_block > 100 * converted.stages[2].bytes_per_block
    for report in (original, converted):
        assert sum(s.held_bytes for s in report.stages) + report.elsewhere_bytes == report.held_bytes


def test_a_block_of_two_functions_is_one_block():
    (stage,) = estimate(chain(reversa.RevNet(), reversa.Store(), depth=3), (BATCH, WIDTH)).stages
    assert len(stage.blocks) == len(stage.held_by_block) == 3
    assert stage.bytes_per_block == 2 * UNIT, "of each half: Tanh's output, and the sum"


class Twice(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(self.inner(x))


def test_a_chain_that_is_called_twice_holds_for_both_calls():
    (once,) = estimate(chain(engine=reversa.Store()), (BATCH, WIDTH)).stages
    (twice,) = estimate(Twice(chain(engine=reversa.Store())), (BATCH, WIDTH)).stages
    assert twice.held_by_block[1:-1] == tuple(2 * held for held in once.held_by_block[1:-1])


# ---------------------------------------------------------------------- operations


@pytest.mark.parametrize("engine", [reversa.Store(), reversa.Invert(), reversa.Recompute(every=3)], ids=str)
def test_operations_are_those_of_flop_counter_mode(engine):
    model, x = nn.Sequential(chain(engine=engine, depth=6), nn.Linear(WIDTH, 8)), torch.randn(BATCH, WIDTH)
    report = estimate(model, x)
    with FlopCounterMode(display=False) as counted:
        loss = model(x).square().mean()
        forward = counted.get_total_flops()
        loss.backward()
    assert report.flops.forward == forward
    assert report.flops.forward + report.flops.backward == counted.get_total_flops()


def test_an_inverse_evaluates_each_function_once_more():
    head = nn.Linear(WIDTH, WIDTH)
    f = 2 * 2 * BATCH * WIDTH * WIDTH  # two linear maps
    flops = estimate(nn.Sequential(chain(depth=6), head), (BATCH, WIDTH)).flops
    assert flops.forward == 6 * f + f // 2
    assert flops.recomputed == 6 * f
    assert estimate(chain(engine=reversa.Store()), (BATCH, WIDTH)).flops.recomputed == 0
    assert estimate(chain(engine=reversa.Invert(keep=3)), (BATCH, WIDTH)).flops.recomputed == 5 * f


# ---------------------------------------------------------------------- nothing computed, nothing touched


def test_an_estimate_takes_no_memory():
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(60_000, 60_000) for _ in range(3)))  # 43 GB
    with LiveBytes() as real:
        report = estimate(model, (8, 60_000), optimizer=torch.optim.AdamW)
    assert real.peak < 1024
    assert report.device == "cpu"
    assert report.peak_bytes > 4 * report.peak.parameters > 4 * 43e9
    assert all(p.is_meta for p in model.parameters())


def test_the_model_and_its_optimizer_stay_as_they_are():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(3600, 2))
    optimizer = torch.optim.Adam(model.parameters())
    before, generator = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    report = estimate(model, IMAGES, optimizer=optimizer)
    assert report.optimizer == "Adam"
    assert report.peak.optimizer_state == 2 * report.peak.parameters + 4 * 6
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(generator, torch.get_rng_state())
    assert not optimizer.state
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert all(p.grad is None and not p._post_accumulate_grad_hooks for p in model.parameters())


class Decoder(nn.Module):
    """Token ids in, scores and a loss of them out, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layer, self.head = nn.Embedding(50, WIDTH), mlp(), nn.Linear(WIDTH, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        scores = self.head(self.layer(self.embed(ids)))
        loss = scores.mean() if labels is None else nn.functional.cross_entropy(scores.flatten(0, 1), labels.flatten())
        return {"loss": loss, "scores": scores}


def test_token_ids_by_name_and_a_loss_of_the_models_own():
    ids, loss = torch.zeros(4, 10, dtype=torch.long), lambda output: output["loss"]
    have = estimate(Decoder(), {"ids": ids, "labels": ids}, loss=loss)
    want = measure(Decoder(), {"ids": ids, "labels": ids}, loss=loss, repeats=1)
    assert (have.peak, have.after_forward, have.flops) == (want.peak, want.after_forward, want.flops)
    assert have.peak.inputs == ids.nbytes, "the same tensor twice"


def test_labels_that_a_loss_brings_along():
    labels = torch.zeros(BATCH, dtype=torch.long)
    report = estimate(nn.Linear(WIDTH, 10), (BATCH, WIDTH), loss=lambda y: nn.functional.cross_entropy(y, labels))
    assert report.held_bytes == pytest.approx(BATCH * 10 * 4, rel=0.01), "the logarithms of probabilities"


# ---------------------------------------------------------------------- the report


def test_the_report_prints_and_is_json():
    report = estimate(chain(), (BATCH, WIDTH), optimizer=torch.optim.SGD)
    text = str(report)
    for word in ("estimated", "512 x 32", "SGD", "parameters", "activations", "Invert()", "recomputed", "Note: "):
        assert word in text
    read = json.loads(json.dumps(report.to_dict()))
    assert read["peak_bytes"] == report.peak_bytes == report.peak.total
    assert read["stages"][0]["held_bytes"] == report.stages[0].held_bytes
    assert isinstance(report, MemoryReport)
    assert report.seconds is None


def test_notes_say_what_cannot_be_known():
    def notes(model: nn.Module) -> str:
        return " ".join(estimate(model, (4, WIDTH)).notes)

    assert "allocator" in notes(mlp())
    assert "dropout" in notes(nn.Sequential(mlp(), nn.Dropout(0.1)))
    assert "dropout" not in notes(nn.Sequential(mlp(), nn.Dropout(0.0)))
    assert "eval()" in notes(mlp().eval())
    assert "Offload()" in notes(chain(engine=reversa.Offload()))
    assert "iterations" in notes(chain(reversa.schemes.IResNet(0.5), depth=2))


def test_code_under_compile_counts_as_if_it_ran_eagerly():
    model = mlp()
    want = estimate(model, (BATCH, WIDTH))
    model[2].compile(backend="eager")
    have = estimate(model, (BATCH, WIDTH))
    assert have.peak == want.peak
    assert any("torch.compile" in note for note in have.notes)


# ---------------------------------------------------------------------- bad input


class Branching(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.sum() > 0 else x


def test_a_model_that_needs_numbers_is_sent_to_measure():
    model = nn.Sequential(nn.Linear(WIDTH, 4), Branching())
    with pytest.raises(SettingError, match=r"needs the numbers in its tensors.*reversa\.memory\.measure"):
        estimate(model, (2, WIDTH))
    assert measure(model, (2, WIDTH), repeats=1).peak_bytes > 0


def test_inputs_that_do_not_fit_raise_the_models_own_error_with_their_shapes():
    with pytest.raises(RuntimeError) as caught:
        estimate(nn.Linear(3, 4), (2, 5))
    assert any("2 x 5" in note for note in caught.value.__notes__)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"inputs": "images"}, "inputs must be a tensor"),
        ({"inputs": ()}, "inputs must be a tensor"),
        ({"precision": "int8"}, "precision must be None, 'bf16' or 'fp16'"),
        ({"optimizer": 3}, "optimizer must be None, a class"),
        ({"optimizer": list}, "must make a torch.optim.Optimizer, got list"),
        ({"optimizer": torch.optim.LBFGS}, "needs no closure"),
        ({"optimizer": torch.optim.SGD(nn.Linear(2, 2).parameters())}, "parameters that the model has not"),
        ({"loss": lambda y: y}, "loss must make one number"),
        ({"model": nn.Linear(WIDTH, 2).requires_grad_(False)}, "nothing that requires a gradient"),
        ({"model": 3}, "model must be a torch.nn.Module"),
    ],
)
def test_bad_settings_say_what_was_needed(settings, message):
    with pytest.raises(SettingError, match=message):
        estimate(**{"model": nn.Linear(WIDTH, 2), "inputs": (2, WIDTH), **settings})


def test_one_function_at_several_places():
    function = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())
    seq = reversa.ReversibleSequence([function] * 5, reversa.Momentum(0.999), engine=reversa.Store())
    (stage,) = estimate(seq, (BATCH, WIDTH)).stages
    assert stage.blocks == tuple(f"blocks.{i}" for i in range(5))
    assert stage.held_bytes == measure(seq, torch.randn(BATCH, WIDTH)).stages[0].held_bytes > 5 * UNIT


def test_an_optimizer_that_has_made_steps():
    """Its counters are numbers that it reads; an estimate has none."""
    model = nn.Sequential(mlp(), mlp())
    optimizer = torch.optim.AdamW(model.parameters())
    fresh = estimate(model, (BATCH, WIDTH), optimizer=optimizer)
    model(torch.randn(4, WIDTH)).sum().backward()
    optimizer.step()
    assert estimate(model, (BATCH, WIDTH), optimizer=optimizer).peak == fresh.peak
    assert len(optimizer.state) == len(list(model.parameters()))


def test_a_forward_that_holds_the_original_module_is_refused():
    model = nn.Sequential(mlp(), mlp())
    held = model[0].forward
    model[0].forward = lambda x: held(x)
    with pytest.raises(SettingError, match="uses the original's parameters"):
        estimate(model, (BATCH, WIDTH))
    assert all(parameter.grad is None for parameter in model.parameters())

"""reversa.memory.measure: against the allocator's own trace; nothing is left behind; an accelerator's peak is used."""

from __future__ import annotations

import copy
import gc
import importlib
import time

import pytest
import torch
from torch import nn

import reversa
from allocator import allocator_peak
from reversa.errors import SettingError
from reversa.memory import estimate, measure
from reversa.memory.ledger import KINDS, Ledger

BATCH, WIDTH = 2048, 64


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))


def chain(engine=None, gamma: float = 0.99, **settings) -> nn.Module:
    return reversa.ReversibleSequence([mlp() for _ in range(8)], reversa.Momentum(gamma), engine=engine, **settings)


def mean_square(y: torch.Tensor) -> torch.Tensor:
    return y.square().mean()


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)


def peaks(model: nn.Module, x: torch.Tensor) -> tuple[int, int]:
    """As measured, and of an ordinary training loop by the allocator."""
    measured = measure(model, x, mean_square, torch.optim.AdamW, repeats=1).peak_bytes
    optimizer = torch.optim.AdamW(model.parameters())

    def step() -> None:
        mean_square(model(x)).backward()
        optimizer.step()

    step()
    optimizer.zero_grad()
    there = [*model.parameters(), *model.buffers(), x]
    there += [t for state in optimizer.state.values() for t in state.values()]
    return measured, allocator_peak(step) + sum(t.nbytes for t in there)


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Sequential(*(mlp() for _ in range(6))), (BATCH, WIDTH)),
        (lambda: nn.Sequential(*(mlp() for _ in range(6))), (BATCH // 16, WIDTH)),
        (lambda: chain(reversa.Store()), (BATCH, WIDTH)),
        (lambda: chain(reversa.Recompute()), (BATCH, WIDTH)),
        (chain, (BATCH, WIDTH)),
        (encoder, (32, 64, WIDTH)),
        (lambda: reversa.convert(encoder(), scheme=reversa.Momentum(0.9)), (32, 64, WIDTH)),
    ],
    ids=["plain", "plain, small batch", "store", "recompute", "invert", "encoder", "converted encoder"],
)
def test_peak_is_that_of_the_allocator_in_an_ordinary_loop(make, shape):
    measured, allocated = peaks(make(), torch.randn(shape))
    assert measured == pytest.approx(allocated, rel=0.01)


def test_in_exact_arithmetic_one_tensor_of_integers_goes_unseen():
    """Spilled bytes are widened inside the CPU's kernel that puts them back, which no count of tensors sees."""
    measured, allocated = peaks(chain(gamma=0.5, exact=True), torch.randn(BATCH, WIDTH))
    assert 0 <= allocated - measured <= 8 * BATCH * WIDTH


def test_a_gradient_that_is_let_go_is_gone():
    w = torch.ones(1000, requires_grad=True)
    ledger = Ledger(torch.device("cpu"), [w])
    with ledger.phase("backward", "temporary"):
        (w * 2).sum().backward()
    assert ledger.split == dict.fromkeys(KINDS, 0) | {"gradients": 4000}
    w.grad = None
    assert ledger.split == dict.fromkeys(KINDS, 0)


def test_other_devices_do_not_count():
    ledger = Ledger(torch.device("cpu"), [])
    with ledger.phase("forward", "activations"):
        here, elsewhere = torch.zeros(10), torch.zeros(10, device="meta")
    assert ledger.split["activations"] == here.nbytes == elsewhere.nbytes == 40


def test_nothing_is_left_behind():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, 2))
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    optimizer = torch.optim.Adam(model.parameters())
    model(x).sum().backward()
    optimizer.step()
    tensors = [*model.state_dict().values(), *(p.grad for p in model.parameters()), x, x.grad]
    tensors += [t for state in optimizer.state.values() for t in state.values()]
    before, versions = copy.deepcopy([t.detach() for t in tensors]), [t._version for t in tensors]
    generator = torch.get_rng_state()
    report = measure(model, x, optimizer=optimizer)
    assert report.peak.optimizer_state == 2 * report.peak.parameters + 4 * 6
    assert all(map(torch.equal, before, tensors))
    assert versions == [t._version for t in tensors]
    assert torch.equal(generator, torch.get_rng_state())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert gc.isenabled()


def test_an_input_that_the_model_writes_to_stays_as_it_is():
    x = -torch.ones(2, 4)
    measure(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 2)), x, repeats=1)
    assert torch.equal(x, -torch.ones(2, 4))


class Slow(nn.Linear):
    """Waits for as long as it is told, the first time for longer."""

    waits = 0.1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(self.waits)
        self.waits = 0.02
        return super().forward(x)


def test_time_is_that_of_a_step_after_the_first():
    report = measure(Slow(4, 4), (2, 4))
    assert 0.02 <= report.seconds < 0.1
    assert "ms a step" in str(report)
    assert "measured" in str(report)


def test_drift_that_is_foreseen_is_not_this_functions_matter():
    assert measure(chain(reversa.Invert(anchors=None), gamma=0.5), (2, WIDTH), repeats=1).peak_bytes > 0


class Backend:
    """What ``torch.cuda`` is asked, with the numbers of an allocator that rounds up and keeps a workspace."""

    def __init__(self, before: int, peak: int) -> None:
        self.before, self.peak = before, peak
        self.asked: list[str] = []

    def memory_allocated(self, _: torch.device) -> int:
        return self.before

    def max_memory_allocated(self, _: torch.device) -> int:
        self.asked.append("peak")
        return self.peak

    def reset_peak_memory_stats(self, _: torch.device) -> None:
        self.asked.append("reset")

    def synchronize(self, _: torch.device) -> None:
        self.asked.append("wait")


def on_accelerator(monkeypatch, backend: object) -> reversa.memory.MemoryReport:
    monkeypatch.setattr(importlib.import_module("reversa.memory.measure"), "_backend", lambda device: backend)
    return measure(mlp(), (BATCH, WIDTH), repeats=1)


def test_an_accelerators_peak_is_its_allocators(monkeypatch):
    tensors = estimate(mlp(), (BATCH, WIDTH)).peak
    backend = Backend(before=10_000, peak=10_000 + tensors.total + 4096)
    report = on_accelerator(monkeypatch, backend)
    assert report.peak_bytes == tensors.total + 4096
    assert report.peak.unseen == 4096
    assert report.peak.activations == tensors.activations
    assert backend.asked == ["wait", "reset", "wait", "peak", "wait", "wait"], "reset before the step, read after it"


@pytest.mark.parametrize("peak", [0, 10_000])
def test_a_peak_that_cannot_be_is_refused(monkeypatch, peak):
    with pytest.raises(SettingError, match=r"tells a peak of .* bytes, and the tensors of this step alone have"):
        on_accelerator(monkeypatch, Backend(before=0, peak=peak))


def test_a_device_that_tells_no_memory_is_refused(monkeypatch):
    with pytest.raises(SettingError, match="does not tell how much memory"):
        on_accelerator(monkeypatch, object())


@pytest.mark.gpu
def test_estimate_and_allocator_on_an_accelerator():
    model, x = chain().cuda(), torch.randn(16 * BATCH, WIDTH, device="cuda")
    want = measure(model, x, optimizer=torch.optim.SGD)
    assert want.device == "cuda:0"
    assert estimate(model, x, optimizer=torch.optim.SGD).peak_bytes == pytest.approx(want.peak_bytes, rel=0.1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"repeats": 0}, "repeats must be a number of steps >= 1, got 0"),
        ({"model": nn.Linear(WIDTH, 2, device="meta")}, r"on the meta device.*reversa\.memory\.estimate"),
        ({"precision": "int8"}, "precision must be None, 'bf16' or 'fp16'"),
        ({"inputs": 3}, "inputs must be a tensor"),
    ],
)
def test_bad_settings_say_what_was_needed(settings, message):
    with pytest.raises(SettingError, match=message):
        measure(**{"model": nn.Linear(WIDTH, 2), "inputs": (2, WIDTH), **settings})

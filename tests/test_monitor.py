"""Memory, drift and throughput as callbacks log them, in Lightning and in transformers.Trainer."""

from __future__ import annotations

import copy
import csv
import importlib
import pickle
import subprocess
import sys
import time
import types
import warnings

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import reversa
from allocator import allocator_peak
from reversa.check.trace import chains
from reversa.errors import MissingExtra, SettingError, StateError
from reversa.memory import estimate, measure
from reversa.memory.measure import Allocator
from reversa.train import MemoryMonitor, monitor

MEASURE = importlib.import_module("reversa.memory.measure")  # the package has a function of that name
PEAK, PREDICTED = "memory/peak_bytes", "memory/predicted_peak_bytes"
WIDTH, BATCH = 32, 512
LOOSE = reversa.Invert(anchors=None, accept_drift=True)
SCALARS = 64  # bytes: a trainer's own copies of the loss, and loss / accumulated batches


def modes():
    return torch._C._len_torch_dispatch_stack()


def residual():
    return nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.Tanh(), nn.Linear(2 * WIDTH, WIDTH))


def digits_net(gamma=0.9, depth=4, stem=64, **settings):
    """Digits-sized: 64 pixels, 10 classes."""
    chain = reversa.ReversibleSequence([residual() for _ in range(depth)], reversa.Momentum(gamma), **settings)
    return nn.Sequential(nn.Linear(stem, WIDTH), chain, nn.Linear(WIDTH, 10))


def stored_net():
    """With all that a monitor could disturb: random masks and running statistics."""
    return nn.Sequential(nn.Linear(64, WIDTH), nn.BatchNorm1d(WIDTH), nn.Dropout(0.2), nn.Linear(WIDTH, 10))


def batches(count=4, size=BATCH):
    g = torch.Generator().manual_seed(0)
    return [(torch.randn(size, 64, generator=g), torch.randint(0, 10, (size,), generator=g)) for _ in range(count)]


class Task(LightningModule):
    def __init__(self, net=digits_net, optimizer=torch.optim.SGD):
        super().__init__()
        torch.manual_seed(1)
        self.net, self.optimizer, self.modes = net(), optimizer, []

    def training_step(self, batch, batch_idx):
        self.modes.append(modes())
        loss = cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        return self.optimizer(self.parameters(), lr=0.01)


class Rows(Callback):
    """What was logged at the end of each batch, where anything was."""

    def __init__(self):
        self.all = []

    def on_train_batch_end(self, trainer, *_):
        known = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self.all.append({name: value for name, value in known.items() if not name.endswith("loss")})


def fit(task, *callbacks, data=None, val=None, **settings):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    settings = {"accelerator": "cpu", "enable_checkpointing": False, "max_epochs": 1, **quiet} | settings
    rows = Rows()
    trainer = Trainer(callbacks=[*callbacks, rows], **settings)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"lightning\.")  # few workers, no validation: meant
        trainer.fit(task, DataLoader(data or batches(), batch_size=None), val and DataLoader(val, batch_size=None))
    return rows.all


class WithLoss(nn.Module):
    """The step of Task as one module, labels among its inputs."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, y):
        return cross_entropy(self.net(x), y)


# ---------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_the_peak_is_that_of_measure_and_of_the_allocator(optimizer):
    task, data = Task(optimizer=optimizer), batches(4)
    step = WithLoss(copy.deepcopy(task.net))
    logged = fit(task, MemoryMonitor(every=2), data=data)[-1]
    measured = measure(step, data[0], lambda loss: loss, optimizer, repeats=1)
    assert measured.peak.when == "backward"  # where gradients of the step before are gone in both
    assert 0 <= logged[PEAK] - measured.peak_bytes <= SCALARS

    moves = optimizer(step.parameters())
    step(*data[0]).backward()
    moves.step()
    moves.zero_grad()
    there = [*step.parameters(), *data[0], *(t for state in moves.state.values() for t in state.values())]

    def ordinary():
        step(*data[0]).backward()
        moves.step()

    assert logged[PEAK] == pytest.approx(allocator_peak(ordinary) + sum(t.nbytes for t in there), rel=0.01)


@pytest.mark.parametrize(("optimizer", "precision"), [(torch.optim.SGD, "32-true"), (torch.optim.AdamW, "bf16-mixed")])
def test_the_prediction_is_that_of_estimate(optimizer, precision):
    task, data = Task(optimizer=optimizer), batches(4)
    step, name = WithLoss(copy.deepcopy(task.net)), {"bf16-mixed": "bf16"}.get(precision)
    logged = fit(task, MemoryMonitor(every=2), data=data, precision=precision)[-1]
    assert logged[PREDICTED] == estimate(step, data[0], lambda loss: loss, optimizer, name).peak_bytes
    assert logged[PREDICTED] == pytest.approx(logged[PEAK], rel=0.01)


def test_a_prediction_is_made_again_for_another_shape_only(monkeypatch):
    asked = []
    monkeypatch.setattr(monitor, "estimate", lambda *given: asked.append(given) or estimate(*given))
    rows = fit(Task(), MemoryMonitor(every=1), data=[*batches(2), *batches(2, 2 * BATCH)])
    assert len(asked) == 2
    assert rows[0][PREDICTED] == rows[1][PREDICTED] < rows[2][PREDICTED] == rows[3][PREDICTED]
    assert rows[3][PREDICTED] == pytest.approx(rows[3][PEAK], rel=0.01)


def test_accumulated_gradients_are_on_top():
    def last(**settings):
        return fit(Task(), MemoryMonitor(every=1), data=batches(4), **settings)[-1]

    plain, accumulated = last(), last(accumulate_grad_batches=2)
    gradients = sum(p.nbytes for p in Task().parameters())
    assert plain[PEAK] < accumulated[PEAK] <= plain[PEAK] + gradients + SCALARS
    assert accumulated[PREDICTED] == plain[PREDICTED]


def test_only_steps_that_are_looked_at_are_touched():
    task = Task()
    fit(task, MemoryMonitor(every=3), data=batches(8))
    assert task.modes == [0, 0, 1, 0, 0, 1, 0, 0]


def test_accumulation_looks_at_the_batch_that_moves():
    task = Task()
    rows = fit(task, MemoryMonitor(every=2), data=batches(7), accumulate_grad_batches=2)
    assert task.modes == [0, 0, 0, 1, 0, 0, 1]  # the epoch's last batch ends the fourth step
    assert [PEAK in row for row in rows] == [False] * 3 + [True] * 4


class Gauge:
    """An accelerator's allocator, played by the CPU."""

    def __init__(self):
        self.calls = []

    def memory_allocated(self, device):
        return 1 << 20

    def synchronize(self, device):
        self.calls.append("wait")

    def reset_peak_memory_stats(self, device):
        self.calls.append("reset")

    def max_memory_allocated(self, device):
        return 3 << 20


def test_on_an_accelerator_the_peak_is_its_allocators(monkeypatch):
    gauge, task = Gauge(), Task()
    monkeypatch.setattr(MEASURE, "_backend", lambda device: gauge)
    rows = fit(task, MemoryMonitor(every=2), data=batches(2))
    assert rows[-1][PEAK] == 3 << 20
    assert rows[-1]["drift"] < 1e-5
    assert gauge.calls == ["wait", "reset", "wait"]
    assert task.modes == [0, 0]


def test_without_an_allocator_that_tells_the_peak_is_left_out_with_one_warning(monkeypatch):
    monkeypatch.setattr(MEASURE, "_backend", lambda device: types.SimpleNamespace())
    with pytest.warns(UserWarning, match="leaves memory/peak_bytes out.*does not tell") as told:
        rows = fit(Task(), MemoryMonitor(every=2))
    assert len(told) == 1
    assert PEAK not in rows[-1]
    assert PREDICTED in rows[-1]


# ---------------------------------------------------------------------------------------------- drift


def worst_round_trip(chain, x, gamma):
    """The update rule and its inverse, written down once more."""
    states = [(x, torch.zeros_like(x))]
    for f in chain.blocks:
        x, v = states[-1]
        v = gamma * v + (1 - gamma) * f(x)
        states.append((x + v, v))
    (x, v), worst = states[-1], 0.0
    for f, was in reversed(list(zip(chain.blocks, states[:-1], strict=True))):
        x = x - v
        v = (v - (1 - gamma) * f(x)) / gamma
        error, scale = torch.cat((x - was[0], v - was[1])).norm(), torch.cat(was).norm()
        worst = max(worst, float(error / scale))
    return worst


@pytest.mark.filterwarnings("ignore::reversa.errors.DriftWarning")
def test_the_drift_is_that_of_the_formulas():
    def make():
        return digits_net(0.3, 10, engine=LOOSE)

    task, (batch, *_) = Task(make), batches(1)
    stem, chain, _ = copy.deepcopy(task.net)
    with torch.no_grad():
        expected = worst_round_trip(chain, stem(batch[0]), 0.3)
    logged = fit(task, MemoryMonitor(every=1), data=[batch])[-1]["drift"]
    assert expected > 1e-3  # far above rounding: the errors were multiplied
    assert 1 / 3 < logged / expected < 3


class Crooked(nn.Module):
    """Computes something else the second time."""

    def forward(self, x):
        return x.tanh() * (1 + 1e-3 * reversa.is_replaying())


@pytest.mark.parametrize("size", [64, 4000])
def test_the_drift_of_a_known_error(size):
    """v comes back as v - (1 - gamma)/gamma * 0.001 f(x); 4000 x 32 elements are compared by a sample."""
    net = nn.Sequential(nn.Linear(64, WIDTH), reversa.ReversibleSequence([Crooked()], reversa.Momentum(0.5)))
    task, data = Task(lambda: net), batches(1, size)
    with torch.no_grad():
        x = copy.deepcopy(net[0])(data[0][0])
    logged = fit(task, MemoryMonitor(every=1), data=data)[-1]["drift"]
    assert logged == pytest.approx(1e-3 * float(x.tanh().norm() / x.norm()), rel=1e-4 if size == 64 else 0.02)


def test_with_two_passes_each_is_compared_with_its_own():
    class Twice(Task):
        def training_step(self, batch, batch_idx):
            return (self.net(batch[0]) - self.net(2 * batch[0])).square().mean()

    assert fit(Twice(), MemoryMonitor(every=1), data=batches(1))[-1]["drift"] < 1e-5


def test_exact_arithmetic_does_not_drift():
    assert fit(Task(lambda: digits_net(0.5, exact=True)), MemoryMonitor(every=2))[-1]["drift"] == 0.0


@pytest.mark.parametrize("net", [stored_net, lambda: digits_net(engine=reversa.Store())])
def test_no_drift_is_logged_where_nothing_is_inverted(net):
    logged = fit(Task(net), MemoryMonitor(every=2))[-1]
    assert set(logged) == {PEAK, PREDICTED, "throughput"}


# ---------------------------------------------------------------------------------------------- throughput


class Slow(Task):
    """20 milliseconds a step, and a fifth of a second for validation."""

    def training_step(self, batch, batch_idx):
        time.sleep(0.02)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        time.sleep(0.2)


def test_throughput_is_samples_by_time_without_validation():
    data = batches(8, 16)
    begun = time.perf_counter()
    rows = fit(Slow(), MemoryMonitor(every=4), data=data, val=data[:1], val_check_interval=2, num_sanity_val_steps=0)
    wall = time.perf_counter() - begun
    assert 3 * 16 / (wall - 4 * 0.2) < rows[-1]["throughput"] <= 16 / 0.02
    assert rows[-1]["throughput"] > 2 * 8 * 16 / wall  # in which validation is


def test_steps_a_second_where_a_batch_does_not_tell_its_size():
    class OfNumbers(Task):
        def training_step(self, batch, batch_idx):
            time.sleep(0.01)
            return self.net(torch.ones(4, 64) * batch).square().mean()

    rows = fit(OfNumbers(), MemoryMonitor(every=4), data=[torch.tensor(0.1 * i) for i in range(4)])
    assert "throughput" not in rows[-1]
    assert 5 < rows[-1]["steps_per_second"] <= 100


def test_the_clock_counts_laps_that_were_ended(monkeypatch):
    now = iter([2.0, 5.0, 9.0])
    clock = monitor.Clock(begun=0.0)
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    assert clock.rate() == {}
    clock.count(10)
    clock.count(20)
    assert clock.rate() == {"throughput": 6.0}
    clock.count(None)
    assert clock.rate() == {"steps_per_second": 3 / 9}


# ---------------------------------------------------------------------------------------------- what it leaves alone

SGD, ADAMW = torch.optim.SGD, torch.optim.AdamW
TRAININGS = {
    "chain, SGD": (digits_net, SGD, {}),
    "chain, AdamW": (digits_net, ADAMW, {}),
    "anchors": (lambda: digits_net(0.1), ADAMW, {}),
    "exact": (lambda: digits_net(0.5, exact=True), ADAMW, {}),
    "stored, dropout, statistics": (stored_net, ADAMW, {}),
    "accumulation": (digits_net, ADAMW, {"accumulate_grad_batches": 2}),
    "bf16": (digits_net, ADAMW, {"precision": "bf16-mixed"}),
    "validation": (digits_net, SGD, {"val": batches(1), "val_check_interval": 2}),
}


@pytest.mark.parametrize(("net", "optimizer", "settings"), TRAININGS.values(), ids=TRAININGS)
def test_weights_are_the_same_to_the_bit(net, optimizer, settings):
    def trained(*callbacks):
        task = Task(net, optimizer)
        torch.manual_seed(2)
        rows = fit(task, *callbacks, **settings)
        return task.state_dict(), torch.get_rng_state(), rows

    (alone, state, _), (watched, same_state, rows) = trained(), trained(MemoryMonitor(every=2))
    assert alone.keys() == watched.keys()
    assert all(torch.equal(alone[name], watched[name]) for name in alone)
    assert torch.equal(state, same_state)
    assert rows[-1][PEAK] > 0


def test_a_copy_that_calls_the_original_does_not_leave_fake_gradients():
    class Bound(Task):
        def __init__(self):
            super().__init__()
            net = self.net
            self.net.forward = lambda x: net[2](net[1](net[0](x)))

    class LetsGo(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            pl_module.zero_grad()

    alone, watched = Bound(), Bound()
    fit(alone)
    with pytest.warns(UserWarning, match="uses the original's parameters"):
        fit(watched, LetsGo(), MemoryMonitor(every=4))
    assert all(p.grad is None for p in watched.parameters())
    assert all(map(torch.equal, alone.parameters(), watched.parameters()))


@pytest.mark.parametrize(
    ("line", "reason"),
    [(lambda task, loss: loss.item(), "needs the numbers"), (lambda task, loss: task.trainer, "Trainer")],
)
def test_a_step_that_cannot_be_estimated_is_told_once(line, reason):
    class Stubborn(Task):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            line(self, loss)
            return loss

    with pytest.warns(UserWarning, match="leaves memory/predicted_peak_bytes out") as told:
        rows = fit(Stubborn(), MemoryMonitor(every=2), data=[*batches(4), *batches(2, 8)])
    (warning,) = told
    assert reason in str(warning.message)
    assert set(rows[-1]) == {PEAK, "drift", "throughput"}


def test_an_error_in_a_step_leaves_nothing_behind():
    class Breaks(Task):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if batch_idx == 1:
                raise KeyError("broken")
            return loss

    task = Breaks()
    with pytest.raises(KeyError, match="broken"):
        fit(task, MemoryMonitor(every=2))
    assert task.modes == [0, 1]
    assert modes() == 0
    assert "scheme_for" not in vars(task.net[1])


def test_a_skipped_batch_leaves_nothing_behind():
    class Skips(Task):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if batch_idx == 1 else None

    task = Skips()
    fit(task, MemoryMonitor(every=2))
    assert task.modes == [0]
    assert modes() == 0
    assert "scheme_for" not in vars(task.net[1])


def test_metrics_reach_a_logger_and_bytes_are_whole(tmp_path):
    logger = CSVLogger(tmp_path)
    rows = fit(Task(), MemoryMonitor(every=3), data=batches(6), logger=logger, log_every_n_steps=3)
    with open(f"{logger.log_dir}/metrics.csv") as file:
        written = list(csv.DictReader(file))
    assert [row["step"] for row in written] == ["2", "5"]
    assert {PEAK, PREDICTED, "drift", "throughput"} <= written[0].keys()
    assert float(written[1][PEAK]) == rows[-1][PEAK] == int(rows[-1][PEAK])


def test_numbers_above_what_float32_holds_are_logged_as_they_are(monkeypatch):
    monkeypatch.setattr(Gauge, "max_memory_allocated", lambda *_: 2**40 + 1)
    monkeypatch.setattr(MEASURE, "_backend", lambda device: Gauge())
    assert fit(Task(), MemoryMonitor(every=2))[-1][PEAK] == 2**40 + 1


# ---------------------------------------------------------------------------------------------- the callback itself


@pytest.mark.parametrize("every", [0, -1, 2.5, "often"])
def test_every_is_a_number_of_steps(every):
    with pytest.raises(SettingError, match="every must be a number of steps >= 1, got"):
        MemoryMonitor(every=every)


def test_it_is_a_callback_and_can_be_sent_to_another_process():
    made = MemoryMonitor(every=7)
    for one in (made, pickle.loads(pickle.dumps(made)), copy.deepcopy(made)):
        assert isinstance(one, Callback)
        assert isinstance(one, MemoryMonitor)
        assert one.every == 7
        assert one.state_key == "MemoryMonitor"


def test_importing_it_loads_neither_framework():
    code = (
        "import sys, reversa.train, reversa.train.huggingface\n"
        "print({'lightning', 'transformers'} & {m.partition('.')[0] for m in sys.modules})"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


@pytest.mark.parametrize(
    ("package", "module", "extra"),
    [
        ("lightning.pytorch", "monitor", "train"),
        ("transformers", "huggingface", "hf"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(monkeypatch, package, module, extra):
    monkeypatch.setitem(sys.modules, package, None)
    made = __import__(f"reversa.train.{module}", fromlist=["MemoryMonitor"]).MemoryMonitor
    with pytest.raises(MissingExtra, match=rf"reversa\[{extra}\]"):
        made()


def test_compiled_code_is_not_counted():
    task = Task()
    task.net[1].compile(backend="eager")
    with pytest.warns(UserWarning, match="peak_bytes out.*compiled code"):
        begun = MemoryMonitor(every=1).begin(task, [])
    assert begun.live is None
    assert Allocator(torch.device("cpu")).backend is None
    begun.until_closed.close()


# ---------------------------------------------------------------------------------------------- transformers.Trainer


@pytest.fixture(scope="module")
def hf():
    return pytest.importorskip("transformers")


TOKENS = torch.randint(0, 64, (32, 64), generator=torch.Generator().manual_seed(0))


class Texts(torch.utils.data.Dataset):
    def __len__(self):
        return len(TOKENS)

    def __getitem__(self, i):
        return {"input_ids": TOKENS[i], "labels": TOKENS[i]}


def gpt2(hf, convert=True):
    torch.manual_seed(0)
    config = hf.GPT2Config(vocab_size=64, n_positions=64, n_embd=32, n_layer=2, n_head=2)
    model = hf.GPT2LMHeadModel(config)
    return reversa.convert(model, scheme=reversa.Momentum(0.9)) if convert else model


def train(hf, folder, model, *callbacks, trainer=None, **settings):
    """Four steps of four texts."""
    quiet = {"use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True, "logging_steps": 2}
    settings = quiet | {"per_device_train_batch_size": 4, "max_steps": 4, "optim": "adamw_torch"} | settings
    made = (trainer or hf.Trainer)(
        model,
        hf.TrainingArguments(output_dir=str(folder), **settings),
        train_dataset=Texts(),
        eval_dataset=Texts(),
        callbacks=list(callbacks),
    )
    made.remove_callback(hf.PrinterCallback)
    made.train()
    return made


def monitored(every=2):
    from reversa.train import huggingface

    return huggingface.MemoryMonitor(every=every)


def reports(trainer):
    return [row for row in trainer.state.log_history if any(name in row for name in (PEAK, PREDICTED, "throughput"))]


HF_TRAININGS = {
    "AdamW": {},
    "SGD, bf16, evaluation, saving": {
        **{"optim": "sgd", "bf16": True, "eval_strategy": "steps", "eval_steps": 1},
        **{"save_strategy": "steps", "save_steps": 3},
    },
}


@pytest.mark.parametrize("settings", HF_TRAININGS.values(), ids=HF_TRAININGS)
def test_hf_numbers_reach_the_history_and_weights_are_the_same_to_the_bit(hf, tmp_path, settings):
    alone = train(hf, tmp_path / "alone", gpt2(hf), **settings)
    watched = train(hf, tmp_path / "watched", gpt2(hf), monitored(), **settings)
    assert all(map(torch.equal, alone.model.parameters(), watched.model.parameters()))
    assert [row["step"] for row in reports(watched)] == [2, 4]
    assert [row["step"] for row in watched.state.log_history if "loss" in row] == [2, 4]  # none was lost
    assert vars(watched).keys() == vars(alone).keys()

    model, precision = gpt2(hf).train(), "bf16" if "bf16" in settings else None
    model.config.use_cache = False  # as Trainer has it
    batch = {"input_ids": TOKENS[:4], "labels": TOKENS[:4].clone()}
    kind = torch.optim.SGD if "optim" in settings else torch.optim.AdamW
    measured = measure(model, batch, lambda output: output.loss, kind, precision, repeats=1)
    for row in reports(watched):
        assert 0 <= row[PEAK] - measured.peak_bytes <= SCALARS
        assert row[PREDICTED] == pytest.approx(row[PEAK], rel=0.01)
        assert 0 < row["drift"] < 1e-5
        assert row["throughput"] > 0


def test_hf_throughput_is_samples_by_time(hf, tmp_path):
    class Slow(hf.TrainerCallback):
        def on_pre_optimizer_step(self, *_, **__):
            time.sleep(0.03)

        def on_evaluate(self, *_, **__):
            time.sleep(0.15)

    more = {"eval_strategy": "steps", "eval_steps": 1}
    trainer = train(hf, tmp_path, gpt2(hf), Slow(), monitored(4), **more)
    (row,) = reports(trainer)
    assert 4 / 0.15 < row["throughput"] <= 4 / 0.03


def test_hf_accumulated_gradients_are_on_top(hf, tmp_path):
    alone = train(hf, tmp_path, gpt2(hf), gradient_accumulation_steps=2, max_steps=2)
    watched = train(hf, tmp_path, gpt2(hf), monitored(), gradient_accumulation_steps=2, max_steps=2)
    (row,) = reports(watched)
    gradients = sum(p.nbytes for p in watched.model.parameters())
    assert row[PREDICTED] < row[PEAK] < row[PREDICTED] + gradients + 4 * TOKENS[:4].nbytes
    assert all(map(torch.equal, alone.model.parameters(), watched.model.parameters()))


@pytest.mark.parametrize("where", ["compute_loss", "step"])
def test_hf_an_error_in_a_step_leaves_nothing_behind(hf, tmp_path, where):
    class Breaks(hf.Trainer):
        def compute_loss(self, *given, **more):
            loss = super().compute_loss(*given, **more)
            if self.state.global_step == 1:
                if where == "compute_loss":
                    raise KeyError(f"broken {modes()}")
                self.optimizer.optimizer.step = None
            return loss

    model, made = gpt2(hf), []

    class Keep(hf.TrainerCallback):
        def on_train_begin(self, args, state, control, optimizer, **_):
            made.append((optimizer, optimizer.step))

    with pytest.raises((KeyError, TypeError), match=r"broken 1|not callable"):
        train(hf, tmp_path, model, Keep(), monitored(), trainer=Breaks)
    assert modes() == 0
    ((optimizer, step),) = made
    assert optimizer.step == step
    assert all("scheme_for" not in vars(holder) for _, holder, _ in chains(model))


def test_hf_a_model_that_cannot_be_estimated_is_told_once(hf, tmp_path):
    class Stubborn(hf.GPT2LMHeadModel):
        def forward(self, input_ids=None, labels=None, **given):
            output = super().forward(input_ids=input_ids, labels=labels, **given)
            output.loss.item()
            return output

    model = Stubborn(gpt2(hf, convert=False).config)
    with pytest.warns(UserWarning, match="predicted_peak_bytes out.*needs the numbers") as told:
        trainer = train(hf, tmp_path, model, monitored())
    assert len(told) == 1
    for row in reports(trainer):
        assert PEAK in row
        assert not {PREDICTED, "drift"} & row.keys()  # and there is no chain


def test_hf_another_loop_is_refused(hf):
    made = monitored()
    assert isinstance(made, hf.TrainerCallback)
    with pytest.raises(StateError, match=r"another loop called it: use it in Trainer's callbacks"):
        made.on_train_begin(None, hf.TrainerState(), hf.TrainerControl())
    with pytest.raises(SettingError, match="every must be"):
        monitored(0)

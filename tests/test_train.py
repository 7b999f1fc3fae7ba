"""``reversa train`` from the inside: data, settings, the run and its folder, checkpoints, going on."""

from __future__ import annotations

import csv
import itertools
import os
import signal
import sys
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy

import reversa
from reversa import models
from reversa.errors import CheckpointError, MissingExtra, OutputError, SettingError
from reversa.train import DATASETS, Interrupted, TrainConfig, load_checkpoint, load_network, train
from reversa.train.config import ENGINES, parse, to_yaml
from reversa.train.cost import step_costs
from reversa.train.data import Batches, Split
from reversa.train.data.digits import digits, shifted
from reversa.train.files import RunFolder, write_text, write_whole

TINY = TrainConfig(depth=3, width=4, epochs=2, batch_size=256)  # 4 steps in an epoch


def tiny(out: Path, **settings) -> TrainConfig:
    return replace(TINY, out=str(out), **settings)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A small but useful run: 6 blocks, 4 epochs."""
    return train(TrainConfig(depth=6, width=8, epochs=4, out=str(tmp_path_factory.mktemp("runs") / "one")))


# ---------------------------------------------------------------------------------------------- data


def test_digits_are_every_image_once_with_its_label():
    data, (pixels, labels) = digits(), load_digits(return_X_y=True)
    splits = (data.train, data.val, data.test)
    assert [len(split.labels) for split in splits] == [1257, 180, 360]
    low, step = data.train.images.min(), (data.train.images.max() - data.train.images.min()) / 16
    found = Counter()
    for split in splits:
        raw = ((split.images - low) / step).round().int().flatten(1)
        found.update((tuple(image), int(label)) for image, label in zip(raw.tolist(), split.labels, strict=True))
    assert found == Counter((tuple(map(int, image)), int(label)) for image, label in zip(pixels, labels, strict=True))


def test_digits_are_stratified_normalised_and_always_the_same():
    one, two = digits(), digits()
    whole = numpy.bincount(load_digits().target) / 1797
    for split in (one.train, one.val, one.test):
        share = split.labels.bincount(minlength=10) / len(split.labels)
        assert (share - torch.tensor(whole)).abs().max() < 0.006
    assert torch.equal(one.test.images, two.test.images)
    assert one.train.images.mean().abs() < 1e-5
    assert abs(one.train.images.std() - 1) < 1e-5


def test_shifted_images_are_moved_by_whole_pixels_in_all_directions():
    images = torch.arange(1.0, 193.0).reshape(3, 1, 8, 8).repeat(100, 1, 1, 1)
    moved = shifted(images, torch.Generator().manual_seed(0), fill=-7.0)
    seen = set()
    for image, got in zip(images[:, 0].numpy(), moved[:, 0].numpy(), strict=True):
        offsets = itertools.product((-1, 0, 1), repeat=2)
        matches = [offset for offset in offsets if numpy.array_equal(by_hand(image, *offset), got)]
        assert len(matches) == 1
        seen.update(matches)
    assert len(seen) == 9


def by_hand(image, down, right):
    out = numpy.full_like(image, -7.0)
    for row, column in itertools.product(range(8), range(8)):
        if 0 <= row - down < 8 and 0 <= column - right < 8:
            out[row, column] = image[row - down, column - right]
    return out


def labels_of(batches: Batches) -> list[list[int]]:
    return [labels.tolist() for _, labels in batches]


def numbered(number: int) -> Split:
    return Split(torch.arange(float(number)).reshape(-1, 1, 1, 1), torch.arange(number))


def test_training_batches_are_new_in_every_epoch_and_never_repeat_an_image_within_one():
    batches = Batches(numbered(50), 8, seed=3)
    epochs = [labels_of(batches) for _ in range(3)]
    assert all(len(epoch) == len(batches) == 6 for epoch in epochs)
    assert all(len(set(itertools.chain(*epoch))) == 48 for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] == labels_of(Batches(numbered(50), 8, seed=3))
    assert epochs[0] != labels_of(Batches(numbered(50), 8, seed=4))


@pytest.mark.parametrize("done", [1, 5, 6, 9])
def test_batches_after_some_steps_are_those_of_an_unbroken_run(done):
    noisy = {"seed": 1, "augment": lambda images, generator: images + torch.rand(images.shape, generator=generator)}
    whole = Batches(numbered(50), 8, **noisy)
    want = [images for _ in range(3) for images, _ in whole][done:]
    rest = Batches(numbered(50), 8, **noisy, done=done)
    got = [images for _ in range(3) for images, _ in rest]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=False))


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(SettingError, match="batch_size=64, but there are 50 images"):
        Batches(numbered(50), 64, seed=0)


# ---------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--scheme", "momentun"], "Did you mean: momentum"),
        (["--engine", "inverse"], "Did you mean: invert"),
        (["--data", "digit"], "Did you mean: digits"),
        (["--model", "reversible"], "Did you mean: reversibleresnet"),
        (["--precision", "bf17"], "Did you mean: bf16"),
        (["--device", "tpu"], "unknown device 'tpu'"),
        (["--gamma", "0"], r"\(0, 1\], got 0"),
        (["--gamma", "1.5"], r"\(0, 1\], got 1.5"),
        (["--scheme", "revnet", "--gamma", "0.5"], "has no gamma"),
        (["--epochs", "0"], "epochs must be at least 1"),
        (["--lr", "-1"], "lr must be a finite number above 0"),
        (["--lr", ".inf"], "lr must be a finite number above 0"),
        (["--seed", "-1"], "seed must lie between"),
        (["--epoch", "3"], "Did you mean: --epochs"),
        (["--depth", "deep"], "depth must be a whole number or null, got deep"),
        (["--gamma", "high"], "gamma must be a number or null, got high"),
        (["--epochs", "1.5"], "epochs must be a whole number, got 1.5"),
        (["--exact", "maybe"], "exact must be true or false, got maybe"),
        (["--exact"], "--exact needs a value, for instance --exact true"),
        (["revnet38"], "unrecognized arguments: revnet38. Settings are flags, such as --model"),
        (["--config", "no/such/file.yaml"], "there is no file .*no/such/file.yaml"),
    ],
)
def test_bad_flags(flags, told):
    with pytest.raises(SettingError, match=told):
        parse(flags)


def test_defaults_are_the_main_job():
    config = parse([])
    assert config == TrainConfig()
    assert (config.data, config.scheme, config.engine) == ("digits", "momentum", "invert")
    assert config.depth >= 50


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path):
    file = tmp_path / "some.yaml"
    file.write_text("depth: 60\nepochs: 3\nprecision: 32\n")
    config = parse(["--config", str(file), "--epochs", "5"])
    assert (config.depth, config.epochs, config.precision) == (60, 5, "32-true")


def test_an_unknown_key_in_a_file_lists_the_nearest(tmp_path):
    file = tmp_path / "some.yaml"
    file.write_text("epoch: 3\n")
    with pytest.raises(SettingError, match="Did you mean: epochs"):
        parse(["--config", str(file)])


def test_written_settings_read_back_the_same(tmp_path):
    config = TrainConfig(gamma=0.5, epochs=3, out=str(tmp_path / "a b")).complete()
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config))
    assert parse(["--config", str(file)]) == config


def test_tables_are_complete():
    engines = {
        kind for kind in vars(reversa).values() if isinstance(kind, type) and issubclass(kind, reversa.engine.Engine)
    }
    assert {type(make()) for make in ENGINES.values()} == engines - {reversa.Mixed}  # which is made for one depth
    assert "digits" in DATASETS


# ---------------------------------------------------------------------------------------------- a run


def test_a_run_leaves_its_folder_and_nothing_else(run):
    files = {str(path.relative_to(run.folder)) for path in run.folder.rglob("*") if path.is_file()}
    wanted = {"config.yaml", "metrics.csv", "curves.png", "report.md", "checkpoints/last.ckpt", "checkpoints/best.ckpt"}
    assert files == wanted
    assert (run.folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert parse(["--config", str(run.folder / "config.yaml")]) == run.config


def test_metrics_have_a_row_per_epoch(run):
    with open(run.folder / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["epoch"]) for row in rows] == [0, 1, 2, 3]
    assert [int(row["step"]) for row in rows] == [19, 38, 57, 76]
    assert {"train_loss", "val_loss", "val_accuracy", "lr"} < rows[0].keys()
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"]) / 3


def test_reported_accuracies_are_those_of_the_best_checkpoint(run):
    data, network = digits(), load_network(run.folder / "checkpoints" / "best.ckpt")
    with torch.no_grad():
        tested = (network(data.test.images).argmax(1) == data.test.labels).double().mean()
        scores = network(data.val.images)
    assert run.test_accuracy == pytest.approx(float(tested), abs=1e-6)
    assert run.test_accuracy > 0.9
    assert run.best["val_accuracy"] == pytest.approx(
        float((scores.argmax(1) == data.val.labels).double().mean()), abs=1e-6
    )
    assert run.best["val_loss"] == pytest.approx(float(cross_entropy(scores, data.val.labels)), rel=1e-4)
    assert run.best["val_loss"] == min(row["val_loss"] for row in run.rows)


def test_the_report_tells_what_was_measured(run):
    report = (run.folder / "report.md").read_text()
    assert f"{run.test_accuracy:.2%}" in report
    assert f"{run.costs['invert'].peak_bytes / 2**20:.2f} MiB" in report
    assert f"{run.costs['store'].peak_bytes / 2**20:.2f} MiB (100.0%)" in report
    assert f"{run.costs['store'].seconds * 1e3:.0f} ms" in report
    assert "curves.png" in report


def test_checkpoints_hold_what_is_needed_to_go_on(run):
    content = torch.load(run.folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert content["global_step"] == 76
    assert content["optimizer_states"]
    assert content["lr_schedulers"]
    assert content["reversa"]["config"]["depth"] == 6


def test_the_same_settings_give_the_same_bits_and_leave_the_process_as_it_was(tmp_path):
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    handler = signal.getsignal(signal.SIGINT)
    one, two = (train(tiny(tmp_path / name)) for name in "ab")
    assert_equal_weights(one.folder, two.folder)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.are_deterministic_algorithms_enabled()
    assert signal.getsignal(signal.SIGINT) is handler


def test_another_seed_is_another_run(tmp_path):
    one, two = (train(tiny(tmp_path / str(seed), seed=seed, epochs=1)) for seed in (0, 1))
    assert one.rows[0]["train_loss"] != two.rows[0]["train_loss"]


@pytest.mark.parametrize("scheme", ["momentum", "revnet", "additive"])
def test_training_is_the_same_with_stored_activations(tmp_path, scheme):
    settings = {"epochs": 1, "precision": "64-true", "scheme": scheme}
    inverted, stored = (train(tiny(tmp_path / engine, engine=engine, **settings)) for engine in ("invert", "store"))
    assert inverted.rows[0]["train_loss"] == pytest.approx(stored.rows[0]["train_loss"], rel=1e-9)
    assert set(inverted.costs) == {"invert", "store"}
    assert set(stored.costs) == {"store"}


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("scheme", ["momentum", "revnet"])
def test_exact_training_has_the_bits_of_stored_activations(tmp_path, scheme, precision):
    settings = {"epochs": 1, "precision": precision, "scheme": scheme, "exact": True}
    inverted, stored = (train(tiny(tmp_path / engine, engine=engine, **settings)) for engine in ("invert", "store"))
    assert inverted.rows[0]["train_loss"] == stored.rows[0]["train_loss"]
    weights = [torch.load(tmp_path / e / "checkpoints/last.ckpt", weights_only=True) for e in ("invert", "store")]
    one, two = (checkpoint["state_dict"] for checkpoint in weights)
    assert all(torch.equal(one[name], two[name]) for name in two)
    assert inverted.title.endswith(", exact")


def test_mixed_precision_trains(tmp_path):
    result = train(tiny(tmp_path / "bf16", precision="bf16", epochs=1))
    assert result.config.precision == "bf16-mixed"
    assert result.rows[0]["train_loss"] < 3


def test_nothing_is_printed_but_the_first_line_the_table_and_the_folder(tmp_path, capsys):
    train(tiny(tmp_path / "quiet", epochs=1))
    out, err = capsys.readouterr()
    assert err == ""
    assert out.startswith("digits: 3 residual blocks, momentum, gamma 0.9, 1 epoch, in ")
    assert out.count("\n") == 9
    assert "\x1b" not in out
    assert out.rstrip().endswith(f"Run folder: {tmp_path / 'quiet'}")


def test_costs_are_measured_flat_in_depth_where_activations_are_computed_back():
    batch = torch.zeros(8, 1, 8, 8), torch.zeros(8, dtype=torch.long)
    engines = {"store": reversa.Store(), "invert": reversa.Invert()}
    small, large = (
        step_costs(models.create("reversibleresnet", depth=depth, width=4), batch, engines, rounds=1)
        for depth in (30, 60)
    )
    assert large["invert"].peak_bytes <= 1.01 * small["invert"].peak_bytes
    assert large["store"].peak_bytes > 1.8 * small["store"].peak_bytes
    assert all(cost.seconds > 0 for cost in large.values())


def test_measuring_leaves_the_network_alone():
    net = models.create("reversibleresnet", depth=3, width=4)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    step_costs(net, (torch.randn(4, 1, 8, 8), torch.zeros(4, dtype=torch.long)), {"store": reversa.Store()}, rounds=1)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    assert net.chains[0].engine == reversa.Invert()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_default_run_reads_digits(tmp_path):
    result = train(TrainConfig(out=str(tmp_path / "default")))
    assert result.test_accuracy >= 0.97
    assert result.costs["invert"].peak_bytes < result.costs["store"].peak_bytes / 8
    assert sum(len(chain.blocks) for chain in load_network(result.folder / "checkpoints" / "last.ckpt").chains) >= 50


# ---------------------------------------------------------------------------------------------- stopping and going on


def assert_equal_weights(one: Path, two: Path) -> None:
    a, b = (load_checkpoint(folder / "checkpoints" / "last.ckpt") for folder in (one, two))
    assert a["global_step"] == b["global_step"]
    assert a["state_dict"].keys() == b["state_dict"].keys()
    assert all(torch.equal(value, b["state_dict"][name]) for name, value in a["state_dict"].items())


def interrupt_at(step: int, monkeypatch) -> None:
    """Send this process a real SIGINT at the end of a training step."""
    from reversa.train.callbacks import Record

    plain = Record.on_train_batch_end

    def hook(self, trainer, *args):
        plain(self, trainer, *args)
        if trainer.global_step == step:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Record, "on_train_batch_end", hook)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    return train(tiny(tmp_path_factory.mktemp("runs") / "unbroken"))


@pytest.mark.parametrize("step", [1, 3, 4, 6, 8])
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(unbroken, tmp_path, step):
    config = tiny(tmp_path / "broken")
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(step, patch)
        with pytest.raises(Interrupted) as told:
            train(config)
    last = tmp_path / "broken" / "checkpoints" / "last.ckpt"
    assert load_checkpoint(last)["global_step"] == step
    assert f"step {step} of 8" in str(told.value)
    assert f"--resume {last}" in str(told.value)
    result = train(replace(config, resume=str(last), engine="store" if step == 3 else "invert"))
    if step != 3:  # another engine rounds differently
        assert_equal_weights(unbroken.folder, result.folder)
    for got, want in zip(result.rows, unbroken.rows, strict=True):
        assert got["train_loss"] == pytest.approx(want["train_loss"], rel=1e-3 if step == 3 else 1e-12)
    assert not list(result.folder.rglob("*.unfinished"))


def test_a_second_interrupt_does_not_wait(tmp_path, monkeypatch):
    from reversa.train.callbacks import Record

    def hook(self, trainer, *args):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Record, "on_train_batch_end", hook)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match="No checkpoint was written yet"):
        train(tiny(tmp_path / "hasty"))
    assert signal.getsignal(signal.SIGINT) is handler


def test_resuming_with_other_settings_is_refused(unbroken):
    last = str(unbroken.folder / "checkpoints" / "last.ckpt")
    with pytest.raises(SettingError, match="width was 4 and is 6"):
        train(tiny(unbroken.folder, width=6, resume=last))


def test_training_outside_the_main_thread(tmp_path):
    results = []
    thread = threading.Thread(target=lambda: results.append(train(tiny(tmp_path / "thread", epochs=1))))
    thread.start()
    thread.join()
    assert len(results[0].rows) == 1


# ---------------------------------------------------------------------------------------------- folders and files


@pytest.mark.parametrize("where", ["file/run", "file"])
def test_an_impossible_folder_is_told_before_any_work(tmp_path, where, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setitem(DATASETS, "digits", lambda: pytest.fail("work was done"))
    with pytest.raises(OutputError, match="is not a folder"):
        train(tiny(tmp_path / where))


def test_an_unwritable_folder_is_told_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)  # the superuser may write everywhere
    monkeypatch.setitem(DATASETS, "digits", lambda: pytest.fail("work was done"))
    with pytest.raises(OutputError, match="no permission"):
        train(tiny(tmp_path / "run"))


def test_a_folder_with_a_run_is_not_overwritten(run):
    with pytest.raises(OutputError, match="holds a run already"):
        train(tiny(run.folder))


def test_a_mistake_leaves_no_folder_behind(tmp_path):
    with pytest.raises(SettingError):
        train(tiny(tmp_path / "run", depth=2))
    odenet = TrainConfig(model="odenet", epochs=1, out=str(tmp_path / "run"))
    with pytest.raises(SettingError, match=r"odenet does not take digits, of 8 x 8 pixels: .* at least 10 x 10"):
        train(odenet)
    assert not (tmp_path / "run").exists()


def test_new_folders_have_names_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = []
    for _ in range(3):
        folders.append(RunFolder.choose(None, "digits-momentum"))
        folders[-1].create()
    assert len({folder.path for folder in folders}) == 3
    assert all(str(folder.path).startswith("runs/2") and "-digits-momentum" in str(folder.path) for folder in folders)


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    file = tmp_path / "file"
    write_text(file, "before")

    def half(stream):
        stream.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(file, half)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert file.read_text() == "before"
    with pytest.raises(OutputError, match="cannot write"):
        write_text(tmp_path / "no" / "file", "")


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_checkpoint_cut_short(run, tmp_path, share):
    whole = (run.folder / "checkpoints" / "last.ckpt").read_bytes()
    cut = tmp_path / "cut.ckpt"
    cut.write_bytes(whole[: int(len(whole) * share)])
    for read in (load_checkpoint, load_network):
        with pytest.raises(CheckpointError, match="cut short"):
            read(cut)


class Foreign:
    """What ``weights_only`` does not load."""


@pytest.mark.parametrize("content", [{"state_dict": {}}, {"reversa": {}}, [1, 2], torch.zeros(2)])
def test_a_checkpoint_of_another_program(tmp_path, content):
    torch.save(content, tmp_path / "other.ckpt")
    with pytest.raises(CheckpointError, match="not a checkpoint of reversa train"):
        load_checkpoint(tmp_path / "other.ckpt")


def test_a_checkpoint_that_is_not_tensors_or_not_there(tmp_path):
    torch.save({"state_dict": Foreign(), "reversa": {}}, tmp_path / "code.ckpt")
    with pytest.raises(CheckpointError, match="not a checkpoint of tensors"):
        load_checkpoint(tmp_path / "code.ckpt")
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        load_checkpoint(tmp_path / "none.ckpt")


def test_a_checkpoint_of_another_network(run, tmp_path):
    content = torch.load(run.folder / "checkpoints" / "last.ckpt", weights_only=True)
    content["reversa"]["config"]["depth"] = 7
    torch.save(content, tmp_path / "other.ckpt")
    with pytest.raises(CheckpointError, match="does not fit"):
        load_network(tmp_path / "other.ckpt")


@pytest.mark.parametrize("package", ["lightning.pytorch", "sklearn.datasets", "rich.console", "matplotlib.figure"])
def test_a_missing_extra_is_named_before_any_work(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtra, match=r"pip install 'reversa\[train\]'"):
        train(tiny(tmp_path / "run"))
    assert not (tmp_path / "run").exists()

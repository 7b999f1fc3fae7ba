"""A training run from its settings to its report."""

from __future__ import annotations

import copy
import logging
import shlex
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from reversa.errors import ReversaError, SettingError, import_extra
from reversa.sequence import ReversibleSequence
from reversa.train.checkpoint import MARK, load_checkpoint
from reversa.train.config import ENGINES, TrainConfig, to_yaml
from reversa.train.cost import StepCost, step_costs
from reversa.train.data import Batches, DataSet, dataset_named
from reversa.train.files import RunFolder, write_text
from reversa.train.report import NOT_REVERSIBLE, Result, as_rich_table, counted, write_report

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from reversa.train.callbacks import Bar, OrderlyStop, Record
    from reversa.train.classifier import Classifier

EXTRAS = ("lightning.pytorch", "jsonargparse", "rich.console", "sklearn.datasets", "matplotlib.figure")

# What may change when a run goes on from its checkpoint.
FREE_TO_CHANGE = {"engine", "device", "threads", "out", "resume"}


class Interrupted(KeyboardInterrupt):
    """Ctrl-C came; a whole checkpoint is written, and the message says how to go on."""


def train(config: TrainConfig) -> Result:
    """Train a network, test it, measure what a step costs, and leave a run folder.

    Same settings, same machine: the same numbers. Progress and the closing table go to the standard output.

    Args:
        config: the settings.

    Raises:
        MissingExtra: a package of the extra ``train`` is not installed.
        OutputError: the run's folder cannot be made or written to, or holds another run; raised before any training.
        CheckpointError: ``resume`` names no whole checkpoint of ours.
        SettingError: the device is not there; the network does not take images of that size; the checkpoint to resume
            belongs to other settings.
        Interrupted: Ctrl-C.
    """
    for module in EXTRAS:
        import_extra(module, "train")
    config = config.complete()
    start = _read_start(config)
    if config.resume is None:
        folder = RunFolder.choose(config.out, config.name)
    else:
        folder = RunFolder.of_checkpoint(Path(config.resume))
    data = dataset_named(config.data)()
    with _own_settings(config):
        run = _Run(config, folder, data, start)
        with run.stop.listening():
            folder.create()
            write_text(folder.config, to_yaml(config))
            run.fit()
        result = run.result()
    write_report(result, folder)
    run.say(as_rich_table(result))
    run.say(f"Run folder: {folder.path}")
    return result


class _Run:
    """The parts of one run, put together."""

    def __init__(self, config: TrainConfig, folder: RunFolder, data: DataSet, start: int) -> None:
        from rich.console import Console

        from reversa.train.callbacks import Bar, OrderlyStop, Record
        from reversa.train.classifier import Classifier

        self.config, self.folder, self.data = config, folder, data
        self.console = Console()
        self.batches = Batches(data.train, config.batch_size, seed=config.seed, augment=data.augment, done=start)
        steps = config.epochs * len(self.batches)
        channels = data.train.images.shape[1]
        self.task: Classifier = Classifier(config, steps, data.num_classes, channels)
        self.record: Record = Record(folder)
        self.stop: OrderlyStop = OrderlyStop(folder)
        self.bar: Bar = Bar(self.console, self.record)
        self.trainer: Trainer = _trainer(config, [self.record, self.stop, self.bar])
        self._try()

    def _try(self) -> None:
        """Show an image to a copy of the network: a network that does not take it is told before there is a folder."""
        image = self.data.val.images[:1]
        try:
            with torch.no_grad(), torch.random.fork_rng([]):
                copy.deepcopy(self.task.network).eval()(image)
        except ReversaError as error:
            size = " x ".join(map(str, image.shape[2:]))
            raise SettingError(
                f"{self.config.model} does not take {self.config.data}, of {size} pixels: {error}"
            ) from error

    def say(self, what: Any) -> None:
        self.console.print(what, soft_wrap=isinstance(what, str), highlight=False)

    def fit(self) -> None:
        """Train to the end, or to Ctrl-C."""
        from reversa.train.callbacks import Stopped

        val = Batches(self.data.val, self.config.batch_size)
        epochs = counted(self.config.epochs, "epoch")
        self.say(f"{self.config.data}: {self.config.network}, {epochs}, in {self.folder.path}")
        try:
            with self.bar.shown():
                self.trainer.fit(self.task, self.batches, val, ckpt_path=self.config.resume, weights_only=True)
        except (Stopped, SystemExit) as stopped:  # SystemExit is what Lightning makes of a second Ctrl-C
            step = f"Stopped at step {self.trainer.global_step} of {self.task.steps}."
            raise Interrupted(f"{step} {self._how_to_go_on()}") from stopped

    def result(self) -> Result:
        """Test the best checkpoint and measure a step."""
        try:
            self.task.load_state_dict(load_checkpoint(self.folder.best)["state_dict"])
            test = Batches(self.data.test, self.config.batch_size)
            tested = self.trainer.test(self.task, test, verbose=False)[0]
            costs = self._costs()
        except (KeyboardInterrupt, SystemExit) as stopped:
            raise Interrupted(f"Stopped after the training, before its report. {self._how_to_go_on()}") from stopped
        rows = self.record.rows
        seconds = float(rows[-1]["seconds"])
        return Result(self.config, self.folder.path, rows, self.record.best, tested["test_accuracy"], costs, seconds)

    def _costs(self) -> dict[str, StepCost]:
        device, plugin = self.trainer.strategy.root_device, self.trainer.precision_plugin
        batch = plugin.convert_input(next(iter(Batches(self.data.train, self.config.batch_size))))
        engines = {name: ENGINES[name]() for name in dict.fromkeys((self.config.engine, "store"))}
        if not any(isinstance(module, ReversibleSequence) for module in self.task.network.modules()):
            engines = {NOT_REVERSIBLE: ENGINES["store"]()}  # whatever engine was asked for
        return step_costs(
            self.task.network.to(device),
            (batch[0].to(device), batch[1].to(device)),
            engines,
            plugin.forward_context,
        )

    def _how_to_go_on(self) -> str:
        config, last = shlex.quote(str(self.folder.config)), shlex.quote(str(self.folder.last))
        if not self.folder.last.exists():
            return (
                f"No checkpoint was written yet.\nTo begin again: reversa train --config {config} --out ANOTHER_FOLDER"
            )
        return f"The checkpoint is whole: {self.folder.last}\nTo go on: reversa train --config {config} --resume {last}"


def _trainer(config: TrainConfig, callbacks: list[Any]) -> Trainer:
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch import Trainer

    from reversa.train.callbacks import WholeCheckpoints

    there = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}
    if config.device in there and not there[config.device]():
        raise SettingError(f"device={config.device}, but this machine, or this PyTorch, has none: choose auto or cpu")
    try:
        trainer = Trainer(
            accelerator=config.device,
            devices=1,
            precision=config.precision,  # type: ignore[arg-type]
            max_epochs=config.epochs,
            callbacks=callbacks,
            plugins=[WholeCheckpoints()],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            deterministic=True,
        )
    except (MisconfigurationException, ValueError) as error:  # Lightning's word for a device that is not there
        raise SettingError(f"device={config.device}, precision={config.precision}: {error}") from error
    if trainer.precision != config.precision:  # Lightning takes another one with a warning
        raise SettingError(f"precision {config.precision} is not to be had on this device: choose {trainer.precision}")
    return trainer


def _read_start(config: TrainConfig) -> int:
    """The step to go on from: 0, or that of the checkpoint to resume."""
    if config.resume is None:
        return 0
    checkpoint = load_checkpoint(config.resume)
    before, now = checkpoint[MARK]["config"], asdict(config)
    other = [name for name in now if name not in FREE_TO_CHANGE and before.get(name) != now[name]]
    if other:
        own = Path(config.resume).parent.parent / "config.yaml"
        differences = ", ".join(f"{name} was {before.get(name)!r} and is {now[name]!r}" for name in other)
        raise SettingError(
            f"{config.resume} belongs to a run with other settings: {differences}. Resume it with its own: "
            f"--config {shlex.quote(str(own))}"
        )
    return int(checkpoint["global_step"])


@contextmanager
def _own_settings(config: TrainConfig) -> Iterator[None]:
    """Threads, random numbers and Lightning's chatter as a run wants them; afterwards as they were."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(range(torch.cuda.device_count())))
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", module=r"lightning\.")  # its deprecations and tips are not the user's matter
        stack.callback(torch.set_num_threads, threads)
        stack.callback(torch.use_deterministic_algorithms, deterministic)
        for logger, level in zip(loggers, levels, strict=True):
            stack.callback(logger.setLevel, level)
            logger.setLevel(logging.ERROR)
        torch.set_num_threads(config.threads)
        torch.manual_seed(config.seed)
        yield

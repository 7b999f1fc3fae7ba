"""The settings of a run, and how they are read from flags and files."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from reversa import models
from reversa.engine import Engine, Invert, Offload, Recompute, Store
from reversa.errors import SettingError, import_extra, nearest
from reversa.schemes import Scheme, scheme_named
from reversa.train.data import dataset_named

ENGINES: dict[str, Callable[[], Engine]] = {
    "invert": Invert,
    "store": Store,
    "recompute": Recompute,
    "offload": Offload,
}

# Lightning's names, and what people write for them.
PRECISIONS = {
    "32-true": "32-true",
    "64-true": "64-true",
    "bf16-mixed": "bf16-mixed",
    "16-mixed": "16-mixed",
    "32": "32-true",
    "64": "64-true",
    "bf16": "bf16-mixed",
    "16": "16-mixed",
}


def make_scheme(name: str, gamma: float | None = None) -> Scheme:
    """A scheme by name, with its own gamma where none is given.

    Raises:
        SettingError: no scheme has that name, it has no gamma, or gamma is out of its range.
    """
    kind: Any = scheme_named(name)
    if gamma is None:
        return kind()
    if "gamma" not in {setting.name for setting in fields(kind)}:
        raise SettingError(f"scheme {name!r} has no gamma, got gamma={gamma}: leave it out")
    return kind(gamma=gamma)


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run; each is a flag of ``reversa train`` and a key of its YAML files.

    Args:
        data: the data set to train on.
        model: the network, one of reversa.models.names().
        scheme: the update rule of its blocks: momentum, revnet or additive.
        depth: residual blocks in all.
        width: channels of the first stage.
        gamma: weight of the old velocity, in (0, 1], where the scheme has one; null for its own (momentum: 0.9).
        epochs: passes over the training images.
        engine: where the backward pass gets the states: invert, store, recompute or offload.
        exact: hold states in integers, so that the backward pass gets the very bits of the forward pass.
        precision: 32-true, 64-true, bf16-mixed, or 16-mixed on a GPU.
        batch_size: images in a step.
        lr: highest learning rate; it rises to it for the first 30 % of the steps and falls to zero afterwards.
        weight_decay: of the convolutions and the linear layer; normalisation has none.
        seed: of the first parameters, the order of the images and their augmentation.
        device: where to train: auto, cpu, cuda or mps.
        threads: CPU threads; images this small gain nothing from more than one, and lose much where cores are shared.
        out: the folder of a new run; null for runs/DATE-TIME-DATA-SCHEME.
        resume: the last.ckpt of a run with the same settings, to go on from in its folder; null to start anew.

    Raises:
        SettingError: an unknown name, or a number outside its range.

    >>> TrainConfig(scheme="revnet").name
    'digits-revnet'
    """

    data: str = "digits"
    model: str = "reversibleresnet"
    scheme: str = "momentum"
    depth: int = 54
    width: int = 16
    gamma: float | None = None
    epochs: int = 12
    engine: str = "invert"
    exact: bool = False
    precision: str | int = "32-true"
    batch_size: int = 64
    lr: float = 0.1
    weight_decay: float = 5e-4
    seed: int = 0
    device: str = "auto"
    threads: int = 1
    out: str | None = None
    resume: str | None = None

    def __post_init__(self) -> None:
        for name in ("depth", "width", "epochs", "batch_size", "threads"):
            if getattr(self, name) < 1:
                raise SettingError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name, least in (("lr", "above 0"), ("weight_decay", "0 or more")):
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0 or (name == "lr" and value == 0):
                raise SettingError(f"{name} must be a finite number {least}, got {value}")
        if not 0 <= self.seed < 2**32:
            raise SettingError(f"seed must lie between 0 and 2**32 - 1, got {self.seed}")
        for name, known in (("model", models.names()), ("engine", ENGINES), ("device", ("auto", "cpu", "cuda", "mps"))):
            if getattr(self, name) not in known:
                raise SettingError(nearest(getattr(self, name), known, name))
        if str(self.precision) not in PRECISIONS:
            raise SettingError(nearest(str(self.precision), PRECISIONS, "precision"))
        object.__setattr__(self, "precision", PRECISIONS[str(self.precision)])
        dataset_named(self.data)
        self.make_scheme()

    @property
    def name(self) -> str:
        """What the run is called where it is not given a folder."""
        return f"{self.data}-{self.scheme}"

    def make_scheme(self) -> Scheme:
        """The update rule."""
        return make_scheme(self.scheme, self.gamma)

    def make_engine(self) -> Engine:
        """Where the backward pass gets its states."""
        return ENGINES[self.engine]()

    def complete(self) -> TrainConfig:
        """The same settings with the scheme's own gamma written out."""
        return replace(self, gamma=getattr(self.make_scheme(), "gamma", None))


def parser() -> Any:
    """The parser of ``reversa train``: a flag for every setting, ``--config FILE`` and ``--print_config``.

    Raises:
        MissingExtra: jsonargparse is not installed.
    """
    jsonargparse = import_extra("jsonargparse", "train")
    built = jsonargparse.ArgumentParser(
        prog="reversa train",
        description="Train a reversible residual network, and measure what it costs.",
        allow_abbrev=False,
        exit_on_error=False,
    )
    built.add_argument("--config", action="config", help="a YAML file of settings; flags after it count more")
    built.add_class_arguments(TrainConfig)
    return built


def parse(flags: Sequence[str]) -> TrainConfig:
    """Settings from command-line flags.

    Raises:
        SettingError: an unknown flag or key, or a value of the wrong kind.

    >>> parse(["--depth", "60"]).depth
    60
    """
    built = parser()
    try:
        settings = built.parse_args(list(flags)).as_dict()
    except import_extra("jsonargparse", "train").ArgumentError as error:
        raise SettingError(f"{_told(str(error))}\nEvery setting: reversa train --help") from error
    settings.pop("config")
    return TrainConfig(**settings)


def to_yaml(config: TrainConfig) -> str:
    """The settings as YAML, for ``--config``."""
    return import_extra("yaml", "train").safe_dump(asdict(config), sort_keys=False)


def _told(message: str) -> str:
    """The parser's message; an unknown flag or key with the nearest ones."""
    names = [setting.name for setting in fields(TrainConfig)]
    for mark, prefix in (("unrecognized arguments: --", "--"), ("Option '", "")):
        if mark in message:
            unknown = message.split(mark)[1].split("'")[0].split()[0].split("=")[0]
            return nearest(prefix + unknown, [prefix + name for name in names], "setting")
    return message

"""The settings of a run, and how they are read from flags and files."""

from __future__ import annotations

import math
import re
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

# What the parser of the flags calls kinds of values, and a file that is not there.
KINDS = {"str": "a name", "int": "a whole number", "float": "a number", "bool": "true or false", "None": "null"}
ABSENT = 'Parser key "config": File does not exist:'

OWN = "reversibleresnet"
"""The network whose scheme, depth and width are settings of a run."""
OWN_SETTINGS = {"scheme": "momentum", "depth": 54, "width": 16}


def make_scheme(name: str, gamma: float | None = None, h: float | None = None) -> Scheme:
    """A scheme by name, with its own gamma or step size where none is given.

    Raises:
        SettingError: no scheme has that name, it has no such setting, or the setting is out of its range.
    """
    kind: Any = scheme_named(name)
    given = {name: value for name, value in (("gamma", gamma), ("h", h)) if value is not None}
    for setting, value in given.items():
        if setting not in {field.name for field in fields(kind)}:
            raise SettingError(f"scheme {name!r} has no {setting}, got {setting}={value}: leave it out")
    return kind(**given)


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run; each is a flag of ``reversa train`` and a key of its YAML files.

    Args:
        data: the images to train on: digits, of 8 x 8 pixels, or digits32, the same enlarged to 32 x 32.
        model: the network; reversa models lists them.
        scheme: the update rule of the blocks of reversibleresnet: momentum, revnet, additive, hamiltonian, midpoint,
            leapfrog, irevnet, affine, iresnet, reversibleheun, mccallumfoster, bdia or dr2net; null for momentum.
            The networks of the papers have their own.
        depth: residual blocks of reversibleresnet in all; null for 54.
        width: channels of the first stage of reversibleresnet; null for 16.
        gamma: weight of the old velocity or state, where there is one; null for the network's or the scheme's own.
        h: the step size, where there is one; null for the network's or the scheme's own.
        epochs: passes over the training images.
        engine: where the backward pass gets the states: invert, store, recompute or offload. Networks without a
            reversible step store their activations.
        exact: hold states in integers, so that the backward pass gets the very bits of the forward pass.
        precision: 32-true, 64-true, bf16-mixed, or 16-mixed on a GPU.
        batch_size: images in a step.
        lr: highest learning rate; it rises to it for the first 30 % of the steps and falls to zero afterwards.
        weight_decay: of the convolutions and the linear layer; normalisation has none.
        seed: of the first parameters, the order of the images and their augmentation.
        device: where to train: auto, cpu, cuda or mps.
        threads: CPU threads; images this small gain nothing from more than one, and lose much where cores are shared.
        out: the folder of a new run; null for runs/DATE-TIME-DATA-NETWORK.
        resume: the last.ckpt of a run with the same settings, to go on from in its folder; null to start anew.

    Raises:
        SettingError: an unknown name, or a number outside its range.

    >>> TrainConfig(scheme="revnet").name
    'digits-revnet'
    """

    data: str = "digits"
    model: str = "reversibleresnet"
    scheme: str | None = None
    depth: int | None = None
    width: int | None = None
    gamma: float | None = None
    h: float | None = None
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
        if self.model == OWN:
            for name, value in OWN_SETTINGS.items():
                if getattr(self, name) is None:
                    object.__setattr__(self, name, value)
        for name in ("depth", "width", "epochs", "batch_size", "threads"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
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
        self.network_settings()

    @property
    def name(self) -> str:
        """What the run is called where it is not given a folder."""
        return f"{self.data}-{self.scheme if self.model == OWN else self.model}"

    @property
    def network(self) -> str:
        """The network in a few words."""
        what = f"{self.depth} residual blocks, {self.scheme}" if self.model == OWN else self.model
        numbers = [f", {name} {value:g}" for name in ("gamma", "h") if (value := getattr(self, name)) is not None]
        return f"{what}{''.join(numbers)}{', exact' * self.exact}"

    def network_settings(self) -> dict[str, Any]:
        """What :func:`reversa.models.create` is given, beside the number of classes and channels.

        Raises:
            SettingError: a setting that the network does not have.
        """
        takes = set(models.settings_of(self.model))
        given: dict[str, Any] = {"engine": self.make_engine()} if "engine" in takes else {}
        asked = ("depth", "width", "scheme", "gamma", "h")
        own: dict[str, Any] = {name: getattr(self, name) for name in asked if getattr(self, name) is not None}
        if "scheme" in takes:
            own["scheme"] = make_scheme(str(self.scheme), own.pop("gamma", None), own.pop("h", None))
        if self.exact:
            own["exact"] = True
        if self.engine not in ("invert", "store") and "engine" not in takes:
            own["engine"] = self.engine
        for name in own:
            if name not in takes:
                has = ", ".join(setting for setting in (*asked, "exact", "engine") if setting in takes) or "none"
                raise SettingError(
                    f"{self.model} has no {name}, got {name}={own[name]!r}: leave it out. Of such settings "
                    f"it has: {has}."
                )
        return given | own

    def make_engine(self) -> Engine:
        """Where the backward pass gets its states."""
        return ENGINES[self.engine]()

    def complete(self) -> TrainConfig:
        """The same settings with the network's or the scheme's own gamma and h written out."""
        settings = models.settings_of(self.model)
        has = vars(make_scheme(self.scheme, self.gamma, self.h)) if self.scheme else settings
        return replace(
            self, **{name: has[name] for name in ("gamma", "h") if getattr(self, name) is None and name in has}
        )


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
    kinds = {setting.name: str(setting.type) for setting in fields(TrainConfig)}
    if wrong := re.match(r'Parser key "(\w+)":.*value: ([^\n]*)', message, re.DOTALL):
        name, value = wrong.groups()
        if name in kinds:
            return f"{name} must be {' or '.join(KINDS[kind] for kind in kinds[name].split(' | '))}, got {value}"
    if missing := re.match(r"argument --(\w+): expected one argument", message):
        return f"--{missing[1]} needs a value, for instance --{missing[1]} {_example(missing[1])}"
    if message.startswith(ABSENT):
        file = message.removeprefix(ABSENT).strip(" '")
        return f"there is no file {file}: --config takes a YAML file of settings"
    if "unrecognized arguments: " in message and "arguments: -" not in message:
        return f"{message}. Settings are flags, such as --model {TrainConfig.model}"
    for mark, prefix in (("unrecognized arguments: --", "--"), ("Option '", "")):
        if mark in message:
            unknown = message.split(mark)[1].split("'")[0].split()[0].split("=")[0]
            return nearest(prefix + unknown, [prefix + name for name in names], "setting")
    return message


def _example(name: str) -> str:
    """A value that a flag could have."""
    value = getattr(TrainConfig, name, None)
    return "true" if value is False else "VALUE" if value is None else str(value)

"""Networks as the command line names them: one of Reversa's, torchvision's, timm's, Hugging Face's, or a user's."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from reversa import models
from reversa.cli.text import IDS, arguments, default_shape
from reversa.errors import ReversaError, SettingError, import_extra, nearest
from reversa.sequence import ReversibleSequence

IMAGES = 8, 3, 224, 224


class Source(NamedTuple):
    """Python that makes a network: the module to import, the function, its arguments."""

    module: str
    function: str
    arguments: str = ""


@dataclass(frozen=True)
class Network:
    """A network that has a name, and is not made yet.

    Attributes:
        spec: what the user wrote.
        create: makes it, with fresh weights.
        source: the same in Python.
        shape: of the inputs, where none is given; None where nothing tells it.
        settings: of a network of :mod:`reversa.models`, with their defaults.
        reversible: it consists of chains already, and has their engine as a setting.
        device: where it is made, with weights; None for the meta device, and the CPU where it needs weights.
    """

    spec: str
    create: Callable[..., nn.Module]
    source: Source
    shape: tuple[int, ...] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    reversible: bool = False
    device: torch.device | None = None

    def build(self, real: bool = False, **settings: Any) -> nn.Module:
        """The network: on the meta device, without memory, or with weights; on the device that was asked for.

        Raises:
            SettingError: what was to make it fails, or makes something else.
        """
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of first weights that will be others some day
                with torch.device(self.device) if self.device else nullcontext():
                    model = self.create(**settings) if real or self.device else self._on_meta(settings)
        except ReversaError:
            raise
        except Exception as error:
            raise SettingError(
                f"{self.spec} cannot be made: {type(error).__name__}: {error}. It is called without arguments."
            ) from error
        if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise SettingError(f"{self.spec} must make a torch.nn.Module, got {type(model).__name__}")
        return (model.to(self.device) if self.device else model).train()

    def _on_meta(self, settings: dict[str, Any]) -> nn.Module:
        try:
            with torch.device("meta"):
                return self.create(**settings)
        except ReversaError:
            raise
        except (NotImplementedError, RuntimeError):  # its constructor computes with numbers
            return self.create(**settings)

    def takes(self, model: nn.Module, shape: tuple[int, ...]) -> Any:
        """A shape as what the model is called with: models of text take it as that of token ids, or of embeddings."""
        return arguments(model, shape, self.spec)


def network_named(spec: str) -> Network:
    """The network of a SPEC: ``revnet110``, ``torchvision:resnet152``, ``timm:...``, ``hf:...``, ``module:factory``.

    Nothing is downloaded. A name alone is looked for among Reversa's networks first, then among torchvision's.

    Raises:
        SettingError: there is no such network; the message lists the nearest ones.
        MissingExtra: the package that has it is not installed.

    >>> network_named("revnet110").shape
    (32, 3, 32, 32)
    """
    package, colon, name = spec.partition(":")
    if not colon:
        return _own(spec) if spec in models.MODELS else _torchvision(spec, spec, models.names())
    if package == "torchvision":
        return _torchvision(spec, name)
    if package == "timm":
        return _timm(spec, name)
    return _hugging_face(spec, name) if package == "hf" else _users(spec, package, name)


def _own(name: str) -> Network:
    settings = models.settings_of(name)
    large = settings.get("large") or settings.get("patch") == 16 or settings.get("squeeze") == 2
    shape = IMAGES if large else (32, settings["channels"], 32, 32)
    source = Source("reversa", "reversa.models.create", f'"{name}"')
    network = Network(name, lambda **given: models.create(name, **given), source, shape, settings)
    has_chains = any(isinstance(module, ReversibleSequence) for module in network.build().modules())
    return replace(network, reversible=has_chains and "engine" in settings)


def _torchvision(spec: str, name: str, others: Iterable[str] = ()) -> Network:
    torchvision = import_extra("torchvision.models", "vision")
    known = torchvision.list_models(module=torchvision)
    if name not in known:
        raise SettingError(nearest(name, dict.fromkeys([*others, *known]), "model"))
    source = Source("torchvision", "torchvision.models.get_model", f'"{name}"')
    return Network(spec, lambda: torchvision.get_model(name, weights=None), source, IMAGES)


def _timm(spec: str, name: str) -> Network:
    timm = import_extra("timm", "timm")
    if not timm.is_model(name):
        raise SettingError(_unknown(name, timm.list_models(), "timm", "timm.list_models()"))
    source = Source("timm", "timm.create_model", f'"{name}"')
    return Network(spec, lambda: timm.create_model(name, pretrained=False), source, IMAGES)


def _hugging_face(spec: str, name: str) -> Network:
    transformers = import_extra("transformers", "hf")
    kinds = import_extra("transformers.models.auto.configuration_auto", "hf").CONFIG_MAPPING_NAMES
    if (Path(name) / "config.json").is_file():
        config, made = transformers.AutoConfig.from_pretrained(name, local_files_only=True), "from_pretrained"
    elif name in kinds:
        config, made = transformers.AutoConfig.for_model(name), "for_model"
    else:
        raise SettingError(
            f"{_unknown(name, kinds, 'transformers', 'CONFIG_MAPPING_NAMES')} hf: takes a kind of model, such as "
            "hf:gpt2, with the settings that its class has, or a folder with a config.json; nothing is downloaded."
        )
    transformers.logging.set_verbosity_error()  # it would tell of losses and first weights that nobody asked for
    auto = _language_model(transformers, config)
    function = f"transformers.{auto.__name__}.from_config"
    source = Source("transformers", function, f"transformers.AutoConfig.{made}({name!r})")
    network = Network(spec, lambda: auto.from_config(config), source)
    return replace(network, shape=default_shape(network.build()))


def _language_model(transformers: Any, config: Any) -> Any:
    """What makes the model that is trained: of text the language model, else the network without head."""
    own = transformers.MODEL_MAPPING.get(type(config), None)
    if getattr(own, "main_input_name", None) == IDS:
        kinds = import_extra("transformers.models.auto.modeling_auto", "hf")
        for task, auto in (
            ("SEQ_TO_SEQ_CAUSAL_LM", transformers.AutoModelForSeq2SeqLM),
            ("MASKED_LM", transformers.AutoModelForMaskedLM),
            ("CAUSAL_LM", transformers.AutoModelForCausalLM),
        ):
            if config.model_type in getattr(kinds, f"MODEL_FOR_{task}_MAPPING_NAMES"):
                return auto
    return transformers.AutoModel


def _unknown(name: str, known: Iterable[str], package: str, where: str) -> str:
    """The sentence for a name among very many: the nearest ones, and where all of them are."""
    close = difflib.get_close_matches(name, list(known), n=5, cutoff=0.5)
    hint = f" Did you mean: {', '.join(close)}?" if close else ""
    return f"unknown {package} model {name!r}.{hint} {where} has all names."


def _users(spec: str, module: str, name: str) -> Network:
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)  # as ``python -m`` does: the user's module lies beside them
    try:
        imported = importlib.import_module(module)
    except (ImportError, ValueError) as error:  # ValueError: an empty name
        raise SettingError(
            f"{spec} cannot be imported: {error}. A model is a name of Reversa's or torchvision's, torchvision:NAME, "
            "timm:NAME, hf:NAME, or module:factory with a module that can be imported from here."
        ) from error
    factory = getattr(imported, name, None)
    if not callable(factory):
        known = [key for key, value in vars(imported).items() if callable(value) and not key.startswith("_")]
        raise SettingError(nearest(name, known, f"function or class of {module}"))
    create: Any = factory
    return Network(spec, create, Source(module, f"{module}.{name}"))

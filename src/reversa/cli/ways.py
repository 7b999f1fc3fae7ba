"""The ways in which a network can be trained: stored, checkpointed, reversible."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from reversa.cli.specs import Network, network_named
from reversa.convert import convert
from reversa.errors import SettingError
from reversa.exact import check_exact
from reversa.memory.sweep import checkpointed
from reversa.schemes import Scheme
from reversa.train.config import ENGINES, make_scheme

Shape = tuple[int, ...]
Way = Callable[..., nn.Module]
"""Makes the model: ``way(shape, real=False, **settings of a network of reversa.models)``."""

REVNETS = {
    "resnet32": "revnet38",
    "resnet110": "revnet110",
    "resnet164": "revnet164",
    "resnet50": "revnet56",
    "resnet101": "revnet104",
}
"""The RevNets of about the same depth and parameters, which their authors compared with these networks."""


@dataclass(frozen=True)
class Asked:
    """The flags that make a network reversible, or change how."""

    scheme: str | None = None
    gamma: float | None = None
    h: float | None = None
    exact: bool = False
    engine: str | None = None

    def make_scheme(self) -> Scheme:
        """The scheme of a model that is converted: ``Momentum(0.9)`` where nothing else is said."""
        return make_scheme(self.scheme or "momentum", self.gamma, self.h)

    @property
    def chain_name(self) -> str:
        """Engine and arithmetic, in words."""
        return f"{ENGINES[self.engine or 'invert']()}{', exact' * self.exact}"

    @property
    def scheme_name(self) -> str:
        """Scheme and arithmetic, and the engine where one was asked for, in words."""
        scheme = self.make_scheme()
        numbers = [getattr(scheme, field.name) for field in fields(scheme)]  # pyright: ignore[reportArgumentType]
        inside = ", ".join(f"{number:g}" for number in numbers if isinstance(number, float))
        engine = f", {ENGINES[self.engine]()}" if self.engine else ""
        return f"{type(scheme).__name__}({inside}){', exact' * self.exact}{engine}"


def way_asked(network: Network, asked: Asked) -> Way:
    """The network as it is; converted, or with settings of its own, where any were asked for."""
    return partial(_as_it_is, network) if asked == Asked() else _reversible(network, asked)


def way_planned(network: Network, asked: Asked | None) -> Way:
    """The network as it is; converted, or with settings of its own, where anything was asked for, be it no flag."""
    return partial(_as_it_is, network) if asked is None else _reversible(network, asked)


def name_asked(network: Network, asked: Asked) -> str:
    """What :func:`way_asked` makes of the network, in words."""
    if asked == Asked():
        return "as it is"
    return asked.chain_name if network.reversible else asked.scheme_name


def pair(network: Network, asked: Asked) -> dict[str, Way]:
    """The network with stored activations, and the way that was asked for."""
    every = every_way(network, asked)
    name = asked.chain_name if network.reversible else asked.scheme_name
    return {key: way for key, way in every.items() if key in (next(iter(every)), name)}


def every_way(network: Network, asked: Asked) -> dict[str, Way]:
    """Stored activations first, then checkpointed, reversible, as a RevNet, and reversible in exact arithmetic.

    Not every network can be made in every way: which one cannot, only making it tells.

    Raises:
        SettingError: what was asked for does not go together.
    """
    inexact, exact = (replace(asked, exact=exact) for exact in (False, True))
    ways: dict[str, Way]
    if network.reversible:
        kept = [replace(inexact, engine=engine) for engine in ("store", "recompute")]
        ways = {one.chain_name: partial(_with_settings, network, one) for one in (*kept, inexact)}
    else:
        ways = {
            "plain": partial(_as_it_is, network),
            "checkpoint each block": partial(_checkpointed, network),
            inexact.scheme_name: _reversible(network, inexact),
        }
    ways |= _revnet(network, asked)
    if asked.exact or _can_be_exact(network, asked):
        ways[exact.chain_name if network.reversible else exact.scheme_name] = _reversible(network, exact)
    return ways


def _revnet(network: Network, asked: Asked) -> dict[str, Way]:
    """The RevNet beside a network of `reversa models`, where there is one of the same depth."""
    only = Asked(engine=asked.engine)
    if asked.scheme == "revnet":
        return {}
    if network.reversible:
        scheme = replace(only, scheme="revnet")
        return {scheme.scheme_name: _reversible(network, scheme)} if "scheme" in network.settings else {}
    if _has_trunk(network):
        return {"RevNet": _reversible(network, replace(only, scheme="revnet"))}
    if (name := REVNETS.get(network.spec)) is None:
        return {}
    other = replace(network_named(name), device=network.device)
    return {f"RevNet ({name})": partial(_of_pairs, other, only)}


def _of_pairs(network: Network, asked: Asked, shape: Shape, real: bool = False, **settings: Any) -> nn.Module:
    """A RevNet with as many residual functions as a ResNet of these settings: a block of its has two."""
    if "blocks" in settings:
        settings["blocks"] = tuple((blocks + 1) // 2 for blocks in settings["blocks"])
    return _with_settings(network, asked, shape, real, **settings)


def _reversible(network: Network, asked: Asked) -> Way:
    return partial(_converted if is_converted(network, asked) else _with_settings, network, asked)


def is_converted(network: Network, asked: Asked | None) -> bool:
    """Whether :func:`reversa.convert` makes it reversible, not a setting of its own."""
    return asked is not None and not network.reversible and not _has_trunk(network)


def _has_trunk(network: Network) -> bool:
    """A Vision Transformer of Reversa's own, whose trunk is reversible by a setting."""
    return not network.reversible and "trunk" in network.settings


def _can_be_exact(network: Network, asked: Asked) -> bool:
    if network.reversible and "scheme" not in network.settings:
        return "exact" in network.settings
    try:
        check_exact(asked.make_scheme(), True)
    except SettingError:
        return False
    return True


def _as_it_is(network: Network, shape: Shape, real: bool = False, **settings: Any) -> nn.Module:
    return network.build(real, **settings)


def _checkpointed(network: Network, shape: Shape, real: bool = False, **settings: Any) -> nn.Module:
    model = network.build(real, **settings)
    return checkpointed(model, example_of(network, model, shape))


def _converted(network: Network, asked: Asked, shape: Shape, real: bool = False, **settings: Any) -> nn.Module:
    model = network.build(real, **settings)
    engine = ENGINES[asked.engine]() if asked.engine else None
    return convert(
        model,
        scheme=asked.make_scheme(),
        exact=asked.exact or None,
        engine=engine,
        example=example_of(network, model, shape),
    )


def example_of(network: Network, model: nn.Module, shape: Shape) -> Any:
    """Inputs to find the blocks by; None for other packages' models, which tell by themselves what they take."""
    if network.spec.startswith(("timm:", "hf:")) or type(model).__module__.startswith("torchvision."):
        return None
    given = network.takes(model, shape)
    if isinstance(given, dict):
        return None
    if isinstance(given, torch.Tensor):
        return given
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    return torch.zeros(shape, dtype=like.dtype, device=like.device)


def _with_settings(network: Network, asked: Asked, shape: Shape, real: bool = False, **settings: Any) -> nn.Module:
    return network.build(real, **settings_asked(network, asked), **settings)


def settings_asked(network: Network, asked: Asked) -> dict[str, Any]:
    """The settings of a network of `reversa models` that the flags stand for.

    Raises:
        SettingError: it has no such setting.
    """
    given: dict[str, Any] = {"engine": ENGINES[asked.engine or "invert"]()}
    if _has_trunk(network):
        given["trunk"] = trunk = asked.scheme or "momentum"
        if trunk not in ("momentum", "revnet"):
            raise SettingError(f"{network.spec} has a trunk for --scheme momentum and for revnet, got {trunk}")
        asked = replace(asked, scheme=None)
    if "scheme" in network.settings:
        given["scheme"] = asked.make_scheme()
    elif asked.scheme is not None:
        raise SettingError(
            f"{network.spec} is reversible, by a scheme of its own; got --scheme {asked.scheme}: leave it out"
        )
    else:
        given |= {name: value for name in ("gamma", "h") if (value := getattr(asked, name)) is not None}
    if asked.exact:
        given["exact"] = True
    for name in given:
        if name not in network.settings:
            raise SettingError(f"{network.spec} has no setting {name}, got --{name}: leave it out")
    return given

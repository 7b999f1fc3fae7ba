"""The ways in which a network can be trained, which ``reversa memory`` compares: stored, checkpointed, reversible."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from reversa.cli.specs import Network
from reversa.convert import convert
from reversa.errors import SettingError
from reversa.exact import check_exact
from reversa.memory.sweep import checkpointed
from reversa.schemes import Scheme
from reversa.train.config import ENGINES, make_scheme

Shape = tuple[int, ...]
Way = Callable[..., nn.Module]
"""Makes the model: ``way(shape, real=False, **settings of a network of reversa.models)``."""


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
    if asked == Asked():
        return partial(_as_it_is, network)
    return partial(_with_settings if network.reversible else _converted, network, asked)


def pair(network: Network, asked: Asked) -> dict[str, Way]:
    """The network with stored activations, and the way that was asked for."""
    every = every_way(network, asked)
    name = asked.chain_name if network.reversible else asked.scheme_name
    return {key: way for key, way in every.items() if key in (next(iter(every)), name)}


def every_way(network: Network, asked: Asked) -> dict[str, Way]:
    """The network with stored activations first, then checkpointed, reversible, and reversible in exact arithmetic.

    Raises:
        SettingError: what was asked for does not go together.
    """
    arithmetics = [replace(asked, exact=False)]
    if asked.exact or _can_be_exact(network, asked):
        arithmetics.append(replace(asked, exact=True))
    if network.reversible:
        stored, recomputed = (replace(asked, engine=engine, exact=False) for engine in ("store", "recompute"))
        return {one.chain_name: partial(_with_settings, network, one) for one in (stored, recomputed, *arithmetics)}
    plain: dict[str, Way] = {
        "plain": partial(_as_it_is, network),
        "checkpoint each block": partial(_checkpointed, network),
    }
    return plain | {one.scheme_name: partial(_converted, network, one) for one in arithmetics}


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
    return checkpointed(model, _example(network, model, shape))


def _converted(network: Network, asked: Asked, shape: Shape, real: bool = False, **settings: Any) -> nn.Module:
    model = network.build(real, **settings)
    engine = ENGINES[asked.engine]() if asked.engine else None
    return convert(
        model,
        scheme=asked.make_scheme(),
        exact=asked.exact,
        engine=engine,
        example=_example(network, model, shape),
    )


def _example(network: Network, model: nn.Module, shape: Shape) -> Any:
    """Other packages' models tell by themselves which inputs they take."""
    if network.spec.startswith(("timm:", "hf:")) or type(model).__module__.startswith("torchvision."):
        return None
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    return torch.zeros(shape, dtype=like.dtype, device=like.device)


def _with_settings(network: Network, asked: Asked, shape: Shape, real: bool = False, **settings: Any) -> nn.Module:
    given: dict[str, Any] = {"engine": ENGINES[asked.engine or "invert"]()}
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
    return network.build(real, **given, **settings)

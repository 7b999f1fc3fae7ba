"""Networks built from reversible sequences, and the one table of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from reversa.errors import SettingError, nearest
from reversa.models.small import ReversibleResNet

# Read by the tests, the docs and the command line: a new network is one file and one line here.
MODELS: dict[str, Callable[..., nn.Module]] = {
    "reversibleresnet": ReversibleResNet,
}


def names() -> list[str]:
    """The names that :func:`create` knows.

    >>> "reversibleresnet" in names()
    True
    """
    return sorted(MODELS)


def create(name: str, num_classes: int = 10, **settings: Any) -> nn.Module:
    """A network by name, with fresh parameters.

    Args:
        name: one of :func:`names`.
        num_classes: width of the output layer.
        settings: the network's own settings, for instance ``depth=54``.

    Raises:
        SettingError: no network has that name, or it has no such setting; the message lists the nearest ones.

    >>> net = create("reversibleresnet", num_classes=10, depth=6, width=8)
    >>> len(net.chains)
    3
    """
    if name not in MODELS:
        raise SettingError(nearest(name, names(), "model"))
    build = MODELS[name]
    known = [setting for setting in inspect.signature(build).parameters if setting != "num_classes"]
    for setting in settings:
        if setting not in known:
            raise SettingError(nearest(setting, known, f"setting of {name}"))
    return build(num_classes=num_classes, **settings)


__all__ = ["MODELS", "ReversibleResNet", "create", "names"]

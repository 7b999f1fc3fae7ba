"""A module outside of chains whose activations are not stored: recomputed, or kept in the host's memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import partial
from typing import Any

from torch import nn
from torch.autograd.graph import save_on_cpu

from reversa.engine.policies import Engine, Offload, Recompute, Store, checkpointed
from reversa.engine.steps import is_recording
from reversa.errors import SettingError


class _Under(ABC):
    """What stands in the place of a module's ``forward``. It can be copied and pickled with the module."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forward = partial(type(self.module).forward, self.module)
        return self._run(forward, args, kwargs) if is_recording() else forward(*args, **kwargs)

    @abstractmethod
    def _run(self, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any: ...


class _Recomputed(_Under):
    def _run(self, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return checkpointed(partial(forward, **kwargs), args, [self.module], type(self.module).__name__)


class _Offloaded(_Under):
    def _run(self, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with save_on_cpu():
            return forward(*args, **kwargs)


def put_under(module: nn.Module, engine: Engine) -> None:
    """Let a module that is no part of a chain keep its activations as an engine says.

    The numbers stay the same: statistics of normalisation layers move once, random numbers are drawn once.

    Args:
        module: any module; what was put over it before is taken away.
        engine: ``Store()``, ``Recompute()`` (its input is stored) or ``Offload()``.

    Raises:
        SettingError: another engine; or something else has replaced this instance's ``forward``.

    >>> import torch
    >>> layer = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    >>> put_under(layer, Recompute())
    >>> layer(torch.randn(2, 4)).sum().backward()
    >>> put_under(layer, Store())
    """
    name, there = type(module).__name__, module.__dict__.get("forward")
    if there is not None and not isinstance(there, _Under):
        raise SettingError(f"{name} has a forward of its own, set by another library: make the plan before that")
    if isinstance(engine, Store):
        module.__dict__.pop("forward", None)
    elif isinstance(engine, (Recompute, Offload)):
        module.__dict__["forward"] = (_Recomputed if isinstance(engine, Recompute) else _Offloaded)(module)
    else:
        raise SettingError(f"{name} is no part of a reversible chain: use Store(), Recompute() or Offload()")

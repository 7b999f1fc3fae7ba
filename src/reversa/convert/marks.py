"""How a switched module is told from others, and how it gets its own class back."""

from __future__ import annotations

from torch import nn

from reversa.convert.stage import Place

PLACE = "_reversa"
ORIGINAL = "_reversa_original"


def is_switched(module: nn.Module) -> bool:
    """Whether the module's class is one of ours."""
    return ORIGINAL in vars(type(module))


def place_of(module: nn.Module) -> Place | None:
    """Where a converted block stands; None for every other module."""
    return module.__dict__.get(PLACE)


def switch_back(module: nn.Module) -> None:
    """Give a switched module its own class back; others are left."""
    if is_switched(module):
        module.__class__ = vars(type(module))[ORIGINAL]
        module.__dict__.pop(PLACE, None)

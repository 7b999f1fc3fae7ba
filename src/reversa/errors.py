"""Everything that Reversa raises, and the one way to import an optional package.

A message says what was needed, what came, and what to do about it.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType


class ReversaError(RuntimeError):
    """Base class of every error that Reversa raises on purpose."""


class SettingError(ReversaError, ValueError):
    """A setting outside its range, or an unknown name."""


class BudgetError(SettingError):
    """No plan fits into the memory that was allowed.

    Attributes:
        least_bytes: what the plan of least memory takes.
    """

    def __init__(self, message: str, least_bytes: int) -> None:
        super().__init__(message)
        self.least_bytes = least_bytes

    def __reduce__(self) -> tuple[type[BudgetError], tuple[str, int]]:
        return type(self), (str(self), self.least_bytes)


class BlockError(ReversaError):
    """A residual function cannot stand in a reversible step: its output changes shape or dtype, is missing, ..."""


class StateError(ReversaError):
    """A state that a scheme cannot carry: streams of unequal shape, an odd dimension, a value that is not finite."""


class StateChanged(ReversaError):
    """A converted block was not given the tensor that the block before it returned."""


class ReplayError(ReversaError):
    """The backward pass cannot see what the forward pass saw; raised instead of giving a wrong gradient."""


class DriftError(ReversaError):
    """Float arithmetic would lose too many digits on the way back."""


class ConversionWarning(UserWarning):
    """A converted model leaves out something that was asked for, because its stages do without."""


class DriftWarning(UserWarning):
    """Float arithmetic will lose a noticeable part of the gradient's digits on the way back."""


class ConversionError(ReversaError):
    """A model, or the stage that was named, cannot be converted."""


class CheckpointError(ReversaError):
    """A checkpoint file is damaged, cut short or of another kind."""


class OutputError(ReversaError):
    """A folder or file cannot be written."""


class MissingExtra(ReversaError, ImportError):
    """An optional package is needed that is not installed."""


MANY_NAMES = 20


def nearest(name: str, known: Iterable[str], what: str) -> str:
    """The sentence for an unknown name: the names nearest to it, and all of them where they are few or none is near.

    >>> nearest("momentun", ["momentum", "revnet"], "scheme")
    "unknown scheme 'momentun'. Did you mean: momentum? Known: momentum, revnet."
    """
    known = list(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f" Did you mean: {', '.join(close)}?" if close else ""
    if close and len(known) > MANY_NAMES:
        return f"unknown {what} {name!r}.{hint} {len(known)} are known."
    return f"unknown {what} {name!r}.{hint} Known: {', '.join(known) or 'none'}."


def import_extra(module: str, extra: str) -> ModuleType:
    """Import an optional package late; where it is missing or broken, name the extra that brings it.

    Raises:
        MissingExtra: the module cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError) as error:  # torchvision beside a mismatched torch raises RuntimeError
        raise MissingExtra(
            f"{module} is needed here and could not be imported ({type(error).__name__}: {error}).\n"
            f"Install it with: pip install 'reversa[{extra}]'"
        ) from error

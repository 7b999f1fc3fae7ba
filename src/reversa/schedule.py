"""Schemes that change while a model is trained."""

from __future__ import annotations

from torch import nn

from reversa.check.trace import chains
from reversa.errors import SettingError
from reversa.exact import check_exact
from reversa.schemes import Scheme


def set_scheme(model: nn.Module, scheme: Scheme) -> None:
    """Give every reversible chain of a model another scheme of the same kind, built or converted.

    The forward passes from now on follow it; a backward pass that is still to come goes back by the one that its
    forward pass had.

    Args:
        model: a model with :class:`reversa.ReversibleSequence` modules, or one that :func:`reversa.convert` was given.
        scheme: the new one, for instance ``Dr2Net(0.3, 0.7).at(0.5)``.

    Raises:
        SettingError: the model has no chain, or one of another kind of scheme.

    >>> import torch, reversa
    >>> seq = reversa.ReversibleSequence([torch.nn.Linear(4, 4)], reversa.Dr2Net(1, 0))
    >>> set_scheme(seq, reversa.Dr2Net(0.3, 0.7))
    >>> seq.scheme
    Dr2Net(alpha=0.3, beta=0.7)
    """
    found = [holder for _, holder, _ in chains(model)]
    if not found:
        raise SettingError(
            "the model has no reversible chain: give it a ReversibleSequence, or call reversa.convert first"
        )
    kinds = {type(holder.scheme) for holder in found}
    if kinds != {type(scheme)}:
        names = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise SettingError(
            f"{scheme} cannot take the place of {names}: a chain keeps the kind of scheme that it was built with. "
            f"Build or convert the model with {type(scheme).__name__} first (reversa.restore undoes a conversion)."
        )
    if scheme.modules():
        raise SettingError(
            f"{scheme} has parameters of its own, which an optimizer does not know: build the model anew"
        )
    for holder in found:
        check_exact(scheme, holder.exact)
    for holder in found:
        holder.scheme = scheme

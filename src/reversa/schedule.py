"""Schemes that change while a model is trained."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from reversa.check.trace import Holder, chains
from reversa.errors import SettingError, nearest
from reversa.exact import check_exact
from reversa.schemes import Dr2Net, Momentum, RevNet, Scheme
from reversa.schemes.coupling import Duplicated

Annealed = Dr2Net | Momentum


def set_scheme(model: nn.Module, scheme: Scheme | Mapping[str, Scheme]) -> None:
    """Give every reversible chain of a model another scheme of the same kind, built or converted.

    The forward passes from now on follow it; a backward pass that is still to come goes back by the one that its
    forward pass had.

    Args:
        model: a model with :class:`reversa.ReversibleSequence` modules, or one that :func:`reversa.convert` was given.
        scheme: the new one, for instance ``Dr2Net(0.3, 0.7).at(0.5)``; or one for each chain that changes, by its name:
            a stage's, as :func:`reversa.explain` shows it, or the path of a sequence.

    Raises:
        SettingError: the model has no chain, none of that name, or one of another kind of scheme.

    >>> import torch, reversa
    >>> seq = reversa.ReversibleSequence([torch.nn.Linear(4, 4)], reversa.Dr2Net(1, 0))
    >>> set_scheme(seq, reversa.Dr2Net(0.3, 0.7))
    >>> seq.scheme
    Dr2Net(alpha=0.3, beta=0.7)
    """
    found = [(name, holder) for name, holder, _ in chains(model)]
    if not found:
        raise SettingError(
            "the model has no reversible chain: give it a ReversibleSequence, or call reversa.convert first"
        )
    pairs = [(holder, scheme) for _, holder in found] if isinstance(scheme, Scheme) else _by_name(found, scheme)
    pairs = [(holder, _like(holder, new)) for holder, new in pairs]
    for holder, new in pairs:
        _check(holder, new)
    for holder, new in pairs:
        holder.scheme = new


def _by_name(found: list[tuple[str, Holder]], scheme: Mapping[str, Scheme]) -> list[tuple[Holder, Scheme]]:
    if not isinstance(scheme, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise SettingError(f"set_scheme needs a scheme, or a mapping from names of chains to schemes, got {scheme!r}")
    names = [name for name, _ in found]
    for name in scheme:
        if name not in names:
            raise SettingError(nearest(name, names, "chain"))
        if names.count(name) > 1:
            raise SettingError(
                f"{names.count(name)} chains of the model are called {name!r}: call set_scheme on the part"
            )
    return [(holder, scheme[name]) for name, holder in found if name in scheme]


def _like(holder: Holder, scheme: Scheme) -> Scheme:
    """RevNet on two copies of the carried tensor, where conversion has put that in its place."""
    return holder.scheme if isinstance(scheme, RevNet) and isinstance(holder.scheme, Duplicated) else scheme


def _check(holder: Holder, scheme: Scheme) -> None:
    if type(holder.scheme) is not type(scheme):
        name = type(holder.scheme).__name__
        raise SettingError(
            f"{scheme} cannot take the place of {name}: a chain keeps the kind of scheme that it was built with. "
            f"Build or convert the model with {type(scheme).__name__} first (reversa.restore undoes a conversion)."
        )
    if scheme.modules() != holder.scheme.modules():
        raise SettingError(
            f"{scheme} has parameters of its own, which an optimizer does not know: build the model anew"
        )
    check_exact(scheme, holder.exact)


class Annealing:
    r"""From a network near the one that was pretrained to a reversible one, in equal parts over the first steps.

    .. math:: p_t = \min(1, t / \mathrm{steps})

    The scheme of step t is ``scheme.at(p_t)``: :meth:`reversa.Momentum.at` (from gamma = 0.01, near which a float chain
    keeps a state every two steps: use ``exact=True``), :meth:`reversa.Dr2Net.at` (from the original network). Where a
    run is taken up again, it follows from the number of optimiser steps.

    Args:
        scheme: where it ends; or for each chain, by its name as in :func:`set_scheme`.
        steps: optimiser steps until then.

    Raises:
        SettingError: fewer than one step, or another kind of scheme.

    >>> import torch, reversa
    >>> seq = reversa.ReversibleSequence([torch.nn.Linear(4, 4)], reversa.Momentum(0.01))
    >>> annealing = Annealing(reversa.Momentum(0.9), steps=100)
    >>> for step in range(100):  # the training loop
    ...     annealing.apply(seq, step)
    >>> round(seq.scheme.gamma, 2)
    0.89
    """

    def __init__(self, scheme: Annealed | Mapping[str, Annealed], steps: int) -> None:
        for each in scheme.values() if isinstance(scheme, Mapping) else [scheme]:
            if not isinstance(each, (Dr2Net, Momentum)):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise SettingError(f"annealing needs a Momentum or a Dr2Net, got {each!r}")
        if not isinstance(steps, int) or steps < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise SettingError(f"annealing needs a number of steps, at least 1, got {steps!r}")
        self.scheme, self.steps = scheme, steps

    def apply(self, model: nn.Module, step: int) -> None:
        """Give the model the scheme of an optimiser step.

        Raises:
            SettingError: as :func:`set_scheme` does.
        """
        progress = min(1.0, step / self.steps)
        if isinstance(self.scheme, Mapping):
            set_scheme(model, {name: each.at(progress) for name, each in self.scheme.items()})
        else:
            set_scheme(model, self.scheme.at(progress))

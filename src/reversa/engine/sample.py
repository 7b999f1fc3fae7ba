"""What drift there really was: a few elements of some arguments of a chain, compared with what came back."""

from __future__ import annotations

import math
import warnings
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from reversa.errors import DriftError, DriftWarning
from reversa.schemes import State

FEWEST, MOST, SHARE = 16, 1024, 1 << 10
"""A thousandth of the elements, about. Drift is everywhere, so that a sample shows it."""
WARN_ABOVE, REFUSE_ABOVE = 3e-4, 1e-2
SECOND = 16
"""Steps from the first sample to the second; after that eight times as many as before."""


class Samples:
    """Samples of a chain's arguments: of the first one that a backward pass comes back to, and of the 16th, 128th,
    1024th ... after it, for a backward pass that does not go so far.

    Args:
        tolerance: the error that is planned with (:func:`reversa.engine.drift.tolerance`); None in exact arithmetic,
            where every bit comes back.
    """

    def __init__(self, tolerance: float | None) -> None:
        self.tolerance = tolerance
        self._samples: dict[int, Sample] = {}
        self._next = 0

    def note(self, argument: Tensor, state: State, step: int) -> None:
        """Keep some of a step's argument, if it is one of those steps."""
        if not self._samples:
            self._next = step
        if step == self._next:
            self._samples[step] = Sample(argument, state, self.tolerance)
            first = min(self._samples)
            self._next = first + max(SECOND, 8 * (step - first))

    def __contains__(self, step: int) -> bool:
        return step in self._samples

    def compare(self, argument: Tensor, step: int, where: object) -> None:
        """Judge what came back in the argument's place.

        Raises:
            DriftError: it is another one by 1 % or more, in 16 bits by more; in exact arithmetic by a bit.
        """
        self._samples[step].compare(argument, where)


class Sample:
    """Elements of a tensor, spread over all of its dimensions.

    A scheme's drift law knows how errors grow in the scheme; how they grow in the residual functions, nobody knows
    before. A network whose states change much from step to step loses all digits under any scheme.

    Args:
        argument: what a residual function of a chain is evaluated at.
        state: the state that it is part of, whose size is the measure: a stream can begin with zeros.
        tolerance: the error that is planned with (:func:`reversa.engine.drift.tolerance`); None for none.
    """

    def __init__(self, argument: Tensor, state: State, tolerance: float | None) -> None:
        self.tolerance = tolerance
        self.places = _places(argument.shape)
        self.elements = argument.detach()[self.places].clone()
        if tolerance is not None:
            self.scale = torch.stack([_norm(stream.detach()[self.places]) for stream in state]).max()

    def compare(self, argument: Tensor, where: object) -> None:
        """Judge what came back in its place.

        Raises:
            DriftError: it is another one by 1 % or more, in 16 bits by more; in exact arithmetic by a bit.
        """
        if self.tolerance is None:
            self._compare_bits(argument, where)
            return
        error = self._error(argument)
        if not error > max(WARN_ABOVE, 4 * self.tolerance):
            return
        message = (
            f"the input recovered for {where} differs from what it was by {error:.0e} of its size, and gradients with "
            "it: the residual functions multiply rounding errors from step to step, or compute something else in the "
            "backward pass (reversa.check tells which). Against the first: exact=True, which does not drift; "
            "Invert(anchors=k), which keeps a state every k steps; a smaller step size, smaller weights, or float64."
        )
        if error > max(REFUSE_ABOVE, 40 * self.tolerance):
            raise DriftError(f"{message} To go on all the same: Invert(accept_drift=True).")
        warnings.warn(message, DriftWarning, stacklevel=2)

    def _compare_bits(self, argument: Tensor, where: object) -> None:
        if isinstance(argument, FakeTensor) or argument.is_meta:
            return
        found = argument.detach()[self.places]
        if not torch.allclose(found, self.elements, rtol=0, atol=0, equal_nan=True):
            raise DriftError(
                f"the input recovered for {where} has not the bits that it had: a residual function computed something "
                "else in the backward pass than in the forward pass. What it reads may have been switched in between "
                "(an adapter, a flag, a counter), it draws random numbers that PyTorch's generators do not know, or "
                "its operations differ from call to call. reversa.check tells which step; engine=Store() recovers none."
            )

    def _error(self, argument: Tensor) -> float:
        if isinstance(argument, FakeTensor) or argument.is_meta:
            return 0.0
        scale = self.scale.item()
        return _norm(argument.detach()[self.places] - self.elements).item() / scale if scale else 0.0


def _norm(x: Tensor) -> Tensor:
    return cast(Any, torch.linalg).vector_norm(x)


@lru_cache(maxsize=64)
def _places(shape: torch.Size) -> tuple[slice, ...]:
    """Where some elements are, spread over all dimensions: slices, so that no layout has to be copied as a whole."""
    steps = [1] * len(shape)
    numel = shape.numel()
    ratio = numel / min(MOST, max(FEWEST, numel // SHARE))
    smallest_first = sorted(range(len(shape)), key=shape.__getitem__)
    for done, dim in enumerate(smallest_first):
        steps[dim] = max(1, min(shape[dim], math.ceil(ratio ** (1 / (len(shape) - done)))))
        ratio /= steps[dim]
    return tuple(slice(None, None, step) for step in steps)

"""Schemes turn residual functions into steps that can be undone. They hold formulas and nothing else.

stream     one of the tensors that a step carries; all streams of a state have one shape
state      the tuple of streams, e.g. ``(x, v)``
residual   the learned function ``f`` inside a block; evaluated in both directions, inverted in neither
step       one use of a scheme with one evaluation of one ``f``; steps of a chain are numbered from 0
argument   the tensor that a step hands to ``f``
value      what ``f`` returned for it
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor, nn

from reversa.errors import SettingError, StateError

State: TypeAlias = tuple[Tensor, ...]
Residual: TypeAlias = Callable[[Tensor], Tensor]


class Scheme(ABC):
    """One invertible step on a tuple of equally shaped tensors: formulas, no autograd, no parameters.

    A step is written down once forwards (:meth:`argument`, :meth:`forward`) and once backwards
    (:meth:`uncover`, :meth:`inverse`). The two halves of each are separate because whoever runs the
    scheme (an engine) evaluates ``f`` in between, exactly once in each direction.

    Every operation must be differentiable by autograd.
    """

    source: ClassVar[str]
    """Where the formula was published."""

    functions_per_block: ClassVar[int] = 1
    """Residual functions in one block: 2 for a RevNet block ``(F, G)``."""

    num_streams: ClassVar[int] = 2

    carries_input: ClassVar[bool] = False
    """The state begins with the whole input, and the output is the state's first stream (what conversion needs)."""

    exact: ClassVar[bool] = False
    """Computed in integers: every bit comes back (:mod:`reversa.exact`)."""

    multiplies: ClassVar[bool] = False
    """:meth:`forward` multiplies streams with each other, so that autograd saves them: an engine that keeps no states
    computes them back as well. All other schemes save nothing of the state's size: additions, multiplications by Python
    numbers or by one number for each sample, ``lerp`` with a Python weight.
    """

    ends_otherwise: ClassVar[bool] = False
    """The last step of a run is another one, and no loop may leave it out."""

    random: bool = False
    """:meth:`begun` draws random numbers in training."""

    @property
    def amplification(self) -> float:
        """By how much one inverse step multiplies a rounding error: ``1 / |b|`` in the two-register form."""
        return 1.0

    @property
    def lossless(self) -> bool:
        """No information is lost in a step: true exactly when errors are not amplified."""
        return self.amplification == 1

    def drift(self, steps: int, eps: float) -> float:
        """The drift law: relative error of a state recovered through ``steps`` inverse steps, to an order of magnitude.

        ``eps * amplification**steps``; ``eps * sqrt(steps)`` where nothing is amplified and errors add up at random.

        Args:
            steps: number of consecutive inverted steps.
            eps: relative rounding error of one step (of the state's data type, or of ``f``'s if that is coarser).
        """
        try:
            return eps * (math.sqrt(steps) if self.lossless else self.amplification**steps)
        except OverflowError:
            return math.inf

    def spilled_bytes(self, steps: int) -> int:
        """How many bytes for each element the state has grown by after so many steps: none, but in exact arithmetic."""
        return 0

    def element_bytes(self, dtype: torch.dtype) -> int:
        """Bytes that a kept state takes for one element of one stream."""
        return dtype.itemsize

    def told(self, state: State) -> State:
        """The part of a state in which two states are compared."""
        return state

    def resumed(self, x: Tensor, state: State, step: int) -> tuple[State, int]:
        """The state in which somebody put another tensor in the place of the output before a step, and that step's
        number from now on.
        """
        return (x, *state[1:]), step

    def modules(self) -> tuple[nn.Module, ...]:
        """Learned modules that open the state (whoever holds the scheme registers them)."""
        return ()

    def begun(self, x: Tensor, steps: int | None, training: bool) -> Scheme:
        """The scheme of one run: with its random numbers drawn where it has any, and knowing how many steps come.

        Args:
            x: the input.
            steps: number of steps of the run, where it is known.
            training: whether the residual functions are in training mode.
        """
        return self

    @abstractmethod
    def open(self, x: Tensor) -> State:
        """The state before the first step, from the input."""

    @abstractmethod
    def close(self, state: State) -> Tensor:
        """The output, from the state after the last step."""

    @abstractmethod
    def argument(self, state: State, step: int) -> Tensor:
        """What ``f`` is evaluated at, from the state before the step."""

    @abstractmethod
    def forward(self, state: State, value: Tensor, step: int) -> State:
        """The state after the step."""

    @abstractmethod
    def uncover(self, state: State, step: int) -> tuple[Tensor, State]:
        """What ``f`` was evaluated at, from the state *after* the step, and what :meth:`inverse` still needs.

        Streams that are not needed any more are left out, so that their memory is free while ``f`` runs.
        """

    def search(self, state: State, step: int, f: Residual) -> tuple[Tensor, State]:
        """:meth:`uncover` for a scheme that has to evaluate ``f`` for it, as often as it takes."""
        return self.uncover(state, step)

    @abstractmethod
    def inverse(self, argument: Tensor, rest: State, value: Tensor, step: int) -> State:
        """The state before the step, from :meth:`uncover`'s result and the value of ``f`` there."""


def added(stream: Tensor, value: Tensor, weight: float | Tensor) -> Tensor:
    """``stream + weight * value`` in one kernel; as plain sums for numbers, of which exact arithmetic makes formulas,
    for nested tensors, and for a weight of its own for each sample.
    """
    if isinstance(weight, Tensor) or not isinstance(stream, Tensor) or stream.is_nested:  # pyright: ignore[reportUnnecessaryIsInstance]
        return stream + weight * value
    if weight in (0, 1):
        return stream + value if weight else stream
    return torch.add(stream, value, alpha=weight)


def times(stream: Tensor, weight: float | Tensor) -> Tensor:
    """``weight * stream``; the stream itself for 1."""
    return stream if isinstance(weight, (int, float)) and weight == 1 else weight * stream


def halves(x: Tensor, dim: int, name: str) -> State:
    """The two halves of x along a dimension.

    They are copies, so that a stream has the same layout before its first step and ever after: compiled code relies on
    it.

    Raises:
        StateError: x has no such dimension, or its size is odd.
    """
    if not -x.dim() <= dim < x.dim():
        raise StateError(
            f"{name}(dim={dim}) splits x along a dimension that it does not have: x has shape {tuple(x.shape)}. "
            "Choose another dim."
        )
    if x.shape[dim] % 2:
        raise StateError(
            f"{name}(dim={dim}) splits x into two equal streams, but dimension {dim} of {tuple(x.shape)} is odd. "
            "Choose an even width, or another dim."
        )
    one, two = x.chunk(2, dim)
    return one.clone(), two.clone()


def at_rest(x: Tensor) -> Tensor:
    """A stream of zeros like x, seen through strides of 0: it takes no memory before the first step."""
    if x.is_nested:  # which has no shape to expand to
        return torch.zeros_like(x)
    return torch.zeros((), dtype=x.dtype, device=x.device).expand(x.shape)


def check_step_size(h: float) -> None:
    """Refuse a step size that is not a positive number.

    Raises:
        SettingError: it is not.
    """
    if not (isinstance(h, (int, float)) and 0 < h < math.inf):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise SettingError(f"the step size h must be a positive number, got {h!r}. Deep networks want 0.1 or less.")


def run(scheme: Scheme, residuals: Sequence[Residual], state: State) -> State:
    """Every step in turn, plainly: the definition that engines are compared with.

    >>> import torch
    >>> from reversa.schemes import Momentum, round_trip
    >>> state = Momentum(0.9).open(torch.ones(2, 3))
    >>> [tuple(stream.shape) for stream in run(Momentum(0.9), [torch.tanh] * 4, state)]
    [(2, 3), (2, 3)]
    """
    for step, f in enumerate(residuals):
        state = scheme.forward(state, f(scheme.argument(state, step)), step)
    return state


def run_back(scheme: Scheme, residuals: Sequence[Residual], state: State) -> State:
    """The inverse of :func:`run`: every step undone, last first."""
    for step in reversed(range(len(residuals))):
        argument, rest = scheme.search(state, step, residuals[step])
        state = scheme.inverse(argument, rest, residuals[step](argument), step)
    return state


def round_trip(scheme: Scheme, residuals: Sequence[Residual], state: State) -> float:
    """Largest absolute error of a state after :func:`run` and :func:`run_back`.

    >>> import torch
    >>> from reversa.schemes import Momentum
    >>> state = Momentum(0.9).open(torch.ones(2, 3, dtype=torch.float64))
    >>> round_trip(Momentum(0.9), [torch.tanh] * 50, state) < 1e-12
    True
    """
    back = run_back(scheme, residuals, run(scheme, residuals, state))
    return max(float((a - b).abs().max()) for a, b in zip(back, state, strict=True))

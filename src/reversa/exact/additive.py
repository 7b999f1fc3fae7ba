"""Schemes that lose no information, in integers: their own sums, modulo the integers' range."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple, cast

from torch import Tensor

from reversa.errors import SettingError
from reversa.exact.base import ExactScheme, empty
from reversa.exact.compiled import kernel
from reversa.exact.fixed import FixedPoint
from reversa.exact.joined import joined
from reversa.exact.kernels import combined, decreased, moved, real, separated
from reversa.exact.watch import Linear, Range, refuse_beyond
from reversa.schemes import Scheme, State

Matrix = tuple[tuple[int, int], tuple[int, int]]


class _Form(NamedTuple):
    """One step as a linear map with an inverse, and which stream ``f`` reads."""

    linear: Linear
    matrix: Matrix
    back: Matrix
    argument: int

    @property
    def moved(self) -> list[int]:
        """The streams that a step does not hand on as they are."""
        rows = zip(self.matrix, self.linear.weights, strict=True)
        return [i for i, (row, weight) in enumerate(rows) if weight or sorted(row) != [0, 1]]


class Additive(ExactScheme):
    """A scheme of two streams without loss, such as RevNet: integers are added where the formula adds real numbers.

    Sums modulo ``2**bits`` can always be undone, so nothing is spilled and no storage is needed.

    Raises:
        SettingError: the scheme is not a sum of its streams with whole weights.
    """

    def __init__(self, scheme: Scheme, fixed: FixedPoint) -> None:
        scale = 2.0**fixed.fraction
        super().__init__(scheme, (scale,) * scheme.num_streams, fixed.dtype)
        self.fixed = fixed
        if scheme.num_streams != 2 or not scheme.lossless:
            raise SettingError(f"{scheme} has no exact arithmetic: it is not a sum of two streams with whole weights")
        self.range = Range(fixed.bits, ("the state", "the state", "what f returned"), (self._remedy(),) * 3)
        self._forms: dict[int, _Form] = {}
        self._moved = kernel(moved, fixed.compile)
        self._separated = kernel(separated, fixed.compile)
        self._decreased = kernel(decreased, fixed.compile)

    @property
    def arithmetic(self) -> FixedPoint:
        return self.fixed

    def spilled_bytes(self, steps: int) -> int:
        return 0

    def argument(self, state: State, step: int) -> Tensor:
        i = self._form(step).argument
        carrier, integer = state[i], state[2 + i]
        if carrier.shape == integer.shape:
            return carrier
        return real(integer, 1 / self.scales[i], carrier.dtype)

    def forward(self, state: State, value: Tensor, step: int) -> State:
        carriers, integers, _ = self.split(state)
        form, f = self._form(step), value.detach()
        X, Y = integers
        made = {
            i: self._moved(X, Y, form.matrix[i], f, form.linear.weights[i] * self.scales[i], 1 / self.scales[i])
            for i in form.moved
        }
        new = tuple(made[i][0] if i in made else combined(integers, form.matrix[i]) for i in range(2))
        if self.fixed.watch:
            limits = (self.fixed.limit, self.fixed.limit, self.fixed.limit / max(1.0, *map(abs, form.linear.weights)))
            self.range.see(step, form.linear, limits, integers, new, f, partial(self._after, state, f, step))
        rows = tuple((*map(float, form.matrix[i]), form.linear.weights[i]) for i in made)
        joint = dict(zip(made, joined(tuple(real for _, real in made.values()), rows, *carriers, value), strict=True))
        return (*(joint[i] if i in joint else combined(carriers, form.matrix[i]) for i in range(2)), *new)

    def _after(self, state: State, value: Tensor, step: int, i: int) -> Tensor:
        """A stream after a step as a sum of real numbers, which tells where the integers have wrapped around."""
        row, weight = self._form(step).matrix[i], self._form(step).linear.weights[i]
        x, y = self.streams(state, step)
        return row[0] * x + row[1] * y + weight * value

    def uncover(self, state: State, step: int) -> tuple[Tensor, State]:
        self.range.settle()
        carriers, integers, _ = self.split(state)
        form, (X, Y) = self._form(step), integers
        unit = 1 / self.scales[form.argument]
        return self._separated(X, Y, form.back[form.argument], unit, carriers[0].dtype), integers

    def inverse(self, argument: Tensor, rest: State, value: Tensor, step: int) -> State:
        form, f = self._form(step), value.detach()
        before = tuple(
            self._decreased(integer, f, weight * scale) if weight else integer
            for integer, weight, scale in zip(rest, form.linear.weights, self.scales, strict=True)
        )
        hollow = empty(argument)
        return (
            *(argument if i == form.argument else hollow for i in range(2)),
            *(combined(before, row) for row in form.back),
        )

    def streams(self, state: State, step: int) -> State:
        carriers, integers, _ = self.split(state)
        return tuple(real(i, 1 / s, carriers[0].dtype) for i, s in zip(integers, self.scales, strict=True))

    def _resumes_at(self, step: int) -> int:
        return step

    def _integer(self, i: int, stream: Tensor) -> Tensor:
        if self.fixed.watch:
            refuse_beyond("the input", stream, self.fixed.limit, 0, self.fixed.bits, self._remedy())
        return self.fixed.integer(stream, self.scales[i])

    def _form(self, step: int) -> _Form:
        if step not in self._forms:
            self._forms[step] = _form(self.scheme, step)
        return self._forms[step]

    def _remedy(self) -> str:
        fixed = self.fixed
        more = ", or more bits" if fixed.bits < 64 else ""
        radix = max(1, fixed.fraction - 4)
        return f"Use FixedPoint(bits={fixed.bits}, radix={radix}), which holds 16 times as much{more}."


def _form(scheme: Scheme, step: int) -> _Form:
    """The formula, run on numbers."""
    run = cast(Any, scheme.forward)
    columns = [run(unit, value, step) for unit, value in (((1, 0), 0.0), ((0, 1), 0.0), ((0, 0), 1.0))]
    (a, b), (c, d) = matrix = cast(Matrix, tuple((int(columns[0][i]), int(columns[1][i])) for i in range(2)))
    det = a * d - b * c
    if abs(det) != 1:
        raise SettingError(f"{scheme} has no exact arithmetic: a step of it loses information")
    weights = float(columns[2][0]), float(columns[2][1])
    argument = cast(int, cast(Any, scheme.argument)((0, 1), step))
    return _Form(Linear(matrix, weights), matrix, ((det * d, -det * b), (-det * c, det * a)), argument)

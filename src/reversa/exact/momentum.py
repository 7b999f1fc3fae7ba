"""Momentum in integers, with the integrating factor: two additions, and the bits that gamma takes are kept."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from reversa.errors import SettingError
from reversa.exact.base import ExactScheme, empty, nothing
from reversa.exact.compiled import kernel
from reversa.exact.fixed import FixedPoint
from reversa.exact.joined import joined
from reversa.exact.kernels import advanced, decreased, real, retreated
from reversa.exact.watch import Linear, Range, refuse_beyond
from reversa.schemes import Momentum, State

WORD_BITS = 8


class IntegratingFactor(ExactScheme):
    r"""Momentum whose velocity is held as :math:`V_t = v_t \gamma^{-t}`, in integers.

    .. math::
        V' = V + \mathrm{round}\big((1 - \gamma) f(x)\, 2^{r_v} / c_t\big), \qquad
        X' = X + \mathrm{round}\big(V' c_t\, 2^{r_x - r_v}\big)

    with :math:`c_t = \gamma^{t+1} 2^{8 n}`. Whenever :math:`\gamma^{t+1}` has lost 8 bits more, the low 8 bits of V,
    which no later step changes, are spilled as a word and V is shifted (n counts those words, and follows from t
    alone). Both sums are undone by subtracting what was added, whatever was lost in rounding, and even beyond the
    integers' range.

    Raises:
        SettingError: fewer than 32 bits, or a velocity radix that leaves too few.
    """

    scheme: Momentum

    def __init__(self, scheme: Momentum, fixed: FixedPoint) -> None:
        if fixed.bits < 32 or fixed.velocity_fraction + WORD_BITS > fixed.bits - 3:
            raise SettingError(
                f"Momentum's velocity needs 32 or 64 bits, {WORD_BITS} of them free beside velocity_radix; got {fixed}"
            )
        super().__init__(scheme, (2.0**fixed.fraction, 2.0**fixed.velocity_fraction), fixed.dtype)
        self.fixed = fixed
        self.loss = -math.log2(scheme.gamma)
        self.form = Linear(((1, scheme.gamma), (0, scheme.gamma)), (1 - scheme.gamma,) * 2)
        self._rows = tuple((*map(float, row), 1 - scheme.gamma) for row in self.form.matrix)
        remedies = [self._remedy(i) for i in (0, 1, 1)]
        self.range = Range(fixed.bits, ("the state x", "the velocity", "what f returned"), remedies)
        self._advanced = kernel(advanced, fixed.compile)
        self._retreated = kernel(retreated, fixed.compile)
        self._decreased = kernel(decreased, fixed.compile)

    @property
    def arithmetic(self) -> FixedPoint:
        return self.fixed

    def spilled_bytes(self, steps: int) -> int:
        # A float's rounding must not decide about a word at whole multiples.
        return math.floor(steps * self.loss / WORD_BITS + 1e-9)

    def argument(self, state: State, step: int) -> Tensor:
        x, integer = state[0], state[2]
        return x if x.shape == integer.shape else real(integer, 1 / self.scales[0], x.dtype)

    def forward(self, state: State, value: Tensor, step: int) -> State:
        (x, v), (X, V), words = self.split(state)
        before, f = (X, V), value.detach()
        for _ in range(self._new_words(step)):
            if self.way_back:
                words = (*words, V.to(torch.uint8))
            V = V >> WORD_BITS
        X, V, new = self._advanced(X, V, f, self._push(step), self._move(step), 1 / self.scales[0])
        if self.fixed.watch:
            after, stream = (X, V), partial(self._real, integers=(X, V), step=step, dtype=f.dtype)
            self.range.see(step, self.form, self._limits(step), before, after, f, stream)
        x, v = joined((new, nothing(new)), self._rows, x, v, value)
        return x, v, X, V, *words

    def uncover(self, state: State, step: int) -> tuple[Tensor, State]:
        self.range.settle()
        (x, _), (X, V), words = self.split(state)
        X, argument = self._retreated(X, V, self._move(step), 1 / self.scales[0], x.dtype)
        return argument, (X, V, *words)

    def inverse(self, argument: Tensor, rest: State, value: Tensor, step: int) -> State:
        X, V, *words = rest
        V = self._decreased(V, value.detach(), self._push(step))
        for _ in range(self._new_words(step)):
            V = (V << WORD_BITS).bitwise_or_(words.pop())
        return argument, empty(argument), X, V, *words

    def streams(self, state: State, step: int) -> State:
        (x, _), integers, _ = self.split(state)
        return tuple(self._real(i, integers, step - 1, x.dtype) for i in range(2))

    def _real(self, i: int, integers: State, step: int, dtype: torch.dtype) -> Tensor:
        """A stream after a step."""
        return real(integers[i], self._factor(step) / self.scales[1] if i else 1 / self.scales[0], dtype)

    def _new_words(self, step: int) -> int:
        return self.spilled_bytes(step + 1) - self.spilled_bytes(step)

    def _factor(self, step: int) -> float:
        """C of a step: gamma to the power of the steps made, times what the shifts have made up for; 2^-8 to 1."""
        return 2.0 ** (WORD_BITS * self.spilled_bytes(step + 1) - (step + 1) * self.loss)

    def _push(self, step: int) -> float:
        """What V takes of the value, in V's units."""
        return (1 - self.scheme.gamma) * self.scales[1] / self._factor(step)

    def _move(self, step: int) -> float:
        """What X takes of V, in X's units."""
        return self._factor(step) * self.scales[0] / self.scales[1]

    def _integer(self, i: int, stream: Tensor) -> Tensor:
        if self.fixed.watch:
            fixed = self.fixed
            limit = fixed.limit if i == 0 else 2.0 ** (fixed.bits - 2 - fixed.velocity_fraction)
            refuse_beyond(("the input", "the first velocity")[i], stream, limit, 0, fixed.bits, self._remedy(i))
        return self.fixed.integer(stream, self.scales[i])

    def _limits(self, step: int) -> tuple[float, float, float]:
        """What |x|, |v| and |f| must stay below, so that no sum leaves the integers' range."""
        fixed = self.fixed
        velocity = 2.0 ** (fixed.bits - 2 - fixed.velocity_fraction) * self._factor(step)
        return fixed.limit, min(velocity, fixed.limit), velocity / max(1 - self.scheme.gamma, 1e-9)

    def _is_read(self, i: int) -> bool:
        return i == 0

    def _remedy(self, i: int) -> str:
        fixed = self.fixed
        name, now = (("radix", fixed.fraction), ("velocity_radix", fixed.velocity_fraction))[i]
        more = ", or more bits" if fixed.bits < 64 else ""
        return f"Use FixedPoint(bits={fixed.bits}, {name}={max(1, now - 4)}), which holds 16 times as much{more}."

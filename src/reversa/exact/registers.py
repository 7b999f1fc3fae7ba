"""Two registers in integers, with an integrating factor for each: what a step takes away is kept, bit by bit."""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from reversa.errors import SettingError
from reversa.exact.base import ExactScheme, empty
from reversa.exact.compiled import kernel
from reversa.exact.fixed import FixedPoint
from reversa.exact.joined import joined
from reversa.exact.kernels import blended, real, unblended, wide
from reversa.exact.momentum import WORD_BITS
from reversa.exact.watch import Linear, Range, refuse_beyond
from reversa.schemes import State
from reversa.schemes.registers import Registers

LEAST_RANGE_BITS = 6
"""A state keeps this many bits before its point, whatever the factor."""


class _Register(NamedTuple):
    """How one register is held: ``s = S * unit``."""

    loss: float
    """The bits that it has lost so far."""
    sign: float | Tensor

    @property
    def words(self) -> int:
        """How many words have left it."""
        return math.floor(self.loss / WORD_BITS + 1e-9)  # a float's rounding must not decide at whole multiples

    @property
    def factor(self) -> float:
        """What a unit has become, 2^-8 to 1."""
        return 2.0 ** (WORD_BITS * self.words - self.loss)


_FIRST = _Register(0.0, 1.0)


class _Step(NamedTuple):
    """A step's coefficients, how large they are at most, and the registers that it reads, takes from, and makes."""

    a: float | Tensor
    b: float | Tensor
    w: float | Tensor
    sizes: tuple[float, float, float]
    read: _Register
    old: _Register
    new: _Register

    @property
    def erases(self) -> bool:
        """Nothing of the old register goes into the new one."""
        return self.sizes[1] == 0


class IntegratingFactors(ExactScheme):
    r"""A step :math:`c' = a c + b p + w f(c)` with :math:`|b| \le 1` on registers :math:`S_t = s_t / G_t` of integers.

    .. math::
        S_{t+1} = S_{t-1} + \mathrm{round}(a c\, 2^r / G_{t+1}) + \mathrm{round}(w f(c)\, 2^r / G_{t+1}), \qquad
        G_{t+1} = b G_{t-1}\, 2^{8 n}

    so that b is multiplied by in G alone, and a step is a sum, which is undone by subtracting what was added. Whenever
    a register's factor has lost 8 bits more, its low 8 bits, which no later step changes, are spilled as a word (n is
    their number, and follows from the coefficients alone). With b = 0 the old register leaves as a whole.

    Coefficients of a and w that are not the same for all samples are allowed, and signs of b.

    Raises:
        SettingError: fewer than 32 bits, or (when run) a step with :math:`|b| > 1`.
    """

    scheme: Registers

    def __init__(self, scheme: Registers, fixed: FixedPoint) -> None:
        if fixed.bits < 32:
            raise SettingError(f"{scheme} needs 32 or 64 bits, 8 of them for what its steps take away; got {fixed}")
        radix = min(fixed.fraction, fixed.bits - 2 - WORD_BITS - LEAST_RANGE_BITS)
        super().__init__(scheme, (2.0**radix,) * 2, fixed.dtype)
        self.fixed = fixed
        self.limit = 2.0 ** (fixed.bits - 2 - radix)
        self.range = Range(fixed.bits, ("the state", "the state", "what f returned"), (self._remedy(radix),) * 3)
        self._registers = [_FIRST, _FIRST]  # the one before the first step, and all after it
        self._bytes = [0]
        self._tensors = [0]
        self._blended = kernel(blended, fixed.compile)
        self._unblended = kernel(unblended, fixed.compile)

    @property
    def arithmetic(self) -> FixedPoint:
        return self.fixed

    def spilled_bytes(self, steps: int) -> int:
        self._plan(steps)
        return self._bytes[steps]

    def spilled_tensors(self, steps: int) -> int:
        self._plan(steps)
        return self._tensors[steps]

    def argument(self, state: State, step: int) -> Tensor:
        c, integer = state[0], state[2]
        return c if c.shape == integer.shape else real(integer, self._unit(step), c.dtype)

    def forward(self, state: State, value: Tensor, step: int) -> State:
        (c, p), (C, P), words = self.split(state)
        made, before, f = self._step(step), (C, P), value.detach()
        if made.erases:
            words, P = (*words, P) if self.way_back else words, torch.zeros_like(P)
        else:
            for _ in range(made.new.words - made.old.words):
                words = (*words, P.to(torch.uint8)) if self.way_back else words
                P = P >> WORD_BITS
        N, new = self._blended(P, c.detach(), f, *self._scales(step), self._unit(step + 1))
        if self.fixed.watch:
            stream = partial(self._after, state, f, step)
            self.range.see(step, self._form(made), self._limits(step), before, (N, C), f, stream)
        (new,) = joined((new,), ((made.a, made.b, made.w),), c, p, value)
        return new, c, N, C, *words

    def uncover(self, state: State, step: int) -> tuple[Tensor, State]:
        self.range.settle()
        (c, _), (N, C), words = self.split(state)
        return real(C, self._unit(step), c.dtype), (N, C, *words)

    def inverse(self, argument: Tensor, rest: State, value: Tensor, step: int) -> State:
        N, C, *words = rest
        made = self._step(step)
        if made.erases:
            P = words.pop()
        else:
            P = self._unblended(N, argument, value.detach(), *self._scales(step))
            for _ in range(made.new.words - made.old.words):
                P = (P << WORD_BITS).bitwise_or_(words.pop())
        return argument, empty(argument), C, P, *words

    def streams(self, state: State, step: int) -> State:
        (c, _), integers, _ = self.split(state)
        return tuple(self._real(integers, step, c.dtype, i) for i in range(2))

    def resumed(self, x: Tensor, state: State, step: int) -> tuple[State, int]:
        """Not from step 0 on: the coefficients, and the units that follow from them, are those of the step's number."""
        streams = (x, self.shown(state, step)[1])
        units = tuple(self._unit(step - i) for i in range(2))
        for i, stream in enumerate(streams):
            self._refuse_beyond(i, stream, self.limit * self._registers[step + 1 - i].factor, step)
        integers = tuple(self.fixed.integer(s.detach(), 1 / unit) for s, unit in zip(streams, units, strict=True))
        values = tuple(real(n, unit, x.dtype) for n, unit in zip(integers, units, strict=True))
        return (*joined(values, ((1.0, 0.0), (0.0, 1.0)), *streams), *integers), step

    def _after(self, state: State, value: Tensor, step: int, i: int) -> Tensor:
        """A register after a step as real numbers, which tells where the integers have wrapped around."""
        c, p = self.streams(state, step)
        a, b, w = self.scheme.coefficients(step)
        return c if i else a * c + b * p + w * value

    def _real(self, integers: State, step: int, dtype: torch.dtype, i: int) -> Tensor:
        """A register before a step."""
        return real(integers[i], self._unit(step - i), dtype)

    def _plan(self, steps: int) -> None:
        """The registers of the steps before that one, and what has left them."""
        while len(self._bytes) <= steps:
            step = len(self._bytes) - 1
            b, old = self.scheme.coefficients(step).b, self._registers[step]
            size = self.scheme.magnitudes(step)[1]
            if size > 1:
                raise SettingError(f"{self.scheme} has no exact arithmetic: step {step} takes {size} times a state")
            new = _FIRST if size == 0 else _Register(old.loss - math.log2(size), old.sign * sign(b))
            words = 0 if size == 0 else new.words - old.words
            self._registers.append(new)
            self._bytes.append(self._bytes[-1] + (words if size else self.fixed.bits // 8))
            self._tensors.append(self._tensors[-1] + (words if size else 1))

    def _step(self, step: int) -> _Step:
        self._plan(step + 1)
        old, read, new = self._registers[step : step + 3]
        return _Step(*self.scheme.coefficients(step), self.scheme.magnitudes(step), read, old, new)

    def _unit(self, step: int) -> float | Tensor:
        """What 1 stands for in the register made last before a step."""
        self._plan(max(step, 0))
        register = self._registers[step + 1]
        return register.sign * (register.factor / self.scales[0])

    def _scales(self, step: int) -> tuple[float | Tensor, float | Tensor]:
        """What the new register takes of c and of the value, in its own units."""
        made = self._step(step)
        unit = made.new.sign * (self.scales[0] / made.new.factor)
        return made.a * unit, made.w * unit

    def _form(self, made: _Step) -> Linear:
        a, b, w = made.sizes
        return Linear(((a, b), (1, 0)), (w, 0))

    def _limits(self, step: int) -> tuple[float, float, float]:
        """What the new register, the one before, and the value must stay below."""
        made = self._step(step)
        new = self.limit * made.new.factor
        return new, self.limit * made.read.factor, new / max(made.sizes[2], 1e-9)

    def _integer(self, i: int, stream: Tensor) -> Tensor:
        self._refuse_beyond(i, stream, self.limit, 0)
        return self.fixed.integer(stream, self.scales[i])

    def _refuse_beyond(self, i: int, stream: Tensor, limit: float, step: int) -> None:
        if self.fixed.watch:
            refuse_beyond("the input", stream, limit, step, self.fixed.bits, self.range.remedies[i])

    def _remedy(self, radix: int) -> str:
        more = ", or more bits" if self.fixed.bits < 64 else ""
        return f"Use FixedPoint(bits={self.fixed.bits}, radix={max(1, radix - 4)}), which holds 16 times as much{more}."


def sign(coefficient: float | Tensor) -> float | Tensor:
    """A coefficient's sign, for each sample; wide, because a unit of the integers is beyond float16."""
    return wide(coefficient.sign()) if isinstance(coefficient, Tensor) else math.copysign(1.0, coefficient)

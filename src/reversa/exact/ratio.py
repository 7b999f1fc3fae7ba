"""Momentum in integers, with a ratio for gamma: what a division leaves over goes into a buffer, and comes back."""

# pyright: reportUnnecessaryIsInstance=false, reportConstantRedefinition=false

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from fractions import Fraction
from functools import cache

import torch
from torch import Tensor

from reversa.errors import SettingError, StateError
from reversa.exact.base import ExactScheme, empty, nothing
from reversa.exact.fixed import real, wide
from reversa.exact.joined import joined
from reversa.exact.watch import Linear, Range, refuse_beyond
from reversa.schemes import Momentum, Scheme, State

BITS = 64
WORD_BITS = 32
CAPACITY = 1 << 62
"""What a buffer stays below, multiplied by d."""


@dataclass(frozen=True, repr=False)
class Ratio:
    r"""Momentum in integers of 64 bits, whose velocity is multiplied by :math:`\gamma = n / d`.

    A division of integers has a remainder. An *information buffer* I, one integer for each element, takes it up, and
    gives a digit below n for it (all divisions round down):

    .. math::
        I \leftarrow d I + (V \bmod d), \quad V \leftarrow n \lfloor V / d \rfloor + (I \bmod n), \quad
        I \leftarrow \lfloor I / n \rfloor

    Inverse: the same with n and d exchanged. The buffer grows by :math:`\log_2(d / n)` bits in each step; before it
    could overflow, its low 32 bits leave it as a word. When that is follows from n, d and the number of the step alone.

    :class:`~reversa.exact.FixedPoint` does the same with any gamma, less time and less memory; this is the algorithm
    as it was published, complete. A velocity has a resolution of :math:`d \cdot 2^{-radix}`: choose a small d.

    Args:
        n: whole number.
        d: whole number, :math:`0 < n \le d < 2^{31}`; the scheme's gamma is n / d.
        radix: the fractional bits of x and of v.
        watch: raise :class:`~reversa.errors.StateError` where a state leaves the range in which integers and real
            numbers agree. Reversal is exact beyond it too; the values are not the scheme's any more.

    Raises:
        SettingError: n, d or radix outside their range.

    Source: Maclaurin, Duvenaud, Adams: Gradient-based hyperparameter optimization through reversible learning,
    ICML 2015, arXiv:1502.03492, and algorithm 3 of Sander et al., 2021, arXiv:2102.07870.

    >>> import torch, reversa
    >>> f = [torch.nn.Linear(8, 8) for _ in range(4)]
    >>> seq = reversa.ReversibleSequence(f, reversa.Momentum(0.9), exact=Ratio(9, 10))
    >>> x = torch.randn(2, 8)
    >>> torch.equal(seq.inverse_state(seq.forward_state((x, x)))[0], x)
    True
    """

    n: int
    d: int
    radix: int = 32
    watch: bool = True

    def __post_init__(self) -> None:
        numbers = (self.n, self.d, self.radix)
        if not all(isinstance(number, int) and not isinstance(number, bool) for number in numbers):
            raise SettingError(f"Ratio needs whole numbers, got {self}. Ratio.of(gamma) gives the nearest ratio.")
        if not 0 < self.n <= self.d < 1 << 31:
            raise SettingError(f"Ratio needs 0 < n <= d < 2**31, got n={self.n}, d={self.d}")
        if not 0 < self.radix < BITS - 3:
            raise SettingError(f"Ratio needs 0 < radix < {BITS - 3}, got {self.radix}")

    def __repr__(self) -> str:
        changed = [f"{f.name}={v!r}" for f in fields(self)[2:] if (v := getattr(self, f.name)) != f.default]
        return f"Ratio({', '.join([repr(self.n), repr(self.d), *changed])})"

    @staticmethod
    def of(gamma: float) -> Ratio:
        """The ratio nearest to gamma with a denominator up to 1000.

        Raises:
            SettingError: gamma is not in (0, 1], or nearer to 0 than to 1/1000.

        >>> Ratio.of(0.9)
        Ratio(9, 10)
        """
        near = Fraction(gamma).limit_denominator(1000) if math.isfinite(gamma) else Fraction()
        if not 0 < near <= 1 or gamma > 1:
            raise SettingError(f"gamma must lie in (0, 1], and not below 1/1000 for a ratio, got {gamma!r}")
        return Ratio(near.numerator, near.denominator)

    @property
    def gamma(self) -> float:
        """``n / d``."""
        return self.n / self.d

    @property
    def limit(self) -> float:
        """Where |x|, ``(1 - gamma) |f|`` and the first |v| stay below, no sum leaves the integers' range.

        A velocity is the difference of two x then, and stays below twice the limit.
        """
        return 2.0 ** (BITS - 3 - self.radix)


class InformationBuffer(ExactScheme):
    r"""Momentum whose velocity is multiplied by a :class:`Ratio`, in integers.

    The state is ``(x, v, X, V, I, *words)``, all of the input's shape: streams, their integers, the buffer, and what
    has left it. After V is multiplied, a step is two sums,

    .. math:: V' = V + \mathrm{round}\big((1 - \gamma) f(x)\, 2^{radix}\big), \qquad X' = X + V'

    which are undone by subtracting, even beyond the integers' range.

    Raises:
        SettingError: the scheme is another than Momentum, or has another gamma.
    """

    scheme: Momentum

    def __init__(self, scheme: Scheme, ratio: Ratio) -> None:
        if not isinstance(scheme, Momentum):
            raise SettingError(f"{ratio} multiplies a velocity, and {scheme} has none. Use exact=True for it.")
        if not math.isclose(scheme.gamma, ratio.gamma, rel_tol=1e-12):
            raise SettingError(
                f"{ratio} needs Momentum(gamma={ratio.n}/{ratio.d}), got gamma={scheme.gamma!r}. Give both the same "
                "ratio of whole numbers, or use exact=True, which takes any gamma."
            )
        super().__init__(scheme, (2.0**ratio.radix,) * 2, torch.int64)
        self.ratio = ratio
        self.form = Linear(((1, scheme.gamma), (0, scheme.gamma)), (1 - scheme.gamma,) * 2)
        self._rows = tuple((*map(float, row), 1 - scheme.gamma) for row in self.form.matrix)
        self._limits = (ratio.limit, 2 * ratio.limit, ratio.limit / max(1 - scheme.gamma, 1e-9))
        self.range = Range(BITS, ("the state x", "the velocity", "what f returned"), (self._remedy(),) * 3)

    @property
    def arithmetic(self) -> Ratio:
        return self.ratio

    def words(self, steps: int) -> int:
        """How many words have left the buffer after so many steps.

        >>> InformationBuffer(Momentum(0.5), Ratio(1, 2)).words(1000)
        30
        """
        # Tables whose lengths are powers of two are computed rarely, and never changed.
        return _words(self.ratio.n, self.ratio.d, 1 << max(10, steps.bit_length()))[steps]

    def spilled_bytes(self, steps: int) -> int:
        return (BITS + WORD_BITS * self.words(steps)) // 8 if steps else 0

    def quantized(self, streams: State) -> State:
        state = super().quantized(streams)
        return (*state, nothing(state[-1]))

    def argument(self, state: State, step: int) -> Tensor:
        x, integer = state[0], state[2]
        return x if x.shape == integer.shape else self._real(integer, x.dtype)

    def forward(self, state: State, value: Tensor, step: int) -> State:
        (x, v), (X, V), (buffer, *words) = self.split(state)
        if self._spills(step):
            if self.way_back:
                words.append(buffer.to(torch.int32))  # the low 32 bits
            buffer = buffer >> WORD_BITS
        before, f = (X, V), value.detach()
        V, buffer = _multiplied(V, buffer, self.ratio.n, self.ratio.d)
        V = V.add_(self._increment(f))
        X = X + V
        new = self._real(X, x.dtype)
        if self.ratio.watch:
            after = X, V
            self.range.see(step, self.form, self._limits, before, after, f, lambda i: self._real(after[i], f.dtype))
        x, v = joined((new, nothing(new)), self._rows, x, v, value)
        return x, v, X, V, buffer, *words

    def uncover(self, state: State, step: int) -> tuple[Tensor, State]:
        self.range.settle()
        (x, _), (X, V), spilled = self.split(state)
        X = X - V
        return self._real(X, x.dtype), (X, V, *spilled)

    def inverse(self, argument: Tensor, rest: State, value: Tensor, step: int) -> State:
        X, V, buffer, *words = rest
        V, buffer = _multiplied(V - self._increment(value), buffer, self.ratio.d, self.ratio.n)
        if self._spills(step):
            buffer = (buffer << WORD_BITS) | (words.pop().to(torch.int64) & ((1 << WORD_BITS) - 1))
        return argument, empty(argument), X, V, buffer, *words

    def streams(self, state: State, step: int) -> State:
        (x, _), (X, V), _ = self.split(state)
        return self._real(X, x.dtype), self._real(V, x.dtype)

    def taken(self, state: State, steps: int) -> tuple[State, State]:
        length = 5 + self.words(steps)
        if len(state) not in (length, length + 2) or any(i.dtype != torch.int64 for i in state[2:5]):
            raise StateError(
                f"inverse_state in {self.ratio} needs the state that forward_state returned: 2 streams, 2 tensors of "
                f"integers, the buffer, {length - 5} words; got {len(state)} tensors."
            )
        return (*(empty(stream) for stream in state[:2]), *state[2:length]), state[length:]

    def _spills(self, step: int) -> bool:
        return self.words(step + 1) > self.words(step)

    def _increment(self, value: Tensor) -> Tensor:
        """What ``f`` adds to V."""
        return self._rounded(value, (1 - self.scheme.gamma) * self.scales[1])

    def _rounded(self, x: Tensor, scale: float) -> Tensor:
        return (wide(x) * scale).round_().to(self.dtype)

    def _real(self, integer: Tensor, dtype: torch.dtype) -> Tensor:
        return real(integer, 1 / self.scales[0], dtype)

    def _integer(self, i: int, stream: Tensor) -> Tensor:
        if self.ratio.watch:
            refuse_beyond(("the input", "the first velocity")[i], stream, self.ratio.limit, 0, BITS, self._remedy())
        return self._rounded(stream, self.scales[i])

    def _is_read(self, i: int) -> bool:
        return i == 0

    def _remedy(self) -> str:
        ratio = self.ratio
        return f"Use Ratio({ratio.n}, {ratio.d}, radix={max(1, ratio.radix - 4)}), which holds 16 times as much."


def _multiplied(V: Tensor, buffer: Tensor, n: int, d: int) -> tuple[Tensor, Tensor]:
    """V times n / d, and the buffer with the remainder in it; undone by the call with n and d exchanged."""
    # In place where a tensor is fresh: at the sizes of a state, fetching new memory costs more than a sum.
    quotient, rest = divided(V, d)
    buffer, digit = divided(rest.add_(buffer, alpha=d), n)
    return digit.add_(quotient, alpha=n), buffer


def divided(integer: Tensor, by: int) -> tuple[Tensor, Tensor]:
    """The quotient, rounded down, and the remainder, which is never negative then."""
    if by & (by - 1) == 0:
        return integer >> (by.bit_length() - 1), integer & (by - 1)
    quotient = torch.div(integer, by, rounding_mode="floor")
    return quotient, torch.sub(integer, quotient, alpha=by)


@cache
def _words(n: int, d: int, length: int) -> tuple[int, ...]:
    """How many words have left a buffer after 0, 1, ... steps.

    ``bound`` is what the buffer is below, whatever the data: the same for all elements and in both directions.
    """
    bound, words, table = 1, 0, [0]
    while len(table) < length:
        if bound * d > CAPACITY:
            bound, words = (bound - 1 >> WORD_BITS) + 1, words + 1
        bound = (bound * d - 1) // n + 1
        table.append(words)
    return tuple(table)

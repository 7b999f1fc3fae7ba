"""The largest batch, image side or sequence length that fits into a budget."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from reversa.errors import BudgetError, SettingError
from reversa.memory.settings import arguments, is_shape, with_tensors
from reversa.words import in_bytes


def largest(least: Callable[[int], int], budget: int, start: int = 1) -> int:
    """The largest size whose least peak fits; bytes must not fall as the size grows.

    Between a size that fits and one that does not, the next is where a line through two sizes meets the budget: bytes
    are nearly linear in a batch.

    Args:
        least: bytes of a size: the plan of least memory for it.
        budget: bytes.
        start: the first size to look at.

    Raises:
        BudgetError: size 1 does not fit.

    >>> largest(lambda size: 100 + 7 * size, 1000), largest(lambda side: 3 * side**2, 1000, start=32)
    (128, 18)
    """
    known: dict[int, int] = {}
    low, high = 0, 0
    size = max(1, start)
    while not (high and high - low <= 1):
        between = high - low
        known[size] = least(size)
        if known[size] <= budget:
            low = max(low, size)
        else:
            high = min(high or size, size)
        if high == 1:
            raise BudgetError(
                f"not even size 1 fits into {in_bytes(budget)}: it takes {in_bytes(known[1])} at least", known[1]
            )
        slow = between > 0 and high - low > between / 2  # bytes that are no line here: take the middle
        size = (low + high) // 2 if slow else _next(known, budget, low, high)
    return low


def _next(known: dict[int, int], budget: int, low: int, high: int) -> int:
    """Where to look next: strictly between what fits and what does not, or beyond all."""
    if len(known) == 1:
        ((size, peak),) = known.items()
        guess = 2 * size if peak <= budget else size // 2
    else:
        (a, at_a), (b, at_b) = sorted(known.items(), key=lambda item: abs(item[1] - budget))[:2]
        slope = (at_b - at_a) / (b - a)
        guess = int(a + (budget - at_a) / slope) if slope > 0 else 2 * max(a, b)
        guess += low in (a, b) and guess == low  # a size that was looked at: the one behind it decides
    if not high:
        return min(max(guess, low + 1), 16 * max(low, 1))
    return min(max(guess, low + 1), high - 1)


def batch_of(inputs: object) -> int:
    """The first size of the first tensor, or shape, among the inputs.

    Raises:
        SettingError: there is none.

    >>> batch_of({"x": (8, 3, 32, 32)})
    8
    """
    sizes: list[int] = []

    def note(*shape: int) -> Tensor:
        sizes.extend(shape[:1])
        return Tensor()

    with_tensors(arguments(inputs), lambda tensor: note(*tensor.shape), note)
    if not sizes:
        raise SettingError("batch needs inputs with a first dimension: a tensor, or a shape such as (8, 3, 224, 224)")
    return sizes[0]


def with_batch(inputs: object, batch: int) -> object:
    """The same inputs for another batch: every tensor, or shape, whose first size is the batch's gets the new one.

    >>> with_batch((8, 3, 32, 32), 2)
    (2, 3, 32, 32)
    """
    before = batch_of(inputs)

    def resized(tensor: Tensor) -> Tensor:
        if tensor.dim() == 0 or tensor.shape[0] != before:
            return tensor
        return tensor.new_empty((batch, *tensor.shape[1:]), device="meta").requires_grad_(tensor.requires_grad)

    def at(value: object) -> object:
        if is_shape(value):
            return (batch, *value[1:]) if value[0] == before else value  # type: ignore[index]
        if isinstance(value, dict):
            return {key: at(item) for key, item in value.items()}
        if isinstance(value, (tuple, list)):
            return tuple(map(at, value))
        return resized(value) if isinstance(value, Tensor) else value

    return at(inputs)

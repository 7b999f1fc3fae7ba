"""Kernels of exact arithmetic, compiled once for all chains."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor

from reversa.exact._torch import compile_graph, transforms_active

P = ParamSpec("P")
R = TypeVar("R")

SHAPES = 16
"""Of each kernel; whoever has more has shapes that change all the time, and gets one graph for all of them."""


class Compiled(Generic[P, R]):
    """A function of tensors and numbers, compiled at its first call with tensors of a shape, layout and type.

    Where that fails it is run as it is, and a warning says so, once. It is run as it is, too, with keywords, with
    subclasses of tensors, and inside the transforms of ``torch.func``.
    """

    def __init__(self, function: Callable[P, R]) -> None:
        self.function = function
        self.graphs: dict[Any, Callable[..., R]] = {}
        self.general: Callable[..., R] | None = None
        self.fails = False

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        others = any(isinstance(a, Tensor) and type(a) is not Tensor for a in args)
        if self.fails or kwargs or others or transforms_active():
            return self.function(*args, **kwargs)
        try:
            # A number would be a constant of the graph, and scales differ from step to step.
            given = [_tensor(a) if isinstance(a, float) else a for a in args]
            key = tuple((a.shape, a.stride(), a.dtype, a.device) if isinstance(a, Tensor) else a for a in given)
            if key not in self.graphs and len(self.graphs) < SHAPES:
                self.graphs[key] = self._graph(given)
            return (self.graphs.get(key) or self._for_any_shape())(*given)
        except Exception as error:
            self.fails = True
            reason = (str(error).strip().splitlines() or [""])[0]
            warnings.warn(
                f"FixedPoint(compile=True): {getattr(self.function, '__name__', 'a kernel')} could not be compiled and "
                f"runs in eager mode, with the same bits. {type(error).__name__}: {reason}",
                stacklevel=2,
            )
            return self.function(*args, **kwargs)

    def _for_any_shape(self) -> Callable[..., R]:
        if self.general is None:
            self.general = torch.compile(self.function, dynamic=True)
        return self.general

    def _graph(self, given: list[Any]) -> Callable[..., R]:
        where = [i for i, a in enumerate(given) if isinstance(a, Tensor)]

        def of_tensors(*tensors: Tensor) -> Any:
            every = list(given)
            for i, tensor in zip(where, tensors, strict=True):
                every[i] = tensor
            return self.function(*every)  # pyright: ignore[reportCallIssue]

        with torch.inference_mode(False), torch.no_grad():
            examples = [
                torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device).zero_()
                for t in (given[i] for i in where)
            ]
            graph = compile_graph(of_tensors, examples)
        return lambda *args: graph(*[args[i] for i in where])


@lru_cache(1 << 14)
def _tensor(number: float) -> Tensor:
    """Scales come back in every training step, and making a tensor takes as long as using it."""
    with torch.inference_mode(False):
        return torch.tensor(number, dtype=torch.float64)


_COMPILED: dict[Any, Any] = {}


def kernel(function: Callable[P, R], compiled: bool) -> Callable[P, R]:
    """The function, or the one compiled form of it that all chains share."""
    if not compiled:
        return function
    if function not in _COMPILED:
        _COMPILED[function] = Compiled(function)
    return _COMPILED[function]

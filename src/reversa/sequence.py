"""ReversibleSequence: the one place where a scheme, residual functions and an engine meet."""

# pyright: reportUnnecessaryIsInstance=false, reportPrivateUsage=false

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial, wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from reversa.engine import Engine, Invert, _torch
from reversa.engine.steps import first_tensor, is_recording, plain_step, with_value
from reversa.engine.watch import AsRecorded, Watch
from reversa.errors import SettingError, StateError
from reversa.exact import Arithmetic, ExactScheme, check_exact, dtype_of, run_in, run_with
from reversa.schemes import Scheme, State

Block = nn.Module | Sequence[nn.Module]
P = ParamSpec("P")
R = TypeVar("R")


def _one_break(
    method: Callable[Concatenate[ReversibleSequence, P], R],
) -> Callable[Concatenate[ReversibleSequence, P], R]:
    """Run by Python as a whole where ``torch.compile`` traces its caller: one graph break, and none inside."""
    outside = _torch.outside_dynamo(method)

    @wraps(method)
    def run(self: ReversibleSequence, *args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_dynamo_compiling() and (self.exact or torch.is_grad_enabled()):
            return outside(self, *args, **kwargs)
        return method(self, *args, **kwargs)

    return run


class ReversibleSequence(nn.Module):
    """A chain of reversible steps over residual functions, as one module.

    The output has the input's shape and data type. In training the activations of the residual functions are not
    stored: the engine computes them back from the output (:class:`reversa.Invert`), or does what another engine says.

    Args:
        blocks: residual functions: modules that return a tensor of their input's shape (or a tuple that begins with
            one); tuples of modules ``(F, G)`` for schemes whose block has several functions. One module may
            stand at several places.
        scheme: the update rule.
        exact: the backward pass computes back the very bits of the forward pass, at any depth: True, or the
            arithmetic, :class:`reversa.exact.FixedPoint` or :class:`reversa.exact.Ratio`. States are integers then.
        engine: how the backward pass gets the states; may be changed at any time (``seq.engine = Store()``), with
            the same numbers.

    Raises:
        SettingError: blocks, scheme or engine of another kind.
        BlockError: (when called) a residual function changes shape or data type, or writes to its input.

    >>> import torch, reversa
    >>> f = [torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh()) for _ in range(4)]
    >>> seq = reversa.ReversibleSequence(f, scheme=reversa.Momentum(gamma=0.9))
    >>> x = torch.randn(2, 8, requires_grad=True)
    >>> seq(x).sum().backward()
    >>> x.grad.shape
    torch.Size([2, 8])
    """

    def __init__(
        self,
        blocks: Iterable[Block],
        scheme: Scheme,
        exact: bool | Arithmetic = False,
        engine: Engine | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(scheme, Scheme):
            raise SettingError(
                f"scheme must be one of reversa.schemes, for instance reversa.Momentum(0.9); got {scheme!r}"
            )
        check_exact(scheme, exact)
        self.scheme = scheme
        self.exact = exact
        self.blocks = nn.ModuleList([_block(block, scheme, i) for i, block in enumerate(blocks)])
        if not len(self.blocks):
            raise SettingError("a ReversibleSequence needs at least one block, got none")
        self.openers = nn.ModuleList(scheme.modules())
        self.engine = Invert() if engine is None else engine

    @property
    def engine(self) -> Engine:
        """How the backward pass gets the states of the forward pass."""
        return self._engine

    @engine.setter
    def engine(self, engine: Engine) -> None:
        if not isinstance(engine, Engine):
            raise SettingError(f"engine must be Invert(), Store(), Recompute() or Offload(), got {engine!r}")
        self._engine = engine

    @property
    def functions(self) -> list[nn.Module]:
        """The residual functions in the order of the steps."""
        if self.scheme.functions_per_block == 1:
            return list(self.blocks)
        return [f for block in self.blocks for f in block]  # type: ignore[attr-defined]

    @_one_break
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The output after the last step.

        Extra arguments reach every residual function; gradients reach them all.

        Returns:
            A tensor of x's shape; where the last residual function returns a tuple, that tuple with the
            output in the first place.
        """
        scheme = self.scheme_for(x)
        if isinstance(scheme, ExactScheme):
            scheme.way_back = self.engine.inverts and is_recording()
        state, output = self.engine.run(scheme, self.functions, partial(scheme.open, x), args, kwargs)
        return with_value(output, scheme.close(state))

    @_one_break
    def forward_state(self, state: State, *args: Any, **kwargs: Any) -> State:
        """The state after the last step, from the state before the first.

        In exact arithmetic the streams are followed by what :meth:`inverse_state` needs to find every bit again.
        """
        state = self._checked(state)
        scheme = self.scheme_for(state[0])
        if not isinstance(scheme, ExactScheme):
            return self.engine.run(scheme, self.functions, lambda: state, args, kwargs)[0]
        fs = self.functions if torch.is_grad_enabled() else [_in_grad_mode(f) for f in self.functions]
        last, _ = self.engine.run(scheme, fs, partial(scheme.quantized, state), args, kwargs)
        return (*scheme.shown(last, len(self.functions)), *scheme.remainder(state))

    def inverse_state(self, state: State, *args: Any, **kwargs: Any) -> State:
        """The state before the first step, from the state after the last.

        Statistics of normalisation layers do not move. Dropout draws new masks, so call ``eval()`` first.

        In exact arithmetic every bit is that of the state given to :meth:`forward_state`.

        Raises:
            StateError: the scheme drew random numbers on the way forth, or nothing is left of what a step wiped out;
                in exact arithmetic, the state is not one that :meth:`forward_state` returned.
        """
        scheme = self.scheme_for(state[0])
        if self.training and self.scheme.random:
            raise StateError(
                f"{self.scheme} draws random numbers in training, which are no part of the state: use {self.scheme} "
                "with random=False, or take the states from states()"
            )
        if scheme.amplification == math.inf:
            raise StateError(
                f"a step of {scheme} wipes out the state before the last one, which cannot be computed back. "
                "exact=True keeps it."
            )
        if isinstance(scheme, ExactScheme):
            last, remainder = scheme.taken(state, len(self.functions))
            return scheme.first(self._back(scheme, _in_grad_mode, last, args, kwargs), remainder)
        return self._back(scheme, _as_it_is, self._checked(state), args, kwargs)

    def _back(
        self,
        scheme: Scheme,
        mode: Callable[[nn.Module], Callable[..., Tensor]],
        state: State,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> State:
        for step, f in reversed(list(enumerate(self.functions))):
            with AsRecorded([Watch(f)], f"step {step}"):
                value = partial(_with_extras, mode(f), args, kwargs)
                argument, rest = scheme.search(state, step, value)
                state = scheme.inverse(argument, rest, value(argument), step)
        return state

    def states(self, x: Tensor, *args: Any, **kwargs: Any) -> list[State]:
        """The state before the first step and after every step, stored: for pictures and for measuring drift."""
        scheme = self.scheme_for(x)
        states = [scheme.open(x)]
        for step, f in enumerate(self.functions):
            states.append(plain_step(scheme, f, states[-1], step, args, kwargs, f"step {step}")[0])
        return [scheme.shown(s, i) for i, s in enumerate(states)] if isinstance(scheme, ExactScheme) else states

    def extra_repr(self) -> str:
        """The scheme, the engine, and what a training step keeps."""
        length = len(self.functions)
        dtype = dtype_of(self)
        scheme = run_in(self.scheme, self.exact, dtype, dtype)
        kept = self.engine.kept_states(scheme, length, dtype)
        return f"{scheme}, {self.engine},\n{length} steps; kept for the backward pass in {dtype}: {kept}"

    def scheme_for(self, x: Tensor) -> Scheme:
        """The scheme in the arithmetic that it runs in."""
        return run_with(self.scheme.begun(x, len(self.functions), self.training), self.exact, x)

    def _checked(self, state: State) -> State:
        state = state[: self.scheme.num_streams] if self.exact else state
        shapes = [tuple(stream.shape) for stream in state]
        if len(state) != self.scheme.num_streams or len(set(shapes)) != 1:
            raise StateError(
                f"{self.scheme} carries {self.scheme.num_streams} streams of one shape, got {shapes}. "
                "scheme.open(x) makes a state of an input."
            )
        return tuple(state)


def _with_extras(f: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any], argument: Tensor) -> Tensor:
    return f(argument, *args, **kwargs)


def _as_it_is(f: nn.Module) -> Callable[..., Tensor]:
    return lambda *args, **kwargs: first_tensor(f(*args, **kwargs))


def _in_grad_mode(f: nn.Module) -> Callable[..., Tensor]:
    """The function's value under grad mode, whatever the mode is: without it some layers take another, faster path."""

    def value(*args: Any, **kwargs: Any) -> Tensor:
        with torch.enable_grad():
            return first_tensor(f(*args, **kwargs)).detach()

    return value


def _block(block: Block, scheme: Scheme, index: int) -> nn.Module:
    """The block as a module, with the number of functions that the scheme wants."""
    needed = scheme.functions_per_block
    parts = list(block) if isinstance(block, Sequence) and not isinstance(block, nn.Module) else [block]
    if not all(isinstance(part, nn.Module) for part in parts):
        raise SettingError(f"block {index} must be made of modules, got {block!r}. Wrap a plain function in a module.")
    if len(parts) != needed:
        form = "a module" if needed == 1 else f"a tuple of {needed} modules such as (F, G)"
        raise SettingError(f"{scheme} needs {form} for each block, got {len(parts)} module(s) for block {index}")
    return parts[0] if needed == 1 else nn.ModuleList(parts)

"""ReversibleSequence: the one place where a scheme, residual functions and an engine meet."""

# pyright: reportUnnecessaryIsInstance=false, reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from reversa.engine import Engine, Invert, _torch
from reversa.engine.steps import first_tensor, plain_step, with_value
from reversa.engine.watch import AsRecorded, Watch
from reversa.errors import SettingError, StateError
from reversa.schemes import Scheme, State

Block = nn.Module | Sequence[nn.Module]


class ReversibleSequence(nn.Module):
    """A chain of reversible steps over residual functions, as one module.

    The output has the input's shape and data type. In training the activations of the residual functions are not
    stored: the engine computes them back from the output (:class:`reversa.Invert`), or does what another engine says.

    Args:
        blocks: residual functions: modules that return a tensor of their input's shape (or a tuple that begins with
            one); tuples of modules ``(F, G)`` for schemes whose block has several functions. One module may
            stand at several places.
        scheme: the update rule.
        exact: bit-for-bit reversal (not in this version).
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
        self, blocks: Iterable[Block], scheme: Scheme, exact: bool = False, engine: Engine | None = None
    ) -> None:
        super().__init__()
        if not isinstance(scheme, Scheme):
            raise SettingError(
                f"scheme must be one of reversa.schemes, for instance reversa.Momentum(0.9); got {scheme!r}"
            )
        if exact:
            raise SettingError("exact=True is not in this version; Invert(anchors='auto') keeps the drift below 1e-4")
        self.scheme = scheme
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

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The output after the last step.

        Extra arguments reach every residual function; gradients reach them all.

        Returns:
            A tensor of x's shape; where the last residual function returns a tuple, that tuple with the
            output in the first place.
        """
        state, output = self._run(self.scheme.open(x), args, kwargs)
        return with_value(output, self.scheme.close(state))

    def forward_state(self, state: State, *args: Any, **kwargs: Any) -> State:
        """The state after the last step, from the state before the first."""
        return self._run(self._checked(state), args, kwargs)[0]

    def inverse_state(self, state: State, *args: Any, **kwargs: Any) -> State:
        """The state before the first step, from the state after the last.

        Statistics of normalisation layers do not move. Dropout draws new masks, so call ``eval()`` first.
        """
        state = self._checked(state)
        for step, f in reversed(list(enumerate(self.functions))):
            argument, rest = self.scheme.uncover(state, step)
            with AsRecorded([Watch(f)], f"step {step}"):
                value = first_tensor(f(argument, *args, **kwargs))
            state = self.scheme.inverse(argument, rest, value, step)
        return state

    def states(self, x: Tensor, *args: Any, **kwargs: Any) -> list[State]:
        """The state before the first step and after every step, stored: for pictures and for measuring drift."""
        states = [self.scheme.open(x)]
        for step, f in enumerate(self.functions):
            states.append(plain_step(self.scheme, f, states[-1], step, args, kwargs, f"step {step}")[0])
        return states

    def extra_repr(self) -> str:
        """The scheme, the engine, and what a training step keeps."""
        length = len(self.functions)
        dtype = next((p.dtype for p in self.parameters() if p.is_floating_point()), torch.get_default_dtype())
        kept = self.engine.kept_states(self.scheme, length, dtype)
        return f"{self.scheme}, {self.engine},\n{length} steps; kept for the backward pass in {dtype}: {kept}"

    def _run(self, state: State, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[State, Any]:
        if torch.compiler.is_dynamo_compiling() and torch.is_grad_enabled():
            return _run_outside_dynamo(self, state, args, kwargs)
        return self.engine.run(self.scheme, self.functions, state, args, kwargs)

    def _checked(self, state: State) -> State:
        shapes = [tuple(stream.shape) for stream in state]
        if len(state) != self.scheme.num_streams or len(set(shapes)) != 1:
            raise StateError(
                f"{self.scheme} carries {self.scheme.num_streams} streams of one shape, got {shapes}. "
                "scheme.open(x) makes a state of an input."
            )
        return tuple(state)


_run_outside_dynamo = _torch.outside_dynamo(ReversibleSequence._run)


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

"""The engine's heart: autograd's own graph, with saved tensors that are computed back.

In the forward pass each residual function runs in grad mode under saved-tensor hooks: what autograd would keep
is packed into a number. The chain keeps the state after its last step alone. In the backward pass the first number
that autograd hands back makes the chain *replay* its step: the argument of ``f`` is uncovered from the state after
the step, ``f`` is evaluated once more, the tensors that it saves are what autograd asked for, and its value is what
the inverse needs to get the state before the step. That state is the **cursor** for the step before.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from reversa.engine import _torch
from reversa.engine.conditions import RandomState, random_state, same_random_state
from reversa.engine.determinism import deterministic
from reversa.engine.extras import Extras
from reversa.engine.finite import Totals, all_finite, is_finite, refuse_not_finite, total
from reversa.engine.kept import Cursor, KeptState
from reversa.engine.replay import (
    CHANGED_OUTPUT,
    Evaluation,
    Saved,
    Unit,
    evaluate_again,
    no_backward,
    refuse_changed_later,
    replaying,
)
from reversa.engine.sample import Samples
from reversa.engine.steps import carried_value, refuse_in_place
from reversa.engine.verify import Hashes
from reversa.errors import ReplayError, ReversaError
from reversa.schemes import Scheme, State


class Chain:
    """Recorded steps without a gap, and the state after the last of them.

    Args:
        scheme: the update rule.
        state: the state before the first step.
        first: number of the first step within the whole run (a run with anchors is several chains).
        group: how many steps are replayed in one go: more of them are alive at once, with less overhead for each.
            It is meant for small states: to say which step was the first that was not finite, the state before the
            first is kept then, elsewhere one number for each step.
        hashes: to prove that what is recovered is what was; None goes without.
        samples: of what residual functions are evaluated at, to see how far what is recovered is from it; None goes
            without.
    """

    def __init__(
        self,
        scheme: Scheme,
        state: State,
        first: int = 0,
        group: int = 1,
        hashes: Hashes | None = None,
        samples: Samples | None = None,
    ) -> None:
        self.scheme: Final = scheme
        self.first: Final = first
        self.group: Final = group
        self._hashes: Final = hashes
        self._samples: Final = samples
        self._lowest: int | None = None  # the first step that saved anything: no backward pass goes further
        self._steps: list[Evaluation] = []
        self._saved: Saved = []  # of all steps, one behind the other ...
        self._starts: list[int] = [0]  # ... and where each step's part begins
        self._random: list[RandomState] = []  # before each of the latest steps, until _settle_random()
        self._totals = Totals()  # of each step's value: not finite where the value is not
        self._entry = KeptState.of(state) if group > 1 else None  # in their place
        self._latest: KeptState | None = None  # the last state, with versions; until end()
        self._held: list[_torch.SavedTensor] | None = None  # the last state in autograd's keeping; from end()
        self._cursor: Cursor | None = None
        self._task = -1  # the backward pass that captured tensors belong to:
        self._captured = Unit([], [])  # entries _from.._to of all saved tensors
        self._from = self._to = 0

    def __len__(self) -> int:
        return len(self._steps)

    # ------------------------------------------------------------------ forward

    def step(self, f: Callable[..., Any], state: State, extras: Extras, module: Any) -> tuple[State, Any]:
        """Make one step and record it. If ``f`` or the scheme raises, the chain stays as it was."""
        number = self.first + len(self._steps)
        argument = self.scheme.argument(state, number)
        evaluation = Evaluation(f, argument, extras, module, number)
        random = None if isinstance(argument, FakeTensor) else random_state(argument.device)
        version = argument._version
        try:
            _torch.push_hooks(self._pack, self._unpack)
            try:
                output = f(argument, *extras.args, **extras.kwargs)
                value = carried_value(output, argument, evaluation)
                refuse_in_place(argument, version, evaluation)
                evaluation.watch.settle(evaluation)
                after = evaluation.multiplied(self.scheme, state, value) if self.scheme.multiplies else None
            finally:
                _torch.pop_hooks()
            if after is None:
                after = self.scheme.forward(state, value, number)  # which refuses what integers do not hold
        except BaseException:
            del self._saved[self._starts[-1] :]
            raise
        if self._hashes is not None:
            self._hashes.note(state)
        if self._lowest is None and len(self._saved) > self._starts[-1]:
            self._lowest = len(self._steps)
        if self._samples is not None and self._lowest is not None:
            self._samples.note(argument, state, len(self._steps))
        self._steps.append(evaluation)
        self._starts.append(len(self._saved))
        if random is not None:
            self._random.append(random)
        if self._entry is None:
            self._totals.add(value)
        return after, output

    def reach(self, state: State) -> None:
        """The state after the latest step: where a backward pass from here on starts."""
        self._latest = KeptState.of(state)

    def end(self) -> None:
        """No step follows: give the latest state to autograd, where hooks of an outer chain or checkpoint see it.

        A state that was changed in place since its step stays here, and with it the version that tells.
        """
        self._settle_random()
        if self._latest is not None and self._latest.unchanged:
            self._held = [_torch.hold(stream) for stream in self._latest.streams]
            self._latest = None

    def _pack(self, tensor: Tensor) -> int:
        self._saved.append((tensor.shape, tensor.dtype, tensor._version))
        return len(self._saved) - 1

    def _settle_random(self) -> None:
        """Give each step that drew random numbers the generators' state before it; forget the others."""
        states, self._random = self._random, []
        if not states:
            return
        states.append(random_state(self._steps[-1].device))
        if same_random_state(states[0], states[-1]):
            return
        for evaluation, before, after in zip(self._steps[1 - len(states) :], states, states[1:], strict=False):
            if not same_random_state(before, after):
                evaluation.random = before

    # ------------------------------------------------------------------ backward

    def _unpack(self, index: int) -> Tensor:
        if not self._from <= index < self._to or self._task != _torch.graph_task():
            self._replay(index)
        tensors, saved = self._captured
        at = index - self._from
        tensor = tensors[at]
        if tensor is None:  # asked for a second time
            self._replay(index)
            return self._unpack(index)
        tensors[at] = None
        if tensor._version != saved[at][2]:
            refuse_changed_later(self._steps[self._step_of(index)])
        return tensor

    def _step_of(self, index: int) -> int:
        return bisect_right(self._starts, index) - 1

    @_torch.orderly
    def _replay(self, index: int) -> None:
        """Capture the saved tensors of the step that ``index`` belongs to, and of the ``group - 1`` steps before it."""
        last = self._step_of(index)
        if last >= len(self._steps):
            no_backward(index)
        self._captured, self._from, self._to = Unit([], []), 0, 0
        self._settle_random()
        grad_enabled = torch.is_grad_enabled()
        _torch.set_grad_enabled(False)
        try:
            with replaying(), deterministic(self.scheme, self._steps[-1].device):
                units, cursor = self._walk_to(last)
            if cursor.step == self._lowest:
                self._refuse_not_finite(cursor.state, recovered=True)
        finally:
            _torch.set_grad_enabled(grad_enabled)
        if len(units) == 1:
            self._captured = units[0]
        else:
            units.reverse()
            tensors = [tensor for unit in units for tensor in unit.tensors]
            self._captured = Unit(tensors, [entry for unit in units for entry in unit.saved])
        self._from, self._to, self._task = self._starts[cursor.step], self._starts[last + 1], cursor.task
        # With the end state kept, nothing needs the first state; without it, a second request might.
        self._cursor = None if cursor.step == self._lowest and self._held is not None else cursor

    def _walk_to(self, last: int) -> tuple[list[Unit], Cursor]:
        """Walk to step ``last`` and replay the unit of steps that ends with it, last step first."""
        cursor = self._nearest(last)
        while cursor.step > last + 1:  # steps that this backward pass did not visit
            self._back(cursor)
        while cursor.step < last:
            self._forth(cursor)
        units: list[Unit] = []
        if cursor.step == last:
            units.append(self._at(cursor)[0])
        while cursor.step > max(self._lowest or 0, last + 1 - self.group):
            units.append(self._back(cursor))
        return units, cursor

    def _nearest(self, last: int) -> Cursor:
        """A known state to walk from: the cursor of this backward pass, or the state after the last step."""
        task = _torch.graph_task()
        cursor, self._cursor = self._cursor, None
        if cursor is not None and cursor.task == task and (cursor.step > last or not self._has_end()):
            return cursor
        return Cursor(task, len(self._steps), self._end_state(task))

    def _has_end(self) -> bool:
        return self._held is not None or self._latest is not None

    def _end_state(self, task: int) -> State:
        where = self._steps[-1]
        if self._latest is not None:
            if not self._latest.unchanged:
                raise ReplayError(CHANGED_OUTPUT.format(where=where))
            return self._latest.streams
        if self._held is None:
            raise ReplayError(
                f"backward through a reversible chain (up to {where}) a second time: the state that it starts from was "
                "given up after the first. Pass retain_graph=True to the first backward()."
            )
        try:
            state = tuple(held.unpack() for held in self._held)
        except ReversaError:
            raise
        except RuntimeError as error:
            raise ReplayError(CHANGED_OUTPUT.format(where=where)) from error
        self._refuse_not_finite(state, recovered=False)
        if task >= 0 and not _torch.graph_is_kept():
            self._held = None  # nobody can ask again: the nodes that would are freed as they run
        return state

    def _back(self, cursor: Cursor) -> Unit:
        """Move the cursor over one step backwards; what the step saved."""
        step, number = cursor.step - 1, self.first + cursor.step - 1
        argument, rest = self.scheme.search(cursor.state, number, self._steps[step].value)
        cursor.state = ()
        saved, _, cursor.state = self._evaluate(
            step, argument, lambda value: self.scheme.inverse(argument, rest, value, number)
        )
        cursor.step = step
        if self._samples is not None and step in self._samples:
            self._samples.compare(self.scheme.argument(cursor.state, number), step, self._steps[step])
        if self._hashes is not None:
            self._hashes.compare(cursor.state, step, self._steps[step])
        return saved

    def _forth(self, cursor: Cursor) -> Tensor:
        """Move the cursor over one step forwards; the step's value."""
        _, value, state = self._at(cursor)
        cursor.step, cursor.state = cursor.step + 1, self.scheme.forward(state, value, self.first + cursor.step)
        return value

    def _at(self, cursor: Cursor) -> tuple[Unit, Tensor, State]:
        """Evaluate ``f`` of the step that the cursor stands before."""
        state = cursor.state
        return self._evaluate(cursor.step, self.scheme.argument(state, self.first + cursor.step), lambda _: state)

    def _evaluate(self, step: int, argument: Tensor, before: Callable[[Tensor], State]) -> tuple[Unit, Tensor, State]:
        expected = self._saved[self._starts[step] : self._starts[step + 1]]
        return evaluate_again(self._steps[step], self.scheme, argument, before, expected)

    def _refuse_not_finite(self, state: State, recovered: bool) -> None:
        if not all_finite(state):
            steps = self._steps[self._lowest :] if recovered else self._steps
            refuse_not_finite(steps, None if recovered else self._first_not_finite(), recovered)

    def _first_not_finite(self) -> int | None:
        """The step whose value was the first that was not finite; None where the reason is another one."""
        if self._entry is None:
            return self._totals.first_not_finite()
        if not (self._entry.unchanged and all_finite(self._entry.streams)):
            return None
        cursor = Cursor(-1, 0, self._entry.streams)
        while cursor.step < len(self._steps):
            if not is_finite(total(self._forth(cursor))):
                return cursor.step - 1
        return None

"""Callbacks of ``transformers.Trainer``: memory, drift and throughput every n steps; schemes that change. The package
is not loaded before a callback is made.
"""

from __future__ import annotations

import inspect
import time
import weakref
from collections.abc import Callable, Mapping
from functools import partial, wraps
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer

from reversa.check.step import default_loss, tensors_of
from reversa.errors import StateError, import_extra
from reversa.memory import MemoryReport, estimate
from reversa.schedule import Annealing
from reversa.train.late import LateBase
from reversa.train.monitor import Clock, Look, Monitor

if TYPE_CHECKING:
    from transformers import TrainerCallback  # pyright: ignore[reportMissingImports]
else:
    TrainerCallback = object


class Anneal(LateBase, Annealing, TrainerCallback):
    """Takes chains from a network near the one that was pretrained to a reversible one: as
    :class:`reversa.train.anneal.Anneal`, which tells the formulas.

    Args:
        scheme: where it ends; or for each chain, by its name.
        steps: optimiser steps until then.

    Raises:
        MissingExtra: transformers is not installed.
        SettingError: fewer than one step, or another kind of scheme; (in training) a model without such chains.

    >>> from reversa.train.huggingface import Anneal
    >>> trainer = transformers.Trainer(  # doctest: +SKIP
    ...     model, arguments, callbacks=[Anneal(reversa.Momentum(0.9), steps=500)]
    ... )
    """

    base = "transformers", "TrainerCallback", "hf"

    def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.apply(given["model"], state.global_step)


class MemoryMonitor(Monitor, TrainerCallback):
    r"""Logs memory, drift and throughput in every n-th step of the optimizer: a callback of ``transformers.Trainer``.

    ``memory/peak_bytes``
        :math:`\max_t \sum_{s \,\text{alive at}\, t} \text{bytes}(s)` over the storages s of parameters, buffers,
        gradients, optimizer state, batch, activations and temporary tensors, in bytes. On the CPU tensors are counted,
        as by :func:`reversa.memory.measure`; on an accelerator it is the peak of its allocator
        (``torch.cuda.max_memory_allocated()``, which is reset before), with all else that the process has there.
    ``memory/predicted_peak_bytes``
        What :func:`reversa.memory.estimate` says of a step with this model, batch and optimizer, and the loss that
        the model returns; made anew when shapes change. It is of one batch, without gradients at the beginning and
        with the optimizer's state: the peak of accumulated batches has their gradients on top, and the very
        first step makes the state on its way.
    ``drift``
        :math:`\max_k \lVert \hat s_k - s_k \rVert / \lVert s_k \rVert` over the steps k that chains undo in the
        backward pass, of the state :math:`\hat s_k` that is recovered and :math:`s_k` that was there. No unit; 0 in
        exact arithmetic. Of a stream of more than 16384 elements it is a sample. Not logged where no chain goes back by
        its inverse.
    ``throughput``
        :math:`\sum \text{samples} / \sum \text{seconds}` of this process over the steps since the last report: with
        loading of data, without evaluation, without saving, and without the steps that are looked at (but for
        ``every=1``). The last batch of an epoch counts in full. In Lightning, ``steps_per_second`` (batches) stands in
        its place where a batch does not tell its size by the first dimension of a tensor.

    The training computes the same bits as without the callback. It costs nothing in the other steps. In a step that
    is looked at, the CPU looks at every operation, and a part of each state is copied to the host for the drift: at
    most 2 * 16384 elements of each stream. An estimate is made with a copy that has no numbers, and takes the time of
    some steps.

    Left out, with one warning that says why: the prediction for a model that cannot be estimated, and on the CPU
    the peak of compiled code, whose tensors nobody sees.

    The numbers are logged by ``trainer.log``, as a row of their own in ``trainer.state.log_history``.

    Args:
        every: steps from one report to the next.

    Raises:
        MissingExtra: transformers is not installed.
        SettingError: ``every`` is no number of steps.
        StateError: (in training) another loop than that of ``transformers.Trainer`` calls the callback.

    >>> from reversa.train.huggingface import MemoryMonitor
    >>> trainer = transformers.Trainer(model, arguments, callbacks=[MemoryMonitor(every=50)])  # doctest: +SKIP
    """

    base = "transformers", "TrainerCallback", "hf"

    def __init__(self, every: int = 50) -> None:
        super().__init__(every)
        self._trainer: Callable[[], Any] = _no_trainer
        self._inputs: Mapping[str, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.close()
        self.clock = Clock()
        self._trainer = weakref.ref(_calling_trainer())

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if (state.global_step + 1) % self.every == 0:
            trainer = self._trainer()
            look = self.begin(trainer.model_wrapped, [_plain(trainer.optimizer)])
            self._count(look, trainer, "training_step", self._note)
            self._count(look, trainer.optimizer, "step")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        look = self.look
        if look is None or self.every == 1:
            self.clock.count(args.train_batch_size * args.gradient_accumulation_steps)
        if look is not None:
            trainer, inputs, self._inputs = self._trainer(), self._inputs, {}
            predict = partial(_estimate, trainer.model, inputs, _plain(trainer.optimizer))
            numbers = self.report(look, trainer.model, inputs, predict)
            should_log = control.should_log
            trainer.log(numbers)
            control.should_log = should_log  # which log() takes for done

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.clock.begun = time.perf_counter()

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.clock.begun = time.perf_counter()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.close()
        self._trainer = _no_trainer

    def _note(self, look: Look, _: Any, inputs: Mapping[str, Any], *__: Any) -> None:
        self._inputs = inputs
        look.was_there(tensors_of(inputs))

    def _count(self, look: Look, owner: Any, name: str, note: Callable[..., None] | None = None) -> None:
        """Count inside a method of one object until the look is closed. An error closes it: no event tells of one."""
        method, own = getattr(owner, name), name in vars(owner)

        @wraps(method)
        def counted(*args: Any, **kwargs: Any) -> Any:
            try:
                if note is not None:
                    note(look, *args)
                with look.counting():
                    return method(*args, **kwargs)
            except BaseException:
                self.close()
                raise

        setattr(owner, name, counted)
        look.until_closed.callback(partial(setattr, owner, name, method) if own else partial(delattr, owner, name))


def _no_trainer() -> None:
    return None


def _calling_trainer() -> Any:
    """The trainer whose loop calls. Events do not hand it over, and it alone logs, and knows where a step ends by an
    error.
    """
    kind = import_extra("transformers", "hf").Trainer
    frame = inspect.currentframe()
    while frame is not None:
        if isinstance(found := frame.f_locals.get("self"), kind):
            return found
        frame = frame.f_back
    raise StateError(
        "MemoryMonitor counts and logs through transformers.Trainer, and another loop called it: use it in Trainer's "
        "callbacks, or reversa.memory.LiveBytes in a loop of your own"
    )


def _plain(optimizer: Any) -> Optimizer:
    """PyTorch's optimizer, without what accelerate wraps it in."""
    return getattr(optimizer, "optimizer", optimizer)


def _estimate(model: nn.Module, inputs: Mapping[str, Any], optimizer: Optimizer) -> MemoryReport:
    return estimate(model, dict(inputs), _loss_of, optimizer)


def _loss_of(output: Any) -> Tensor:
    """The loss that the model returns, or else that of an estimate."""
    return output["loss"] if isinstance(output, Mapping) and "loss" in output else default_loss(output)

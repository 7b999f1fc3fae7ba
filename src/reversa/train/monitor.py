"""Memory, drift and throughput, every n steps of a training: Lightning's callback, and what Hugging Face's shares."""

from __future__ import annotations

import inspect
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import _disable_current_modes  # private: PyTorch has no public name for it
from torch.utils._pytree import tree_leaves

from reversa.check.step import tensors_of
from reversa.check.trace import NOTHING, Trace, chains, distance
from reversa.engine import _torch
from reversa.errors import SettingError
from reversa.memory import LiveBytes, MemoryReport, estimate
from reversa.memory.live import storages
from reversa.memory.measure import Allocator
from reversa.memory.notes import is_compiled
from reversa.schemes import Scheme, State
from reversa.train.late import LateBase

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
else:
    Callback = object

PEAK, PREDICTED = "memory/peak_bytes", "memory/predicted_peak_bytes"
PART = 1 << 14  # of each stream of a state, about so many elements are compared
Numbers = dict[str, float]


@dataclass
class Clock:
    """Laps: each from the end of one step to the end of the next, loading of data included."""

    seconds: float = 0.0
    steps: int = 0
    samples: int | None = 0
    begun: float = field(default_factory=time.perf_counter)

    def count(self, samples: int | None) -> None:
        """A lap is over, with so many samples where that is known; the next one begins."""
        now = time.perf_counter()
        self.seconds, self.begun = self.seconds + now - self.begun, now
        self.steps += 1
        self.samples = None if self.samples is None or samples is None else self.samples + samples

    def rate(self) -> Numbers:
        """Samples a second, or else steps."""
        name, done = ("steps_per_second", self.steps) if self.samples is None else ("throughput", self.samples)
        return {name: done / self.seconds} if self.steps else {}


class RoundTrip(Trace):
    """A trace of the drift alone, of a part of each state, on the host and unseen: the step's memory is as without."""

    def _forward(self, scheme: Scheme, state: State, value: Tensor, step: int) -> State:
        after = scheme.forward(state, value, step)
        if _torch.graph_task() < 0 and not value.is_nested:  # not where a backward pass goes forwards once more
            part = _part(scheme.told(state))
            self._seen.setdefault(step, []).append((part, part[0]))
        return after

    def _inverse(self, scheme: Scheme, argument: Tensor, rest: State, value: Tensor, step: int) -> State:
        before = scheme.inverse(argument, rest, value, step)
        if seen := self._seen.get(step):
            recovered = _part(scheme.told(before))
            with _disable_current_modes():  # the nearest is of the forward pass that is undone
                error, nearest = min((distance(recovered, state), i) for i, (state, _) in enumerate(seen))
            del seen[nearest]
            self.drift = max(self.drift, (error, step))
        return before


def _part(state: State) -> State:
    """Elements at equal distances, which are odd: never of a single channel."""
    with _disable_current_modes(), torch.no_grad():
        every = [torch.arange(0, s.numel(), s.numel() // PART | 1, device=s.device) for s in state]
        return tuple(s.detach().take(index).cpu() for s, index in zip(state, every, strict=True))


@contextmanager
def round_trips(model: nn.Module) -> Iterator[list[RoundTrip]]:
    """Inside, every chain that goes back by its inverse is looked at."""
    inverted = [(holder, RoundTrip(name, places)) for name, holder, places in chains(model) if holder.engine.inverts]
    with ExitStack() as undo:
        for holder, trip in inverted:
            vars(holder)["scheme_for"] = partial(trip.looked_at, holder.scheme_for)
            undo.callback(vars(holder).pop, "scheme_for")
        yield [trip for _, trip in inverted]


class Look:
    """A step that is looked at: its chains' round trips, until closed, and the bytes alive while it counts."""

    def __init__(self, model: nn.Module, optimizers: Iterable[Optimizer], memory: Allocator | None) -> None:
        self.until_closed = ExitStack()
        self.trips, self.memory = self.until_closed.enter_context(round_trips(model)), memory
        self.live = LiveBytes(device="cpu") if memory is not None and memory.backend is None else None
        self.was_there([*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters())])
        self.was_there(tree_leaves([dict(optimizer.state) for optimizer in optimizers]))

    def was_there(self, values: Iterable[Any]) -> None:
        """Count the tensors among these as well, for as long as they are alive."""
        if self.live is not None:
            for storage in chain.from_iterable(storages(value) for value in values if isinstance(value, Tensor)):
                self.live._add(storage)

    def counting(self) -> AbstractContextManager[Any]:
        """A part of the step, in which tensors are counted where no allocator does."""
        return self.live or nullcontext()

    def numbers(self) -> Numbers:
        """What was seen."""
        drift = max((trip.drift for trip in self.trips), default=NOTHING)
        found: Numbers = {} if drift == NOTHING else {"drift": drift[0]}
        if self.live is not None:
            found[PEAK] = self.live.peak
        elif self.memory is not None:
            self.memory.wait()
            found[PEAK] = self.memory.backend.max_memory_allocated(self.memory.device)
        return found


class Monitor(LateBase):
    """What both callbacks do: every n-th step is looked at, the others are timed."""

    def __init__(self, every: int = 50) -> None:
        if not (isinstance(every, int) and every >= 1):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise SettingError(f"every must be a number of steps >= 1, got {every!r}")
        self.every, self.clock = every, Clock()
        self.look: Look | None = None
        self._left: set[str] = set()
        self._predicted: tuple[Any, Numbers] = None, {}

    def begin(self, model: nn.Module, optimizers: Sequence[Optimizer]) -> Look:
        """Look at the step that comes."""
        self.clock.seconds -= time.perf_counter()
        memory = self._memory(model)  # waits until an accelerator is done with the steps before: their time
        self.clock.seconds += time.perf_counter()
        self.look = Look(model, optimizers, memory)
        return self.look

    def close(self) -> None:
        """Leave the step that is looked at, where there is one."""
        if self.look is not None:
            self.look.until_closed.close()
        self.look = None

    def report(self, look: Look, model: nn.Module, batch: Any, predict: Callable[[], MemoryReport]) -> Numbers:
        """The numbers of the step that was looked at, and of those before it. Then a lap begins."""
        numbers = look.numbers()
        self.close()
        numbers |= self._prediction(model, batch, predict) | self.clock.rate()
        self.clock = Clock()
        return numbers

    def _memory(self, model: nn.Module) -> Allocator | None:
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        try:
            if device.type == "cpu" and is_compiled(model):
                raise SettingError("tensors are counted on the CPU, and compiled code makes some that nobody sees")
            memory = Allocator(device)
            memory.reset()
            return memory
        except SettingError as error:
            return self._leave_out(PEAK, error)

    def _prediction(self, model: nn.Module, batch: Any, predict: Callable[[], MemoryReport]) -> Numbers:
        """Made again where shapes change, until it fails."""
        shapes = [(t.shape, t.dtype) for t in tensors_of(batch)]
        if PREDICTED not in self._left and shapes != self._predicted[0]:
            self._predicted = shapes, {}
            try:
                self._predicted = shapes, {PREDICTED: predict().peak_bytes}
            except Exception as error:  # a user's model may raise anything
                self._leave_out(PREDICTED, error)
        return self._predicted[1]

    def _leave_out(self, what: str, error: Exception) -> None:
        if what not in self._left:
            self._left.add(what)
            warnings.warn(f"MemoryMonitor leaves {what} out. {type(error).__name__}: {error}", stacklevel=2)


class MemoryMonitor(Monitor, Callback):
    r"""Logs memory, drift and throughput in every n-th step of the optimizer, as a callback of Lightning.

    - ``memory/peak_bytes``: :math:`\max_t \sum_{s \,\text{alive at}\, t} \text{bytes}(s)` in the step's last batch.
    - ``memory/predicted_peak_bytes``: what :func:`reversa.memory.estimate` says of that training step.
    - ``drift``: :math:`\max_k \lVert \hat s_k - s_k \rVert / \lVert s_k \rVert` of states that chains recover.
    - ``throughput``: :math:`\sum \text{samples} / \sum \text{seconds}` over the batches since the last report.

    :class:`reversa.train.huggingface.MemoryMonitor` says more of each, and what it costs. Lightning lets old gradients
    go after the forward pass, an estimate begins without. A training step that reaches for ``self.trainer`` or
    optimizers cannot be estimated. The numbers go the way of ``self.log``: to loggers when ``log_every_n_steps`` says.

    Args:
        every: steps from one report to the next.

    Raises:
        MissingExtra: Lightning is not installed.
        SettingError: ``every`` is no number of steps.

    >>> from lightning.pytorch import Trainer
    >>> trainer = Trainer(callbacks=[MemoryMonitor(every=50)], logger=False, enable_checkpointing=False)
    """

    base = "lightning.pytorch", "Callback", "train"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._steps, self.clock = trainer.global_step, Clock()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.close()
        if _moves(trainer, batch_idx) and (self._steps + 1) % self.every == 0:
            look = self.begin(pl_module, trainer.optimizers)
            look.was_there(tensors_of(batch))
            look.until_closed.enter_context(look.counting())

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._steps += _moves(trainer, batch_idx)
        if self.look is None or self.every == 1:
            self.clock.count(next((t.shape[0] for t in tensors_of(batch) if t.dim()), None))
        if self.look is not None:
            numbers = self.report(self.look, pl_module, batch, partial(_estimate, trainer, batch, batch_idx))
            doubles = {name: torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()}
            pl_module.log_dict(doubles, batch_size=1)  # in float64 bytes are told to the last

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.clock.begun = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.close()  # the last batch may have been skipped

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.close()


def _moves(trainer: Trainer, batch_idx: int) -> bool:
    """Whether the optimizer makes a step with this batch, and gradients are not only accumulated."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or batch_idx + 1 == trainer.num_training_batches


class _TrainingStep(nn.Module):
    """A training step as a module: what is copied with it is the model alone."""

    def __init__(self, model: nn.Module, run: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self.model, self.run = model, run

    def forward(self, batch: Any) -> Any:
        return self.run(self.model, batch)


def _estimate(trainer: Trainer, batch: Any, batch_idx: int) -> MemoryReport:
    module, precision = trainer.lightning_module, trainer.precision_plugin
    step = type(module).training_step  # an instance's own would run the instance
    more = (batch_idx,) if len(inspect.signature(step).parameters) > 2 else ()

    def run(twin: Any, batch: Any) -> Any:
        with precision.train_step_context():
            output = step(twin, batch, *more)
        return output["loss"] if isinstance(output, Mapping) else output

    optimizer = trainer.optimizers[0] if trainer.optimizers else None
    return estimate(_TrainingStep(module, run), (batch,), lambda loss: loss, optimizer)

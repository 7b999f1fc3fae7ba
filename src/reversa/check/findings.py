"""What the training steps of a check say: rows, problems and notes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from reversa.check.report import CheckReport, Row, Status
from reversa.check.step import Case, Outcome, worst
from reversa.check.trace import NOTHING, Finding, Trace, chains
from reversa.engine import Store, _torch
from reversa.errors import ConversionError, ReversaError
from reversa.exact import run_in

# A parameter whose gradient is shorter than this, in units of the typical one, is compared with the typical one.
FLOOR = 1e-2

STATES = (
    "Use exact=True, which recovers every bit, a gamma nearer to 1, or Invert(anchors=1), which keeps every state. "
    "Where anchors are off, Invert(anchors='auto') may be enough: it keeps a state where the drift law asks for one."
)
REPEAT = (
    "A residual function must compute the same thing twice from the same input: take counters, caches and random "
    "numbers of its own out of its forward, let it ask reversa.is_replaying(), or use engine=Store()."
)
SCHEME = "Correct uncover() and inverse() of the scheme, or use engine=Store()."
UNKNOWN = "Use engine=Store() or Recompute() for this model until the cause is found."
SLOPE = (
    "Where a function cuts or replaces gradients on purpose (detach, straight-through, a custom backward) this is "
    "as it must be, and the other rows hold; otherwise correct that function's backward."
)
EFFECT = "A residual function writes to it when it is evaluated again: let it ask reversa.is_replaying() first."


@dataclass(frozen=True)
class Precision:
    """A data type to train in, and the errors that are too large for rounding there."""

    name: str
    double: bool
    eps: float
    noticeable: float
    wrong: float

    def status(self, error: float) -> Status:
        return "wrong" if error > self.wrong else "noticeable" if error > self.noticeable else "right"


def precisions(case: Case) -> list[Precision]:
    """float64, and the model's own: with the type that autocast computes in, if that is on."""
    # States are recovered to 1e-11 in float64, but parts of a model may compute in float32 all the same.
    double = Precision("float64", True, torch.finfo(torch.float64).eps, 1e-9, 1e-6)
    name, under = str(case.dtype).removeprefix("torch."), case.dtype
    kind = next(iter(sorted({d.type for d in case.devices} - {"cpu"})), "cpu")
    if _torch.any_autocast() and torch.is_autocast_enabled(kind):
        under = torch.get_autocast_dtype(kind)
        name = f"{name} (autocast to {str(under).removeprefix('torch.')})"
    if under == torch.float64:
        return [double]
    eps = torch.finfo(under).eps
    return [double, Precision(name, False, eps, *((1e-4, 1e-3) if under == torch.float32 else (4 * eps, 32 * eps)))]


@dataclass
class Findings:
    """Rows in the making, gathered over the data types."""

    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    status: dict[str, Status] = field(default_factory=dict)
    where: dict[str, str] = field(default_factory=dict)
    problems: list[tuple[int, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, what: str, precision: Precision, error: float, where: str, problem: tuple[int, str, str]) -> None:
        """An error, and the problem that it means where it is too large: rank (causes before effects), text, remedy."""
        rank: list[Status] = ["not measured", "right", "noticeable", "wrong"]
        status = precision.status(error)
        self.errors.setdefault(what, {})[precision.name] = error
        if rank.index(status) >= rank.index(self.status.get(what, "not measured")):
            self.status[what], self.where[what] = status, where if error else ""
        if status == "wrong":
            size = f" (relative error {error:.0e} in {precision.name})" if error < float("inf") else ""
            self.problems.append((problem[0], f"{problem[1]}{size}. {problem[2]}"))

    def leave(self, what: str, why: str) -> None:
        """Something that was not measured."""
        self.errors[what], self.status[what], self.where[what] = {}, "not measured", why

    def rows(self) -> tuple[Row, ...]:
        return tuple(Row(what, errors, self.status[what], self.where[what]) for what, errors in self.errors.items())


def examine(case: Case) -> CheckReport:
    """All of the check.

    Raises:
        ConversionError: there is no reversible chain in the model.
    """
    model, found = type(case.model).__name__, Findings()
    rules = dict.fromkeys(
        f"{run_in(holder.scheme, holder.exact, case.dtype, case.dtype)} and {holder.engine}"
        for _, holder, _ in chains(case.model)
    )
    if not rules:
        raise ConversionError(
            f"check needs a model with reversible chains, and {model} has none. Call reversa.convert(model) first, or "
            "build it with reversa.ReversibleSequence."
        )
    if not case.model.training:
        found.notes.append("checked in eval mode, as the model is. Call model.train() to check dropout and statistics.")
    columns = precisions(case)
    with case.undisturbed():
        for precision in columns:
            _compare(case, precision, found, alone=len(columns) == 1)
    # Causes first; of one cause what it does in the model's own type, which was looked at last.
    found.problems.reverse()
    found.problems.sort(key=lambda problem: problem[0])
    return CheckReport(
        model,
        "; ".join(rules),
        tuple(precision.name for precision in columns),
        found.rows(),
        tuple(dict.fromkeys(text for _, text in found.problems)),
        tuple(dict.fromkeys(found.notes)),
    )


def _compare(case: Case, precision: Precision, found: Findings, alone: bool) -> None:
    """One training step with stored activations and one with the model's engines, in one data type."""
    try:
        stored = case.step(precision.double, Store())
    except Exception as error:
        if not precision.double or alone:
            raise
        found.notes.append(
            f"float64 was left out, because the model does not run in it: {type(error).__name__}: {error}"
        )
        return
    try:
        own = case.step(precision.double, None)
    except Exception as error:  # whatever a second evaluation meets in someone else's code
        kind = "" if isinstance(error, ReversaError) else f"{type(error).__name__}: "
        text = str(error) if kind == "" else f"{error}. {REPEAT}"
        found.leave("gradients", "the training step raised an error")
        found.problems.append((0, f"the training step raises an error in {precision.name}. {kind}{text}"))
        return
    if not bool(torch.isfinite(stored.loss)):
        found.leave("gradients", "the loss is not finite")
        found.problems.append(
            (0, f"the loss is {float(stored.loss)} with stored activations too. Look at inputs and weights.")
        )
        return
    _forward(precision, stored, own, found)
    _gradients(case, precision, stored, own, found)
    _steps(precision, own.traces, found)
    _effects(precision, stored, own, found)
    if precision.double and any(g is not None for g in stored.gradients.values()):
        _slope(case, precision, stored, found)


def _forward(precision: Precision, stored: Outcome, own: Outcome, found: Findings) -> None:
    error, _ = worst({"loss": own.loss}, {"loss": stored.loss})
    text = (
        "the forward pass gives another loss from the same weights, inputs and random numbers: nothing can be compared"
    )
    remedy = "Look for state outside the model, a generator of its own, or operations that are not deterministic."
    found.add("the loss", precision, error, "", (0, text, remedy))


def _gradients(case: Case, precision: Precision, stored: Outcome, own: Outcome, found: Findings) -> None:
    none = [name for name, gradient in stored.gradients.items() if gradient is None]
    if len(none) == len(stored.gradients):
        why = "every parameter is frozen" if not none else "the loss depends on no parameter that requires one"
        found.leave("gradients", "there are none")
        problem = f"no parameter and no input gets a gradient: {why}. Call requires_grad_() on what is to be trained."
        found.problems.append((0, problem))
        return
    if none:
        names = ", ".join(none[:3]) + (", ..." if len(none) > 3 else "")
        found.notes.append(
            f"{len(none)} of {len(stored.gradients)} parameters get no gradient from this loss: {names}."
        )
    error, name = worst(own.gradients, stored.gradients, FLOOR)
    if not precision.double and error > precision.wrong and found.status.get("gradients") in ("right", "noticeable"):
        # What a change of the weights, as small as rounding and drift, does to the same gradients without reversal.
        size = max(precision.eps, min(precision.noticeable, max(trace.drift[0] for trace in own.traces)))
        moved = case.step(precision.double, Store(), shift=size)
        unsure, _ = worst(moved.gradients, stored.gradients, FLOOR)
        if error <= 3 * unsure:
            precision = replace(precision, wrong=error)
            found.notes.append(
                f"with these inputs, changing the weights by {size:.0e} changes the gradients by {unsure:.0e} in "
                f"{precision.name}, also with stored activations: float64 is the judge. A larger batch usually helps."
            )
    text = f"the gradients are not those of stored activations; the worst is that of {name}"
    found.add("gradients", precision, error, f"worst: {name}", (4, text, UNKNOWN))


def _steps(precision: Precision, traces: list[Trace], found: Findings) -> None:
    """What the chains computed: is each step undone, is each function repeated, how far do the states drift?"""
    if not any(trace.taken for trace in traces):
        found.problems.append((0, "no reversible chain ran with these inputs. Pass inputs that reach them."))
    for trace in traces:
        if not trace.taken:
            found.notes.append(f"the chain {trace.name} did not run with these inputs.")
    _most(precision, traces, found, "functions, evaluated again", lambda trace: trace.repeat, _repeat)
    _most(precision, traces, found, "steps, undone", lambda trace: trace.undo, _undo)
    for trace in traces:
        what = f"states of {trace.name} ({trace.taken} steps)"
        if trace.drift == NOTHING:
            found.leave(what, "no state is recovered by inverting" if trace.taken else "did not run")
            continue
        error, step = trace.drift
        text = f"states are not recovered in {trace.name}; the worst is the one before {trace.place(step)}"
        found.add(what, precision, error, f"worst: before {trace.place(step)}", (3, text, STATES))


def _repeat(place: str) -> tuple[int, str, str]:
    return 1, f"{place} computes something else when it is evaluated again in the backward pass", REPEAT


def _undo(place: str) -> tuple[int, str, str]:
    return 2, f"the scheme's inverse does not undo its forward at {place}", SCHEME


def _most(
    precision: Precision,
    traces: list[Trace],
    found: Findings,
    what: str,
    finding: Callable[[Trace], Finding],
    problem: Callable[[str], tuple[int, str, str]],
) -> None:
    """The chain with the largest error of a kind."""
    trace = max(traces, key=finding)
    error, step = finding(trace)
    found.add(what, precision, error, f"worst: {trace.place(step)}", problem(trace.place(step)))


def _effects(precision: Precision, stored: Outcome, own: Outcome, found: Findings) -> None:
    if stored.buffers or own.buffers:
        error, name = worst(own.buffers, stored.buffers)
        text = f"the buffer {name} is not what stored activations leave after a training step"
        found.add("buffers after the step", precision, error, f"worst: {name}", (5, text, EFFECT))
    error = 0.0 if own.generators.same(stored.generators) else float("inf")
    text = "the random generators are not where stored activations leave them after a training step"
    found.add("random generators after it", precision, error, "", (5, text, EFFECT))


def _slope(case: Case, precision: Precision, stored: Outcome, found: Findings) -> None:
    what = "slope of the loss, measured"
    error, clear = case.slope_error(stored.gradients)
    if not clear and error > 1e-3:
        found.leave(what, "the loss is too rough for differences")
        return
    measured = replace(precision, noticeable=1e-3, wrong=1e-2)
    text = "backpropagation, also with stored activations, gives another slope of the loss than differences do"
    found.add(what, measured, error, "", (6, text, SLOPE))

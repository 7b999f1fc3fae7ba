"""Which models can be converted, and is everything right with them? A row for each model of the zoo, none left out.

``python benchmarks/zoo.py`` takes three minutes; ``--only NAME`` runs the rows that have NAME in theirs. It exits with
status 1 where a row fails. The table goes into docs/conversion.md, too.
"""

from __future__ import annotations

import argparse
import copy
import gc
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import report
import reversa
from reversa.memory import LiveBytes
from zoo_hf import hugging_face_cases
from zoo_models import Case, Inputs, torch_cases, torchvision_cases
from zoo_oracle import GAMMA, loss_of, outputs_of, ruled, same, step, worst_error
from zoo_timm import timm_cases

ADDED, ALLOWED = 2, 1e-9
PAGE = report.HERE.parent / "docs" / "conversion.md"
BEGIN, END = "<!-- zoo: this table is written by benchmarks/zoo.py -->", "<!-- zoo -->"
LIBRARIES: dict[str, Callable[[], list[Case]]] = {
    "torchvision": torchvision_cases,
    "timm": timm_cases,
    "transformers": hugging_face_cases,
    "torch.nn": torch_cases,
}
COLUMNS = (
    "model",
    "stages",
    "blocks",
    "random",
    "error",
    "tensors",
    "state",
    "exact",
    "restored",
    "bytes a block",
    "not converted",
    "verdict",
)
NOTES = f"""
## How to read it

Every model is built by its library's own constructor, with few layers and channels, in float64 and training mode, with
dropout, stochastic depth and LayerDrop on where the model has them. All parameters are moved by noise of 0.02, so that
no branch hides behind a zero at which it begins. It is converted with Momentum({GAMMA}). A row of "none" is a model
without residual blocks, of which `reversa.explain` says so.

- **stages, blocks**: the lengths of the stages that were found, which must be those that the library's source says.
  An `e` stands where the finder was given the inputs, since the model does not tell them (an image size of one's own,
  or a class without a registered name).
- **random**: whether blocks of the stages draw random numbers.
- **error**: of the gradient, against the same update rule with stored activations, written without this library: the
  blocks' forward replaced on the instances, one velocity for each stage, ordinary autograd, same seed. The worst over
  all **tensors** with a gradient, which are every parameter and every input in floating point. Largest difference over
  the largest element of that tensor's gradient; where that is less than 1e-6 of the largest of all (biases whose
  gradient is zero but for rounding), over the latter times 1e-6. Required: {ALLOWED:g}, also of the outputs.
- **state**: BatchNorm's statistics and counters are the same rule's to the bit, and so is the random number that is
  drawn after the step.
- **exact**: with `exact=True`, outputs, gradients and buffers are `torch.equal` to those of `engine=Store()`.
- **restored**: the keys of `state_dict` never changed; after `reversa.restore` every module has its class again, and
  outputs and gradients in training mode are those of a copy that was never converted, to the bit.
- **bytes a block**: live bytes that a converted model holds more after its forward pass for each block more, and those
  of the model that is **not converted**. Blocks are added through the constructors.
"""


# ------------------------------------------------------------------ one row


@dataclass
class Row:
    """What was seen of a model, and what of it is wrong."""

    cells: dict[str, str]
    wrong: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def must(self, column: str, holds: bool, otherwise: str = "no") -> None:
        self.cells[column] = "yes" if holds else otherwise
        if not holds:
            self.wrong.append(column)


class Probe:
    """A model before and after its conversion, beside a copy that stays as it was."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        self.case, self.inputs = case, case.inputs()
        self.model = self.made(0)
        self.original = copy.deepcopy(self.model)

    def made(self, more: int) -> nn.Module:
        """In float64, with noise on every parameter."""
        model = self.case.make(more).double().train()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        return model

    @property
    def example(self) -> Any:
        if not self.case.example:
            return None
        return self.inputs[0] or self.inputs[1]

    def convert(self, model: nn.Module, **settings: Any) -> nn.Module:
        return reversa.convert(model, scheme=reversa.Momentum(GAMMA), example=self.example, **settings)

    def stages(self) -> list[Sequence[str]]:
        return [stage.blocks for stage in reversa.explain(self.model).stages]

    def gradients(self, row: Row) -> None:
        """A step of the converted model beside the rule's, and what was found."""
        keys = list(self.model.state_dict())
        self.convert(self.model)
        stages = self.stages()
        found = tuple(map(len, stages))
        row.cells["stages"] = ", ".join(map(str, found)) + " e" * self.case.example
        row.cells["blocks"] = str(sum(found))
        if found != self.case.stages:
            row.wrong.append(f"stages {found} instead of {self.case.stages}")
        actual = step(self.model, self.inputs)
        with ruled(self.original, stages) as rules:
            expected = step(self.original, self.inputs)
        drew = any(rule.drew for rule in rules)
        row.cells["random"] = "yes" if drew else "-"
        if drew != self.case.random:
            row.wrong.append("random")
        error = worst_error(actual, expected)
        row.cells["error"] = f"{error:.0e}"
        row.cells["tensors"] = str(sum(t is not None for t in expected.gradients.values()))
        if not error <= ALLOWED:
            row.wrong.append("error")
        row.must("state", same(actual.state.values(), expected.state.values()))
        if list(self.model.state_dict()) != keys:
            row.wrong.append("keys of state_dict")

    def restored(self, row: Row) -> None:
        """The original's classes and bits."""
        reversa.restore(self.model)
        self.original.load_state_dict(self.model.state_dict())
        back, before = step(self.model, self.inputs), step(self.original, self.inputs)
        classes = [[type(m) for m in model.modules()] for model in (self.model, self.original)]
        row.must("restored", classes[0] == classes[1] and same(back.everything, before.everything))

    def exact(self, row: Row) -> None:
        steps = []
        state = copy.deepcopy(self.model.state_dict())
        for engine in (reversa.Invert(), reversa.Store()):
            self.model.load_state_dict(state)
            self.convert(self.model, exact=True, engine=engine)
            steps.append(step(self.model, self.inputs).everything)
            reversa.restore(self.model)
        row.must("exact", same(*steps))

    def bytes_for_a_block(self, row: Row) -> None:
        """At two depths, plain and converted: the difference, for each block that was added."""
        deep = self.made(ADDED)
        plain = held_after_forward(deep, self.inputs) - held_after_forward(self.original, self.inputs)
        self.convert(deep)
        ours = held_after_forward(deep, self.inputs) - held_after_forward(self.model, self.inputs)
        added = blocks_of(deep) - blocks_of(self.model)
        row.cells |= {"bytes a block": f"{ours / added:,.0f}", "not converted": f"{plain / added:,.0f}"}
        if ours or plain <= 0:
            row.wrong.append("bytes a block")


def blocks_of(model: nn.Module) -> int:
    return sum(len(stage.blocks) for stage in reversa.explain(model).stages)


def held_after_forward(model: nn.Module, inputs: Inputs) -> int:
    """Live bytes between a forward and its backward pass; an earlier one has made what models keep for good."""
    with torch.no_grad():
        model(*inputs[0], **inputs[1])
    torch.manual_seed(7)
    gc.collect()
    gc.disable()
    try:
        with LiveBytes(exclude=model) as counted:
            loss = loss_of(outputs_of(model, inputs))
            held = counted.live
            del loss
    finally:
        gc.enable()
    return held


def control(case: Case, row: Row) -> None:
    """A model without residual blocks: nothing is found, and the reason is told."""
    found = reversa.explain(case.make(0))
    row.cells["stages"] = row.cells["blocks"] = "-"
    if found.stages:
        row.wrong.append("stages were found where there are no residual blocks")
    row.remarks = [f"{name} {reason}" for name, reason in found.left] or [str(found).splitlines()[0]]


def run(name: str, case: Case) -> Row:
    """One row; an error is part of it."""
    row = Row(dict.fromkeys(COLUMNS, "") | {"model": name})
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if case.stages:
                probe = Probe(case)
                for look in (probe.gradients, probe.bytes_for_a_block, probe.restored, probe.exact):
                    look(row)
            else:
                control(case, row)
    except Exception as error:  # whatever it is: a row is never left out
        row.wrong.append(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")
    row.cells["verdict"] = "FAILS" if row.wrong else "right" if case.stages else "none"
    return row


# ------------------------------------------------------------------ the table


def all_cases() -> dict[str, Case]:
    """By library and name."""
    return {f"{library} {case.name}": case for library, cases in LIBRARIES.items() for case in cases()}


def chosen(only: Sequence[str]) -> dict[str, Case]:
    cases = all_cases()
    return {name: case for name, case in cases.items() if not only or any(part in name for part in only)}


def rows_of(cases: dict[str, Case]) -> Iterator[Row]:
    """With progress on a terminal."""
    for i, (name, case) in enumerate(cases.items(), 1):
        if sys.stderr.isatty():
            print(f"\r\x1b[K{i} of {len(cases)}: {name}", end="", file=sys.stderr, flush=True)
        yield run(name, case)
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def tables(rows: Sequence[Row]) -> list[report.Table]:
    """The zoo, and why a row is none or fails."""
    count = Counter(row.cells["verdict"] for row in rows)
    title = f"{len(rows)} models: {count['right']} right, {count['none']} without a stage, {count['FAILS']} failing"
    zoo = report.Table(title, COLUMNS, [tuple(row.cells[column] for column in COLUMNS) for row in rows])
    reasons: list[Sequence[str]] = [
        (row.cells["model"], "; ".join(row.wrong + row.remarks)) for row in rows if row.wrong or row.remarks
    ]
    return [zoo, report.Table("Why not", ("model", "reason"), reasons)]


def into_page(table: report.Table) -> None:
    """Between its marks in the document of conversion."""
    before, begin, end = PAGE.read_text().partition(BEGIN)
    after = end.partition(END)[2]
    PAGE.write_text(f"{before}{begin}\n\n{table.title}.\n\n{table.markdown()}\n\n{END}{after}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=(), metavar="NAME", help="rows with this in their name; no file")
    only = parser.parse_args().only
    torch.set_num_threads(1)
    cases = chosen(only)
    if not cases:
        parser.error(f"no model of the zoo has {' or '.join(only)} in its name: {', '.join(all_cases())}")
    rows = list(rows_of(cases))
    made = tables(rows)
    for table in made:
        table.show()
    if not only:
        question = "Which models can be converted, and is everything right with them?"
        report.write("zoo", question, "cpu", made, NOTES, ("torchvision", "timm", "transformers"))
        into_page(made[0])
    return int(any(row.wrong for row in rows))


if __name__ == "__main__":
    sys.exit(main())

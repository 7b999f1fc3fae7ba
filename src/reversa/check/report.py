"""The verdict on a model, as a table that people read and as a dictionary for programs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

Status = Literal["right", "noticeable", "wrong", "not measured"]


@dataclass(frozen=True)
class Row:
    """One thing that was looked at.

    Attributes:
        what: in words.
        errors: the relative error found, by data type; 0 or infinite where two things are either the same or not.
        status: ``"noticeable"`` is an error that training bears.
        where: whose error it is: the worst parameter, step or buffer; or why it was not measured.
    """

    what: str
    errors: dict[str, float]
    status: Status
    where: str = ""


@dataclass(frozen=True)
class CheckReport:
    """The answer of :func:`reversa.check`; prints as a table with the verdict as its last sentence.

    Attributes:
        model: the model's class.
        rule: schemes and engines of its chains.
        dtypes: the data types that it was trained in.
        rows: what was looked at, and what was found.
        problems: why training would be wrong and what to do, the likeliest cause first; empty where it is right.
        notes: what else there is to know.
    """

    model: str
    rule: str
    dtypes: tuple[str, ...]
    rows: tuple[Row, ...]
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether training gives the right gradients and no side effects."""
        return not self.problems

    @property
    def verdict(self) -> str:
        """One sentence, and what to do where training would be wrong."""
        if self.problems:
            return f"Do NOT train: {self.problems[0]}"
        verdict = f"Training this model with {self.rule} gives the right gradients"
        noticeable = [row.what for row in self.rows if row.status == "noticeable"]
        return f"{verdict}, with more rounding than usual in: {', '.join(noticeable)}." if noticeable else f"{verdict}."

    def __str__(self) -> str:
        head = ("relative error of", *self.dtypes, "", "")
        cells = [(r.what, *(_number(r.errors.get(d)) for d in self.dtypes), r.status, r.where) for r in self.rows]
        widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)]
        table = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in (head, *cells)]
        notes = [f"Note: {note}" for note in self.notes]
        return "\n".join([f"{self.model}: {self.rule}", "", *table, "", *notes, self.verdict])

    def to_dict(self) -> dict[str, Any]:
        """Everything, in types that JSON knows; an infinite error is None."""
        rows = [
            {
                "what": row.what,
                "errors": {dtype: error if math.isfinite(error) else None for dtype, error in row.errors.items()},
                "status": row.status,
                "where": row.where,
            }
            for row in self.rows
        ]
        return {
            "ok": self.ok,
            "verdict": self.verdict,
            "model": self.model,
            "rule": self.rule,
            "dtypes": list(self.dtypes),
            "rows": rows,
            "problems": list(self.problems),
            "notes": list(self.notes),
        }


def _number(error: float | None) -> str:
    if error is None:
        return "-"
    return "0" if error == 0 else f"{error:.0e}" if math.isfinite(error) else "all"

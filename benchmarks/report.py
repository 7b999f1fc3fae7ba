"""Tables on the terminal and dated result files."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

HERE = Path(__file__).parent
RESULTS = HERE / "results"
IMAGES = HERE.parent / "docs" / "images"


@dataclass
class Table:
    """Rows of text under a header; a row of no cells is a rule."""

    title: str
    columns: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)

    def show(self) -> None:
        """Print it: with rich where rich is there."""
        try:
            from rich.console import Console
            from rich.table import Table as RichTable
        except ImportError:
            print(f"\n{self.title}\n{self.text()}", flush=True)
            return
        table = RichTable(title=self.title, title_justify="left", min_width=0)
        for i, column in enumerate(self.columns):
            table.add_column(column, justify="right" if i else "left", no_wrap=True)
        for row in self.rows:
            table.add_section() if not row else table.add_row(*row)
        width = None if sys.stdout.isatty() else 240
        Console(width=width).print(table)

    def text(self) -> str:
        """In columns of equal width."""
        cells = [self.columns, *(row for row in self.rows if row)]
        widths = [max(len(row[i]) for row in cells) for i in range(len(self.columns))]
        lines = [
            "  ".join(f"{c:{'<' if i == 0 else '>'}{w}}" for i, (c, w) in enumerate(zip(row, widths, strict=True)))
            for row in cells
        ]
        return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])

    def markdown(self) -> str:
        lines = [self.columns, ["---", *["---:"] * (len(self.columns) - 1)], *(row for row in self.rows if row)]
        return "\n".join("| " + " | ".join(row) + " |" for row in lines)


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def commit() -> str:
    """The commit, and whether code that runs here differs from it; result files of other benchmarks do not count."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=HERE, capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--", "../src", "*.py")
    return (git("describe", "--always") or "unknown") + ("-dirty" if changed else "")


def processor(device: str) -> str:
    """The machine's name: the accelerator's, or the processor's."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(torch.device(device))
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return f"{name or platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s) used"


def write(name: str, question: str, device: str, tables: Iterable[Table], notes: str, packages: Sequence[str]) -> Path:
    """Write ``results/<name>_<device>_<date>.md``: question, command, machine, versions, date, tables."""
    today = datetime.date.today().isoformat()
    versions = ", ".join(f"{package} {version(package)}" for package in ("torch", *packages))
    parts = [
        f"# {question}",
        f"- command: `python {' '.join([str(Path(sys.argv[0]).resolve().relative_to(HERE.parent)), *sys.argv[1:]])}`\n"
        f"- machine: {processor(device)}\n"
        f"- versions: reversa {version('reversa')} ({commit()}), {versions}, Python {platform.python_version()}\n"
        f"- date: {today}",
    ]
    parts += [f"## {table.title}\n\n{table.markdown()}" for table in tables]
    parts.append(notes)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}_{device.replace(':', '')}_{today}.md"
    path.write_text("\n\n".join(part.strip() for part in parts) + "\n")
    print(f"written: {path.relative_to(HERE.parent)}", flush=True)
    return path


def parser(description: str | None, quick: str) -> argparse.ArgumentParser:
    """A parser that knows ``--quick``, and what that leaves out."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--quick", action="store_true", help=quick)
    return made


def depths_and_batch(
    description: str | None, full: Sequence[int], quick: Sequence[int], batch: int
) -> tuple[bool, Sequence[int], int]:
    """Whether ``--quick`` is given, and what is to be measured: ``--depths``, ``--batch``."""
    made = parser(description, "fewer depths, and no picture")
    made.add_argument("--depths", type=int, nargs="+")
    made.add_argument("--batch", type=int, default=batch)
    args = made.parse_args()
    return args.quick, args.depths or (quick if args.quick else full), args.batch


def finish(
    name: str,
    question: str,
    tables: Sequence[Table],
    notes: str,
    packages: Sequence[str],
    picture: Callable[[], None] | None,
) -> Path:
    """Show the tables, draw the picture and write the result file; without a picture the run was a quick one."""
    for table in tables:
        table.show()
    if picture is not None:
        picture()
    return write(name if picture else f"{name}_quick", question, "cpu", tables, notes, packages)

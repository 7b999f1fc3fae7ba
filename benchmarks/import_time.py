"""How much longer does `import reversa` take than `import torch`? Fresh processes in turn; the target is 0.1 s.

Run it with ``python benchmarks/import_time.py``.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys

import report

SNIPPET = "import time; start = time.perf_counter(); import {module}; print(time.perf_counter() - start)"


def seconds(module: str) -> float:
    run = subprocess.run([sys.executable, "-c", SNIPPET.format(module=module)], capture_output=True, text=True)
    if run.returncode:
        raise SystemExit(run.stderr)
    return float(run.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
    rounds = parser.parse_args().rounds
    for module in ("torch", "reversa"):  # files into the page cache, bytecode onto the disk
        seconds(module)
    pairs = [(seconds("torch"), seconds("reversa")) for _ in range(rounds)]
    torch_, reversa_ = (statistics.median(column) for column in zip(*pairs, strict=True))
    more = statistics.median(b - a for a, b in pairs)
    table = report.Table(
        "Seconds to import, median",
        ("import torch", "import reversa", "more, per round", "target"),
        [(f"{torch_:.3f}", f"{reversa_:.3f}", f"{more:+.3f}", "+0.100")],
    )
    table.show()
    notes = f"{rounds} rounds; in each a fresh process imports torch, another one reversa (which imports torch)."
    question = "How much longer does `import reversa` take than `import torch`?"
    report.write("import_time", question, "cpu", [table], notes, ())


if __name__ == "__main__":
    main()

"""``reversa models``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

import torch

from reversa import models
from reversa.errors import SettingError
from reversa.sequence import ReversibleSequence

_DEFAULT = 10


def run(arguments: Sequence[str]) -> int:
    """List the networks by name, with what they consist of."""
    parser = argparse.ArgumentParser(
        prog="reversa models", description="The networks that reversa train and reversa.models.create know by name."
    )
    parser.add_argument("--classes", type=int, default=_DEFAULT, help=f"width of the last layer (default: {_DEFAULT})")
    parser.add_argument("--json", action="store_true", help="print the list for a program")
    settings = parser.parse_args(arguments)
    if settings.classes < 1:
        raise SettingError(f"--classes must be at least 1, got {settings.classes}")
    rows = [_row(name, settings.classes) for name in models.names()]
    if settings.json:
        print(json.dumps(rows, indent=2))
        return 0
    print(f"{'name':<32}{'parameters':>12}{'reversible steps':>18}  settings")
    for row in rows:
        print(f"{row['name']:<32}{row['parameters']:>12,}{row['reversible_steps']:>18}  {', '.join(row['settings'])}")
    return 0


def _row(name: str, classes: int) -> dict[str, Any]:
    with torch.device("meta"):  # no memory, no random numbers
        network = models.create(name, num_classes=classes)
    chains = [module for module in network.modules() if isinstance(module, ReversibleSequence)]
    return {
        "name": name,
        "parameters": sum(p.numel() for p in network.parameters()),
        "reversible_steps": sum(len(chain.functions) for chain in chains),
        "settings": list(models.settings_of(name)),
    }

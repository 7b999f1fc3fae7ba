"""Flags that ``reversa memory`` and ``reversa plan`` share, and what they make: a job."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

import torch

from reversa.cli.job import Job, device_named, shape_of
from reversa.cli.specs import network_named
from reversa.cli.text import own_loss
from reversa.cli.ways import Asked
from reversa.memory.settings import PRECISIONS
from reversa.schemes import SCHEMES

OPTIMIZERS = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW, "none": None}
SPEC = "a name of `reversa models` or of torchvision; torchvision:NAME, timm:NAME, hf:NAME, module:factory"


def add_step_flags(parser: argparse.ArgumentParser) -> None:
    """What a training step is made of."""
    parser.add_argument(
        "--input", metavar="8x3x224x224", help="shape of the inputs, 4x1024 for token ids (default: the network's own)"
    )
    parser.add_argument("--device", metavar="NAME", help="where the step is made: cuda, mps (default: the CPU)")
    parser.add_argument("--precision", choices=PRECISIONS, help="of autocast (default: none)")
    parser.add_argument(
        "--optimizer", choices=OPTIMIZERS, default="sgd", help="sgd (the default) is without momentum, so without state"
    )


def add_scheme_flags(parser: argparse.ArgumentParser) -> Any:
    """What makes a network reversible; returns their group."""
    reversible = parser.add_argument_group("to make it reversible")
    reversible.add_argument("--scheme", metavar="NAME", help=f"one of {', '.join(SCHEMES)} (default: momentum)")
    reversible.add_argument("--gamma", type=float, help="weight of the old velocity (default: the scheme's own)")
    reversible.add_argument("--h", type=float, help="the step size (default: the scheme's own)")
    reversible.add_argument("--exact", action="store_true", help="exact arithmetic")
    return reversible


def job_of(spec: str, settings: argparse.Namespace, engine: str | None = None) -> Job:
    """A network and its training step, as the flags say."""
    network = replace(network_named(spec), device=device_named(settings.device))
    asked = Asked(settings.scheme, settings.gamma, settings.h, settings.exact, engine)
    step = {"loss": own_loss, "optimizer": OPTIMIZERS[settings.optimizer], "precision": settings.precision}
    return Job(network, asked, shape_of(settings.input, network), step)

"""``reversa convert``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from reversa.cli.flags import SPEC, add_scheme_flags
from reversa.cli.job import shape_of
from reversa.cli.recipe import written
from reversa.cli.specs import Network, network_named
from reversa.cli.ways import Asked, example_of
from reversa.convert import convert, explain
from reversa.errors import ConversionError, SettingError


def run(arguments: Sequence[str]) -> int:
    """Print what a conversion makes of a network."""
    settings = _parser().parse_args(arguments)
    network = network_named(settings.spec)
    if network.reversible:
        raise SettingError(f"{settings.spec} is reversible as it is made: nothing is to be converted")
    asked = Asked(settings.scheme, settings.gamma, settings.h, settings.exact)
    model, example = network.build(), None
    if settings.input is not None or network.shape is not None:
        example = _example(network, model, settings.input)
    named = None if settings.stages is None else [name.strip() for name in settings.stages.split(",")]
    try:
        convert(model, asked.make_scheme(), named or "auto", asked.exact or None, example=example)
    except ConversionError as error:
        hint = " Here --input gives their shape." if example is None and network.shape is None else ""
        raise SettingError(f"{settings.spec} cannot be made reversible: {error}{hint}") from error
    report = explain(model)
    if settings.json:
        print(json.dumps(asdict(report) | {"saved_bytes": report.saved_bytes}, indent=2))
        return 0
    print(f"{settings.spec}: {report}\n\nIn Python:\n\n{_program(network, asked, named, example)}")
    return 0


def _example(network: Network, model: nn.Module, shape: str | None) -> Any:
    """Inputs of the shape that was asked for; None where the model tells its own."""
    if shape is None:
        return example_of(network, model, shape_of(None, network))
    given = network.takes(model, shape_of(shape, network))
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))

    def zeros(value: Any) -> Any:
        return torch.zeros(value, dtype=like.dtype, device=like.device) if isinstance(value, tuple) else value

    return {name: zeros(value) for name, value in given.items()} if isinstance(given, dict) else zeros(given)


def _program(network: Network, asked: Asked, named: list[str] | None, example: Any) -> str:
    source = network.source
    given = [written(asked.make_scheme())]
    given += [] if named is None else [f"stages={named!r}"]
    given += ["exact=True"] * asked.exact
    given += [f"example={written(example)}"] * (example is not None)
    imports = sorted({source.module, *(["torch"] if example is not None else [])} - {"reversa"})
    return "\n".join(
        [
            *(f"import {name}" for name in imports),
            "",
            "import reversa",
            "",
            f"model = {source.function}({source.arguments})",
            f"reversa.convert(model, {', '.join(given)})",
        ]
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="reversa convert",
        description="What a conversion makes of a network: its stages, what each holds for the backward pass before "
        "and after, what changes in the function that is computed, what is left as it is, and why. Nothing is "
        "computed, made or downloaded.",
    )
    parser.add_argument("spec", metavar="SPEC", help=SPEC)
    parser.add_argument("--input", metavar="8x3x224x224", help="shape of the inputs (default: the network's own)")
    parser.add_argument(
        "--stages",
        metavar="layer2,layer3",
        help="convert these alone, by name or pattern (default: all)",
    )
    add_scheme_flags(parser)
    parser.add_argument("--json", action="store_true", help="print for a program")
    return parser

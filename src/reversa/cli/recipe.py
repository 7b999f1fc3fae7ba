"""The lines of Python that make the same plan for the same model, and apply it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from torch import Tensor, nn

from reversa.cli.job import Job
from reversa.cli.ways import Asked, example_of, is_converted, settings_asked
from reversa.memory import Speed
from reversa.schemes import Scheme


def recipe(
    job: Job, asked: Asked | None, model: nn.Module, budget: str, allow: Sequence[str] | None, speed: Speed
) -> str:
    """The program, with ``model`` the one that was planned for."""
    network = job.network
    device = "" if network.device is None else f', device="{network.device}"'
    given = [
        "model",
        written(network.takes(model, job.shape), device),
        f'"{budget}"',
        *([] if allow is None else [f"allow={list(allow)!r}"]),
        *_step(job, model),
        f"speed=Speed({', '.join(f'{name}={value:g}' for name, value in vars(speed).items())})",
    ]
    body = [
        *_model(job, asked, model, device),
        "found = plan(",
        *(f"    {line}," for line in given),
        ")",
        "found.apply(model)",
    ]
    return "\n".join([*_imports(network.source.module, "\n".join(body)), "", *body])


def _imports(module: str, body: str) -> list[str]:
    """What the program uses, others' packages first."""
    others = {name for name in ("torch", module) if f"{name}." in body and name != "reversa"}
    own = ["import reversa"] if "reversa." in body else []
    return [*(f"import {name}" for name in sorted(others)), "", *own, "from reversa.memory import Speed, plan"]


def _model(job: Job, asked: Asked | None, model: nn.Module, device: str) -> list[str]:
    network = job.network
    converts = is_converted(network, asked)
    settings = {} if converts or asked is None else settings_asked(network, asked)
    settings.pop("engine", None)  # the plan says it
    arguments = [network.source.arguments] * bool(network.source.arguments)
    arguments += [f"{name}={written(value)}" for name, value in settings.items()]
    placed = f'.to("{network.device}")' if network.device else ""
    lines = [f"model = {network.source.function}({', '.join(arguments)}){placed}.train()"]
    if converts and asked is not None:
        exact = ", exact=True" if asked.exact else ""
        example = example_of(network, model, job.shape)
        shown = "" if example is None else f", example={written(example, device)}"
        lines.append(f"reversa.convert(model, scheme={written(asked.make_scheme())}{exact}{shown})")
    return lines


def _step(job: Job, model: nn.Module) -> list[str]:
    """Loss, optimizer and precision, where they are not those that :func:`reversa.memory.plan` takes by itself."""
    given = job.network.takes(model, job.shape)
    found = ["loss=lambda output: output.loss"] if isinstance(given, dict) and "labels" in given else []
    if job.step["optimizer"] is not None:
        found.append(f"optimizer=torch.optim.{job.step['optimizer'].__name__}")
    if job.step["precision"] is not None:
        found.append(f'precision="{job.step["precision"]}"')
    return found


def written(value: Any, device: str = "") -> str:
    """A value in Python."""
    if isinstance(value, dict):
        inside = ", ".join(f'"{name}": {written(each, device)}' for name, each in value.items())
        return f"{{{inside}}}"
    if isinstance(value, Tensor):
        return f"torch.zeros({tuple(value.shape)}, dtype={value.dtype}{device})"
    if isinstance(value, Scheme):
        names = [field.name for field in fields(value)]  # pyright: ignore[reportArgumentType]
        numbers = {name: getattr(value, name) for name in names}
        given = ", ".join(f"{name}={number!r}" for name, number in numbers.items() if isinstance(number, float))
        return f"reversa.{type(value).__name__}({given})"
    return f'"{value}"' if isinstance(value, str) else repr(value)

"""What ``reversa memory`` and ``reversa plan`` are about: a network, its inputs, its sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from reversa.cli.specs import Network
from reversa.cli.text import takes_ids
from reversa.cli.ways import Asked, Shape, Way
from reversa.errors import ReversaError, SettingError
from reversa.memory.fake import NEEDS_NUMBERS

AXES = {
    "batch": "batch (samples)",
    "side": "side of the images (pixels)",
    "length": "length of the sequences (tokens)",
    "depth": "residual blocks",
    "blocks": "residual blocks in each stage",
}


@dataclass(frozen=True)
class Job:
    """A network, the inputs of a step, and what else the step is made of."""

    network: Network
    asked: Asked
    shape: Shape
    step: Mapping[str, Any]

    def made(self, way: Way, shape: Shape | None = None, real: bool = False, **settings: Any) -> tuple[Any, Any]:
        """The model, and what it is called with."""
        shape = self.shape if shape is None else shape
        model = way(shape, real=real, **settings)
        return model, self.network.takes(model, shape)

    def inputs(self, against: str | None = None) -> str:
        """The shape of the inputs, in words; ``against`` stands for the size that changes."""
        batch, *rest = self.shape
        changed = {
            "batch": ("batch", *rest),
            "side": (batch, *rest[:1], "side", "side"),
            "length": (batch, "length", *rest[1:]),
        }
        return times(changed.get(against or "", self.shape))


def sized(job: Job, against: str, flag: str = "--against") -> tuple[str, Callable[[Way, int], tuple[Any, Any]]]:
    """What the axis shows, and the function that makes model and inputs of a size."""
    batch, *rest = job.shape
    if against == "batch":
        return against, lambda way, value: job.made(way, (value, *rest))
    if against == "side":
        if len(rest) != 3:
            raise SettingError(f"{flag} side needs images, BATCHxCHANNELSxHEIGHTxWIDTH, got {job.inputs()}")
        return against, lambda way, value: job.made(way, (batch, rest[0], value, value))
    if against == "length":
        if len(rest) != 2 and not (len(rest) == 1 and takes_ids(job.network.build())):
            raise SettingError(
                f"{flag} length needs sequences, BATCHxLENGTH of token ids or BATCHxLENGTHxWIDTH of embeddings, got "
                f"{job.inputs()}"
            )
        return against, lambda way, value: job.made(way, (batch, value, *rest[1:]))
    return _deep(job)


def _deep(job: Job) -> tuple[str, Callable[[Way, int], tuple[Any, Any]]]:
    own = job.network.settings
    if "depth" in own:
        return "depth", lambda way, value: job.made(way, depth=value)
    if "blocks" not in own:
        raise SettingError(
            f"{job.network.spec} takes no depth: --against depth needs a network of `reversa models` with a setting "
            "depth or blocks, for instance reversibleresnet or revnet110"
        )
    if isinstance(own["blocks"], int):
        return "depth", lambda way, value: job.made(way, blocks=value)
    stages = len(own["blocks"])
    return "blocks", lambda way, value: job.made(way, blocks=(value,) * stages)


def shape_of(text: str | None, network: Network) -> Shape:
    """The shape of the inputs: what ``--input`` says, or the network's own.

    Raises:
        SettingError: it is malformed, or nothing tells it.

    >>> from reversa.cli.specs import network_named
    >>> shape_of("8x3x32x32", network_named("revnet38"))
    (8, 3, 32, 32)
    """
    if text is not None:
        return tuple(whole_numbers(text, "x", "--input", "8x3x224x224"))
    if network.shape is None:
        raise SettingError(
            f"nothing tells which inputs {network.spec} takes: add --input with their shape, such as 8x3x224x224 for "
            "images, 8x128 for token ids, 8x128x768 for embeddings"
        )
    return network.shape


def device_named(name: str | None) -> torch.device | None:
    """The device of ``--device``; None for the CPU, as which a network without weights is counted.

    Raises:
        SettingError: PyTorch knows no such device, or sees none here.
    """
    if name is None:
        return None
    try:
        device = torch.device(name)
        here = device.type == "cpu" or (device.index or 0) < torch.get_device_module(device).device_count()
    except (AttributeError, RuntimeError) as error:
        raise SettingError(f"--device takes cpu, cuda, cuda:1, mps or the like, got {name!r}") from error
    if not here:
        raise SettingError(
            f"--device {name}: PyTorch sees no such device here, and a backward pass asks it also where nothing is "
            "computed. Run this where it is. Without --device a step is estimated as the CPU runs it; notes under the "
            "report say what differs."
        )
    return None if device.type == "cpu" else device


def whole_numbers(text: str, separator: str, flag: str, example: str) -> list[int]:
    """The numbers of a flag.

    Raises:
        SettingError: something in it is no whole number above 0.

    >>> whole_numbers("8,16", ",", "--values", "8,16,32")
    [8, 16]
    """
    parts = text.lower().split(separator)
    if not all(part.strip().isascii() and part.strip().isdigit() and int(part) > 0 for part in parts):
        raise SettingError(f"{flag} takes whole numbers above 0, such as {example}, got {text!r}")
    return [int(part) for part in parts]


@contextmanager
def explained(
    job: Job, measures: bool = False, against: str | None = None, choose: str | None = None
) -> Iterator[None]:
    """The network's own errors as a message; where numbers decide, the flag that runs the step."""
    try:
        yield
    except ReversaError as error:
        if isinstance(error.__cause__, NEEDS_NUMBERS) and not measures:
            raise SettingError(
                f"{job.network.spec} needs the numbers in its tensors, and an estimate has none. `reversa memory "
                f"{job.network.spec} --measure` runs a step, and counts it."
            ) from error
        raise
    except (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
        first = str(error).strip().split("\n", 1)[0].rstrip(".!")
        raise SettingError(
            f"{job.network.spec} cannot make a training step with these inputs ({job.inputs(against)}): "
            f"{type(error).__name__}: {first}. Choose {choose or ('other --values' if against else 'another --input')}."
        ) from error


def times(shape: tuple[int | str, ...]) -> str:
    """A shape in words.

    >>> times((8, 3))
    '8 x 3'
    """
    return " x ".join(map(str, shape))

"""What ``reversa memory`` is about: a network, its inputs, its sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from reversa.cli.specs import Network
from reversa.cli.ways import Asked, Shape, Way
from reversa.errors import ReversaError, SettingError
from reversa.memory import MemoryReport, estimate
from reversa.memory.fake import NEEDS_NUMBERS

AXES = {
    "batch": "batch (samples)",
    "side": "side of the images (pixels)",
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

    def estimates(self, ways: Mapping[str, Way]) -> dict[str, MemoryReport]:
        """One report for each way."""
        return {name: estimate(*self.made(way), **self.step) for name, way in ways.items()}


def sized(job: Job, against: str) -> tuple[str, Callable[[Way, int], tuple[Any, Any]]]:
    """What the axis shows, and the function that makes model and inputs of a size."""
    batch, *rest = job.shape
    if against == "batch":
        return against, lambda way, value: job.made(way, (value, *rest))
    if against == "side":
        if len(rest) != 3:
            raise SettingError(f"--against side needs images, BATCHxCHANNELSxHEIGHTxWIDTH, got {times(job.shape)}")
        return against, lambda way, value: job.made(way, (batch, rest[0], value, value))
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
        what = "BATCHxLENGTHxWIDTH of its embeddings, or images" if network.spec.startswith("hf:") else "a shape"
        raise SettingError(
            f"nothing tells which inputs {network.spec} takes: add --input with {what}, such as 8x128x768"
        )
    return network.shape


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
def explained(job: Job, measures: bool) -> Iterator[None]:
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
            f"{job.network.spec} cannot make a training step with these inputs ({times(job.shape)}): "
            f"{type(error).__name__}: {first}. Choose another --input."
        ) from error


def times(shape: tuple[int | str, ...]) -> str:
    """A shape in words.

    >>> times((8, 3))
    '8 x 3'
    """
    return " x ".join(map(str, shape))

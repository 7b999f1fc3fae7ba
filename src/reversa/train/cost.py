"""What a training step costs under each engine, measured on this machine."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from reversa.engine import Engine
from reversa.memory.live import LiveBytes
from reversa.sequence import ReversibleSequence


class StepCost(NamedTuple):
    """One training step: forward and backward pass, without the optimizer's."""

    peak_bytes: int
    """Most bytes alive at once of activations and temporary tensors; no parameters, no gradients."""
    seconds: float
    """Median over the rounds."""


def use_engine(network: nn.Module, engine: Engine) -> None:
    """Give every reversible sequence of a network another engine."""
    for module in network.modules():
        if isinstance(module, ReversibleSequence):
            module.engine = engine


def step_costs(
    network: nn.Module,
    batch: tuple[Tensor, Tensor],
    engines: Mapping[str, Engine],
    context: Callable[[], AbstractContextManager[object]] = nullcontext,
    rounds: int = 7,
) -> dict[str, StepCost]:
    """Peak bytes and time of a training step under each engine, for the same network and the same batch.

    The engines take turns, so that what else the machine does falls on all of them. The network itself is not touched.

    Args:
        network: scores of images.
        batch: images and labels, on the network's device.
        engines: what to compare, by name.
        context: what a forward pass runs in (autocast).
        rounds: steps timed per engine, after one that warms up.

    >>> from reversa import Invert, Store, models
    >>> net = models.create("reversibleresnet", depth=30, width=4)
    >>> batch = torch.zeros(2, 1, 8, 8), torch.zeros(2, dtype=torch.long)
    >>> costs = step_costs(net, batch, {"store": Store(), "invert": Invert()}, rounds=1)
    >>> costs["invert"].peak_bytes < costs["store"].peak_bytes
    True
    """
    network = copy.deepcopy(network).train()
    images, labels = batch

    def step() -> None:
        with context():
            loss = cross_entropy(network(images), labels)
        loss.backward()

    peaks: dict[str, int] = {}
    times: dict[str, list[float]] = {name: [] for name in engines}
    for name, engine in engines.items():
        use_engine(network, engine)
        step()
        with LiveBytes(exclude=network) as live:
            step()
        peaks[name] = live.peak
    for _ in range(rounds):
        for name, engine in engines.items():
            use_engine(network, engine)
            times[name].append(_seconds(step, images.device))
    return {name: StepCost(peaks[name], statistics.median(times[name])) for name in engines}


def _seconds(step: Callable[[], None], device: torch.device) -> float:
    _wait_for(device)
    begun = time.perf_counter()
    step()
    _wait_for(device)
    return time.perf_counter() - begun


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

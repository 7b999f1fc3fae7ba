"""Proof on the way back: the state before each step has the bits that it had."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from reversa.errors import ReplayError, SettingError
from reversa.schemes import Scheme, State


class Hashes:
    """A hash of the state before each step of a chain.

    Raises:
        SettingError: the scheme does not run in exact arithmetic, so no bits would be the same.
    """

    def __init__(self, scheme: Scheme) -> None:
        if not scheme.exact:
            raise SettingError(
                f"Invert(verify=True) compares bits, and {scheme} in floating point does not give them back. Use it "
                "with exact=True."
            )
        self.scheme = scheme
        self.before: list[list[Tensor]] = []

    def note(self, state: State) -> None:
        """In the forward pass: the state before the next step."""
        self.before.append(list(map(_hash, self.scheme.told(state))))

    def compare(self, state: State, step: int, where: object) -> None:
        """In the backward pass: the state recovered before a step.

        Raises:
            ReplayError: it is another one.
        """
        found = list(map(_hash, self.scheme.told(state)))
        if isinstance(state[0], FakeTensor) or state[0].is_meta:
            return  # there is nothing to compare
        if len(found) != len(self.before[step]) or not all(map(torch.equal, found, self.before[step])):
            raise ReplayError(
                f"{where}: the state before it was not recovered bit for bit, so it, or a step after it, did not "
                "compute the same bits twice. Look for random numbers or a state of its own, for compiled code in one "
                "of two evaluations only, and for kernels of other packages that are not deterministic."
            )


def _hash(integers: Tensor) -> Tensor:
    """A weighted sum modulo 2**64, with an odd weight for each place: exchanged or changed elements change it."""
    flat = integers.detach().reshape(-1).to(torch.int64)
    places = torch.arange(flat.numel(), device=flat.device)
    weights = (places * 0x2545F4914F6CDD1D) ^ (places >> 7) | 1
    return (flat * weights).sum()

"""The table of the Momentum ResNets' poster: what invertible networks can do. Every entry is measured, none is claimed.

=========================  ==========  ========  ========  ======  ========
                           Neural ODE  i-ResNet  i-RevNet  RevNet  Momentum
=========================  ==========  ========  ========  ======  ========
inverse without iteration  yes         no        yes       yes     yes
same parameters            no          yes       no        no      yes
unconstrained training     yes         no        yes       yes     yes
=========================  ==========  ========  ========  ======  ========
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import reversa
from cases import chain, error
from reversa.errors import ReversaError
from reversa.models import NeuralODE
from reversa.models.ode import Autonomous

WIDTH, DEPTH = 6, 5
x = torch.randn(4, WIDTH, dtype=torch.float64)


class Counted(nn.Module):
    """A residual function of a ResNet, with a norm of the user's choice; counts its evaluations."""

    def __init__(self, width: int = WIDTH, norm: float = 0.4) -> None:
        super().__init__()
        self.linear, self.calls = nn.Linear(width, width, dtype=torch.float64), 0
        self.linear.weight.data *= norm / torch.linalg.matrix_norm(self.linear.weight.data, 2)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.linear(x).tanh()


@dataclass(frozen=True)
class System:
    """How a system is made of residual functions, run, and inverted."""

    make: Callable[[list[nn.Module]], nn.Module]
    halves: bool = False
    one_function: bool = False

    def functions(self, norm: float) -> list[Counted]:
        number = 1 if self.one_function else DEPTH + self.halves * DEPTH % 2
        return [Counted(WIDTH // 2 if self.halves else WIDTH, norm) for _ in range(number)]


def of_scheme(scheme) -> System:
    return System(lambda fs: chain(scheme, fs, engine=reversa.Invert(anchors=None)), not scheme.carries_input)


SYSTEMS = {
    "Neural ODE": System(lambda fs: NeuralODE(Autonomous(fs[0]), method="rk4", steps=40), one_function=True),
    "i-ResNet": of_scheme(reversa.IResNet(0.5)),
    "i-RevNet": of_scheme(reversa.IRevNet()),
    "RevNet": of_scheme(reversa.RevNet()),
    "Momentum": of_scheme(reversa.Momentum(0.9)),
}


def there(system: nn.Module, x: Tensor):
    return system.forward_state(system.scheme.open(x)) if isinstance(system, reversa.ReversibleSequence) else system(x)


def back(system: nn.Module, y) -> Tensor:
    if isinstance(system, reversa.ReversibleSequence):
        return system.scheme.close(system.inverse_state(y))
    return system.inverse(y)


@torch.no_grad()
def inverts_without_iteration(system: System) -> bool:
    """The inverse evaluates the functions as often as the forward pass did, and gives the input back."""
    torch.manual_seed(0)
    fs = system.functions(norm=0.4)
    net = system.make(fs)
    y = there(net, x)
    forwards = sum(f.calls for f in fs)
    error_of_it = error(back(net, y), x)
    assert error_of_it < 1e-7
    return sum(f.calls for f in fs) == 2 * forwards


def takes_the_parameters_of_a_resnet(system: System) -> bool:
    """It can be made of a residual network's own functions, all of them, and each of them matters."""
    torch.manual_seed(0)
    fs = [Counted() for _ in range(DEPTH + DEPTH % 2)]
    try:
        net = system.make(copy.deepcopy(fs))
        net(x).square().sum().backward()
    except (RuntimeError, ReversaError):  # the functions are too wide for halves
        return False
    return [p.shape for p in net.parameters() if p.grad is not None] == [p.shape for f in fs for p in f.parameters()]


def trains_without_constraint(system: System) -> bool:
    """With functions that stretch space threefold the input still comes back, and gradients are finite."""
    torch.manual_seed(0)
    net = system.make(system.functions(norm=3.0))
    try:
        with torch.no_grad():
            recovered = back(net, there(net, x))
        net(x).square().sum().backward()
    except ReversaError:
        return False
    assert all(p.grad.isfinite().all() for p in net.parameters())
    return error(recovered, x) < 1e-3


@pytest.mark.parametrize(
    ("name", "without_iteration", "same_parameters", "unconstrained"),
    [
        ("Neural ODE", True, False, True),
        ("i-ResNet", False, True, False),
        ("i-RevNet", True, False, True),
        ("RevNet", True, False, True),
        ("Momentum", True, True, True),
    ],
)
def test_the_posters_table(name, without_iteration, same_parameters, unconstrained):
    system = SYSTEMS[name]
    assert inverts_without_iteration(system) == without_iteration
    assert takes_the_parameters_of_a_resnet(system) == same_parameters
    assert trains_without_constraint(system) == unconstrained

"""Can a network learn x -> -x^3 in one dimension? Its trajectories have to cross.

``python examples/trajectories.py`` trains three networks from four seeds, prints their errors and draws
docs/images/crossing.png. Setting of Sander et al., ICML 2021, arXiv:2102.07870: one residual function
Linear(1, 16)-tanh-Linear(16, 1) in all of 15 layers, 200 points in (-1, 1) for each training step, SGD with a learning
rate of 0.01; Momentum with gamma = 0.99 for 301 steps, a ResNet for 2001, as in the authors' code. The third network is
the ResNet with steps of 1/15, which follows a flow.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import reversa
from reversa.trajectories import draw_lines

DEPTH, GAMMA, SEEDS = 15, 0.99, range(4)
PICTURE = Path(__file__).parent.parent / "docs" / "images" / "crossing.png"


class ResNet(nn.Module):
    """x' = x + h f(x), the same f in every layer."""

    def __init__(self, f: nn.Module, h: float) -> None:
        super().__init__()
        self.f, self.h = f, h

    def states(self, x: Tensor) -> list[Tensor]:
        states = [x]
        for _ in range(DEPTH):
            states.append(states[-1] + self.h * self.f(states[-1]))
        return states

    def forward(self, x: Tensor) -> Tensor:
        return self.states(x)[-1]


def momentum(f: nn.Module) -> nn.Module:
    return reversa.ReversibleSequence([f] * DEPTH, scheme=reversa.Momentum(GAMMA))


NETWORKS: dict[str, tuple[Callable[[nn.Module], nn.Module], int]] = {
    f"Momentum ResNet, gamma = {GAMMA}": (momentum, 301),
    "ResNet, x + f(x)": (lambda f: ResNet(f, 1), 2001),
    f"ResNet, x + f(x) / {DEPTH}": (lambda f: ResNet(f, 1 / DEPTH), 2001),
}


def target(x: Tensor) -> Tensor:
    return -(x**3)


def trained(make: Callable[[nn.Module], nn.Module], steps: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    network = make(nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1)))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    for _ in range(steps):
        x = 2 * torch.rand(200, 1) - 1
        optimizer.zero_grad()
        nn.functional.mse_loss(network(x), target(x)).backward()
        optimizer.step()
    return network


@torch.no_grad()
def told(network: nn.Module) -> str:
    """The mean squared error, and how many of 200 pairs of neighbours end in falling order."""
    x = torch.arange(-100, 101)[:, None] / 100.5  # in the middle of 201 equal parts of (-1, 1)
    y = network(x)
    if not y.isfinite().all():
        return "not finite"
    return f"{nn.functional.mse_loss(y, target(x)):.3f} ({int((y[:, 0].diff() < 0).sum())})"


def main() -> None:
    torch.set_num_threads(1)
    drawn = {}
    print("mean squared error (pairs of 200 that changed sides), from four seeds")
    for name, (make, steps) in NETWORKS.items():
        networks = [trained(make, steps, seed) for seed in SEEDS]
        print(f"{name:30s}", "  ".join(told(network) for network in networks))
        drawn[name] = networks[0].states(torch.linspace(-1, 1, 11)[:, None])
    del drawn["ResNet, x + f(x)"]
    draw_lines(drawn, PICTURE)
    print(f"{PICTURE.relative_to(PICTURE.parents[2])}: {PICTURE.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()

"""What a plan is made of: predicted seconds by hand, the sums over blocks against steps, the solver against all."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from torch import nn

import reversa
from cases import mlp
from reversa.memory import Speed, curve, estimate, plan
from reversa.memory.costs import RECOMPUTE, STORE, Costs
from reversa.memory.plan import _prepared
from reversa.memory.settings import Settings
from reversa.memory.solve import INVERT, Block, Rest, fastest, leanest

SPEED = Speed(flops=20e12, flops_16=300e12, bandwidth=2e12, host=25e9)
NEVER = 1e30
ADAM = torch.optim.AdamW


def network(depth: int, scheme: reversa.schemes.Scheme | None = None) -> nn.Module:
    chain = reversa.ReversibleSequence([mlp(32) for _ in range(depth)], scheme or reversa.Momentum(0.99))
    return nn.Sequential(nn.Linear(32, 32), nn.Tanh(), chain, nn.Linear(32, 10))


# ---------------------------------------------------------------------- seconds


def test_matrix_products_take_their_operations():
    model = nn.Sequential(nn.Linear(64, 48, bias=False), nn.Linear(48, 32, bias=False))
    found = plan(model, (128, 64), "1 GiB", speed=Speed(flops=1e9, flops_16=1e9, bandwidth=NEVER, host=NEVER))
    forward = 2 * 128 * (64 * 48 + 48 * 32)
    # the first layer's input needs no gradient
    assert found.seconds == pytest.approx((forward + forward + 2 * 128 * 48 * 32) / 1e9, rel=1e-6)


def test_everything_else_takes_its_bytes():
    speed = Speed(flops=NEVER, flops_16=NEVER, bandwidth=1e6, host=NEVER)
    few, more = (
        plan(nn.Sequential(nn.Linear(40, 40), *[nn.Tanh()] * n), (100, 40), "1 GiB", speed=speed).seconds
        for n in (1, 3)
    )
    forward, backward = 2 * 16000, 3 * 16000  # reads x and writes y; reads dy and y and writes dx
    assert more - few == pytest.approx(2 * (forward + backward) / 1e6)


# ---------------------------------------------------------------------- the usual ways to compare with


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, ADAM])
@pytest.mark.parametrize("depth", [9, 16])
def test_segments_of_sqrt_n_blocks_are_what_a_chain_with_them_takes(depth, optimizer):
    model, inputs = network(depth), (2048, 32)
    ways = {way.name: way.peak_bytes for way in plan(model, inputs, "1 GiB", optimizer=optimizer, speed=SPEED).ways}
    model[2].engine = reversa.Recompute(every=int(depth**0.5))
    want = estimate(model, inputs, optimizer=optimizer).peak_bytes
    assert ways["checkpoint every sqrt(n) blocks"] == pytest.approx(want, rel=0.06)
    for name, engine in (("checkpoint each block", reversa.Recompute()), ("all stored", reversa.Store())):
        model[2].engine = engine
        assert ways[name] == pytest.approx(estimate(model, inputs, optimizer=optimizer).peak_bytes, abs=512), name


# ---------------------------------------------------------------------- sums over blocks


def simulated(blocks: list[Block], rest: Rest, actions: tuple[str, ...]) -> tuple[float, float]:
    """Peak and seconds of these choices, step by step."""
    held = peak = seconds = 0.0
    inverted = 0  # steps since the last kept state
    for u, (block, action) in enumerate(zip(blocks, actions, strict=True)):
        choice = next(c for c in block.choices if c.action == action)
        begins = u == 0 or blocks[u - 1].last
        running = inverted if not begins else 0
        state = 0
        if running and action == INVERT and running == block.every:
            state, running = blocks[u - 1].anchor, 0
        elif running and action != INVERT:
            state = blocks[u - 1].closing
        peak = max(peak, held + choice.forth, held + state + choice.needed)
        held += state + choice.held
        seconds += choice.seconds
        inverted = (running + 1 if block.every else 1) if action == INVERT else 0
    last = rest[actions[-1]]
    return max(peak, held + last.needed, held + last.forth), seconds + last.seconds


MODELS = {
    "momentum": lambda: network(8),
    "gamma 0.1": lambda: network(8, reversa.Momentum(0.1)),
    "two streams": lambda: nn.Sequential(
        nn.Linear(32, 64),
        reversa.ReversibleSequence([(mlp(32), mlp(32)) for _ in range(8)], reversa.RevNet()),
        nn.Linear(64, 10),
    ),
}


@pytest.mark.parametrize("case", MODELS)
def test_the_solver_finds_the_best_of_all_choices_and_the_sums_are_what_steps_take(case):
    policies = (STORE, RECOMPUTE, INVERT)
    settings = Settings(MODELS[case](), (2048, 32), None, ADAM, None)
    draw = random.Random(case)
    with _prepared(settings):
        costs = Costs(settings, policies, SPEED)
        can = [tuple(choice.action for choice in block.choices) for block in costs.blocks]
        every = {actions: simulated(costs.blocks, costs.rest, actions) for actions in itertools.product(*can)}
        assert len(every) >= 3**8
        update = costs.profiles[STORE].total - sum(costs.profiles[STORE].seconds)  # the optimizer's, in no sum
        for actions in draw.sample(list(every), 8):
            trial, (peak, _) = costs.trial(actions), every[actions]
            assert max(peak, costs.update) == pytest.approx(trial.peak, rel=0.03), actions
            assert every[actions][1] + update == pytest.approx(trial.seconds, rel=0.01), actions
    peaks = sorted({peak for peak, _ in every.values()})
    assert leanest(costs.blocks, costs.rest).peak == peaks[0]
    for budget in peaks[:: len(peaks) // 15]:
        found = fastest(costs.blocks, costs.rest, budget)
        assert found is not None
        assert found.peak <= budget
        assert (found.peak, found.seconds) == pytest.approx(every[found.actions])
        assert found.seconds == pytest.approx(min(s for peak, s in every.values() if peak <= budget))
    assert fastest(costs.blocks, costs.rest, peaks[0] - 1) is None


def test_the_optimizers_state_counts_in_every_window():
    """Without it a plan of the least memory looked as if it took less than the parameters and their moments."""
    model, inputs = network(4), (8, 32)
    own = sum(p.nbytes for p in model.parameters())
    (found,) = curve(model, inputs, ["1 GiB"], optimizer=ADAM, speed=SPEED)
    for way in found.ways:
        assert way.peak_bytes > 3 * own, way
    assert found.least_bytes > 3 * own

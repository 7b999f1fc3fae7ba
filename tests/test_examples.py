"""The examples: what each one says of itself, and the numbers against stored activations.

``reversa.convert`` is exchanged under the scripts: for itself in float64, for ``engine=Store()``, and for an oracle
that puts the update rule into the blocks of the ordinary model. Losses, gradients and weights must be the same.
"""

from __future__ import annotations

import importlib
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._pytree import tree_leaves

import reversa
from cases import Result, assert_same
from convert_cases import by_rule
from processes import WORLD, needs_fsdp2
from processes import in_processes as marks

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))
CONVERT = reversa.convert
STEPS = 4
EXACTLY = 1e-8
"""Of float64, after some steps of Adam."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),  # Dynamo looks at it
    pytest.mark.filterwarnings("ignore:.*(num_workers|log|Checkpoint directory|litlogger).*:UserWarning"),
]


# ---------------------------------------------------------------------- what stands in for reversa.convert


def in_double(model: nn.Module) -> nn.Module:
    """The model in float64, and its images too."""
    model.register_forward_pre_hook(lambda _, args: tuple(a.double() if a.is_floating_point() else a for a in args))
    return model.double()


def reversible(model: nn.Module, **settings: Any) -> nn.Module:
    settings.pop("example", None)  # of another type than the model has now
    stages = {"stages": ["layer1", "layer2"]} if hasattr(model, "layer1") else {}
    example = torch.zeros(2, 1, 32, 32) if hasattr(model, "layer1") else None
    return CONVERT(in_double(model), example=example, **stages, **settings)


def stored(model: nn.Module, **settings: Any) -> nn.Module:
    return reversible(model, engine=reversa.Store(), **settings)


def runs_of(model: Any) -> list[list[Any]]:
    """The blocks of each stage, known from the models' own sources."""
    if hasattr(model, "layer1"):  # the first block changes the number of channels
        return [list(model.layer1)[1:], list(model.layer2)[1:]]
    if hasattr(model, "blocks"):
        return [list(model.blocks)]
    return [list(model.transformer.h if hasattr(model, "transformer") else model.model.layers)]


def by_hand(model: Any, scheme: reversa.Momentum, **_: Any) -> Any:
    """The rule over the blocks' own forward functions, with ordinary autograd."""
    in_double(model)
    for run in runs_of(model):
        for block, step in zip(run, by_rule([block.forward for block in run], scheme.gamma), strict=True):
            block.forward = step
            block.compile = lambda **_: None
    return model


# ---------------------------------------------------------------------- runs of the scripts


@dataclass
class Run:
    """What ``main`` returned, the model that it trained, and the gradients at each step of its optimizer."""

    told: Any
    model: nn.Module
    gradients: list[Result]

    @property
    def weights(self) -> Result:
        return {name: value.detach() for name, value in self.model.state_dict().items()}


def example(name: str) -> Any:
    return importlib.import_module(name)


def noting(found: list[Result]) -> Any:
    """A hook that collects the gradients at each step of any optimizer, and shards of gradients as a whole."""

    def note(optimizer: Any, *_: Any) -> None:
        given = [p.grad for group in optimizer.param_groups for p in group["params"]]
        if any(g is None or isinstance(g, FakeTensor) for g in given):
            return  # an estimate's, or a step that computes its gradients itself
        whole = (getattr(g, "full_tensor", lambda g=g: g)() for g in given)
        found.append({f"gradient {i}": g.clone() for i, g in enumerate(whole)})

    return register_optimizer_step_pre_hook(note)


def run(monkeypatch: pytest.MonkeyPatch, name: str, convert: Callable[..., nn.Module], **settings: Any) -> Run:
    made: list[nn.Module] = []
    found: list[Result] = []
    if "accelerate" in sys.modules:  # one precision for each process
        sys.modules["accelerate"].state.AcceleratorState._reset_state(True)

    def keep(model: nn.Module, *args: Any, **more: Any) -> nn.Module:
        made.append(model)
        return convert(model, *args, **more)

    hook = noting(found)
    with monkeypatch.context() as patch:
        patch.setattr(reversa, "convert", keep)
        told = example(name).main(**settings)
    hook.remove()
    return Run(told, made[-1], found)


def flat(told: Any) -> list[float]:
    return tree_leaves(told)


def assert_same_run(actual: Run, expected: Run, tolerance: float) -> None:
    assert flat(actual.told) == pytest.approx(flat(expected.told), rel=tolerance)
    assert len(actual.gradients) == len(expected.gradients) > 0
    for have, want in zip(actual.gradients, expected.gradients, strict=True):
        assert_same(have, want, tolerance)
    assert_same(actual.weights, expected.weights, tolerance)


SETTINGS: dict[str, dict[str, Any]] = {
    "accelerate_loop": {},
    "averaged": {},
    "compiled": {"backend": "aot_eager"},
    "functional": {},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_training_is_that_of_stored_activations(monkeypatch, name):
    torch.compiler.reset()
    settings = SETTINGS[name] | {"steps": STEPS}
    expected = run(monkeypatch, name, by_hand, **settings)
    for convert in (reversible, stored):
        assert_same_run(run(monkeypatch, name, convert, **settings), expected, EXACTLY)


IN_INTEGERS = {"plain_loop": {}, "lora": {}, "lora, converted last": {"convert_first": False}}


@pytest.mark.parametrize(("name", "settings"), IN_INTEGERS.items(), ids=IN_INTEGERS)
def test_exact_training_is_that_of_stored_activations(monkeypatch, name, settings):
    name, settings = name.partition(",")[0], settings | {"steps": STEPS}
    actual = run(monkeypatch, name, CONVERT, **settings)
    assert_same_run(actual, run(monkeypatch, name, partial(CONVERT, engine=reversa.Store()), **settings), 0)
    # Integers round the state otherwise: in float64, without bfloat16, it is seen how little that is.
    monkeypatch.setattr(torch, "autocast", lambda *_: nullcontext())
    actual, expected = (run(monkeypatch, name, convert, **settings) for convert in (reversible, by_hand))
    assert actual.told == pytest.approx(expected.told, rel=1e-4)
    assert_same(actual.gradients[0], expected.gradients[0], 1e-6)


@pytest.mark.parametrize("name", ["plain_loop", "lora", *(name for name in SETTINGS if name != "averaged")])
def test_the_loss_falls(monkeypatch, capsys, name):
    torch.compiler.reset()
    losses = run(monkeypatch, name, CONVERT, **SETTINGS.get(name, {})).told
    assert losses[-1] < losses[0] - 0.2
    assert f"loss {losses[0]:.3f} before, {losses[-1]:.3f} after" in capsys.readouterr().out


def test_plain_loop_says_what_conversion_saves(monkeypatch, capsys):
    run(monkeypatch, "plain_loop", CONVERT, steps=1)
    lines = capsys.readouterr().out.splitlines()
    before, after = (float(line.split(": ")[1].split()[0]) for line in lines[:2])
    assert after < before / 2


def test_averages_are_better_than_no_training(monkeypatch):
    losses = run(monkeypatch, "averaged", CONVERT).told
    assert max(losses["moving average"], losses["SWA"]) < losses["before"] - 1


def test_lora_trains_every_adapter_and_merges(monkeypatch, capsys):
    actual = run(monkeypatch, "lora", reversible, steps=2)
    assert len(actual.gradients[-1]) == 2 * 7 * 8  # A and B of the seven linear layers of each block
    assert all(g is not None and g.abs().max() > 0 for g in actual.gradients[-1].values())
    assert not any("lora" in name for name in actual.weights)
    assert float(capsys.readouterr().out.split()[-1]) < 1e-5


# ---------------------------------------------------------------------- resumed runs


def test_lightning_resumed_is_a_plain_loop_that_was_not_interrupted(monkeypatch, tmp_path):
    actual = run(monkeypatch, "lightning_vit", reversible, steps=2 * STEPS, folder=str(tmp_path))
    monkeypatch.setattr(reversa, "convert", by_hand)
    oracle = example("lightning_vit").Digits().vit
    optimizer = torch.optim.AdamW(oracle.parameters(), lr=3e-3)
    images, labels = example("small_data").digits()
    expected = []
    for _ in range(2):
        for x, y in list(zip(images.split(64), labels.split(64), strict=True))[:STEPS]:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(oracle(x), y)
            loss.backward()
            optimizer.step()
            expected.append(loss.item())
    assert actual.told == pytest.approx(expected, rel=EXACTLY)
    assert_same(actual.weights, oracle.state_dict(), EXACTLY)


def test_lightning_checkpoint_fits_the_ordinary_model(monkeypatch, tmp_path):
    losses = run(monkeypatch, "lightning_vit", CONVERT, folder=str(tmp_path)).told
    assert losses[-1] < losses[0] - 0.2
    plain = reversa.restore(example("lightning_vit").Digits().vit)
    saved = torch.load(tmp_path / "half.ckpt", weights_only=False)["state_dict"]
    plain.load_state_dict({name.removeprefix("vit."): value for name, value in saved.items()})


def test_hf_trainer_resumed_has_the_same_losses(monkeypatch, tmp_path):
    """With dropout: the history before the checkpoint is in the resumed one, too."""
    done = run(monkeypatch, "hf_trainer", CONVERT, folder=str(tmp_path))
    losses, resumed = done.told
    assert losses == resumed
    assert losses[-1] < losses[0] - 1
    assert len(done.gradients) == 30
    for i in range(10, 20):
        assert_same(done.gradients[10 + i], done.gradients[i], 0)
    assert losses[-1] < losses[0] - 1


def test_hf_trainer_trains_as_with_stored_activations(monkeypatch, tmp_path):
    folder = str(tmp_path)
    expected = run(monkeypatch, "hf_trainer", by_hand, steps=STEPS, folder=folder)
    for convert in (reversible, stored):
        assert_same_run(run(monkeypatch, "hf_trainer", convert, steps=STEPS, folder=folder), expected, EXACTLY)


# ---------------------------------------------------------------------- the page


PAGE = EXAMPLES.parent / "docs" / "stacks.md"


@pytest.mark.parametrize("code", re.findall(r"```py\n(.*?)```", PAGE.read_text(), re.DOTALL), ids=["peft", "compile"])
def test_blocks_of_the_page_in_which_other_packages_warn(code):
    """The others are run by test_package.py, without a warning."""
    exec(compile(code, str(PAGE), "exec"), {"__name__": "page"})


def test_the_page_and_the_scripts_name_each_other():
    scripts = {path.name for path in EXAMPLES.glob("*.py")} - {"small_data.py", "stability.py", "trajectories.py"}
    assert set(re.findall(r"\(\.\./examples/(\w+\.py)\)", PAGE.read_text())) == scripts
    for name in scripts:
        assert f"examples/{name}``" in (EXAMPLES / name).read_text(), f"{name} does not say how it is started"


# ---------------------------------------------------------------------- several processes


def one_process(name: str, steps: int) -> tuple[list[float], list[Result]]:
    """The whole batch in one plain loop, by stored activations: losses and gradients."""
    oracle = by_hand(example(name).make_model(), reversa.Momentum(0.9))
    optimizer = torch.optim.AdamW(oracle.parameters(), lr=3e-3)
    losses, found = [], []
    for tokens in example("small_data").pieces(steps):
        optimizer.zero_grad()
        loss = oracle(input_ids=tokens, labels=tokens).loss
        loss.backward()
        found.append({f"gradient {i}": p.grad.clone() for i, p in enumerate(oracle.parameters())})
        optimizer.step()
        losses.append(loss.item())
    return losses, found


def in_processes(test: Any) -> Any:
    for mark in marks:
        test = mark(test)
    return test


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _process(rank: int, port: int, folder: str, name: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(WORLD), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    reversa.convert = reversible
    found: list[Result] = []
    noting(found)
    losses = example(name).main(STEPS)
    torch.save((losses, found), f"{folder}/{rank}")
    sys.stdout.flush()
    os._exit(0)  # as in processes.py


def assert_as_one_process(folder: Path, name: str) -> None:
    mp.spawn(_process, args=(free_port(), str(folder), name), nprocs=WORLD)
    losses, expected = one_process(name, STEPS)
    for rank in range(WORLD):
        told, found = torch.load(folder / str(rank))
        assert told == pytest.approx(losses, rel=1e-6)  # Llama computes its norms in float32
        for have, want in zip(found, expected, strict=True):
            assert_same(have, want, 1e-6)


@in_processes
def test_ddp_is_one_process(tmp_path):
    assert_as_one_process(tmp_path, "ddp")


@needs_fsdp2
@in_processes
def test_fsdp2_is_one_process(tmp_path):
    assert_as_one_process(tmp_path, "fsdp2")


@in_processes
@pytest.mark.parametrize("name", ["ddp", pytest.param("fsdp2", marks=needs_fsdp2)])
def test_the_command_with_torchrun(name):
    """As users start it, with its own numbers."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(WORLD)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    script = str(EXAMPLES / f"{name}.py")
    done = subprocess.run([*command, script], env=environment, capture_output=True, text=True, check=True, timeout=300)
    before, after = (float(word) for word in done.stdout.replace(",", "").split()[1:4:2])
    assert after < before - 1

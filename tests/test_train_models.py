"""``reversa train --model NAME`` and ``reversa models``: every network by its name, with its own settings."""

from __future__ import annotations

import json
import re
from dataclasses import asdict

import pytest
import torch

import reversa
from reversa import models
from reversa.cli import main
from reversa.errors import SettingError
from reversa.schemes import SCHEMES
from reversa.train import load_network, train
from reversa.train.checkpoint import make_network
from reversa.train.config import ENGINES, TrainConfig, parse, to_yaml
from reversa.train.data import DATASETS, digits, digits32


def test_the_main_job_is_what_it_was():
    config = TrainConfig()
    assert (config.scheme, config.depth, config.width, config.name) == ("momentum", 54, 16, "digits-momentum")
    assert config.complete().network == "54 residual blocks, momentum, gamma 0.9"


@pytest.mark.parametrize("name", [name for name in models.names() if not name.endswith("1202")])
def test_every_network_can_be_asked_for(name):
    config = parse(["--model", name])
    with torch.device("meta"):
        network = make_network(config, num_classes=10, channels=1)
    assert sum(p.numel() for p in network.parameters()) > 100_000
    for chain in (m for m in network.modules() if isinstance(m, reversa.ReversibleSequence)):
        assert chain.engine == reversa.Invert()


def test_settings_reach_the_network():
    config = TrainConfig(model="hamiltonian74", h=0.05, engine="store", exact=True)
    with torch.device("meta"):
        chain = make_network(config, 10, 1).stages[0]
    assert (chain.scheme, chain.engine, chain.exact) == (reversa.Hamiltonian(0.05), reversa.Store(), True)
    with torch.device("meta"):
        network = make_network(TrainConfig(model="momentumresnet18", gamma=0.5), 10, 1)
    assert network.stages[0][0].scheme == reversa.Momentum(0.5)
    with torch.device("meta"):
        network = make_network(TrainConfig(scheme="midpoint", h=0.02, depth=6), 10, 1)
    assert network.chains[0].scheme == reversa.Midpoint(0.02)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (
            {"model": "hamiltonian74", "depth": 12},
            "hamiltonian74 has no depth, got depth=12: leave it out. Of such settings it has: h, exact",
        ),
        ({"model": "hamiltonian74", "scheme": "revnet"}, "hamiltonian74 has no scheme"),
        ({"model": "revnet38", "gamma": 0.9}, "revnet38 has no gamma"),
        ({"model": "resnet32", "exact": True}, "resnet32 has no exact"),
        ({"model": "resnet32", "engine": "recompute"}, "resnet32 has no engine"),
        ({"scheme": "revnet", "h": 0.1}, "scheme 'revnet' has no h"),
        ({"model": "leapfrog62", "h": -1.0}, "step size h must be a positive number"),
        ({"model": "leapfrog"}, "Did you mean: leapfrog"),
    ],
)
def test_settings_that_a_network_does_not_have(settings, told):
    with pytest.raises(SettingError, match=told):
        make_network(TrainConfig(**settings), 10, 1)


def test_written_settings_read_back_the_same(tmp_path):
    config = TrainConfig(model="leapfrog26", out=str(tmp_path)).complete()
    assert config.h == 0.1
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config))
    assert asdict(parse(["--config", str(file)])) == asdict(config)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["midpoint26", "revnet38"])
def test_a_network_of_the_papers_learns(tmp_path, name):
    result = train(TrainConfig(model=name, epochs=3, lr=0.05, out=str(tmp_path / "run")))
    assert result.rows[-1]["train_loss"] < result.rows[0]["train_loss"]
    assert result.test_accuracy > 0.3  # chance is 0.1
    assert name in (tmp_path / "run" / "report.md").read_text()
    network = load_network(tmp_path / "run" / "checkpoints" / "best.ckpt")
    assert type(network) is type(models.create(name))


@pytest.mark.parametrize("name", ["vit", "odenetsmall"])
def test_nothing_is_said_to_be_computed_back_where_nothing_is(tmp_path, name):
    result = train(TrainConfig(model=name, epochs=1, out=str(tmp_path / "run")))
    ((activations, accuracy, peak, _),) = result.table
    assert (activations, accuracy) == ("no reversible step", f"{result.test_accuracy:.2%}")
    assert "100.0%" in peak
    assert "computed back" not in (tmp_path / "run" / "report.md").read_text()


def test_help_names_every_scheme_engine_and_data_set():
    words = set(re.findall(r"\w+", TrainConfig.__doc__ or ""))
    assert words >= {*SCHEMES, *ENGINES, *DATASETS}


def test_enlarged_digits_are_the_same_digits():
    small, large = digits(), digits32()
    assert torch.equal(small.test.labels, large.test.labels)
    assert large.train.images.shape == (1257, 1, 32, 32)
    back = torch.nn.functional.avg_pool2d(large.test.images, 4)
    assert (back - small.test.images).abs().mean() < 0.25 * small.test.images.abs().mean()
    batch = large.augment(large.train.images[:8], torch.Generator().manual_seed(0))
    assert batch.shape == (8, 1, 32, 32)


def test_the_list_of_networks(capsys):
    assert main(["models"]) == 0
    out = capsys.readouterr().out
    assert "hamiltonian218                     1,683,034               108" in out
    assert main(["models", "--json", "--classes", "100"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["revnet38"]["parameters"] == 475_060
    assert rows["revnet38"]["reversible_steps"] == 14
    assert "h" in rows["leapfrog26"]["settings"]
    assert set(rows) == set(models.names())

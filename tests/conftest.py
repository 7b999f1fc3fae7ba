"""What every test starts from: fixed seeds, one thread (two workers share the machine), few and fixed examples."""

from __future__ import annotations

import gc
import importlib
import sys

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
settings.register_profile(
    "reversa",
    deadline=None,
    max_examples=15,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.load_profile("reversa")


@pytest.fixture(autouse=True, scope="module")
def _frozen():
    """What is there before a file's tests (packages, ten thousand tests) is not searched whenever a test collects."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def users_module(monkeypatch, tmp_path):
    """Writes a module of the user's into the working directory, from its name and its source."""

    def made(name: str, source: str):
        (tmp_path / f"{name}.py").write_text(source)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
        monkeypatch.delitem(sys.modules, name, raising=False)
        importlib.invalidate_caches()
        return importlib.import_module(name)

    return made

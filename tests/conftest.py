"""What every test starts from: fixed seeds, one thread (two workers share the machine), few and fixed examples."""

from __future__ import annotations

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


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)

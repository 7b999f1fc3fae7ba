"""The benchmark of faithful conversion, on a model small enough to run here."""

from __future__ import annotations

import importlib
from functools import partial
from pathlib import Path

import pytest
from torchvision.models import VisionTransformer, resnet18

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def faithful(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("faithful")


@pytest.mark.filterwarnings("ignore::reversa.errors.DriftWarning")
def test_an_exact_conversion_has_equal_gradients_and_is_near_the_original(faithful):
    vit = partial(VisionTransformer, 16, 8, 3, 2, 16, 32, num_classes=10)
    subject = faithful.Subject("tiny ViT", vit, 2, 16, 10)
    results = faithful.run(subject, (0.001,))
    for way in (faithful.EXACT, faithful.HOST, faithful.EXACT_32):
        measured = results[0.001, way.name]
        assert measured.gradient == "equal"
        assert measured.distance < 1e-2
    assert results[None, faithful.CHECKPOINT].gradient == "equal"
    assert results[0.001, "float32, anchors=None"].error > 1e-3  # float is wrong, and the table says so
    rows = [row for row in faithful.step_table(subject, results).rows if row]
    assert len(rows) == 2 + len(faithful.WAYS) - 1  # no block is left over


def test_the_relu_stays_within_the_block(faithful):
    table = faithful.relu_table(faithful.Subject("ResNet-18", resnet18, 4, 64), (0.5, 0.001))
    distances, outside = ([float(row[column]) for row in table.rows] for column in (1, 4))
    for values in (distances, outside):
        assert values == sorted(values, reverse=True)
        assert values[-1] < 1e-3

"""The command takes any data, and writes only where it is told to."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.unit.benchmarks.scripts import load

unlearning = load("unlearning")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes with text labels, pixels from 0 to 1, in colour."""
    rng = np.random.default_rng(0)
    labels = np.array(["owl", "ape"] * 40)
    images = rng.random((80, 4, 4, 3)) / 2 + (labels == "owl")[:, None, None, None] / 2
    path = tmp_path / "photos.npz"
    np.savez(path, x_train=images, y_train=labels, x_test=images, y_test=labels)
    return path


def test_text_labels_and_a_fraction_are_taken(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"

    unlearning.main(data=str(photos), features=64, erase=5, seeds=1, fraction=0.5, out=out)

    report = json.loads(out.read_text())
    (run,) = report["runs"]
    assert report["setup"]["num_train_examples"] == 40
    assert run["max_sum_difference"] == 0
    assert run["max_weight_difference"] <= 1e-5
    assert run["accuracy_after_share"] == run["accuracy_never_share"] > 0.6


def test_nothing_is_written_without_being_told_where(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    unlearning.main(data=str(photos), features=64, erase=5, seeds=1)

    assert [path.name for path in tmp_path.rglob("*.json")] == []

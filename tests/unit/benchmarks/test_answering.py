"""What answers cost: every way is measured, and a way that there is not is said to be none."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from lifelong_ray.config import ModelConfig
from tests.unit.benchmarks.scripts import load

precision = load("precision")
cascade = load("cascade")


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_every_precision_and_layout_is_measured(tmp_path: Path) -> None:
    out = tmp_path / "out.json"

    precision.main(models="mlp", batches="2,1", rounds=2, out=out)

    (model,) = json.loads(out.read_text())["models"].values()
    assert set(model["batches"]) == {"2", "1"}
    for found in model["batches"].values():
        assert set(found) == {"fp32", "bf16", "int8"}
        assert all(set(way) == {"channels_last", "contiguous"} for way in found.values())
        assert found["int8"]["channels_last"]["images_per_second"] > 0
    assert model["lowered_share"]["int8"] > 0.9
    assert model["left_out"] == {}


def test_a_precision_that_a_model_cannot_answer_in_is_left_out_and_said_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(precision.MODELS, "odd", ModelConfig(widths=(3, 5), image_size=8))
    out = tmp_path / "out.json"

    precision.main(models="odd", batches="1", rounds=1, out=out)

    model = json.loads(out.read_text())["models"]["odd"]
    assert set(model["batches"]["1"]) == {"fp32", "bf16"}
    assert "nothing of this model can answer in int8" in model["left_out"]["int8"]


def test_a_cascade_is_measured_on_images_that_chose_nothing(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(400) % 2
    images = rng.integers(0, 90, (400, 8, 8, 1), np.uint8)
    images[labels == 1, :4] += 150
    data, out = tmp_path / "halves.npz", tmp_path / "out.json"
    np.savez(data, x_train=images, y_train=labels, x_test=images[:40], y_test=labels[:40])

    cascade.main(
        data=str(data),
        model="convnet",
        widths="4,4",
        training=200,
        holdout=200,
        testing=40,
        epochs=2,
        limits="0.05",
        batches="8",
        out=out,
    )

    results = json.loads(out.read_text())["results"]
    assert [result["precision"] for result in results] == ["fp32", "bf16"]
    for result in results:
        assert result["calibration"]["num_choosing"] == 100
        assert result["light_share"] > 0
        assert result["images_per_second"]["8"]["together"] > 0

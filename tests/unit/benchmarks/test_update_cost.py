"""One update against retraining: which data, which methods, which figures."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lifelong_ray.config import LearningConfig
from tests.unit.benchmarks.scripts import load

update_cost, common, report = map(load, ("update_cost", "common", "report"))


class TaskSet:
    """What a task set of the continuum library offers of use here."""

    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        self._all = images, labels, np.zeros(len(labels))

    def get_raw_samples(self) -> tuple[np.ndarray, ...]:
        return self._all


@pytest.fixture
def bars() -> tuple[np.ndarray, np.ndarray]:
    """Four classes by which row of an image is bright."""
    rng = np.random.default_rng(0)
    labels = np.tile(np.arange(4), 30)
    images = rng.integers(0, 120, (120, 4, 4)).astype(np.uint8)
    images[np.arange(120), labels] += 130
    return images, labels


@pytest.fixture
def file(bars: tuple[np.ndarray, np.ndarray], tmp_path: Path) -> Path:
    images, labels = bars
    path = tmp_path / "bars.npz"
    names = np.array(["ape", "bat", "cat", "dog"])[labels]
    np.savez(path, x_train=images, y_train=names, x_test=images, y_test=names)
    return path


def measured(data: str, out: Path, **more: Any) -> dict[str, Any]:
    given: dict[str, Any] = {
        "model": "mlp",
        "epochs": 1,
        "budgets": "",
        "num_features": 32,
        "seeds": 1,
        "device": "cpu",
    }
    update_cost.main(data=data, out=out, **given | more)
    methods: dict[str, Any] = json.loads(out.read_text())["methods"]
    return methods


def test_every_metric_of_the_update_is_written(file: Path, tmp_path: Path) -> None:
    methods = measured(
        str(file),
        tmp_path / "out.json",
        new_classes="bat,dog",
        methods="full,fast",
        peak_tflops=1.0,
    )

    fast = methods["fast"]
    assert fast["plasticity"] == fast["new_accuracy"]
    assert fast["backward_transfer"] == -fast["forgetting"]
    assert len(fast["per_class_accuracy"]) == 4
    assert np.mean(fast["per_class_accuracy"]) == pytest.approx(fast["accuracy"])
    # The base version has nothing of the new classes right, and half of the images are old.
    before = (fast["old_accuracy"] + fast["forgetting"]) / 2
    gained = fast["positive_flip_share"] - fast["negative_flip_share"]
    assert gained == pytest.approx(fast["accuracy"] - before)
    assert 0 < methods["full"]["share_of_peak"] < 1
    assert fast["share_of_peak"] is None
    for key in ("calibration_error", "milliseconds_per_image", "average_incremental_accuracy"):
        assert fast[key] is not None


def test_listed_settings_run_in_every_combination_and_without_full(
    file: Path, tmp_path: Path
) -> None:
    methods = measured(
        str(file),
        tmp_path / "update_tau.json",
        new_classes="bat,dog",
        methods="slow",
        num_features=0,
        memory_share=0,
        memory_per_class=5,
        replay_share="0.25,0.5",
        logit_adjustment="0,1",
    )
    report.main(results=tmp_path, docs=tmp_path)

    assert list(methods) == [
        "slow share 0.25 tau 0",
        "slow share 0.25 tau 1",
        "slow share 0.5 tau 0",
        "slow share 0.5 tau 1",
    ]
    assert methods["slow share 0.5 tau 1"]["points_over_full"] is None
    assert "| slow share 0.5 tau 1 | slow | - |" in (tmp_path / "benchmarks.md").read_text()


def test_a_combination_sets_both_values_and_one_needs_no_name() -> None:
    both = update_cost.combinations(LearningConfig(), "0.25,auto", "1")
    (one,) = update_cost.combinations(LearningConfig(), "auto", "0.5").items()

    assert both[" share 0.25 tau 1"].update.replay.share == 0.25
    assert both[" share auto tau 1"].update.replay.share == "auto"
    assert both[" share auto tau 1"].update.logit_adjustment == 1
    assert one[0] == ""
    assert one[1].update.logit_adjustment == 0.5


def test_a_scenario_of_continuum_says_itself_which_classes_are_new(
    bars: tuple[np.ndarray, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, labels = bars
    both = [TaskSet(images[part], labels[part]) for part in (labels < 2, labels >= 2)]
    monkeypatch.setitem(sys.modules, "my_scenarios", SimpleNamespace(mine=lambda: (both, both)))

    methods = measured("continuum:my_scenarios:mine", tmp_path / "out.json", methods="fast")

    assert methods["fast"]["new_accuracy"] > 0.5


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"methods": "slow,slwo"}, "slwo is not a method; choose from full, warm_epoch"),
        ({"methods": "slow", "budgets": "0.1"}, "--budgets are shares of the seconds of full"),
        ({"methods": "fast", "num_features": 0}, "fast needs the analytic head"),
        ({}, "--new-classes is empty; name the labels"),
        ({"data": "cifar100-50+50", "new_classes": "8"}, "leave out --new-classes"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    wrong: dict[str, Any], message: str, tmp_path: Path
) -> None:
    given: dict[str, Any] = {"data": "digits", "out": tmp_path / "out.json"} | wrong

    with pytest.raises(Exception, match=message):
        measured(**given)


def test_an_update_is_measured_between_two_experiences(
    bars: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    images, labels = bars
    three = [TaskSet(images[labels == c], labels[labels == c]) for c in range(3)]
    monkeypatch.setitem(sys.modules, "my_scenarios", SimpleNamespace(mine=lambda: (three, three)))

    with pytest.raises(Exception, match="has 3 experiences, and one update is measured"):
        common.growing_scenario(common.data_config("continuum:my_scenarios:mine", 1.0), "")


def test_without_a_gpu_the_command_says_why_it_measured_nothing(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = tmp_path / "update_gpu.json"

    update_cost.main(data=str(file), new_classes="bat", device="cuda", out=out)
    report.main(results=tmp_path, docs=tmp_path)

    assert json.loads(out.read_text())["skipped"].startswith("no CUDA device: ")
    assert "Skipped: no CUDA device: " in (tmp_path / "benchmarks.md").read_text()

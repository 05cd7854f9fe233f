"""What is measured of a method while experiences arrive."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lifelong_ray.config import ModelConfig
from lifelong_ray.datasets import class_order
from tests.unit.benchmarks.scripts import load

common, continual, sequence = map(load, ("common", "continual", "sequence"))

MODEL = ModelConfig(name="mlp", widths=(8,), image_size=4)


@pytest.fixture
def bars(tmp_path: Path) -> Path:
    """Four classes by which row of an image is bright."""
    rng = np.random.default_rng(0)
    labels = np.tile(np.arange(4), 20)
    images = rng.integers(0, 120, (80, 4, 4)).astype(np.uint8)
    images[np.arange(80), labels] += 130
    path = tmp_path / "bars.npz"
    np.savez(path, x_train=images, y_train=labels, x_test=images[:40], y_test=labels[:40])
    return path


def measured(bars: Path, kind: str, name: str = "er") -> dict[str, Any]:
    scenario, num_classes = common.cut_scenario(common.data_config(str(bars), 1.0), kind, 2)
    protocol = sequence.Protocol(
        scenario=kind,
        iterations=20,
        batch_size=8,
        memory_per_class=4,
        lambda_ewc=1.0,
        precision="fp32",
        device="cpu",
        num_experiences=2,
        num_classes=num_classes,
        classes_per_label=num_classes // len(scenario.class_names),
    )
    result: dict[str, Any] = sequence.run_method(
        scenario, MODEL, continual.method(name, protocol, 0)
    )
    return result


@pytest.mark.parametrize("kind", ["class", "domain", "task"])
def test_every_update_is_judged_by_class_and_against_its_parent(bars: Path, kind: str) -> None:
    result = measured(bars, kind)

    first, second = result["updates"]
    assert (first["negative_flip_share"], first["positive_flip_share"]) == (None, None)
    gained = second["positive_flip_share"] - second["negative_flip_share"]
    num_labels = 2 if kind == "domain" else 4
    assert len(second["per_class_accuracy"]) == num_labels
    assert result["per_class_accuracy"] == second["per_class_accuracy"]
    assert second["accuracy"] == pytest.approx(result["final_accuracy"])
    # Half of the images are of classes that the parent could not know, or of parts it had not
    # seen; of the others it has answered `rows[0][0]` rightly.
    before = result["rows"][0][0] / 2 + (result["rows"][0][1] or 0) / 2
    assert gained == pytest.approx(result["final_accuracy"] - before)
    assert 0 <= result["calibration_error"] <= 1
    assert result["milliseconds_per_image"] > 0


def test_forward_transfer_is_measured_where_labels_are_known_beforehand(bars: Path) -> None:
    domain, classes = measured(bars, "domain"), measured(bars, "class")

    untrained = sequence._untrained(
        common.cut_scenario(common.data_config(str(bars), 1.0), "domain", 2)[0],
        MODEL,
        0,
        [(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.tensor([0, 1]))] * 2,
    )
    assert untrained == (0.5, 0.5)
    assert domain["forward_transfer"] is not None
    assert domain["rows"][0][1] is not None
    assert classes["forward_transfer"] is None
    assert classes["rows"][0][1] is None


def test_the_command_writes_every_metric_of_every_method(
    bars: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    continual.main(
        data=str(bars),
        scenario="domain",
        experiences=2,
        methods="naive,joint",
        widths="8",
        iterations=4,
        batch_size=8,
        device="cpu",
        peak_tflops=1.0,
        seeds=1,
        out=tmp_path / "out.json",
    )

    methods = json.loads((tmp_path / "out.json").read_text())["methods"]
    for key in (
        "final_accuracy_mean",
        "per_class_accuracy_mean",
        "average_incremental_accuracy_mean",
        "forgetting_mean",
        "backward_transfer_mean",
        "forward_transfer_mean",
        "retention_mean",
        "plasticity_mean",
        "negative_flip_share_mean",
        "positive_flip_share_mean",
        "calibration_error_mean",
        "milliseconds_per_image",
        "share_of_peak",
    ):
        assert methods["naive"][key] is not None, key
    assert 0 < methods["joint"]["share_of_peak"] < 1
    assert "| naive |" in capsys.readouterr().out


def test_without_a_gpu_the_command_says_why_it_measured_nothing(
    bars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    continual.main(data=str(bars), device="cuda", precision="bf16", out=tmp_path / "out.json")

    report = json.loads((tmp_path / "out.json").read_text())
    assert report["skipped"].startswith("no CUDA device: ")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"methods": "er,erm"}, "erm is not a method; choose from default, naive"),
        ({"scenario": "klass"}, "klass is not a scenario; choose from class, domain, task"),
        ({"compare": "avalanche", "model": "convnet"}, "compared with an mlp only"),
    ],
)
def test_options_that_name_nothing_are_refused(wrong: dict[str, str], message: str) -> None:
    with pytest.raises(Exception, match=message):
        continual.main(data="digits", **wrong)


def test_cifar100_in_parts_keeps_its_experiences(
    cifar100: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = common.data_config("cifar100-50+50", 1.0, str(cifar100))

    scenario, num_classes = common.cut_scenario(config, "task", 5)

    assert [len(e.classes) for e in scenario.experiences] == [50, 50]
    assert (num_classes, scenario.task_of_class) == (100, (0,) * 50 + (1,) * 50)
    assert set(scenario.experiences[1].train_labels) == set(range(50, 100))
    assert "says itself which classes arrive when: 2 experiences" in capsys.readouterr().out


def test_classes_come_in_the_order_of_a_seed(bars: Path) -> None:
    config = common.data_config(str(bars), 1.0)

    scenario, _ = common.cut_scenario(config, "class", 2, order_seed=3)

    assert scenario.class_names == tuple(map(str, class_order(4, 3)))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of images of many sizes, some of them grey."""
    rng = np.random.default_rng(0)
    for name, mode in (("cat", "RGB"), ("dog", "L")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(5):
            shape = (6 + i, 9, 3) if mode == "RGB" else (6 + i, 9)
            image = Image.fromarray(rng.integers(0, 256, shape).astype(np.uint8))
            image.save(tmp_path / "photos" / name / f"{i}.png")
    return tmp_path / "photos"


def test_images_of_many_sizes_are_scaled_to_one(photos: Path) -> None:
    config = common.data_config(str(photos), 1.0)

    scenario, _ = common.cut_scenario(config, "class", 2, image_size=8)

    assert {e.train_images.shape for e in scenario.experiences} == {(4, 8, 8, 3)}


def test_images_of_many_sizes_are_refused_without_a_size(photos: Path) -> None:
    with pytest.raises(Exception, match=r"images of the shapes .* as --image-size"):
        common.load_arrays(common.data_config(str(photos), 1.0))


def test_experiences_that_come_by_themselves_are_not_scaled() -> None:
    with pytest.raises(Exception, match="leave out --image-size"):
        common.growing_scenario(common.data_config("cifar100-50+50", 1.0), "", image_size=8)

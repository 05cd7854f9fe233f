"""What the comparison with Avalanche does on this side of the process boundary."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.unit.benchmarks.scripts import load

peer, oracle = load("avalanche_peer"), load("avalanche_oracle")


def settings(**more: Any) -> Any:
    given: dict[str, Any] = {
        "scenario": "class",
        "num_experiences": 2,
        "num_iterations": 3,
        "memory_per_class": 10,
        "seed": 0,
        "order": (2, 0, 3, 1),
        "hidden": (5,),
        "learning_rate": 0.001,
        "batch_size": 4,
        "dark_alpha": 0.5,
        "dark_beta": 1.0,
        "ewc_lambda": 1.0,
        "lwf_alpha": 1.0,
        "lwf_temperature": 2.0,
    }
    return peer.Settings(**given | more)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Four classes of two images each; every pixel of an image is its class times 51."""
    labels = np.array([0, 1, 2, 3, 0, 1, 2, 3], dtype=np.int16)
    images = np.repeat(labels * 51, 4).reshape(8, 2, 2).astype(np.uint8)
    path = tmp_path / "data.npz"
    np.savez(path, x_train=images, y_train=labels, x_test=images, y_test=labels)
    return path


def test_classes_come_in_the_order_given_and_pixels_run_from_zero_to_one(data: Path) -> None:
    train, _ = peer.load_parts(data, settings())

    first, second = ({round(float(x), 3) for x in part.images.flatten()} for part in train)
    assert (first, second) == ({0.4, 0.0}, {0.6, 0.2})


@pytest.mark.parametrize(
    ("scenario", "labels", "outputs"), [("class", [[1, 0], [3, 2]], 4), ("domain", [[1, 0]] * 2, 2)]
)
def test_a_label_is_a_place_in_the_order_or_in_the_experience(
    data: Path, scenario: str, labels: list[list[int]], outputs: int
) -> None:
    given = settings(scenario=scenario)

    train, _ = peer.load_parts(data, given)

    assert [part.labels.tolist() for part in train] == [row * 2 for row in labels]
    assert given.num_outputs == outputs


def test_memory_counts_original_classes_in_both_scenarios() -> None:
    assert settings(scenario="class").memory_size == 40
    assert settings(scenario="domain").memory_size == 40


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"order": (0, 1, 2)}, "must name each class"), ({"num_experiences": 3}, "cannot be cut")],
)
def test_a_protocol_that_does_not_fit_the_data_is_refused(
    data: Path, wrong: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        peer.load_parts(data, settings(**wrong))


def test_every_experience_is_stopped_after_its_iterations_and_counted() -> None:
    stops: list[int] = []
    stop = peer.StopAfter(3)
    strategy = SimpleNamespace(mb_y=torch.zeros(4), stop_training=lambda: stops.append(stop.total))

    for _ in range(2):
        stop.before_training_exp(strategy)
        for _ in range(3):
            stop.after_training_iteration(strategy)

    assert stops == [3, 6]
    assert stop.samples_seen == 24


def test_a_disagreement_is_told_from_a_difference_by_definition() -> None:
    def verdict(difference: float, tolerance: float | None) -> str:
        return str(oracle.Comparison("x", difference, tolerance, "").verdict)

    assert verdict(0.5, 1.0) == "agrees"
    assert verdict(float("nan"), 1.0) == "DISAGREES"
    assert verdict(2.0, 1.0) == "DISAGREES"
    assert verdict(2.0, None) == "differs by definition"


@pytest.mark.parametrize(
    ("topic", "answer", "wrong"),
    [
        ("penalty", lambda asked: {"value": _penalty(asked)}, lambda x: {"value": x["value"] / 2}),
        (
            "distillation",
            lambda asked: {"values": _divergences(asked)},
            lambda x: {"values": [4 * v for v in x["values"]]},
        ),
    ],
)
def test_an_answer_off_by_a_factor_is_noticed(topic: str, answer: Any, wrong: Any) -> None:
    right = answer(getattr(oracle, f"ask_{topic}")())
    compare = getattr(oracle, f"compare_{topic}")

    assert {one.verdict for one in compare(right)} == {"agrees"}
    assert {one.verdict for one in compare(wrong(right))} == {"DISAGREES"}


def _penalty(asked: dict[str, Any]) -> torch.Tensor:
    penalty: torch.Tensor = asked["importance"] * (asked["now"] - asked["anchor"]) ** 2
    return penalty.sum()


def _divergences(asked: dict[str, Any]) -> list[torch.Tensor]:
    known = slice(asked["num_known"])
    values = []
    for temperature in asked["temperatures"]:
        p = (asked["teacher"][:, known] / temperature).softmax(1)
        q = (asked["logits"][:, known] / temperature).softmax(1)
        values.append((p * (p / q).log()).sum(1).mean())
    return values

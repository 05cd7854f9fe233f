"""The gate, against cases small enough to count by hand."""

import numpy as np
import pytest
from numpy.typing import NDArray

from lifelong_ray.config import GateConfig
from lifelong_ray.release import Check, GateReport, judge_base, judge_update

CONFIG = GateConfig()
OLD = ("cat", "dog")
ALL = ("cat", "dog", "owl")


def answers(classes: int, predicted: list[int]) -> NDArray[np.float64]:
    """Scores whose best class is the predicted one."""
    return np.eye(classes)[predicted]


def check(report: GateReport, name: str) -> Check:
    return next(check for check in report.checks if check.name == name)


def test_a_base_version_that_is_right_passes() -> None:
    labels = [0] * 10 + [1] * 10

    report = judge_base(labels, answers(2, labels), OLD, CONFIG)

    assert report.passed
    assert report.reason == "passed"
    assert check(report, "accuracy").value == 1.0


def test_a_base_version_below_the_least_accuracy_fails_and_says_so() -> None:
    labels = [0] * 10 + [1] * 10
    predicted = [0] * 9 + [1] + [1] * 4 + [0] * 6

    report = judge_base(labels, answers(2, predicted), OLD, CONFIG)

    assert not report.passed
    assert report.reason == "accuracy 0.650 below 0.700"


def test_a_class_below_the_floor_fails_though_the_mean_is_fine() -> None:
    labels = [0] * 90 + [1] * 10
    predicted = [0] * 90 + [1] * 2 + [0] * 8

    report = judge_base(labels, answers(2, predicted), OLD, CONFIG)

    assert not report.passed
    assert report.reason == "class_floor 0.200 below 0.300 (class dog)"


def test_an_empty_hold_out_never_passes() -> None:
    report = judge_base([], np.zeros((0, 2)), OLD, CONFIG)

    assert not report.passed
    assert report.not_judged == ("accuracy", "class_floor")
    assert "accuracy not judged: 0 of 5 images" in report.reason


def test_an_update_that_keeps_the_old_and_learns_the_new_passes() -> None:
    labels = [0] * 10 + [1] * 10 + [2] * 10
    parent = [0] * 10 + [1] * 10 + [0] * 10

    report = judge_update(labels, answers(2, parent), answers(3, labels), OLD, ALL, CONFIG)

    assert report.passed
    assert check(report, "retention").value == 1.0
    assert check(report, "new_accuracy").value == 1.0


def test_confusion_with_a_new_class_costs_retention_but_not_retention_within_old() -> None:
    labels = [0] * 10 + [1] * 10 + [2] * 10
    scores = answers(3, labels)
    scores[:4] = [0.4, 0.0, 0.6]  # four cats become owls, but cat stays the best old class

    report = judge_update(labels, answers(2, labels[:20] + [0] * 10), scores, OLD, ALL, CONFIG)

    assert check(report, "retention").value == pytest.approx(16 / 20)
    assert check(report, "retention_within_old").value == 1.0
    assert check(report, "negative_flips").value == pytest.approx(4 / 20)
    assert not report.passed


def test_retention_is_relative_to_what_the_parent_got_right() -> None:
    labels = [0] * 20
    parent = [0] * 10 + [1] * 10
    candidate = [1] * 1 + [0] * 9 + [1] * 10

    report = judge_update(labels, answers(2, parent), answers(2, candidate), OLD, OLD, CONFIG)

    assert check(report, "retention").value == pytest.approx(9 / 10)
    assert check(report, "negative_flips").value == pytest.approx(1 / 20)


def test_class_order_may_differ_between_parent_and_candidate() -> None:
    labels = [0] * 10 + [1] * 10  # owl, cat

    report = judge_update(
        labels,
        answers(2, [0] * 10 + [1] * 10),  # dog, cat
        answers(3, labels),
        ("dog", "cat"),
        ("owl", "cat", "dog"),
        CONFIG,
    )

    assert check(report, "retention").value == 1.0
    assert check(report, "new_accuracy").value == 1.0


def test_a_new_class_without_hold_out_images_is_listed_as_not_judged() -> None:
    labels = [0] * 10 + [1] * 10 + [2] * 2

    report = judge_update(
        labels, answers(2, [*labels[:20], 0, 0]), answers(3, labels), OLD, ALL, CONFIG
    )

    assert report.passed
    assert report.not_judged == ("new_accuracy",)
    assert "new_accuracy not judged: 2 of 5 images" in report.reason
    assert "too few images to judge owl" in check(report, "class_floor").reason


def test_an_update_without_old_hold_out_images_never_passes() -> None:
    labels = [2] * 10

    report = judge_update(labels, answers(2, [0] * 10), answers(3, labels), OLD, ALL, CONFIG)

    assert not report.passed
    assert {"retention", "retention_within_old", "negative_flips"} <= set(report.not_judged)


def test_a_candidate_that_lost_a_class_never_passes() -> None:
    labels = [0] * 10

    report = judge_update(
        labels, answers(2, labels), answers(1, labels), ("cat", "dog"), ("cat",), CONFIG
    )

    assert not report.passed
    assert "classes_kept 0.500 below 1.000: dog missing" in report.reason


def test_scores_that_are_not_numbers_fail_even_where_the_best_class_looks_right() -> None:
    labels = [0] * 10
    scores = answers(2, labels)
    scores[0] = [np.nan, 0.0]

    report = judge_update(labels, answers(2, labels), scores, OLD, OLD, CONFIG)

    assert not report.passed
    assert check(report, "retention").value == pytest.approx(0.9)
    assert check(report, "retention_within_old").value == pytest.approx(0.9)
    assert check(report, "finite_scores").passed is False


def test_a_parent_that_is_never_right_has_nothing_to_lose() -> None:
    labels = [0] * 10

    report = judge_update(labels, answers(2, [1] * 10), answers(2, labels), OLD, OLD, CONFIG)

    assert report.passed


@pytest.mark.parametrize(
    ("labels", "scores", "message"),
    [
        ([0, 5], np.zeros((2, 2)), "labels run from 0 to 5 but there are 2 classes"),
        ([0, -1], np.zeros((2, 2)), "labels run from -1"),
        ([0.5], np.zeros((1, 2)), "one integer class index"),
        ([0], np.zeros((2, 2)), "candidate scores have shape"),
    ],
)
def test_input_of_the_wrong_shape_is_refused(
    labels: list[int], scores: NDArray[np.float64], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        judge_base(labels, scores, OLD, CONFIG)


def test_a_report_survives_json() -> None:
    report = judge_base([0] * 10, answers(2, [0] * 10), OLD, CONFIG)

    assert GateReport.model_validate_json(report.model_dump_json()) == report

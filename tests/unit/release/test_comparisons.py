"""What an operator reads of pairs of answers."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from lifelong_ray.release import LabelledPairs, ModelLatency, summarise_comparisons
from tests.rows import a_comparison, a_label


def test_agreement_is_the_share_of_requests_with_one_class_from_both() -> None:
    rows = [
        a_comparison("a"),
        a_comparison("b"),
        a_comparison("c"),
        a_comparison("d", candidate="dog"),
    ]

    [summary] = summarise_comparisons(rows, [])

    assert (summary.rollout_id, summary.num_comparisons) == ("r1", 4)
    assert (summary.stable_version, summary.candidate_version) == ("v1", "v1.1")
    assert summary.agreement == 0.75


def test_the_difference_in_confidence_comes_with_its_standard_error() -> None:
    rows = [
        a_comparison(str(confidence), stable_confidence=0.5, candidate_confidence=confidence)
        for confidence in (0.6, 0.7, 0.8)
    ]

    [summary] = summarise_comparisons(rows, [])

    assert summary.confidence_difference == pytest.approx(0.2)
    assert summary.confidence_difference_se == pytest.approx(0.1 / math.sqrt(3))


def test_one_pair_has_no_standard_error() -> None:
    row = a_comparison("a", stable_confidence=0.5, candidate_confidence=0.75)

    [summary] = summarise_comparisons([row], [])

    assert summary.confidence_difference == pytest.approx(0.25)
    assert summary.confidence_difference_se is None


def test_latency_is_that_inside_the_models_which_were_asked() -> None:
    rows = [a_comparison(str(n), stable_ms=float(n), candidate_ms=0.0) for n in range(101)]

    [summary] = summarise_comparisons(rows, [])

    assert summary.stable_latency.number == 100  # one answer came from memory
    assert summary.stable_latency.median_ms == pytest.approx(50.5)
    assert summary.stable_latency.p99_ms == pytest.approx(99.01)
    assert summary.candidate_latency == ModelLatency(0, None, None)


def test_later_labels_say_who_was_right() -> None:
    rows = [
        a_comparison("both", audit=False),
        a_comparison("candidate", candidate="dog", audit=False),
        a_comparison("stable", candidate="dog"),
        a_comparison("neither", candidate="dog", audit=False),
        a_comparison("unlabelled", candidate="dog"),
    ]
    labels = [
        a_label("both", "cat"),
        a_label("candidate", "dog"),
        a_label("stable", "cat"),
        a_label("neither", "cow"),
        a_label("unknown", "cow"),
    ]

    [summary] = summarise_comparisons(rows, labels)

    assert summary.labelled == LabelledPairs(1, 1, 1, 1)
    assert summary.audited == LabelledPairs(only_stable=1)


def test_the_first_label_counts_and_rows_of_one_request_count_once() -> None:
    rows = [a_comparison("a", candidate="dog")] * 2
    labels = [a_label("a", "cat", at_s=9.0), a_label("a", "dog", at_s=2.0)]

    [summary] = summarise_comparisons(rows, [*labels, replace(labels[0], kind="import", at_s=0.0)])

    assert summary.num_comparisons == 1
    assert summary.labelled == LabelledPairs(only_candidate=1)


def test_a_candidate_without_an_answer_was_wrong_and_has_no_confidence() -> None:
    rows = [a_comparison("a", candidate="", candidate_confidence=0.0, candidate_ms=0.0)]

    [summary] = summarise_comparisons(rows, [a_label("a", "cat")])

    assert (summary.num_unanswered, summary.agreement) == (1, 0.0)
    assert summary.confidence_difference is None
    assert summary.labelled == LabelledPairs(only_stable=1)


def test_rollouts_are_told_apart_in_the_order_of_their_first_request() -> None:
    rows = [
        a_comparison("b", rollout_id="r2", at_s=2.0),
        a_comparison("a"),
        a_comparison("c", at_s=3.0),
    ]

    summaries = summarise_comparisons(rows, [])

    assert [(s.rollout_id, s.num_comparisons) for s in summaries] == [("r1", 2), ("r2", 1)]


def test_nothing_compared_is_nothing_to_say() -> None:
    assert summarise_comparisons([], [a_label("a", "cat")]) == []

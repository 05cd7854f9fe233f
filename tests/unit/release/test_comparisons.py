"""What an operator reads of pairs of answers."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from lifelong_ray.release import LabelledPairs, ModelLatency, summarise_comparisons
from lifelong_ray.types import Comparison, Feedback


def a_pair(
    request_id: str, stable: str = "cat", candidate: str = "cat", **more: object
) -> Comparison:
    row = Comparison(
        request_id=request_id,
        at_s=1.0,
        rollout_id="r1",
        stable_version="v1",
        stable_class=stable,
        stable_confidence=0.5,
        candidate_version="v1.1",
        candidate_class=candidate,
        candidate_confidence=0.75,
        stable_ms=1.0,
        candidate_ms=2.0,
        audit=False,
    )
    return replace(row, **more)  # type: ignore[arg-type]  # any field


def a_label(request_id: str, label: str, at_s: float = 2.0) -> Feedback:
    return Feedback(
        feedback_id=f"{request_id}-{at_s}",
        at_s=at_s,
        kind="feedback",
        label=label,
        request_id=request_id,
        content_hash="",
        user="",
        audit=False,
    )


def test_agreement_is_the_share_of_requests_with_one_class_from_both() -> None:
    rows = [a_pair("a"), a_pair("b"), a_pair("c"), a_pair("d", candidate="dog")]

    [summary] = summarise_comparisons(rows, [])

    assert (summary.rollout_id, summary.num_comparisons) == ("r1", 4)
    assert (summary.stable_version, summary.candidate_version) == ("v1", "v1.1")
    assert summary.agreement == 0.75


def test_the_difference_in_confidence_comes_with_its_standard_error() -> None:
    confidences = (0.6, 0.7, 0.8)
    rows = [a_pair(str(c), candidate_confidence=c) for c in confidences]

    [summary] = summarise_comparisons(rows, [])

    assert summary.confidence_difference == pytest.approx(0.2)
    assert summary.confidence_difference_se == pytest.approx(0.1 / math.sqrt(3))


def test_one_pair_has_no_standard_error() -> None:
    [summary] = summarise_comparisons([a_pair("a")], [])

    assert summary.confidence_difference == pytest.approx(0.25)
    assert summary.confidence_difference_se is None


def test_latency_is_that_inside_the_models_which_were_asked() -> None:
    rows = [a_pair(str(n), stable_ms=float(n), candidate_ms=0.0) for n in range(101)]

    [summary] = summarise_comparisons(rows, [])

    assert summary.stable_latency.number == 100  # one answer came from memory
    assert summary.stable_latency.median_ms == pytest.approx(50.5)
    assert summary.stable_latency.p99_ms == pytest.approx(99.01)
    assert summary.candidate_latency == ModelLatency(0, None, None)


def test_later_labels_say_who_was_right() -> None:
    rows = [
        a_pair("both"),
        a_pair("candidate", candidate="dog"),
        a_pair("stable", candidate="dog", audit=True),
        a_pair("neither", candidate="dog"),
        a_pair("unlabelled", candidate="dog"),
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
    rows = [a_pair("a", candidate="dog")] * 2
    labels = [a_label("a", "cat", at_s=9.0), a_label("a", "dog", at_s=2.0)]

    [summary] = summarise_comparisons(rows, [*labels, replace(labels[0], kind="import", at_s=0.0)])

    assert summary.num_comparisons == 1
    assert summary.labelled == LabelledPairs(only_candidate=1)


def test_a_candidate_without_an_answer_was_wrong_and_has_no_confidence() -> None:
    rows = [a_pair("a", candidate="", candidate_confidence=0.0, candidate_ms=0.0)]

    [summary] = summarise_comparisons(rows, [a_label("a", "cat")])

    assert (summary.num_unanswered, summary.agreement) == (1, 0.0)
    assert summary.confidence_difference is None
    assert summary.labelled == LabelledPairs(only_stable=1)


def test_rollouts_are_told_apart_in_the_order_of_their_first_request() -> None:
    rows = [a_pair("b", rollout_id="r2", at_s=2.0), a_pair("a"), a_pair("c", at_s=3.0)]

    summaries = summarise_comparisons(rows, [])

    assert [(s.rollout_id, s.num_comparisons) for s in summaries] == [("r1", 2), ("r2", 1)]


def test_nothing_compared_is_nothing_to_say() -> None:
    assert summarise_comparisons([], [a_label("a", "cat")]) == []

"""Promotion evidence: exact properties of the bets, and simulated streams of audit labels."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from lifelong_ray.release import (
    Pairs,
    confidence_sequence,
    count_pairs,
    e_inferior,
    e_not_inferior,
    judge_evidence,
)
from lifelong_ray.release.evidence import log_e_inferior, log_e_not_inferior, log_wealth
from tests.proof import short_and_long
from tests.rows import a_comparison, a_label

counts = st.integers(0, 400)
pairs_of_any_size = st.builds(Pairs, counts, counts, counts)
margins = st.floats(0, 0.5)


@settings(deadline=None)
@given(pairs_of_any_size, margins, st.floats(0, 1), st.floats(0, 1))
def test_no_strategy_of_nature_makes_the_fortune_grow_while_the_candidate_is_inferior(
    pairs: Pairs, margin: float, share_worse: float, share_better: float
) -> None:
    # Nature picks any odds whose mean difference is at most -margin.
    p_worse = margin + (1 - margin) * share_worse
    p_better = min(1 - p_worse, p_worse - margin) * share_better
    p_same = 1 - p_worse - p_better

    now = log_e_not_inferior(pairs, margin)
    following = [
        (p_better, log_e_not_inferior(pairs + Pairs(better=1), margin)),
        (p_same, log_e_not_inferior(pairs + Pairs(same=1), margin)),
        (p_worse, log_e_not_inferior(pairs + Pairs(worse=1), margin)),
    ]

    expected_growth = sum(p * math.exp(value - now) for p, value in following)
    assert expected_growth <= 1 + 1e-9


@settings(deadline=None)
@given(pairs_of_any_size, margins)
def test_evidence_for_and_against_mirror_each_other(pairs: Pairs, margin: float) -> None:
    mirrored = Pairs(better=pairs.worse, same=pairs.same, worse=pairs.better)

    assert log_e_inferior(pairs, margin) == pytest.approx(
        float(log_wealth(mirrored.better, mirrored.same, mirrored.worse, (1 + margin) / 2))
    )
    assert log_e_inferior(pairs, 0.0) == pytest.approx(log_e_not_inferior(mirrored, 0.0))


@settings(deadline=None)
@given(st.lists(st.builds(Pairs, counts, counts, counts), max_size=5), st.randoms())
def test_evidence_merges_over_replicas_in_any_order(parts: list[Pairs], random: object) -> None:
    shuffled = list(parts)
    random.shuffle(shuffled)  # type: ignore[attr-defined]  # Hypothesis draws it

    assert sum(parts, Pairs()) == sum(shuffled, Pairs())


@settings(deadline=None)
@given(pairs_of_any_size, margins, margins)
def test_a_larger_margin_never_weakens_the_evidence_for_the_candidate(
    pairs: Pairs, first: float, second: float
) -> None:
    small, large = sorted((first, second))

    assert log_e_not_inferior(pairs, large) >= log_e_not_inferior(pairs, small) - 1e-9


def test_no_data_is_no_evidence_either_way() -> None:
    assert e_not_inferior(Pairs(), 0.02) == 1.0
    assert e_inferior(Pairs(), 0.02) == 1.0


def test_overwhelming_evidence_is_infinite_instead_of_an_error() -> None:
    assert e_not_inferior(Pairs(better=10_000), 0.02) == math.inf


def test_a_margin_of_one_is_met_by_anything_but_a_candidate_that_is_always_worse() -> None:
    assert e_not_inferior(Pairs(same=1), 1.0) > 1e6
    assert e_not_inferior(Pairs(worse=50), 1.0) < 1
    assert e_inferior(Pairs(worse=50), 1.0) <= 1


@settings(deadline=None)
@given(pairs_of_any_size.filter(lambda pairs: pairs.total > 0), st.floats(0.001, 0.5))
def test_the_interval_contains_the_observed_difference(pairs: Pairs, alpha: float) -> None:
    interval = confidence_sequence(pairs, alpha)

    assert -1 <= interval.low <= pairs.difference + 1e-9
    assert pairs.difference - 1e-9 <= interval.high <= 1


@settings(deadline=None)
@given(pairs_of_any_size)
def test_a_smaller_alpha_gives_a_wider_interval(pairs: Pairs) -> None:
    wide, narrow = confidence_sequence(pairs, 0.001), confidence_sequence(pairs, 0.1)

    assert wide.low <= narrow.low <= narrow.high <= wide.high


def test_an_alpha_outside_zero_and_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"alpha is 1\.0"):
        confidence_sequence(Pairs(), 1.0)


def test_negative_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot be negative"):
        Pairs(better=-1)


@pytest.mark.parametrize(
    ("pairs", "decision", "reason"),
    [
        (Pairs(), "undecided", "0 of 50 labelled pairs seen"),
        (Pairs(better=49), "undecided", "49 of 50 labelled pairs seen"),
        (Pairs(3, 50, 3), "undecided", "undecided within 2 points of stable: 56 labelled pairs"),
        (Pairs(30, 30, 0), "not_inferior", "not worse than stable by 2 points or more: 60 lab"),
        (Pairs(0, 10, 20), "inferior", "worse than stable by more than 2 points: 30 labelled"),
    ],
)
def test_a_verdict_gives_its_reason_with_the_numbers(
    pairs: Pairs, decision: str, reason: str
) -> None:
    verdict = judge_evidence(pairs, alpha=0.05, margin=0.02, min_labelled_pairs=50)

    assert verdict.decision == decision
    assert verdict.reason.startswith(reason)


@settings(deadline=None)
@given(pairs_of_any_size, st.floats(0, 0.1), st.floats(0.001, 0.5))
def test_the_verdict_needs_an_e_value_of_one_over_alpha(
    pairs: Pairs, margin: float, alpha: float
) -> None:
    verdict = judge_evidence(pairs, alpha=alpha, margin=margin, min_labelled_pairs=1)

    if verdict.decision != "inferior":
        proven = log_e_not_inferior(pairs, margin) >= math.log(1 / alpha)
        assert (verdict.decision == "not_inferior") == (proven and pairs.total > 0)
    assert (verdict.decision == "inferior") == (
        log_e_inferior(pairs, margin) >= math.log(1 / alpha)
    )


@pytest.mark.parametrize("better", range(1, 12))
def test_a_promotion_comes_exactly_when_the_odds_against_chance_reach_one_over_alpha(
    better: int,
) -> None:
    verdict = judge_evidence(Pairs(better=better), alpha=0.05, margin=0.0, min_labelled_pairs=1)

    # With right answers only and no margin, stake c wins 1 + c each time.
    stakes = np.geomspace(0.01, 0.95, 20)
    fortune = float(np.mean((1 + stakes) ** better))
    assert (verdict.decision == "not_inferior") == (fortune >= 20)


# ---------------------------------------------------------------- simulation


def first_crossings(
    p_better: float, p_worse: float, margin: float, *, streams: int, labels: int, alpha: float
) -> NDArray[np.float64]:
    """Number of labels after which each stream promotes, looking after every label."""
    rng = np.random.default_rng(7)
    crossed = np.full(streams, np.inf)
    for stream in range(streams):
        draw = rng.random(labels)
        better = np.cumsum(draw < p_better)
        worse = np.cumsum(draw > 1 - p_worse)
        same = np.arange(1, labels + 1) - better - worse
        log_e = log_wealth(better, same, worse, (1 - margin) / 2)
        hits = np.flatnonzero(log_e >= math.log(1 / alpha))
        if len(hits):
            crossed[stream] = hits[0] + 1
    return crossed


@short_and_long("streams", 200, 8_000)
@pytest.mark.parametrize(
    ("p_better", "p_worse", "margin"),
    [
        pytest.param(0.04, 0.06, 0.02, id="worse by the margin, versions mostly agree"),
        pytest.param(0.24, 0.26, 0.02, id="worse by the margin, versions often disagree"),
        pytest.param(0.05, 0.05, 0.0, id="equal versions, no margin"),
        pytest.param(0.0, 0.02, 0.02, id="worse by the margin, never better"),
    ],
)
def test_false_promotions_stay_within_alpha_when_looking_after_every_label(
    p_better: float, p_worse: float, margin: float, streams: int
) -> None:
    alpha = 0.05

    crossed = first_crossings(p_better, p_worse, margin, streams=streams, labels=1_500, alpha=alpha)

    share = np.isfinite(crossed).mean()
    print(f"false promotions {share:.3f} of alpha {alpha}")
    assert share <= alpha


@pytest.mark.parametrize(
    ("p_better", "p_worse", "at_most"),
    [
        pytest.param(0.30, 0.05, 80, id="25 points better"),
        pytest.param(0.15, 0.05, 200, id="10 points better"),
        pytest.param(0.08, 0.03, 400, id="5 points better"),
    ],
)
def test_a_clearly_better_candidate_is_promoted_after_few_labels(
    p_better: float, p_worse: float, at_most: int
) -> None:
    crossed = first_crossings(p_better, p_worse, 0.02, streams=200, labels=2_000, alpha=0.05)

    median = float(np.median(crossed))
    print(f"median labels to promote: {median:.0f}")
    assert median <= at_most


def test_the_confidence_sequence_misses_the_truth_at_any_look_with_at_most_alpha() -> None:
    # The interval excludes the truth exactly when one of its two bets has succeeded.
    rng, alpha, truth = np.random.default_rng(3), 0.1, 0.10
    missed = 0
    for _ in range(400):
        draw = rng.random(1_000)
        better, worse = np.cumsum(draw < 0.2), np.cumsum(draw > 0.9)
        same = np.arange(1, 1_001) - better - worse
        too_high = log_wealth(better, same, worse, (1 + truth) / 2) >= math.log(2 / alpha)
        too_low = log_wealth(worse, same, better, (1 - truth) / 2) >= math.log(2 / alpha)
        missed += bool((too_high | too_low).any())

    assert missed / 400 <= alpha


# ---------------------------------------------------------------- joining labels


def test_labels_turn_comparisons_into_pairs() -> None:
    comparisons = [
        a_comparison("a", stable="cat", candidate="dog"),
        a_comparison("b", stable="cat", candidate="dog"),
        a_comparison("c", stable="cat", candidate="cat"),
        a_comparison("unlabelled", stable="cat", candidate="dog"),
    ]
    labels = [a_label("a", "dog"), a_label("b", "cat"), a_label("c", "cow"), a_label("x", "dog")]

    assert count_pairs(comparisons, labels, "r1") == Pairs(better=1, same=1, worse=1)


def test_a_candidate_without_an_answer_was_wrong() -> None:
    assert count_pairs(
        [a_comparison("a", stable="cat", candidate="")], [a_label("a", "cat")], "r1"
    ) == Pairs(worse=1)


def test_only_the_audit_share_of_this_rollout_is_evidence() -> None:
    comparison, label = a_comparison("a", stable="cat", candidate="dog"), a_label("a", "dog")

    assert count_pairs([replace(comparison, audit=False)], [label], "r1") == Pairs()
    assert count_pairs([comparison], [replace(label, audit=False)], "r1") == Pairs()
    assert count_pairs([comparison], [replace(label, kind="import")], "r1") == Pairs()
    assert count_pairs([comparison], [label], "r2") == Pairs()


def test_repeated_rows_count_once_and_later_labels_change_nothing() -> None:
    comparison = a_comparison("a", stable="cat", candidate="dog")
    labels = [a_label("a", "cat", at_s=9.0), a_label("a", "dog", at_s=2.0)]

    assert count_pairs([comparison, comparison], labels * 2, "r1") == Pairs(better=1)

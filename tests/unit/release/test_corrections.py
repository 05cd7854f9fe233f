"""Evidence from corrections: valid at every look, whatever the weights."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lifelong_ray.release.corrections import (
    Corrections,
    count_corrections,
    judge_corrections,
    log_e_corrected_more,
    log_e_not_corrected_more,
)
from lifelong_ray.types import ServedRequest

LIMIT = 1.25


@given(st.integers(1, 99), st.integers(0, 500), st.integers(0, 500))
def test_both_hypotheses_cannot_be_refuted_together_under_one_weight(
    weight: int, candidate: int, stable: int
) -> None:
    corrections = Corrections({weight: (candidate, stable)})
    both = (
        log_e_not_corrected_more(corrections, LIMIT),
        log_e_corrected_more(corrections, LIMIT),
    )

    assert min(both) < math.log(20)


@pytest.mark.parametrize("weight", [1, 20, 50, 95])
@pytest.mark.parametrize("limit", [0.8, 1.0, 1.25, 2.0])
def test_a_candidate_at_the_limit_wins_nothing_on_average(weight: int, limit: float) -> None:
    share = weight * limit / (weight * limit + 100 - weight)
    for evidence in (log_e_not_corrected_more, log_e_corrected_more):
        after = [
            math.exp(evidence(Corrections({weight: counts}), limit)) for counts in ((1, 0), (0, 1))
        ]
        assert share * after[0] + (1 - share) * after[1] == pytest.approx(1)


def looks(ratio: float, weights: list[int], per_weight: int, seed: int) -> list[Corrections]:
    """What is seen after every tenth correction, under one weight after another."""
    rng = np.random.default_rng(seed)
    by_weight: dict[int, tuple[int, int]] = {}
    seen = []
    for weight in weights:
        share = weight * ratio / (weight * ratio + 100 - weight)
        mine = rng.random(per_weight) < share
        for number in range(10, per_weight + 1, 10):
            candidate = int(mine[:number].sum())
            by_weight = {**by_weight, weight: (candidate, number - candidate)}
            seen.append(Corrections(by_weight))
    return seen


def test_a_candidate_corrected_too_often_is_seldom_called_good_at_any_look() -> None:
    false = sum(
        any(
            log_e_not_corrected_more(seen, LIMIT) >= math.log(20)
            for seen in looks(LIMIT, [5, 20, 50], 200, seed)
        )
        for seed in range(200)
    )

    assert false <= 200 * 0.05


def test_an_equally_good_candidate_is_called_good_and_a_bad_one_bad() -> None:
    good = looks(0.9, [5, 20, 50], 600, seed=1)[-1]
    bad = looks(2.5, [5, 20, 50], 100, seed=1)[-1]

    assert log_e_not_corrected_more(good, LIMIT) > math.log(20)
    assert log_e_corrected_more(good, LIMIT) < 0
    assert log_e_corrected_more(bad, LIMIT) > math.log(20)


def test_the_ratio_is_that_of_corrections_per_request() -> None:
    assert Corrections({50: (30, 20)}).ratio == pytest.approx(1.5)
    assert Corrections({20: (20, 80)}).ratio == pytest.approx(1.0)
    assert Corrections({20: (20, 80), 50: (50, 50)}).ratio == pytest.approx(1.0)
    assert Corrections().ratio is None
    assert Corrections({5: (3, 0)}).ratio is None


@pytest.mark.parametrize("by_weight", [{0: (1, 1)}, {100: (1, 1)}, {5: (-1, 0)}])
def test_counts_that_are_none_are_refused(by_weight: dict[int, tuple[int, int]]) -> None:
    with pytest.raises(ValueError, match="corrections at a weight"):
        Corrections(by_weight)


# ---------------------------------------------------------------- counting and judging


def corrected(at_s: float, variant: str) -> ServedRequest:
    return ServedRequest(f"{at_s}", "v1", variant, "cat", False, at_s)


def test_a_correction_counts_under_the_weight_at_the_time_of_its_answer() -> None:
    weights = [(100.0, 0), (110.0, 5), (120.0, 50), (130.0, 100)]
    answers = [
        corrected(at_s, variant)
        for at_s in (90.0, 105.0, 111.0, 119.9, 120.0, 131.0)
        for variant in ("stable", "candidate")
    ]

    assert count_corrections(answers, weights) == Corrections({5: (2, 2), 50: (1, 1)})


def test_answers_of_a_version_that_a_header_chose_do_not_count() -> None:
    chosen = replace(corrected(111.0, "candidate"), chosen=True)

    assert count_corrections([chosen], [(110.0, 5)]) == Corrections()


def test_corrections_of_a_session_do_not_count_as_they_are_one_draw() -> None:
    sticky = replace(corrected(111.0, "candidate"), sticky=True)

    assert count_corrections([sticky], [(110.0, 5)]) == Corrections()


def test_counts_add_up_weight_by_weight() -> None:
    one, other = Corrections({5: (1, 2), 20: (0, 1)}), Corrections({5: (3, 4)})

    assert one + other == Corrections({5: (4, 6), 20: (0, 1)})


@pytest.mark.parametrize(
    ("counts", "decision"),
    [((10, 30), "undecided"), ((40, 120), "not_inferior"), ((90, 30), "inferior")],
)
def test_a_verdict_says_what_it_rests_on(counts: tuple[int, int], decision: str) -> None:
    verdict = judge_corrections(Corrections({50: counts}), alpha=0.05, limit=LIMIT, least=50)

    assert verdict.decision == decision
    assert f"{sum(counts)} " in verdict.reason

"""Whether requests are split by weight: exact properties of the bets, and simulated requests."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lifelong_ray.release import sample_ratio
from lifelong_ray.release.sample_ratio import log_e_split
from tests.proof import short_and_long

ALPHA = 0.001
splits = st.sampled_from([(95, 5), (50, 50), (99, 1), (34, 33, 33), (70, 20, 5, 5)])


@settings(deadline=None)
@given(splits, st.lists(st.integers(0, 5_000), min_size=4, max_size=4))
def test_requests_split_by_weight_win_nothing_on_average(
    weights: tuple[int, ...], counts: list[int]
) -> None:
    by_arm = tuple(counts[: len(weights)])
    now = log_e_split(weights, by_arm)

    growth = sum(
        weight
        / 100
        * math.exp(log_e_split(weights, (*by_arm[:arm], by_arm[arm] + 1, *by_arm[arm + 1 :])) - now)
        for arm, weight in enumerate(weights)
    )

    assert growth == pytest.approx(1, abs=1e-6)


def first_alarms(
    weights: tuple[int, ...], really: tuple[float, ...], *, streams: int, requests: int
) -> list[float]:
    """Requests after which each stream raises an alarm, looking after every tenth."""
    rng = np.random.default_rng(11)
    shares = np.array(really) / sum(really)
    alarms = []
    for _ in range(streams):
        tens = rng.multinomial(10, shares, size=requests // 10).cumsum(axis=0)
        alarm = math.inf
        for number, by_arm in enumerate(tens.tolist(), 1):
            if sample_ratio({weights: tuple(by_arm)}).is_off(ALPHA):
                alarm = 10 * number
                break
        alarms.append(alarm)
    return alarms


@short_and_long("streams", 100, 4_000)
@pytest.mark.parametrize("weights", [(95, 5), (50, 50), (60, 20, 20)])
def test_a_sound_split_hardly_ever_raises_an_alarm_however_often_one_looks(
    weights: tuple[int, ...], streams: int
) -> None:
    alarms = first_alarms(weights, weights, streams=streams, requests=2_000)

    share = np.isfinite(alarms).mean()
    print(f"false alarms {share:.4f} of alpha {ALPHA}")
    assert share <= ALPHA + 4 * math.sqrt(ALPHA * (1 - ALPHA) / streams)


def test_a_chi_square_test_at_every_look_would_not_keep_its_promise() -> None:
    rng = np.random.default_rng(11)
    looked = np.arange(1, 2_001)
    alarms = 0
    for _ in range(300):
        candidate = np.cumsum(rng.random(2_000) < 0.05)
        deviation = (candidate - 0.05 * looked) ** 2 / (looked * 0.05 * 0.95)
        alarms += bool((deviation[100:] > 10.83).any())  # chi-square, one degree, p < 0.001

    assert alarms / 300 > 5 * ALPHA


@pytest.mark.parametrize(
    ("weights", "really", "at_most"),
    [
        pytest.param((95, 5), (97.5, 2.5), 1_500, id="half of the candidate's requests lost"),
        pytest.param((50, 50), (60, 40), 600, id="a fifth of one half lost"),
        pytest.param((50, 50), (100, 0), 30, id="nobody gets the candidate"),
        pytest.param((60, 20, 20), (60, 30, 10), 300, id="two arms mixed up"),
    ],
)
def test_a_wrong_split_is_found_soon(
    weights: tuple[int, ...], really: tuple[float, ...], at_most: int
) -> None:
    median = float(np.median(first_alarms(weights, really, streams=40, requests=4_000)))

    print(f"median requests to an alarm: {median:.0f}")
    assert median <= at_most


def test_evidence_of_several_weights_adds_up() -> None:
    steps = {(95, 5): (990, 10), (80, 20): (160, 40)}

    ratio = sample_ratio(steps)

    assert ratio.log_e == pytest.approx(sum(log_e_split(w, n) for w, n in steps.items()))
    assert ratio.observed == (1_150, 50)
    assert ratio.expected == pytest.approx((1_110, 90))


def test_without_requests_nothing_is_proven() -> None:
    assert sample_ratio({}).log_e == 0
    assert not sample_ratio({(95, 5): (0, 0)}).is_off(ALPHA)


def test_an_arm_without_weight_that_was_given_requests_is_proof() -> None:
    assert sample_ratio({(100, 0): (10, 1)}).log_e == math.inf
    assert sample_ratio({(100, 0): (10, 0)}).log_e == 0

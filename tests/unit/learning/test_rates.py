from __future__ import annotations

import itertools
import math

import pytest

from lifelong_ray.learning.rates import find_rate, rate_and_momentum
from lifelong_ray.types import LearningError


def test_a_constant_schedule_never_moves():
    steps = {rate_and_momentum("constant", step, 50, 0.3) for step in range(50)}

    assert steps == {(0.3, 0.9)}


def test_one_cycle_climbs_to_its_peak_and_falls_to_almost_nothing():
    rates = [rate_and_momentum("one_cycle", step, 100, 0.5)[0] for step in range(100)]

    top = rates.index(max(rates))
    assert rates[0] == pytest.approx(0.5 / 25)
    assert rates[top] == 0.5
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert rates[-1] == pytest.approx(0.5 / 25 / 1e4)


def test_momentum_runs_against_the_rate():
    momenta = [rate_and_momentum("one_cycle", step, 100, 0.5)[1] for step in range(100)]

    assert momenta[29] == min(momenta) == pytest.approx(0.85)
    assert momenta[0] == momenta[-1] == max(momenta) == pytest.approx(0.95)


def test_the_range_test_stays_well_below_where_the_loss_diverges():
    def loss_at(_: int, rate: float) -> float:
        return 1.0 / (1 + 100 * rate) if rate < 0.1 else 1e6

    assert 0.004 < find_rate(loss_at) < 0.1


def test_the_range_test_stops_at_the_first_loss_that_is_no_number():
    tried: list[float] = []

    def loss_at(_: int, rate: float) -> float:
        tried.append(rate)
        return math.nan if rate > 1e-3 else 1.0 - rate

    found = find_rate(loss_at)

    assert tried == sorted(tried)
    assert tried[-2] < 1e-3 < tried[-1] < 1.5e-3
    assert found < 1e-3


def test_the_range_test_tries_rates_evenly_on_a_logarithmic_scale():
    tried: list[float] = []
    find_rate(lambda _, rate: tried.append(rate) or 1.0)

    ratios = [later / earlier for earlier, later in itertools.pairwise(tried)]

    assert ratios == pytest.approx([ratios[0]] * len(ratios))
    assert (tried[0], tried[-1]) == pytest.approx((1e-5, 1.0))


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_range_test_without_one_finite_loss_says_what_to_do(loss):
    with pytest.raises(LearningError, match=r"no finite loss.*or set a learning rate"):
        find_rate(lambda step, rate: loss)

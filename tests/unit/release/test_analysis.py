"""Looks at a metric, and what they come to."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from lifelong_ray.config import MetricConfig, RolloutConfig, StepConfig
from lifelong_ray.release.analysis import MetricRun, judged, measured, outcome


def metric(**more: Any) -> MetricConfig:
    return MetricConfig(**{"measure": "error_share", "successCondition": "result < 0.1"} | more)


def looked(values: list[float | None], every_s: float = 10.0, **more: Any) -> MetricRun:
    """A run after looks at these values, so many seconds apart, the first at second 100."""
    runs: tuple[MetricRun, ...] = ()
    for number, value in enumerate(values):
        now_s = 100 + every_s * number
        runs = measured(runs, [metric(**more)], {"error_share": value}, began_s=100.0, now_s=now_s)
    return runs[0]


def come_to(values: list[float | None], **more: Any) -> str:
    return outcome([looked(values, **more)], [metric(**more)])[0]


@pytest.mark.parametrize(
    ("conditions", "expected"),
    [
        ({"successCondition": "result < 1"}, "Successful"),
        ({"successCondition": "result > 1"}, "Failed"),
        ({"successCondition": "", "failureCondition": "result < 1"}, "Failed"),
        ({"successCondition": "", "failureCondition": "result > 1"}, "Successful"),
        ({"successCondition": "result > 1", "failureCondition": "result > 2"}, "Inconclusive"),
        ({"successCondition": "result < 1", "failureCondition": "result < 2"}, "Failed"),
    ],
    ids=repr,
)
def test_a_value_is_judged_by_its_conditions(conditions: dict[str, str], expected: str) -> None:
    assert judged(metric(**conditions), 0.5) == expected


def test_a_metric_is_successful_once_it_was_measured_often_enough() -> None:
    assert come_to([0.0, 0.0], count=3) == "Running"
    assert come_to([0.0, 0.0, 0.0], count=3) == "Successful"


def test_more_bad_measurements_than_allowed_fail_at_once() -> None:
    assert come_to([0.5, 0.0], count=5, failureLimit=1) == "Running"
    assert come_to([0.5, 0.5], count=5, failureLimit=1) == "Failed"


def test_bad_measurements_within_the_limit_are_put_up_with() -> None:
    assert come_to([0.5, 0.0, 0.0], count=3, failureLimit=1) == "Successful"


def test_undecided_measurements_beyond_their_limit_ask_for_a_decision() -> None:
    both = {"successCondition": "result < 0.1", "failureCondition": "result > 0.9"}

    assert come_to([0.5], count=3, inconclusiveLimit=1, **both) == "Running"
    assert come_to([0.5, 0.5], count=3, inconclusiveLimit=1, **both) == "Inconclusive"


def test_where_there_is_nothing_to_measure_nothing_is_decided() -> None:
    run = looked([None] * 50)

    assert run == MetricRun()
    assert outcome([run], [metric()]) == ("Running", "error_share: 0 of 1 measurements")


def test_measurements_wait_for_their_interval_and_the_first_for_its_delay() -> None:
    often = looked([0.0] * 7, every_s=5.0, count=50, interval=10)
    late = looked([0.0] * 7, every_s=5.0, count=50, interval=10, initialDelay=12)

    assert [look.at_s for look in often.last] == [100, 110, 120, 130]
    assert [look.at_s for look in late.last] == [115, 125]


def test_a_run_that_came_to_something_is_not_measured_any_more() -> None:
    assert looked([0.0, 0.5, 0.5], count=1) == looked([0.0], count=1)


def test_an_analysis_comes_to_the_worst_of_its_metrics_and_says_why() -> None:
    good, bad = MetricRun(successful=1), looked([0.5])
    metrics = [metric(), metric()]

    assert outcome([good, good], metrics) == ("Successful", "2 metrics successful")
    phase, why = outcome([good, bad], metrics)
    assert phase == "Failed"
    assert why == (
        "error_share is 0.5 where result < 0.1 is wanted: 1 of 1 measurements failed, 0 allowed"
    )
    assert outcome([], metrics)[0] == "Running"


def test_looks_at_another_number_of_metrics_count_for_nothing() -> None:
    failed = (MetricRun(failed=9),)
    metrics = [metric(), metric()]

    assert outcome(failed, metrics)[0] == "Running"
    runs = measured(failed, metrics, {"error_share": 0.0}, began_s=0.0, now_s=1.0)
    assert [(run.successful, run.failed) for run in runs] == [(1, 0), (1, 0)]


@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=80),
    st.integers(1, 30),
    st.integers(0, 9),
    st.integers(0, 9),
)
def test_counts_are_those_of_the_values_until_something_is_decided(
    values: list[float], count: int, fail: int, undecided: int
) -> None:
    limits = {
        "count": count,
        "failureLimit": min(fail, count - 1),
        "inconclusiveLimit": min(undecided, count - 1),
        "successCondition": "result < 0.5",
        "failureCondition": "result > 0.8",
    }
    run = looked(list(values), **limits)

    seen = run.successful + run.failed + run.inconclusive
    assert seen <= min(len(values), count)
    assert run.failed == sum(value > 0.8 for value in values[:seen])
    assert run.successful == sum(value < 0.5 for value in values[:seen])
    assert len(run.last) == min(seen, 20)


# ---------------------------------------------------------------- bad settings


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"successCondition": ""}, "can never decide"),
        ({"successCondition": "result"}, "not a condition"),
        ({"count": 0}, "greater than 0"),
        ({"interval": 0}, "greater than 0"),
        ({"count": 2, "failureLimit": 2, "inconclusiveLimit": 2}, "every result"),
        ({"measure": "profit"}, "accuracy_difference"),
    ],
    ids=repr,
)
def test_a_metric_that_decides_nothing_is_refused(more: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        metric(**more)


@pytest.mark.parametrize(
    "steps",
    [
        [{"setWeight": 0}],
        [{"pause": 1.0}],
        [{"shadow": 0.0}, {"setWeight": 5}],
        [{"setWeight": 5}, {"setWeight": 0}, {"pause": 1.0}],
        [{"analysis": [metric().model_dump()], "min_requests": 0}],
        [
            {"shadow": 1.0},
            {"analysis": [metric(measure="correction_ratio").model_dump()], "min_requests": 0},
            {"setWeight": 5},
        ],
    ],
    ids=repr,
)
def test_steps_that_can_never_end_are_refused(steps: list[dict[str, Any]]) -> None:
    with pytest.raises(ValidationError, match="can never end"):
        RolloutConfig(steps=tuple(StepConfig(**step) for step in steps))


def test_a_pause_before_the_first_share_may_wait_for_no_requests() -> None:
    steps = (StepConfig(pause=1.0, min_requests=0), StepConfig(setWeight=5))

    assert RolloutConfig(steps=steps).steps == steps

"""What the body of a request for an experiment may be."""

from __future__ import annotations

from typing import Any

import pytest

from lifelong_ray.on_ray.http import RequestError
from lifelong_ray.on_ray.wishes import experiment_intent, steering_intent

NOW_S = 1_000.0
ARMS = [{"version": "v1", "weight": 80}, {"version": "v1.1", "weight": 20}]


def test_a_body_becomes_a_wish() -> None:
    body = {"arms": ARMS, "end_s": 2_000, "adaptive": True, "reason": "curious"}

    intent = experiment_intent(body, "curious", NOW_S)

    assert (intent.verb, intent.actor, intent.reason) == ("start_experiment", "operator", "curious")
    assert intent.experiment is not None
    assert [(arm.version, arm.weight) for arm in intent.experiment.arms] == [
        ("v1", 80),
        ("v1.1", 20),
    ]
    assert intent.experiment.adaptive


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": ARMS[:1]}, "at least 2"),
        ({"arms": [ARMS[0], ARMS[0]]}, "more than once"),
        ({"arms": [ARMS[0], {"version": "v1.1", "weight": 30}]}, "add up to 110"),
        ({"arms": [ARMS[0], {"version": "v1.1", "weight": -1}]}, "arms.1.weight"),
        ({"arms": [ARMS[0], {"version": "v1.1", "weight": "x"}]}, "arms.1.weight"),
        ({"arms": "v1"}, "arms"),
        ({"end_s": 999}, "must end later"),
        ({"end_s": float("nan")}, "end_s"),
        ({"end_s": None}, "end_s"),
        ({"metric": "clicks"}, "metric"),
        ({"candidate": "v1.1"}, "candidate"),
    ],
)
def test_a_body_that_describes_no_experiment_is_refused_with_the_reason(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        experiment_intent({"arms": ARMS, "end_s": 2_000} | changes, "", NOW_S)

    assert (caught.value.status, caught.value.code) == (422, "bad_experiment")


def test_a_promotion_may_be_forced_and_nothing_else() -> None:
    assert steering_intent("promote", {"force": True}, "now", NOW_S).force
    assert not steering_intent("abort", {"force": False}, "", NOW_S).force
    with pytest.raises(RequestError, match="only promote a force"):
        steering_intent("abort", {"force": True}, "", NOW_S)


@pytest.mark.parametrize("force", ["false", "no", 1, 0, None, [0]], ids=repr)
def test_what_is_not_true_or_false_forces_no_promotion(force: object) -> None:
    with pytest.raises(RequestError, match="not true or false"):
        steering_intent("promote", {"force": force}, "", NOW_S)

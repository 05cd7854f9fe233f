"""What `GET /admin/comparisons` finds in the log."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lifelong_ray.config import FeedbackConfig, StepConfig
from lifelong_ray.feedback import LogWriter
from lifelong_ray.on_ray.comparisons import compared
from lifelong_ray.release import Event, ReleaseDesk, Rollout
from lifelong_ray.types import NotFoundError
from tests.fakes import MemoryStore
from tests.rows import a_comparison, a_label

NOW_S = 1_800_000_000.0
LONG_AGO_S = NOW_S - 5 * 3_600


@pytest.fixture
def store() -> MemoryStore:
    """Ten pairs of a rollout that began five hours ago, and one of another a minute ago."""
    store = MemoryStore()
    for rollout_id, at_s, number in (("r1", LONG_AGO_S, 10), ("r2", NOW_S - 60, 1)):
        rollout = Rollout(
            id=rollout_id,
            candidate="v1.1",
            steps=(StepConfig(setWeight=5),),
            salt="s",
            started_at_s=at_s,
            step_started_at_s=at_s,
        )
        event = Event(
            number=1,
            what="started",
            who="ann",
            why="",
            from_version="v1",
            to_version="v1.1",
            at_s=at_s,
        )
        ReleaseDesk(store, lambda: NOW_S).record_rollout(rollout, [event])
        log = LogWriter(store, FeedbackConfig(), "front", lambda at_s=at_s: at_s)  # type: ignore[misc]  # a clock
        rows = [
            a_comparison(f"{rollout_id}-{n}", rollout_id=rollout_id, at_s=at_s + n)
            for n in range(number)
        ]
        for row in rows:
            log.log_comparison(row)
        log.flush()
        log.record_feedback([a_label(rows[0].request_id, "cat", at_s)], ())
    return store


def shown(store: MemoryStore, **options: Any) -> dict[str, Any]:
    asked = {"rollout_id": None, "hours": 1.0, "last": 100} | options
    answer = compared(store, lambda: NOW_S, **asked)
    json.dumps(answer, allow_nan=False)
    return answer


def test_without_a_name_the_last_hour_is_shown(store: MemoryStore) -> None:
    answer = shown(store)

    assert answer["num_comparisons"] == 1
    assert [rollout["rollout_id"] for rollout in answer["rollouts"]] == ["r2"]
    assert [row["request_id"] for row in answer["comparisons"]] == ["r2-0"]


def test_more_hours_show_more_rollouts(store: MemoryStore) -> None:
    answer = shown(store, hours=6.0)

    assert [rollout["rollout_id"] for rollout in answer["rollouts"]] == ["r1", "r2"]
    assert [rollout["labelled"]["both_right"] for rollout in answer["rollouts"]] == [1, 1]


def test_a_rollout_is_shown_alone_and_from_its_start(store: MemoryStore) -> None:
    answer = shown(store, rollout_id="r1", last=3)

    assert answer["since_s"] == LONG_AGO_S
    assert answer["num_comparisons"] == 10
    assert [row["request_id"] for row in answer["comparisons"]] == ["r1-7", "r1-8", "r1-9"]


def test_the_latest_rows_may_be_left_out(store: MemoryStore) -> None:
    assert shown(store, last=0)["comparisons"] == []


@pytest.mark.parametrize("name", ["r3", "../current", "", "r1/../r2"])
def test_a_rollout_that_never_was_is_not_found(store: MemoryStore, name: str) -> None:
    with pytest.raises(NotFoundError, match="there was never a rollout"):
        shown(store, rollout_id=name)


def test_an_empty_log_has_nothing_to_show() -> None:
    assert shown(MemoryStore())["rollouts"] == []


def test_rows_are_in_the_order_of_their_requests(store: MemoryStore) -> None:
    log = LogWriter(store, FeedbackConfig(), "late", lambda: NOW_S)
    log.log_comparison(a_comparison("early", rollout_id="r2", at_s=NOW_S - 90, audit=False))
    log.flush()

    assert [row["request_id"] for row in shown(store)["comparisons"]] == ["early", "r2-0"]

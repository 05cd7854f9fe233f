"""How many replicas are wanted, by the clock and by the release document."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from lifelong_ray.config import AutoscalingConfig, Config, OffPeakConfig, config_from
from lifelong_ray.on_ray import scaling
from lifelong_ray.on_ray.scaling import FollowingPolicy, autoscaling, bounds_at, is_off_peak
from lifelong_ray.release import ReleaseDesk, ReleaseDocument, Rollout
from tests.fakes import MemoryStore

MONDAY = datetime(2026, 11, 23, tzinfo=UTC)


def at(day: int, hour: int, minute: int = 0) -> datetime:
    """Of the week that begins on `MONDAY`."""
    return MONDAY.replace(day=MONDAY.day + day, hour=hour, minute=minute)


@pytest.mark.parametrize(
    ("now", "expected"),
    [
        (at(0, 21, 59), False),
        (at(0, 22), True),
        (at(1, 3), True),
        (at(1, 6), False),
        (at(5, 3), True),  # The night that began on Friday.
        (at(5, 23), False),
        (at(6, 3), False),
    ],
    ids=str,
)
def test_quiet_hours_belong_to_the_day_on_which_they_begin(now: datetime, expected: bool) -> None:
    weekdays = OffPeakConfig(start="22:00", end="06:00", days=("Mon", "Tue", "Wed", "Thu", "Fri"))

    assert is_off_peak(weekdays, now) is expected


@pytest.mark.parametrize(("hour", "expected"), [(8, False), (9, True), (16, True), (17, False)])
def test_quiet_hours_may_lie_within_a_day(hour: int, expected: bool) -> None:
    assert is_off_peak(OffPeakConfig(start="09:00", end="17:00"), at(0, hour)) is expected


def test_bounds_follow_the_clock() -> None:
    quiet = OffPeakConfig(start="22:00", end="06:00", min_replicas=0, max_replicas=2)
    always = AutoscalingConfig(min_replicas=3, max_replicas=9, off_peak=quiet)

    assert bounds_at(always, at(0, 12).timestamp()) == (3, 9)
    assert bounds_at(always, at(0, 23).timestamp()) == (0, 2)
    assert bounds_at(AutoscalingConfig(), at(0, 23).timestamp()) == (1, 2)


def test_serve_is_told_the_widest_bounds_and_the_policy_narrows_them() -> None:
    quiet = {"start": "22:00", "end": "06:00", "min_replicas": 0, "max_replicas": 2}
    config = config_from(
        {"serving": {"front": {"min_replicas": 3, "max_replicas": 9, "off_peak": quiet}}}
    )

    told = autoscaling(config, "front")

    assert (told["min_replicas"], told["initial_replicas"], told["max_replicas"]) == (0, 3, 9)
    assert told["policy"].policy_kwargs["deployment"] == "front"
    assert "policy" not in autoscaling(Config(), "front")
    assert "policy" in autoscaling(Config(), "slot")


def context(wanted: float) -> Any:
    return SimpleNamespace(wanted=wanted)


@pytest.fixture
def by_the_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of Ray's rule, which needs a controller's context."""
    monkeypatch.setattr(
        scaling, "replica_queue_length_autoscaling_policy", lambda context: (context.wanted, {})
    )


@pytest.mark.usefixtures("by_the_queue")
@pytest.mark.parametrize(
    ("hour", "wanted", "expected"), [(12, 1, 3), (12, 5, 5), (12, 20, 9), (23, 1, 1), (23, 20, 2)]
)
def test_what_the_queue_asks_for_is_kept_within_the_bounds_of_the_hour(
    hour: int, wanted: int, expected: int
) -> None:
    quiet = {"start": "22:00", "end": "06:00", "min_replicas": 0, "max_replicas": 2}
    tree = {"serving": {"front": {"min_replicas": 3, "max_replicas": 9, "off_peak": quiet}}}
    policy = FollowingPolicy(tree, "front", clock=at(0, hour).timestamp)

    assert policy(context(wanted))[0] == expected


@pytest.mark.usefixtures("by_the_queue")
def test_the_slot_sleeps_until_there_is_a_candidate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = FollowingPolicy({"store": {"url": str(tmp_path)}}, "slot")
    assert policy(context(0))[0] == 0

    monkeypatch.setattr(policy, "_floor", 1)

    assert policy(context(0))[0] == 1


def test_the_slot_is_woken_once_a_store_that_could_not_be_opened_can_be(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = MemoryStore()
    rollout = {"candidate": "v1.1", "steps": ({"setWeight": 5},), "salt": "s"}
    rollout |= {"id": "r", "started_at_s": 0.0, "step_started_at_s": 0.0}
    document = ReleaseDocument(stable="v1", rollout=Rollout.model_validate(rollout))
    ReleaseDesk(store, lambda: 0.0).swap(document, None)
    failures = [OSError("no route to host"), OSError("not yet")]

    def open_store(config: object) -> MemoryStore:
        if failures:
            raise failures.pop()
        return store

    monkeypatch.setattr(scaling, "open_store", open_store)
    monkeypatch.setattr(scaling, "_LOOK_EVERY_S", 0.01)

    policy = FollowingPolicy({}, "slot")

    deadline_s = time.monotonic() + 10
    while policy._floor == 0:
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


@pytest.mark.parametrize(
    "scaling_tree",
    [
        {"min_replicas": 3, "max_replicas": 2},
        {"off_peak": {"min_replicas": 3, "max_replicas": 2}},
        {"off_peak": {"start": "22:00", "end": "22:00"}},
        {"off_peak": {"start": "24:00"}},
        {"off_peak": {"start": "7:00"}},
        {"off_peak": {"days": ["Monday"]}},
        {"upscale_delay_s": -1},
    ],
    ids=repr,
)
def test_bounds_that_are_none_are_refused(scaling_tree: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        AutoscalingConfig.model_validate(scaling_tree)

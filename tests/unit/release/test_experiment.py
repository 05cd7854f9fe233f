"""Several versions side by side: who gets which, what it comes to, and what it may never do."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from lifelong_ray.config import ExperimentConfig, RolloutConfig
from lifelong_ray.release import (
    Arm,
    ArmTally,
    Corrections,
    Event,
    Experiment,
    ExperimentPlan,
    FrontReport,
    Intent,
    Observation,
    Pairs,
    ReleaseDocument,
    advance,
    assign,
    choose_arm,
    needed_versions,
    thompson_weights,
)
from lifelong_ray.release.corrections import ratio_interval
from lifelong_ray.release.transitions import objection
from tests.proof import short_and_long

CONFIG = ExperimentConfig(interval_s=60.0)
NOW_S = 1_000.0
END_S = 10_000.0
THREE = {"v1": 60, "v1.1": 30, "v1.2": 10}


def a_plan(arms: dict[str, int] | None = None, **more: object) -> ExperimentPlan:
    rows = [{"version": v, "weight": w} for v, w in (arms or THREE).items()]
    return ExperimentPlan.model_validate({"arms": rows, "end_s": END_S} | more)


def a_wish(verb: str, **more: Any) -> Intent:
    if verb == "start_experiment":
        more.setdefault("experiment", a_plan())
    fields = {"id": "i1", "verb": verb, "actor": "ann", "reason": "curious", "at_s": NOW_S}
    return Intent.model_validate(fields | more)


def asked(document: ReleaseDocument, verb: str, **more: Any) -> ReleaseDocument:
    return document.changed(intents=(a_wish(verb, **more),))


def a_front(
    document: ReleaseDocument, *, cold: bool = False, now_s: float = NOW_S, **more: Any
) -> FrontReport:
    warm = ("v1",) if cold else ("v0", "v1", "v1.1", "v1.2")
    return FrontReport("f1", now_s, document.seq, warm, **more)


def looked(
    document: ReleaseDocument,
    *fronts: FrontReport,
    now_s: float = NOW_S,
    config: ExperimentConfig = CONFIG,
    **seen: Any,
) -> tuple[ReleaseDocument, tuple[Event, ...]]:
    observation = Observation(now_s, fronts, Pairs(), slot_ready=False)
    return advance(document, replace(observation, **seen), RolloutConfig(), config)


def preparing(**plan: Any) -> ReleaseDocument:
    document = ReleaseDocument(seq=1, stable="v1", previous="v0")
    return looked(asked(document, "start_experiment", experiment=a_plan(**plan)))[0]


def running(**plan: Any) -> ReleaseDocument:
    document = preparing(**plan)
    return looked(document, a_front(document))[0]


def experiment_of(document: ReleaseDocument) -> Experiment:
    assert document.experiment is not None
    return document.experiment


def tallies(*rights: tuple[int, int], corrected: tuple[int, ...] = (0, 0, 0)) -> dict[str, Any]:
    rows = zip(rights, corrected, strict=True)
    return {"tallies": tuple(ArmTally(labelled=n, correct=c, corrected=e) for (c, n), e in rows)}


# ---------------------------------------------------------------- plans


@pytest.mark.parametrize(
    ("arms", "message"),
    [
        ({"v1": 60, "v1.1": 30}, "add up to 90, not to 100"),
        ({"v1": 60, "v1.1": 60}, "add up to 120"),
        ({"v1": 100}, "at least 2"),
        ({"v1": 110, "v1.1": -10}, "greater than or equal to 1|less than or equal to 100"),
        ({"v1": 100, "v1.1": 0}, "greater than or equal to 1"),
        ({f"v1.{n}": 11 for n in range(1, 10)}, "at most 8"),
    ],
)
def test_a_plan_that_is_no_split_is_refused(arms: dict[str, int], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        a_plan(arms)


def test_a_version_is_one_arm_only() -> None:
    rows = [{"version": "v1", "weight": 50}] * 2

    with pytest.raises(ValidationError, match="name v1 more than once"):
        ExperimentPlan.model_validate({"arms": rows, "end_s": END_S})


def test_an_experiment_cannot_end_before_it_is_asked_for() -> None:
    with pytest.raises(ValidationError, match="must end later"):
        a_wish("start_experiment", experiment=a_plan(end_s=NOW_S))


@pytest.mark.parametrize("verb", ["promote", "end_experiment", "rollback"])
def test_only_its_start_has_a_plan(verb: str) -> None:
    with pytest.raises(ValidationError, match="exactly when its verb starts one"):
        a_wish(verb, experiment=a_plan())


# ---------------------------------------------------------------- who gets which arm


def test_every_arm_gets_its_share_of_a_hundred_thousand_keys() -> None:
    weights = (60, 30, 10)
    arms = np.array([choose_arm("salt", f"user-{n}", weights) for n in range(100_000)])

    for arm, weight in enumerate(weights):
        share = weight / 100
        bound = 5 * math.sqrt(100_000 * share * (1 - share))
        assert abs((arms == arm).sum() - 100_000 * share) <= bound


@pytest.mark.parametrize("weights", [(1, 99), (50, 50), (13, 13, 13, 13, 12, 12, 12, 12)])
def test_shares_are_right_for_two_arms_and_for_eight(weights: tuple[int, ...]) -> None:
    arms = np.array([choose_arm("salt", f"user-{n}", weights) for n in range(20_000)])

    for arm, weight in enumerate(weights):
        bound = 5 * math.sqrt(20_000 * weight / 100 * (1 - weight / 100))
        assert abs((arms == arm).sum() - 200 * weight) <= bound


def test_when_weights_change_keys_move_only_to_arms_that_gained() -> None:
    before, after = (60, 30, 10), (40, 20, 40)  # the first two keep their odds
    keys = [f"user-{n}" for n in range(20_000)]

    moves = {(choose_arm("s", key, before), choose_arm("s", key, after)) for key in keys}

    assert moves == {(0, 0), (1, 1), (2, 2), (0, 2), (1, 2)}


def test_a_running_experiment_assigns_by_its_document_alone() -> None:
    document = running()
    reread = ReleaseDocument.model_validate_json(document.model_dump_json())
    keys = [f"user-{n}" for n in range(500)]

    assignments = [assign(document, key) for key in keys]

    assert assignments == [assign(reread, key) for key in keys]
    assert {(a.variant, a.version) for a in assignments} == {
        ("stable", "v1"),
        ("v1.1", "v1.1"),
        ("v1.2", "v1.2"),
    }
    assert not any(a.shadow or a.chosen for a in assignments)


@pytest.mark.parametrize(
    ("override", "version"),
    [("v1.2", "v1.2"), (" V1.1 ", "v1.1"), ("stable", "v1"), ("v1", "v1"), ("never", "v1")],
)
def test_a_header_names_the_arm(override: str, version: str) -> None:
    document = running()

    for key in map(str, range(50)):
        assignment = assign(document, key, override)
        assert (assignment.version, assignment.chosen) == (version, True)


@pytest.mark.parametrize("override", ["v9", "always", "", "candidate"])
def test_a_header_that_names_no_arm_changes_nothing(override: str) -> None:
    document = running()

    for key in map(str, range(50)):
        assert assign(document, key, override) == assign(document, key)


# ---------------------------------------------------------------- from start to end


def test_weights_take_effect_once_every_live_front_holds_every_arm() -> None:
    document = preparing()

    cold = replace(a_front(document, cold=True), front_id="f2")
    held, none = looked(document, a_front(document), cold)
    begun, events = looked(held, a_front(held))

    assert needed_versions(document, RolloutConfig()) == {"v0", "v1", "v1.1", "v1.2"}
    assert none == ()
    assert experiment_of(held).message == "waiting for 1 of 2 fronts to load the arms"
    assert {assign(held, str(n)).version for n in range(100)} == {"v1"}
    assert held.seq == document.seq
    assert [event.what for event in events] == ["experiment_began"]
    assert experiment_of(begun).began_s == NOW_S
    assert begun.seq == held.seq + 1


def test_without_a_front_an_experiment_waits() -> None:
    held, _ = looked(preparing())

    assert experiment_of(held).message == "waiting for a front"


def test_stable_is_the_first_arm_wherever_it_was_named() -> None:
    document = preparing(arms={"v1.1": 30, "v1": 70})

    assert experiment_of(document).versions == ("v1", "v1.1")
    assert experiment_of(document).variants == ("stable", "v1.1")


def test_at_its_end_an_experiment_is_summed_up_and_changes_nothing() -> None:
    document = running()
    by_arm = (6_000, 3_000, 1_000)
    front = a_front(
        document, now_s=END_S, requests_by_arm={experiment_of(document).id: by_arm, "other": (9,)}
    )
    seen = tallies((800, 1_000), (450, 500), (90, 100), corrected=(600, 150, 100))

    after, events = looked(
        document, front, now_s=END_S, assigned={(60, 30, 10): (600, 310, 90)}, **seen
    )

    assert (after.stable, after.previous, after.experiment) == ("v1", "v0", None)
    [event] = events
    assert (event.what, event.why) == (
        "experiment_ended",
        "experiment ended: its planned end has come",
    )
    result = event.experiment.result  # type: ignore[union-attr]  # of an experiment
    stable, better, _ = result.arms  # type: ignore[union-attr]  # summed up
    assert [arm.requests for arm in result.arms] == list(by_arm)  # type: ignore[union-attr]  # summed up
    assert (stable.accuracy, stable.corrections_per_request) == (0.8, 0.1)
    assert stable.accuracy_low < 0.8 < stable.accuracy_high
    assert better.accuracy == 0.9
    first, second = result.against_stable  # type: ignore[union-attr]  # summed up
    assert first.accuracy_difference == pytest.approx(0.1)
    assert 0 < first.accuracy_difference_low < 0.1 < first.accuracy_difference_high
    assert first.correction_ratio == pytest.approx(0.5)
    assert 0 < first.correction_ratio_low < 0.5 < first.correction_ratio_high < 1
    assert second.correction_ratio == pytest.approx(1.0)
    assert second.accuracy_difference_low < 0  # a hundred labels prove nothing yet
    assert result.is_split_by_weight  # type: ignore[union-attr]  # summed up
    assert event.evidence["arms"][1]["version"] == "v1.1"


def test_an_experiment_that_is_ended_says_by_whom_and_why() -> None:
    document = running()

    after, events = looked(asked(document, "end_experiment"), a_front(document))

    assert after.experiment is None
    assert [(event.what, event.who) for event in events] == [("experiment_ended", "ann")]
    assert (events[0].why, events[0].intent_id) == ("experiment ended: curious", "i1")


def test_a_result_so_far_is_kept_at_every_interval_and_survives_a_front() -> None:
    document = running()
    name = experiment_of(document).id
    one = a_front(document, now_s=NOW_S + 60, requests_by_arm={name: (50, 30, 20)})
    other = replace(one, front_id="f2", at_s=NOW_S + 120, requests_by_arm={name: (5, 3, 2)})

    early, _ = looked(document, replace(one, at_s=NOW_S + 59), now_s=NOW_S + 59)
    kept, _ = looked(document, one, now_s=NOW_S + 60)
    reread = ReleaseDocument.model_validate_json(kept.model_dump_json())
    later, _ = looked(reread, other, now_s=NOW_S + 120)

    assert early == document
    assert kept.seq == document.seq  # nothing that a front acts on
    result = experiment_of(later).result
    assert result is not None
    assert [arm.requests for arm in result.arms] == [55, 33, 22]


def test_a_wrong_split_is_told() -> None:
    document = running()

    kept, _ = looked(
        document,
        a_front(document, now_s=NOW_S + 60),
        now_s=NOW_S + 60,
        assigned={(60, 30, 10): (600, 390, 10)},
    )

    result = experiment_of(kept).result
    assert result is not None
    assert not result.is_split_by_weight


def test_an_experiment_without_a_label_ends_with_what_is_known() -> None:
    document = running()

    _, events = looked(asked(document, "end_experiment"))

    result = events[-1].experiment.result  # type: ignore[union-attr]  # of an experiment
    assert result is not None
    assert {arm.accuracy for arm in result.arms} == {None}
    assert result.against_stable[0].accuracy_difference is None
    assert result.against_stable[0].correction_ratio_high is None


# ---------------------------------------------------------------- Thompson sampling


def test_an_adaptive_experiment_sends_more_to_what_is_better_and_promotes_nothing() -> None:
    document = running(adaptive=True)
    seen = tallies((70, 100), (95, 100), (60, 100))
    front = a_front(document, now_s=NOW_S + 60)

    moved, events = looked(document, front, now_s=NOW_S + 60, **seen)
    again, _ = looked(document, front, now_s=NOW_S + 60, **seen)

    weights = experiment_of(moved).weights
    assert weights == (1, 98, 1)
    assert experiment_of(again) == experiment_of(moved)  # another controller draws the same
    assert [event.what for event in events] == ["experiment_reweighed"]
    assert events[0].why == "weights follow accuracy: v1 1 %, v1.1 98 %, v1.2 1 %"
    assert (moved.stable, moved.previous) == ("v1", "v0")
    assert moved.seq == document.seq + 1
    assert experiment_of(moved).split is None


def test_a_plain_experiment_keeps_its_weights_whatever_is_seen() -> None:
    document = running()

    kept, events = looked(
        document,
        a_front(document, now_s=NOW_S + 60),
        now_s=NOW_S + 60,
        **tallies((10, 100), (95, 100), (60, 100)),
    )

    assert experiment_of(kept).weights == (60, 30, 10)
    assert events == ()


def test_without_a_label_weights_stay() -> None:
    document = running(adaptive=True)

    kept, events = looked(document, a_front(document, now_s=NOW_S + 60), now_s=NOW_S + 60)

    assert experiment_of(kept).weights == (60, 30, 10)
    assert events == ()


def test_weights_may_follow_corrections_instead() -> None:
    document = running(adaptive=True, metric="corrections")
    requests = {experiment_of(document).id: (1_000, 1_000, 1_000)}
    front = a_front(document, now_s=NOW_S + 60, requests_by_arm=requests)
    seen = tallies((9, 10), (1, 10), (9, 10), corrected=(300, 10, 300))

    moved, _ = looked(document, front, now_s=NOW_S + 60, **seen)

    assert experiment_of(moved).weights == (1, 98, 1)


def test_thompson_weights_are_the_chances_of_being_best_above_a_floor() -> None:
    equal = thompson_weights([50, 50, 50, 50], [50, 50, 50, 50], np.random.default_rng(0))
    sure = thompson_weights([100, 10], [0, 90], np.random.default_rng(0))
    # Beta(2, 1) beats Beta(1, 2) with probability 5/6.
    close = thompson_weights([1, 0], [0, 1], np.random.default_rng(0))

    assert sum(equal) == 100
    assert all(abs(weight - 25) <= 2 for weight in equal)
    assert sure == (99, 1)
    assert abs(close[0] - (1 + 98 * 5 / 6)) <= 2


# ---------------------------------------------------------------- beside a rollout


def test_an_experiment_and_a_rollout_never_run_together() -> None:
    stable = ReleaseDocument(stable="v1", previous="v0")
    rolling, _ = looked(asked(stable, "start", candidate="v1.1"))

    assert "the rollout of v1.1 is in progress" in (
        objection(rolling, a_wish("start_experiment")) or ""
    )
    assert "is under way; end it before v1.2" in (
        objection(running(), a_wish("start", candidate="v1.2")) or ""
    )
    assert "is under way; end it first" in (objection(running(), a_wish("start_experiment")) or "")


@pytest.mark.parametrize("verb", ["promote", "abort", "pause", "resume"])
def test_wishes_about_a_rollout_do_not_touch_an_experiment(verb: str) -> None:
    assert "no rollout is in progress" in (objection(running(), a_wish(verb)) or "")


def test_stable_must_be_an_arm() -> None:
    document = ReleaseDocument(stable="v2")

    assert "lack v2, which is stable" in (objection(document, a_wish("start_experiment")) or "")


def test_what_is_not_under_way_cannot_be_ended() -> None:
    document = ReleaseDocument(stable="v1")

    assert "nothing to end" in (objection(document, a_wish("end_experiment")) or "")


def test_a_rollback_ends_the_experiment_first() -> None:
    document = running()

    ended, first = looked(asked(document, "rollback"), a_front(document))
    after, second = looked(ended, a_front(ended))

    assert [event.what for event in first] == ["rollback_asked", "experiment_ended"]
    assert first[1].why == "experiment ended: rollback to v0 asked"
    assert [event.what for event in second] == ["rolled_back"]
    assert (after.stable, after.previous) == ("v0", "v1")


def test_a_rollout_may_be_asked_for_while_an_end_waits() -> None:
    document = running()
    intents = (a_wish("end_experiment"), a_wish("start", candidate="v1.2", id="i2"))

    after, events = looked(document.changed(intents=intents), a_front(document))

    assert [event.what for event in events] == ["started", "experiment_ended"]
    assert after.experiment is None
    assert after.rollout is not None


def test_an_experiment_is_summed_up_before_another_may_start() -> None:
    document = running()
    first = experiment_of(document).id
    intents = (a_wish("end_experiment"), a_wish("start_experiment", id="i2"))

    after, events = looked(document.changed(intents=intents), a_front(document))

    assert [event.what for event in events] == ["refused", "experiment_ended"]
    assert f"{first} is being summed up" in events[0].why
    ended = events[1].experiment
    assert ended is not None
    assert (ended.id, ended.ended_by) == (first, "ann")
    assert ended.result is not None
    assert objection(after, a_wish("start_experiment", id="i3")) is None


def test_arms_are_records_of_the_document() -> None:
    document = running()

    assert ReleaseDocument.model_validate_json(document.model_dump_json()) == document
    assert experiment_of(document).arms[0] == Arm(version="v1", weight=60)


# ---------------------------------------------------------------- the ratio of corrections


def test_the_interval_of_the_ratio_holds_its_estimate_and_narrows() -> None:
    few = ratio_interval(Corrections({50: (20, 40)}), alpha=0.05)
    many = ratio_interval(Corrections({50: (400, 800)}), alpha=0.05)

    assert few[0] < many[0] < 0.5 < many[1] < few[1]


@short_and_long("streams", 30, 2_000)
def test_the_interval_of_the_ratio_misses_the_truth_at_any_look_with_at_most_alpha(
    streams: int,
) -> None:
    rng, alpha, truth, weight = np.random.default_rng(5), 0.1, 1.5, 30
    share = weight * truth / (weight * truth + 100 - weight)
    missed = 0
    for _ in range(streams):
        mine = np.cumsum(rng.random(300) < share)
        for number in range(20, 301, 20):
            candidate = int(mine[number - 1])
            low, high = ratio_interval(
                Corrections({weight: (candidate, number - candidate)}), alpha
            )
            if not low <= truth <= high:
                missed += 1
                break

    assert missed <= streams * alpha

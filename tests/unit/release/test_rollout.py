"""The rollout state machine: when a candidate moves on, waits, becomes stable or is taken back."""

import math
import random
from dataclasses import replace
from typing import get_args

import pytest

from lifelong_ray.config import ExperimentConfig, RolloutConfig, StepConfig
from lifelong_ray.release import (
    ArmTally,
    Corrections,
    Counter,
    Event,
    FrontReport,
    Intent,
    Lease,
    Observation,
    Pairs,
    ReleaseDocument,
    Rollout,
    Verb,
    advance,
    judge_evidence,
    needed_versions,
    needs_slot,
)
from lifelong_ray.release.document import What
from tests.proof import short_and_long

CONFIG = RolloutConfig()
GOOD = Pairs(better=40, same=60)
BAD = Pairs(same=10, worse=40)


def an_intent(verb: str, *, force: bool = False, intent_id: str = "i1", **more: object) -> Intent:
    if verb == "start":
        more.setdefault("candidate", "v1.1")
    if verb == "start_experiment":
        arms = [{"version": version, "weight": 50} for version in ("v1", "v1.1")]
        more.setdefault("experiment", {"arms": arms, "end_s": 1_030.0, "adaptive": True})
    return Intent.model_validate(
        {"id": intent_id, "verb": verb, "actor": "ann", "reason": "why not", "at_s": 1.0}
        | {"force": force}
        | more
    )


def asked(document: ReleaseDocument, verb: str, **more: object) -> ReleaseDocument:
    return document.changed(intents=(an_intent(verb, **more),))  # type: ignore[arg-type]  # any field


def counters(requests: int, errors: int = 0, model_ms: float = 1.0) -> Counter:
    answered = Counter().answered(model_ms).latency_counts
    return Counter(requests, errors, tuple(n * (requests - errors) for n in answered))


def a_front(
    document: ReleaseDocument,
    name: str = "f1",
    *,
    warm: tuple[str, ...] = ("v1", "v1.1"),
    requests: int = 0,
    errors: int = 0,
    at_s: float = 1_000.0,
    candidate_ms: float = 1.0,
) -> FrontReport:
    return FrontReport(
        front_id=name,
        at_s=at_s,
        doc_seq=document.seq,
        warm_versions=warm,
        counters={
            "v1": counters(1_000),
            "v1.1": counters(requests, errors, candidate_ms),
        },
    )


def seeing(
    *fronts: FrontReport, pairs: Pairs | None = None, slot_ready: bool = True, now_s: float = 1_000
) -> Observation:
    return Observation(now_s=now_s, fronts=fronts, pairs=pairs or Pairs(), slot_ready=slot_ready)


def started(**changes: object) -> ReleaseDocument:
    """A document whose rollout has just begun."""
    document = asked(ReleaseDocument(seq=1, stable="v1", previous="v0"), "start")
    document, _ = advance(document, seeing(now_s=900), CONFIG)
    assert document.rollout is not None
    return document.changed(rollout=document.rollout.model_copy(update=changes))


def at_step(index: int, **changes: object) -> ReleaseDocument:
    """A document in the middle of a rollout with the default steps."""
    weight = {0: 0, 1: 5, 2: 20, 3: 50, 4: 100}[index]
    return started(step_index=index, weight=weight, shadow=0.5, **changes)


def rollout_of(document: ReleaseDocument) -> Rollout:
    assert document.rollout is not None
    return document.rollout


def whats(events: tuple[Event, ...]) -> list[str]:
    return [event.what for event in events]


# ---------------------------------------------------------------- start and steps


def test_a_started_rollout_has_no_traffic_before_its_capacity_is_seen() -> None:
    document = asked(ReleaseDocument(seq=4, stable="v1"), "start")

    following, events = advance(document, seeing(a_front(document), slot_ready=True), CONFIG)

    rollout = rollout_of(following)
    assert (rollout.step_index, rollout.weight, rollout.shadow) == (-1, 0, 0.0)
    assert rollout.steps == CONFIG.steps
    assert following.seq == 5
    assert following.intents == ()
    assert whats(events) == ["started"]
    assert (events[0].from_version, events[0].to_version) == ("v1", "v1.1")


def test_steps_of_the_intent_replace_those_of_the_config() -> None:
    steps = (StepConfig(setWeight=10),)
    document = asked(ReleaseDocument(stable="v1"), "start", steps=steps)

    following, _ = advance(document, seeing(), CONFIG)

    assert rollout_of(following).steps == steps


def test_the_first_step_waits_for_a_slot() -> None:
    document = started()

    held, _ = advance(document, seeing(a_front(document), slot_ready=False), CONFIG)
    moved, events = advance(held, seeing(a_front(held), slot_ready=True), CONFIG)

    assert rollout_of(held).step_index == -1
    assert rollout_of(held).message == "waiting for a slot to load v1.1"
    assert (rollout_of(moved).step_index, rollout_of(moved).shadow) == (0, 0.5)
    assert moved.seq == held.seq + 1
    assert whats(events) == ["stepped"]
    assert events[0].why == "step 1 of 5: weight 0 %, shadow 50 %"


def test_a_step_waits_for_its_requests() -> None:
    document = at_step(1)

    held, events = advance(document, seeing(a_front(document, requests=12)), CONFIG)

    assert rollout_of(held).message == "12 of 50 requests seen"
    assert rollout_of(held).weight == 5
    assert held.seq == document.seq
    assert events == ()


def test_a_step_ends_when_its_requests_were_seen_by_all_fronts_together() -> None:
    document = at_step(1)
    fronts = [a_front(document, name, requests=25) for name in ("f1", "f2")]

    moved, _ = advance(document, seeing(*fronts), CONFIG)

    assert rollout_of(moved).weight == 20
    assert rollout_of(moved).step_baseline == {"f1": (25, 0), "f2": (25, 0)}


def test_requests_of_the_step_before_do_not_count_again() -> None:
    document = at_step(1, step_baseline={"f1": (100, 0)})

    held, _ = advance(document, seeing(a_front(document, requests=110)), CONFIG)

    assert rollout_of(held).message == "10 of 50 requests seen"


def test_a_front_that_started_anew_counts_from_zero() -> None:
    document = at_step(1, step_baseline={"f1": (100, 0)})

    moved, _ = advance(document, seeing(a_front(document, "f2", requests=50)), CONFIG)

    assert rollout_of(moved).step_index == 2


def test_a_step_waits_for_every_live_front_to_acknowledge() -> None:
    document = at_step(1)
    behind = replace(a_front(document, "f2"), doc_seq=document.seq - 1)

    held, _ = advance(document, seeing(a_front(document, requests=99), behind), CONFIG)

    assert rollout_of(held).weight == 5
    assert rollout_of(held).message == f"waiting for front f2 to follow document {document.seq}"


def test_a_silent_front_is_not_waited_for() -> None:
    document = at_step(1)
    dead = replace(a_front(document, "f2", at_s=990), doc_seq=0)

    moved, _ = advance(document, seeing(a_front(document, requests=99), dead), CONFIG)

    assert rollout_of(moved).weight == 20


def test_without_any_live_front_nothing_moves() -> None:
    document = at_step(1)

    held, _ = advance(document, seeing(pairs=GOOD), CONFIG)

    assert rollout_of(held).weight == 5
    assert rollout_of(held).message == "no front has reported for 5 s"


def test_a_pause_step_lasts_its_time() -> None:
    steps = (StepConfig(pause=60, min_requests=0), StepConfig(setWeight=5))
    document = started(steps=steps, step_index=0, step_started_at_s=950)

    held, _ = advance(document, seeing(a_front(document)), CONFIG)
    later = replace(seeing(a_front(document, at_s=1_010)), now_s=1_010)
    moved, _ = advance(document, later, CONFIG)

    assert rollout_of(held).message == "50 of 60 s paused"
    assert rollout_of(moved).weight == 5


def test_a_shadow_share_stays_while_the_weight_rises() -> None:
    document = at_step(0)

    moved, _ = advance(document, seeing(a_front(document, requests=50)), CONFIG)

    assert (rollout_of(moved).weight, rollout_of(moved).shadow) == (5, 0.5)


# ---------------------------------------------------------------- capacity


def test_a_large_weight_waits_until_every_live_front_is_warm() -> None:
    document = at_step(2)
    warm = a_front(document, requests=99)
    cold = a_front(document, "f2", warm=("v1",))

    held, _ = advance(document, seeing(warm, cold), CONFIG)
    moved, _ = advance(document, seeing(warm, a_front(document, "f2")), CONFIG)

    assert rollout_of(held).weight == 20
    assert rollout_of(held).message == "waiting for front f2 to load v1.1"
    assert rollout_of(moved).weight == 50


def test_a_large_weight_needs_no_slot() -> None:
    document = at_step(2)

    moved, _ = advance(document, seeing(a_front(document, requests=99), slot_ready=False), CONFIG)

    assert rollout_of(moved).weight == 50


def test_fronts_are_asked_for_the_candidate_one_step_before_they_need_it() -> None:
    held = [
        "v1.1" in needed_versions(document, CONFIG)
        for document in (started(), at_step(0), at_step(1), at_step(2), at_step(3))
    ]

    assert held == [False, False, False, True, True]


def test_fronts_always_hold_stable_and_previous() -> None:
    assert needed_versions(ReleaseDocument(), CONFIG) == frozenset()
    assert needed_versions(ReleaseDocument(stable="v2", previous="v1"), CONFIG) == {"v1", "v2"}


def test_fronts_load_the_candidate_when_a_promotion_is_asked_early() -> None:
    document, _ = advance(asked(at_step(0), "promote"), seeing(), CONFIG)

    assert "v1.1" in needed_versions(document, CONFIG)


# ---------------------------------------------------------------- promotion


def last_step(**changes: object) -> ReleaseDocument:
    return at_step(4, **changes)


def test_enough_evidence_after_the_last_step_promotes() -> None:
    document = last_step()

    following, events = advance(
        document, seeing(a_front(document, requests=60), pairs=GOOD), CONFIG
    )

    assert (following.stable, following.previous, following.rollout) == ("v1.1", "v1", None)
    assert following.seq == document.seq + 1
    assert whats(events) == ["promoted"]
    assert events[0].why.startswith("not worse than stable by 2 points or more: 100 labelled")
    assert (events[0].from_version, events[0].to_version) == ("v1", "v1.1")
    assert events[0].evidence["better"] == 40
    assert events[0].rollout is not None
    assert events[0].rollout.phase == "Healthy"


def test_without_labels_a_rollout_pauses_and_neither_promotes_nor_aborts() -> None:
    document = last_step()
    observation = seeing(a_front(document, requests=100_000))

    following, events = advance(document, observation, CONFIG)

    assert (following.stable, rollout_of(following).weight) == ("v1", 100)
    assert rollout_of(following).phase == "Paused"
    assert rollout_of(following).message == "0 of 50 labelled pairs seen"
    assert whats(events) == ["paused"]


def test_a_pause_for_evidence_ends_when_the_evidence_is_there() -> None:
    document = last_step(phase="Paused", paused_by="evidence")

    following, _ = advance(document, seeing(a_front(document, requests=60), pairs=GOOD), CONFIG)

    assert following.stable == "v1.1"


def test_evidence_does_not_skip_steps() -> None:
    document = at_step(1)

    following, _ = advance(document, seeing(a_front(document, requests=99), pairs=GOOD), CONFIG)

    assert following.stable == "v1"
    assert rollout_of(following).weight == 20


def test_fewer_labels_than_needed_never_promote_however_good() -> None:
    document = last_step()

    following, _ = advance(
        document, seeing(a_front(document, requests=60), pairs=Pairs(better=49)), CONFIG
    )

    assert following.stable == "v1"
    assert rollout_of(following).message == "49 of 50 labelled pairs seen"


def test_promotion_waits_until_every_live_front_is_warm() -> None:
    document = last_step()
    fronts = a_front(document, requests=60), a_front(document, "f2", warm=("v1",))

    held, _ = advance(document, seeing(*fronts, pairs=GOOD), CONFIG)

    assert held.stable == "v1"
    assert rollout_of(held).message == ("waiting for front f2 to load v1.1; then v1.1 is promoted")


def test_a_controller_that_waits_changes_the_document_only_once() -> None:
    document = last_step()
    fronts = a_front(document, requests=60)

    paused, _ = advance(document, seeing(fronts), CONFIG)
    again, events = advance(paused, seeing(a_front(paused, requests=60)), CONFIG)
    unacknowledged, more = advance(again, seeing(replace(fronts, doc_seq=0)), CONFIG)

    assert again == paused
    assert unacknowledged.seq == paused.seq
    assert (events, more) == ((), ())


# ---------------------------------------------------------------- abort


@pytest.mark.parametrize("index", [0, 1, 2, 3])
def test_proof_of_being_worse_aborts_at_any_step(index: int) -> None:
    document = at_step(index)

    following, events = advance(document, seeing(a_front(document), pairs=BAD), CONFIG)

    assert (following.stable, following.previous, following.rollout) == ("v1", "v0", None)
    assert whats(events) == ["aborted"]
    assert events[0].why.startswith("worse than stable by more than 2 points: 50 labelled pairs")
    assert events[0].rollout is not None
    assert events[0].rollout.phase == "Degraded"


def test_an_abort_waits_for_nobody() -> None:
    document = at_step(1, phase="Paused", paused_by="operator")

    following, _ = advance(document, seeing(pairs=BAD, slot_ready=False), CONFIG)

    assert following.rollout is None


def test_a_candidate_with_errors_is_taken_back() -> None:
    document = at_step(1)

    following, events = advance(
        document, seeing(a_front(document, requests=400, errors=12)), CONFIG
    )

    assert following.rollout is None
    assert events[0].why == "errors 3.0 % of 400 requests, above 2 % (0.0 % stable)"


def test_a_few_requests_with_errors_take_nothing_back() -> None:
    document = at_step(1)

    following, _ = advance(document, seeing(a_front(document, requests=12, errors=6)), CONFIG)

    assert rollout_of(following).message == "12 of 50 requests seen"


def test_errors_of_an_earlier_rollout_are_not_held_against_a_candidate() -> None:
    document = started()
    front = a_front(document, requests=1_000, errors=900)

    moved, _ = advance(document, seeing(front), CONFIG)
    later, _ = advance(moved, seeing(replace(front, doc_seq=moved.seq, at_s=1_000)), CONFIG)

    assert rollout_of(moved).step_index == 0
    assert rollout_of(later).message == "0 of 50 requests seen"


def test_high_latency_inside_the_model_pauses_until_it_falls_or_is_accepted() -> None:
    document = at_step(1)
    slow = seeing(a_front(document, requests=200, candidate_ms=30.0))

    paused, events = advance(document, slow, CONFIG)
    still, _ = advance(paused, slow, CONFIG)
    recovered, _ = advance(paused, seeing(a_front(paused, requests=200)), CONFIG)
    resumed, _ = advance(asked(paused, "resume"), slow, CONFIG)

    assert rollout_of(paused).phase == "Paused"
    assert whats(events) == ["paused"]
    assert "p99 inside the model 32.3 ms against 1.1 ms stable" in events[0].why
    assert still == paused
    assert rollout_of(recovered).weight == 20
    assert rollout_of(resumed).latency_accepted
    assert rollout_of(resumed).phase == "Progressing"


# ---------------------------------------------------------------- operators


def seeing_split(
    document: ReleaseDocument, stable: int, candidate: int, weight: int = 5
) -> Observation:
    front = a_front(document, requests=99)
    return replace(seeing(front), assigned={(100 - weight, weight): (stable, candidate)})


def test_requests_that_are_not_split_by_weight_pause_a_rollout_until_that_is_accepted() -> None:
    document = at_step(1)

    paused, events = advance(document, seeing_split(document, 990, 10), CONFIG)
    still, none = advance(paused, seeing_split(paused, 1_900, 100), CONFIG)
    resumed, _ = advance(asked(still, "resume"), seeing_split(still, 990, 10), CONFIG)
    moved, _ = advance(resumed, seeing_split(resumed, 990, 10), CONFIG)

    assert rollout_of(paused).paused_by == "sample_ratio"
    assert events[0].why == (
        "requests are not split by weight: chance assigned 990 to stable and 10 to v1.1, "
        "where 950 and 50 were due; resume accepts it"
    )
    assert events[0].evidence["assigned"] == [990, 10]
    assert events[0].evidence["log_e_sample_ratio"] > math.log(1_000)
    assert (still, none) == (paused, ())  # proven once is proven, and nothing is written
    assert rollout_of(moved).weight == 20


def test_requests_split_by_weight_pause_nothing() -> None:
    document = at_step(1)

    moved, _ = advance(document, seeing_split(document, 948, 52), CONFIG)

    assert rollout_of(moved).weight == 20


def test_a_wrong_split_stops_a_promotion_but_neither_a_forced_one_nor_an_abort() -> None:
    document = last_step()
    off = seeing_split(document, 900, 100, weight=50)

    held, _ = advance(document, replace(off, pairs=GOOD), CONFIG)
    taken_back, _ = advance(document, replace(off, pairs=BAD), CONFIG)
    forced, _ = advance(asked(held, "promote", force=True), off, CONFIG)
    forced, _ = advance(forced, replace(off, fronts=(a_front(forced),)), CONFIG)

    assert rollout_of(held).paused_by == "sample_ratio"
    assert taken_back.rollout is None
    assert taken_back.stable == "v1"
    assert forced.stable == "v1.1"


def test_an_operators_pause_holds_until_resumed() -> None:
    document = at_step(1)
    paused, _ = advance(asked(document, "pause"), seeing(), CONFIG)

    held, _ = advance(paused, seeing(a_front(paused, requests=999), pairs=GOOD), CONFIG)
    resumed, events = advance(asked(held, "resume", intent_id="i2"), seeing(), CONFIG)

    assert held == paused
    assert rollout_of(held).message == "paused by ann: why not"
    assert rollout_of(resumed).phase == "Progressing"
    assert whats(events) == ["resumed"]


def test_an_operators_abort_returns_everybody_to_stable() -> None:
    following, events = advance(asked(at_step(2), "abort"), seeing(), CONFIG)

    assert (following.stable, following.rollout) == ("v1", None)
    assert (events[0].what, events[0].who, events[0].why) == (
        "aborted",
        "ann",
        "abort asked: why not",
    )


def test_promote_skips_steps_but_not_the_evidence() -> None:
    document, _ = advance(asked(at_step(0), "promote"), seeing(), CONFIG)

    waiting, _ = advance(document, seeing(a_front(document)), CONFIG)
    promoted, _ = advance(waiting, seeing(a_front(waiting), pairs=GOOD), CONFIG)

    assert rollout_of(waiting).message == "0 of 50 labelled pairs seen"
    assert promoted.stable == "v1.1"


def test_a_forced_promotion_needs_no_evidence_but_warm_fronts_and_says_who_forced_it() -> None:
    document, _ = advance(asked(at_step(0), "promote", force=True), seeing(), CONFIG)

    cold, _ = advance(document, seeing(a_front(document, warm=("v1",))), CONFIG)
    promoted, events = advance(cold, seeing(a_front(cold)), CONFIG)

    assert cold.stable == "v1"
    assert promoted.stable == "v1.1"
    assert (events[0].why, events[0].intent_id) == ("promotion forced by ann", "i1")


def test_even_a_forced_promotion_does_not_outrun_proof_of_being_worse() -> None:
    document, _ = advance(asked(last_step(), "promote", force=True), seeing(), CONFIG)

    following, _ = advance(document, seeing(a_front(document), pairs=BAD), CONFIG)

    assert (following.stable, following.rollout) == ("v1", None)


def test_a_rollback_exchanges_stable_and_previous() -> None:
    document = asked(ReleaseDocument(seq=3, stable="v2", previous="v1"), "rollback")

    following, events = advance(document, seeing(a_front(document)), CONFIG)

    assert (following.stable, following.previous, following.seq) == ("v1", "v2", 4)
    assert whats(events) == ["rollback_asked", "rolled_back"]
    assert (events[1].from_version, events[1].to_version) == ("v2", "v1")


def test_a_rollback_waits_until_every_live_front_is_warm() -> None:
    document = asked(ReleaseDocument(stable="v2", previous="v1"), "rollback")

    held, _ = advance(document, seeing(a_front(document, warm=("v2",))), CONFIG)
    done, _ = advance(held, seeing(a_front(held)), CONFIG)

    assert (held.stable, held.message) == ("v2", "waiting for front f1 to load v1")
    assert (done.stable, done.rollback, done.message) == ("v1", None, "")


def test_a_rollback_works_without_any_front_because_nobody_is_left_to_wait_for() -> None:
    document = asked(ReleaseDocument(stable="v2", previous="v1"), "rollback")

    following, _ = advance(document, seeing(), CONFIG)

    assert following.stable == "v1"


def test_a_rollback_takes_the_candidate_back_first() -> None:
    document = asked(at_step(2), "rollback")

    following, events = advance(document, seeing(), CONFIG)

    assert (following.stable, following.rollout) == ("v0", None)
    assert whats(events) == ["aborted", "rollback_asked", "rolled_back"]


def test_a_waiting_rollback_can_be_cancelled() -> None:
    document = ReleaseDocument(stable="v2", previous="v1")
    held, _ = advance(asked(document, "rollback"), seeing(a_front(document, warm=("v2",))), CONFIG)

    following, events = advance(asked(held, "abort", intent_id="i2"), seeing(), CONFIG)

    assert (following.stable, following.rollback) == ("v2", None)
    assert whats(events) == ["rollback_cancelled"]


def test_intents_take_effect_in_order() -> None:
    document = at_step(2).changed(
        intents=(an_intent("abort"), an_intent("start", intent_id="i2", candidate="v1.2"))
    )

    following, events = advance(document, seeing(), CONFIG)

    assert whats(events) == ["aborted", "started"]
    assert rollout_of(following).candidate == "v1.2"
    assert following.handled[-2:] == ("i1", "i2")


def test_an_intent_that_came_too_late_is_refused_on_the_record() -> None:
    document = asked(ReleaseDocument(seq=2, stable="v1"), "abort")

    following, events = advance(document, seeing(), CONFIG)

    assert whats(events) == ["refused"]
    assert events[0].why == (
        "abort refused: no rollout is in progress, so there is nothing to abort"
    )
    assert following.intents == ()
    assert following.seq == 2


def test_a_rollout_that_has_just_started_is_not_judged_by_what_was_seen_of_the_last_one() -> None:
    document = at_step(2).changed(intents=(an_intent("abort"), an_intent("start", intent_id="i2")))

    following, _ = advance(document, seeing(a_front(document), pairs=BAD), CONFIG)

    assert rollout_of(following).step_index == -1


def test_automatic_changes_name_the_controller_that_made_them() -> None:
    document = at_step(1).changed(lease=Lease(holder="c7", expires_at_s=2_000))

    _, events = advance(document, seeing(a_front(document, requests=50)), CONFIG)

    assert events[0].who == "controller c7"


# ---------------------------------------------------------------- another controller


def drive(document: ReleaseDocument, *, reread: bool) -> tuple[ReleaseDocument, list[str]]:
    """Run a rollout to its end; every tick by a controller that knows only the document."""
    history: list[str] = []
    for tick in range(40):
        if reread:
            document = ReleaseDocument.model_validate_json(document.model_dump_json())
        front = a_front(document, requests=60 * tick)
        document, events = advance(
            document, seeing(front, pairs=Pairs(better=tick, same=3 * tick)), CONFIG
        )
        history += [f"{event.what}: {event.why}" for event in events]
    return document, history


def test_another_controller_continues_a_rollout_from_the_document_alone() -> None:
    document = asked(ReleaseDocument(stable="v1"), "start")

    by_one, one_history = drive(document, reread=False)
    by_many, many_history = drive(document, reread=True)

    assert by_one.stable == "v1.1"
    assert [line.split(":")[0] for line in one_history] == [
        "started",
        "stepped",
        "stepped",
        "stepped",
        "stepped",
        "stepped",
        "paused",
        "promoted",
    ]
    assert (by_many, many_history) == (by_one, one_history)


# ---------------------------------------------------------------- whatever happens


def a_story(seed: int) -> tuple[set[str], set[int]]:
    """Forty ticks of chance, checked one by one; returns what happened and every weight."""
    chance = random.Random(seed)
    document = asked(ReleaseDocument(seq=1, stable="v1", previous="v0"), "start", intent_id="i0")
    seen = [Counter(), Counter(), Counter()]
    pairs = Pairs()
    error_share = chance.choice([0.0, 0.0, 0.01, 0.05])
    gain = chance.choice([-0.3, -0.02, 0.0, 0.3])
    happened: set[str] = set()
    weights = set()
    for tick in range(40):
        now_s = 1_000.0 + tick
        for _ in range(chance.choice([0, 4, 30]) if document.rollout is not None else 0):
            better = chance.random() < 0.3 + min(gain, 0)
            worse = chance.random() < 0.3 - max(gain, 0)
            pairs += Pairs(int(better), int(better == worse), int(worse))
        if chance.random() < 0.15:
            verb = chance.choice(get_args(Verb))
            intent = an_intent(verb, intent_id=f"t{tick}")
            document = document.changed(intents=(*document.intents, intent))
        reports = []
        for number in range(chance.choice([0, 1, 2, 2, 3])):
            requests = chance.choice([0, 10, 200])
            seen[number] += counters(requests, round(error_share * requests))
            reports.append(
                FrontReport(
                    front_id=f"f{number}",
                    at_s=now_s if chance.random() < 0.9 else 0.0,
                    doc_seq=document.seq - (chance.random() < 0.1),
                    warm_versions=tuple(v for v in ("v0", "v1", "v1.1") if chance.random() < 0.85),
                    counters={"v1.1": seen[number]},
                )
            )
        observation = seeing(*reports, pairs=pairs, slot_ready=chance.random() < 0.8, now_s=now_s)

        if document.experiment is not None:
            right = [chance.randrange(20) for _ in document.experiment.arms]
            tallies = tuple(ArmTally(labelled=20, correct=number) for number in right)
            observation = replace(observation, tallies=tallies)

        following, events = advance(document, observation, CONFIG, ExperimentConfig(interval_s=3))

        check_invariants(document, observation, following, events)
        happened |= {event.what for event in events}
        weights.add(following.rollout.weight if following.rollout is not None else 0)
        if following.rollout is None or following.rollout.step_index < 0:
            pairs = Pairs()
        document = following
    return happened, weights


@short_and_long("stories", 60, 2_000)
def test_whatever_is_observed_the_invariants_of_a_release_hold(stories: int) -> None:
    happened: set[str] = set()
    weights: set[int] = set()

    for seed in range(stories):
        more_happened, more_weights = a_story(seed)
        happened |= more_happened
        weights |= more_weights

    # The stories must have gone everywhere, or they would prove little.
    assert happened == set(get_args(What)) - {"created"}
    assert weights == {0, 5, 20, 50, 100}


def check_invariants(
    before: ReleaseDocument,
    observation: Observation,
    after: ReleaseDocument,
    events: tuple[Event, ...],
) -> None:
    live = [r for r in observation.fronts if r.at_s >= observation.now_s - 5]
    assert after.stable is not None
    assert after.seq >= before.seq
    assert (after.seq > before.seq) or after.acknowledgeable() == before.acknowledgeable()
    assert after.intents == ()
    assert all(after.knows(intent.id) for intent in before.intents)
    assert [e.number for e in events] == list(range(before.next_audit, after.next_audit))
    assert all(event.who and event.why for event in events)

    assert after.rollout is None or after.experiment is None
    if after.experiment is not None:
        assert sum(after.experiment.weights) == 100
        assert min(after.experiment.weights) >= 1

    moved_pointer = after.stable != before.stable
    assert moved_pointer == bool({"promoted", "rolled_back"} & set(whats(events)))
    if "promoted" in whats(events):
        assert live
        assert all("v1.1" in r.warm_versions and r.doc_seq >= before.seq for r in live)
        verdict = judge_evidence(observation.pairs, alpha=0.05, margin=0.02, min_labelled_pairs=50)
        assert verdict.decision == "not_inferior"
    if "rolled_back" in whats(events):
        assert all(after.stable in r.warm_versions for r in live)
    if observation.pairs == Pairs() and not observation.fronts:
        automatic = [e for e in events if e.who.startswith("controller")]
        assert not {"promoted", "aborted"} & {e.what for e in automatic}

    weight_before = before.rollout.weight if before.rollout else 0
    rollout = after.rollout
    if rollout is not None and rollout.weight > weight_before:
        assert live
        if rollout.weight > CONFIG.slot_max_weight:
            assert all("v1.1" in r.warm_versions for r in live)
        else:
            assert observation.slot_ready


# -- analysis ---------------------------------------------------------------------------------

ANY_ERRORS = RolloutConfig(max_error_share=1)
FEW_ERRORS = {
    "measure": "error_share",
    "successCondition": "result < 0.01",
    "failureCondition": "result > 0.5",
    "count": 2,
    "interval": 10,
}


def analysing(**metric: object) -> ReleaseDocument:
    """A document in a step that analyses, after one that sets the weight."""
    steps = (
        StepConfig(setWeight=20),
        StepConfig.model_validate({"analysis": [FEW_ERRORS | metric], "min_requests": 0}),
        StepConfig(setWeight=50),
    )
    return started(steps=steps, step_index=1, weight=20)


def looked_at(document: ReleaseDocument, *, errors: int, looks: int = 2) -> ReleaseDocument:
    """The document after looks ten seconds apart at so many errors of a hundred requests."""
    for look in range(looks):
        now_s = 1_000.0 + 10 * look
        front = a_front(document, requests=100, errors=errors, at_s=now_s)
        document, _ = advance(document, seeing(front, now_s=now_s), ANY_ERRORS)
        if document.rollout is None:
            break
    return document


def test_a_step_of_analysis_ends_once_its_metrics_are_successful() -> None:
    once = looked_at(analysing(), errors=0, looks=1)
    assert rollout_of(once).message == "error_share: 1 of 2 measurements"

    assert rollout_of(looked_at(analysing(), errors=0)).step_index == 2


def test_a_failed_analysis_takes_the_candidate_back() -> None:
    document = looked_at(analysing(), errors=90)

    assert document.rollout is None
    assert document.stable == "v1"
    assert "analysis failed: error_share is 0.9" in document.outbox[-1].why


def test_an_inconclusive_analysis_asks_and_resume_accepts_it() -> None:
    document = looked_at(analysing(), errors=20)
    rollout = rollout_of(document)
    assert (rollout.phase, rollout.paused_by) == ("Paused", "analysis")
    assert "resume accepts it" in rollout.message

    resumed = asked(document, "resume")
    front = a_front(resumed, requests=100, errors=20, at_s=1_020.0)
    document, _ = advance(resumed, seeing(front, now_s=1_020.0), ANY_ERRORS)
    document = looked_at(document, errors=20, looks=3)

    assert rollout_of(document).step_index == 2


def test_resume_accepts_what_did_not_decide_and_nothing_that_is_still_to_come() -> None:
    throughout = FEW_ERRORS | {"measure": "agreement", "successCondition": "result > 0.9"}
    throughout |= {"failureCondition": "result < 0.1"}
    config = ANY_ERRORS.model_copy(
        update={"analysis": RolloutConfig.model_validate({"analysis": [throughout]}).analysis}
    )
    document = analysing(count=1)
    front = a_front(document, requests=100, errors=20)
    document, _ = advance(document, seeing(front), config)
    assert (rollout_of(document).paused_by, rollout_of(document).undecided) == (
        "analysis",
        ("step",),
    )

    resumed, _ = advance(asked(document, "resume"), seeing(a_front(document)), config)
    unsure = replace(seeing(a_front(resumed, requests=100, errors=20), now_s=1_010), agreement=0.5)
    paused, _ = advance(resumed, unsure, config)

    assert rollout_of(resumed).accepted == ("step",)
    assert rollout_of(paused).paused_by == "analysis"
    assert "agreement is 0.5" in rollout_of(paused).message


def test_metrics_of_the_whole_rollout_are_measured_beside_its_steps() -> None:
    config = RolloutConfig.model_validate({"analysis": [FEW_ERRORS], "max_error_share": 1})
    document = at_step(1)
    front = a_front(document, requests=10, errors=9)

    document, events = advance(document, seeing(front), config)

    assert whats(events) == ["aborted"]
    assert "error_share is 0.9" in events[-1].why


def test_a_metric_that_was_never_measured_holds_a_promotion() -> None:
    agreeing = FEW_ERRORS | {"measure": "agreement", "failureCondition": "result < 0.1"}
    agreeing |= {"successCondition": "", "count": 9}
    config = RolloutConfig.model_validate({"analysis": [agreeing]})
    document = last_step()
    seen = seeing(a_front(document, requests=100), pairs=GOOD)

    held, _ = advance(document, seen, config)
    promoted, events = advance(held, replace(seen, agreement=0.9), config)

    assert held.stable == "v1"
    assert rollout_of(held).message == "agreement: 0 of 9 measurements"
    assert whats(events) == ["promoted"]
    assert promoted.stable == "v1.1"


def test_what_was_measured_is_in_the_document_for_whoever_goes_on() -> None:
    document = looked_at(analysing(), errors=0, looks=1)
    again = ReleaseDocument.model_validate_json(document.model_dump_json())

    assert rollout_of(again).in_step == rollout_of(document).in_step
    assert rollout_of(again).in_step[0].last[0].value == 0.0


# -- corrections ------------------------------------------------------------------------------

BY_USERS = RolloutConfig(evidence="corrections")


def corrected(document: ReleaseDocument, counts: tuple[int, int]) -> Observation:
    front = a_front(document, requests=1_000)
    return replace(seeing(front), corrections=Corrections({50: counts}))


def test_without_audit_labels_few_corrections_promote_a_candidate() -> None:
    document = last_step()

    document, events = advance(document, corrected(document, (40, 120)), BY_USERS)

    assert whats(events) == ["promoted"]
    assert document.stable == "v1.1"
    assert events[-1].evidence["correction_ratio"] == pytest.approx(1 / 3)


def test_all_users_get_a_candidate_only_once_corrections_have_decided() -> None:
    """With nobody left on stable corrections would say nothing any more."""
    document = at_step(3)

    held, events = advance(document, corrected(document, (10, 10)), BY_USERS)
    moved, _ = advance(held, corrected(held, (40, 120)), BY_USERS)

    assert whats(events) == ["paused"]
    assert (rollout_of(held).weight, rollout_of(held).paused_by) == (50, "evidence")
    assert rollout_of(held).message == "20 of 50 corrections seen"
    assert (rollout_of(moved).weight, rollout_of(moved).phase) == (100, "Progressing")


def test_many_corrections_take_a_candidate_back_at_any_step() -> None:
    document = at_step(1)

    document, events = advance(document, corrected(document, (90, 30)), BY_USERS)

    assert whats(events) == ["aborted"]


def test_corrections_neither_promote_nor_abort_where_audit_labels_are_the_evidence() -> None:
    for counts in ((40, 120), (90, 30)):
        document = last_step()
        document, _ = advance(document, corrected(document, counts), CONFIG)
        assert rollout_of(document).paused_by == "evidence"


def test_the_document_remembers_which_weight_held_when() -> None:
    document = at_step(1, weights=((900.0, 0), (950.0, 5)))

    document, _ = advance(document, seeing(a_front(document, requests=100)), CONFIG)

    assert rollout_of(document).weights == ((900.0, 0), (950.0, 5), (1_000.0, 20))


@pytest.mark.parametrize(
    ("steps", "index", "needed"),
    [
        ([{"shadow": 0.5}, {"setWeight": 50}], -1, True),
        ([{"setWeight": 5}, {"setWeight": 50}], 0, True),
        ([{"setWeight": 5}, {"setWeight": 50}], 1, False),
        ([{"setWeight": 50}, {"setWeight": 100}], -1, False),
        ([{"setWeight": 50}, {"setWeight": 5}], 0, True),
        ([{"setWeight": 50}, {"shadow": 0.5}], 0, False),
        ([{"setWeight": 0, "min_requests": 0}, {"pause": 5, "min_requests": 0}], 0, False),
    ],
)
def test_a_slot_is_needed_for_copies_and_small_shares_now_or_later(
    steps: list[dict[str, object]], index: int, needed: bool
) -> None:
    parsed = tuple(StepConfig.model_validate(step) for step in steps)
    weights = [step.setWeight for step in parsed[: index + 1] if step.setWeight is not None]
    rollout = Rollout(
        id="r",
        candidate="v2",
        steps=parsed,
        step_index=index,
        weight=weights[-1] if weights else 0,
        salt="s",
        started_at_s=0.0,
        step_started_at_s=0.0,
    )

    assert needs_slot(ReleaseDocument(stable="v1", rollout=rollout), RolloutConfig()) is needed


def test_without_a_rollout_no_slot_is_needed() -> None:
    assert not needs_slot(ReleaseDocument(stable="v1"), RolloutConfig())

"""The controller, tick by tick, over a real log and a clock of the test's own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from lifelong_ray.config import Config, StepConfig
from lifelong_ray.feedback import LogWriter, RequestIds
from lifelong_ray.on_ray.rollout import Controller
from lifelong_ray.release import (
    Counter,
    FrontReport,
    Intent,
    ReleaseDesk,
    ReleaseDocument,
    Split,
)
from lifelong_ray.storage import Store
from lifelong_ray.types import ConflictError, Feedback
from tests.fakes import MemoryStore
from tests.rows import a_comparison, a_label
from tests.unit.on_ray.world import add_version, settings

START_S = 1_800_000_000.0
CONFIG = settings(
    rollout={"margin": 0.1, "min_labelled_pairs": 20, "lease_s": 10.0, "heartbeat_timeout_s": 5.0}
)
STEPS = (StepConfig(setWeight=10, min_requests=20), StepConfig(setWeight=50, min_requests=20))


@dataclass
class Stage:
    """A store with v1 stable and v1.1 registered, one front, one slot, a clock."""

    store: Store
    config: Config = CONFIG
    now_s: float = START_S
    asked: int = 0
    errors: int = 0
    front_is_alive: bool = True
    warm: tuple[str, ...] = ("v1", "v1.1")
    num_rows: int = 0
    assigned: dict[Split, tuple[int, ...]] = field(default_factory=dict)
    by_arm: dict[str, tuple[int, ...]] = field(default_factory=dict)
    desk: ReleaseDesk = field(init=False)
    log: LogWriter = field(init=False)

    def __post_init__(self) -> None:
        self.desk = ReleaseDesk(self.store, lambda: self.now_s)
        self.log = LogWriter(self.store, self.config.feedback, "front", lambda: self.now_s)

    def controller(self) -> Controller:
        return Controller(self.config, self.store, lambda: self.now_s)

    @property
    def document(self) -> ReleaseDocument:
        return self.desk.read()[0]

    def ask(self, verb: str, **what: Any) -> None:
        self.desk.request(
            Intent.model_validate({"verb": verb, "actor": "ann", "at_s": self.now_s} | what)
        )

    def start(self, **what: Any) -> None:
        self.ask("start", candidate="v1.1", steps=STEPS, **what)

    def tick(self, controller: Controller, times: int = 1) -> ReleaseDocument:
        """Let a second pass, the front and the slot report, and the controller look."""
        for _ in range(times):
            self.now_s += 1.0
            if self.front_is_alive:
                controller.take_front_report(
                    FrontReport(
                        front_id="front",
                        at_s=self.now_s,
                        doc_seq=self.document.seq,
                        warm_versions=self.warm,
                        counters={"v1.1": Counter(self.asked, self.errors)},
                        assigned=self.assigned,
                        requests_by_arm=self.by_arm,
                    )
                )
                controller.take_slot_report("slot", self.now_s, ("v1.1",))
            controller.tick()
        return self.document

    def reach_last_step(self, controller: Controller) -> None:
        """Start a rollout and give every step its requests."""
        self.start()
        for _ in range(10):
            self.asked += 10
            self.tick(controller)
        rollout = self.document.rollout
        assert rollout is not None
        assert (rollout.weight, rollout.is_at_last_step) == (50, True)

    def compare(
        self,
        number: int,
        *,
        candidate: str,
        label: str | None = "boot",
        audit: bool = True,
        rollout_id: str = "",
    ) -> None:
        """Log pairs of a stable version that says ``boot`` and a candidate, with labels."""
        rollout = self.document.rollout
        assert rollout is not None
        votes = []
        for _ in range(number):
            self.num_rows += 1
            request_id = f"request-{self.num_rows}"
            self.log.log_comparison(
                a_comparison(
                    request_id,
                    stable="boot",
                    candidate=candidate,
                    at_s=self.now_s,
                    rollout_id=rollout_id or rollout.id,
                    audit=audit,
                )
            )
            if label is not None:
                votes.append(a_label(request_id, label, self.now_s, audit=audit))
        self.log.flush()
        self.log.record_feedback(votes, ())

    def history(self) -> list[str]:
        return [event.what for event in self.desk.audit_trail()]


@pytest.fixture
def stage(store: MemoryStore) -> Stage:
    add_version(store)
    return Stage(store)


def test_a_candidate_that_keeps_up_is_promoted_on_the_evidence_of_the_log(stage: Stage) -> None:
    controller = stage.controller()
    stage.reach_last_step(controller)

    stage.compare(15, candidate="boot")
    before = stage.tick(controller)
    stage.compare(60, candidate="boot")
    after = stage.tick(controller)

    assert before.stable == "v1"
    assert (after.stable, after.previous, after.rollout) == ("v1.1", "v1", None)
    promotion = stage.desk.audit_trail()[-1]
    assert promotion.what == "promoted"
    assert promotion.evidence["same"] == 75
    assert promotion.who == f"controller {controller.holder}"
    assert stage.history() == ["created", "started", "stepped", "stepped", "paused", "promoted"]


def test_a_worse_candidate_is_taken_back(stage: Stage) -> None:
    controller = stage.controller()
    stage.reach_last_step(controller)

    stage.compare(60, candidate="shoe")
    document = stage.tick(controller)

    assert (document.stable, document.rollout) == ("v1", None)
    abortion = stage.desk.audit_trail()[-1]
    assert abortion.what == "aborted"
    assert abortion.evidence["worse"] == 60


def test_a_candidate_that_fails_is_taken_back_without_a_label(stage: Stage) -> None:
    controller = stage.controller()
    stage.start()
    stage.tick(controller, times=2)

    stage.asked, stage.errors = 40, 20
    document = stage.tick(controller)

    assert (document.stable, document.rollout) == ("v1", None)
    assert "errors 50.0 % of 40 requests" in stage.desk.audit_trail()[-1].why


def test_without_labels_nothing_is_promoted_and_nothing_taken_back(stage: Stage) -> None:
    controller = stage.controller()
    stage.reach_last_step(controller)

    for candidate in ("boot", "shoe"):
        stage.compare(100, candidate=candidate, label=None)
        document = stage.tick(controller, times=60)

        assert document.stable == "v1"
        assert document.rollout is not None
        assert (document.rollout.phase, document.rollout.weight) == ("Paused", 50)
        assert document.rollout.message == "0 of 20 labelled pairs seen"
    assert controller.status()["agreement"] == pytest.approx(0.5)


def test_labels_outside_the_audit_share_and_of_other_rollouts_are_no_evidence(
    stage: Stage,
) -> None:
    controller = stage.controller()
    stage.reach_last_step(controller)

    stage.compare(100, candidate="boot", audit=False)
    stage.compare(100, candidate="boot", rollout_id="another")
    stage.tick(controller, times=3)

    assert sum(controller.status()["pairs"].values()) == 0
    assert stage.document.stable == "v1"


def test_a_label_that_comes_before_or_after_its_comparison_counts_once(stage: Stage) -> None:
    controller = stage.controller()
    stage.reach_last_step(controller)

    stage.compare(5, candidate="boot")
    stage.tick(controller, times=3)
    stage.compare(5, candidate="shoe")
    stage.tick(controller, times=3)

    assert controller.status()["pairs"] == {"better": 0, "same": 5, "worse": 5}


def test_a_second_controller_waits_for_the_lease_and_goes_on_with_the_same_counts(
    stage: Stage,
) -> None:
    first, second = stage.controller(), stage.controller()
    stage.reach_last_step(first)
    stage.compare(15, candidate="boot")
    stage.compare(2, candidate="shoe")
    stage.tick(first)
    counts = first.status()["pairs"]
    revision = stage.document.revision

    stage.tick(second, times=4)
    assert stage.document.revision == revision  # the first may be alive

    stage.tick(second, times=8)
    lease = stage.document.lease
    assert lease is not None
    assert lease.holder == second.holder
    assert second.status()["pairs"] == counts == {"better": 0, "same": 15, "worse": 2}
    rollout = stage.document.rollout
    assert rollout is not None
    assert (rollout.weight, rollout.is_at_last_step) == (50, True)

    stage.compare(200, candidate="boot")
    assert stage.tick(second).stable == "v1.1"
    revision = stage.document.revision
    stage.tick(first)
    assert stage.document.revision == revision  # the one that comes back finds it done


def test_a_controller_that_died_in_a_step_costs_no_request_its_count(stage: Stage) -> None:
    first = stage.controller()
    stage.start()
    stage.tick(first, times=2)
    stage.asked = 15
    stage.tick(first)
    second = stage.controller()

    stage.now_s += 20
    stage.tick(second)
    stage.asked = 20
    document = stage.tick(second)

    assert document.rollout is not None
    assert document.rollout.weight == 50


def test_no_step_begins_while_no_front_reports(stage: Stage) -> None:
    controller = stage.controller()
    stage.start()
    stage.tick(controller, times=2)
    stage.asked = 100
    stage.tick(controller)
    stage.front_is_alive = False

    document = stage.tick(controller, times=10)

    assert document.rollout is not None
    assert document.rollout.message == "no front has reported for 5 s"
    assert controller.status()["live_fronts"] == []


def test_a_rollback_waits_until_every_front_holds_its_target(stage: Stage) -> None:
    controller = stage.controller()
    stage.reach_last_step(controller)
    stage.compare(200, candidate="boot")
    assert stage.tick(controller).stable == "v1.1"

    stage.warm = ("v1.1",)
    stage.ask("rollback", reason="complaints")
    assert stage.tick(controller, times=3).stable == "v1.1"
    stage.warm = ("v1", "v1.1")
    document = stage.tick(controller)

    assert (document.stable, document.previous) == ("v1", "v1.1")
    assert stage.history()[-2:] == ["rollback_asked", "rolled_back"]


def test_a_wish_that_comes_between_reading_and_writing_is_not_lost(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    controller = stage.controller()
    swap = stage.store.swap
    meetings = []

    def meet(key: str, data: bytes, expected: str | None) -> str:
        if key == "current.json" and not meetings:
            meetings.append(key)
            stage.ask("abort", reason="changed my mind")
            raise ConflictError("somebody was first")
        return swap(key, data, expected)

    stage.start()
    stage.tick(controller)
    stage.asked = 5
    monkeypatch.setattr(stage.store, "swap", meet)
    assert stage.tick(controller).rollout is not None
    assert stage.tick(controller).rollout is None

    assert meetings
    assert stage.history()[-1] == "aborted"


def test_fronts_that_do_not_split_by_weight_pause_the_rollout_on_the_record(stage: Stage) -> None:
    controller = stage.controller()
    stage.start()
    rollout = stage.tick(controller, times=3).rollout
    assert rollout is not None
    stage.assigned = {Split("another-rollout", (90, 10)): (0, 5_000)}
    assert stage.tick(controller).rollout == rollout

    stage.assigned = {rollout.split: (995, 5)}
    document = stage.tick(controller)

    assert document.rollout is not None
    assert document.rollout.paused_by == "sample_ratio"
    pause = stage.desk.audit_trail()[-1]
    assert (pause.what, pause.evidence["assigned"]) == ("paused", [995, 5])

    stage.ask("resume")
    assert stage.tick(controller, times=2).rollout.paused_by is None  # type: ignore[union-attr]  # under way


def test_requests_of_a_front_that_died_keep_their_count_until_the_controller_does(
    stage: Stage,
) -> None:
    first, second = stage.controller(), stage.controller()
    stage.start()
    rollout = stage.tick(first, times=3).rollout
    assert rollout is not None
    died = FrontReport(
        front_id="died",
        at_s=stage.now_s,
        doc_seq=stage.document.seq,
        warm_versions=stage.warm,
        assigned={rollout.split: (250, 25)},
    )
    first.take_front_report(died)
    stage.assigned = {rollout.split: (600, 66)}
    stage.tick(first, times=8)
    stage.asked = 30
    stage.tick(first)

    assert stage.desk.audit_trail()[-1].evidence["assigned"] == [850, 91]
    stage.now_s += 20
    stage.assigned = {rollout.split: (5_000, 0)}
    document = stage.tick(second)
    assert document.rollout is not None
    assert stage.desk.audit_trail()[-1].evidence["assigned"] == [5_000, 0]


# ---------------------------------------------------------------- experiments


def label_answers(stage: Stage, version: str, variant: str, *, right: int, wrong: int) -> None:
    """Log labels for audited answers of one arm."""
    ids = RequestIds(b"k" * 32)
    votes = []
    for number in range(right + wrong):
        request_id = ids.issue(stage.now_s, version, variant, "boot", audit=True)
        votes.append(a_label(request_id, "boot" if number < right else "shoe", stage.now_s))
    stage.log.record_feedback(votes, ())


def start_experiment(stage: Stage, **more: Any) -> None:
    arms = [{"version": "v1", "weight": 50}, {"version": "v1.1", "weight": 50}]
    plan = {"arms": arms, "end_s": stage.now_s + 1_000} | more
    stage.ask("start_experiment", experiment=plan)


def test_an_experiment_is_measured_ends_by_itself_and_its_result_is_stored(stage: Stage) -> None:
    controller = stage.controller()
    start_experiment(stage)
    experiment = stage.tick(controller, times=2).experiment
    assert experiment is not None
    assert experiment.began_s is not None

    label_answers(stage, "v1", "stable", right=80, wrong=20)
    label_answers(stage, "v1.1", "v1.1", right=95, wrong=5)
    label_answers(stage, "v1.1", "candidate", right=0, wrong=50)  # of a rollout before
    stage.by_arm = {experiment.id: (500, 480)}
    stage.now_s += 998
    document = stage.tick(controller)

    assert (document.stable, document.previous, document.experiment) == ("v1", None, None)
    stored = stage.desk.experiment(experiment.id)
    assert stored.ended_why == "its planned end has come"
    result = stored.result
    assert result is not None
    assert [(a.requests, a.labelled, a.correct, a.corrections) for a in result.arms] == [
        (500, 100, 80, 20),
        (480, 100, 95, 5),
    ]
    assert stage.history()[-3:] == ["experiment_started", "experiment_began", "experiment_ended"]


def test_answers_before_the_weights_took_effect_and_chosen_ones_tell_nothing(stage: Stage) -> None:
    controller = stage.controller()
    stage.warm = ("v1",)
    start_experiment(stage)
    stage.tick(controller, times=2)
    label_answers(stage, "v1", "stable", right=0, wrong=9)
    stage.now_s += 5
    stage.warm = ("v1", "v1.1")
    stage.tick(controller, times=2)
    chosen = RequestIds(b"k" * 32).issue(stage.now_s, "v1.1", "v1.1", "boot", True, chosen=True)
    vote = Feedback("f", stage.now_s, "feedback", "shoe", chosen, "", "", True)
    stage.log.record_feedback([vote], ())
    label_answers(stage, "v1", "stable", right=3, wrong=0)
    stage.ask("end_experiment")
    stage.tick(controller)

    result = stage.desk.audit_trail()[-1].evidence
    assert [(arm["labelled"], arm["corrections"]) for arm in result["arms"]] == [(3, 0), (0, 0)]


def test_another_controller_goes_on_with_the_same_experiment_and_the_same_counts(
    stage: Stage,
) -> None:
    first, second = stage.controller(), stage.controller()
    start_experiment(stage, adaptive=True)
    experiment = stage.tick(first, times=2).experiment
    assert experiment is not None
    label_answers(stage, "v1", "stable", right=60, wrong=40)
    label_answers(stage, "v1.1", "v1.1", right=95, wrong=5)

    stage.now_s += 58
    by_first = stage.tick(first, times=3).experiment
    stage.now_s += 70
    by_second = stage.tick(second).experiment

    assert by_first is not None
    assert by_second is not None
    assert by_first.weights == by_second.weights == (1, 99)
    assert by_first.result is not None
    assert by_second.result is not None
    assert by_first.result.arms == by_second.result.arms
    assert by_second.began_s == experiment.began_s
    assert stage.document.stable == "v1"


def test_an_idle_controller_writes_only_to_keep_its_lease(stage: Stage) -> None:
    controller = stage.controller()
    stage.tick(controller)
    revision = stage.document.revision

    stage.tick(controller, times=60)

    assert stage.document.revision - revision <= 12


def test_the_status_tells_what_a_slot_answers_in_and_forgets_one_that_is_gone(
    stage: Stage,
) -> None:
    controller = stage.controller()

    controller.take_slot_report("slot", stage.now_s, ("v1.1",), {}, {"v1.1": "int8"})
    [slot] = controller.status()["slots"]
    stage.now_s += 60

    assert slot["precisions"] == {"v1.1": "int8"}
    assert controller.status()["slots"] == []


def test_a_report_that_was_overtaken_on_its_way_changes_nothing(stage: Stage) -> None:
    stage.start()
    controller = stage.controller()
    late = FrontReport("front", stage.now_s, 0, ())
    before = stage.tick(controller, 5).rollout
    assert before is not None
    assert before.message == "0 of 20 requests seen"

    controller.take_front_report(late)
    controller.tick()

    assert stage.document.rollout == before

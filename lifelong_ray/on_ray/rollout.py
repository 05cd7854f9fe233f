"""The controller: the one process that moves the release document.

One replica, no route, a lease in the document. It gathers heartbeats and evidence,
asks `release.advance` what to do, and writes the answer with a compare-and-swap.
Everything it needs to go on after a crash is in the document and in the log.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ray import serve

from lifelong_ray.config import Config, Precision, config_from
from lifelong_ray.feedback import FirstLabels, LogTail, uuid7
from lifelong_ray.on_ray.arms import ArmLabels
from lifelong_ray.release import (
    ArmTally,
    Corrections,
    Experiment,
    FrontReport,
    Observation,
    Pairs,
    ReleaseDesk,
    ReleaseDocument,
    Rollout,
    Split,
    advance,
    count_corrections,
    count_pairs,
)
from lifelong_ray.storage import Store, open_store
from lifelong_ray.types import (
    Comparison,
    ConflictError,
    Feedback,
    LifelongError,
)

logger = logging.getLogger(__name__)

_TICK_S = 0.25
_SHOWN_EVENTS = 20


@dataclass(frozen=True)
class _SlotReport:
    at_s: float
    warm: tuple[str, ...]
    failures: Mapping[str, str]
    precisions: Mapping[str, Precision]


class Evidence:
    """Paired answers and labels of one rollout, read from the log as they come in.

    Reads only files it has not seen; a new one over the same log comes to the same
    counts, so that a restarted controller continues where the old one stopped.
    """

    def __init__(self, store: Store, rollout: Rollout, now_s: Callable[[], float]) -> None:
        self._rollout_id = rollout.id
        self._comparisons_tail = LogTail(store, "comparisons", rollout.started_at_s, now_s)
        self._feedback_tail = LogTail(store, "feedback", rollout.started_at_s, now_s)
        self._num_compared = 0
        self._num_alike = 0
        self._audited: list[Comparison] = []
        self._votes: list[Feedback] = []
        self._pairs = Pairs()
        self._first = FirstLabels()
        self.corrections = Corrections()

    @property
    def agreement(self) -> float | None:
        """Share of the compared requests that both versions answered alike."""
        return self._num_alike / self._num_compared if self._num_compared else None

    def poll(self, weights: Sequence[tuple[float, int]]) -> Pairs:
        """Read what is new and return the counts of all labelled pairs.

        Args:
            weights: The rollout's, by which corrections are counted.
        """
        rows = [r for r in self._comparisons_tail.poll() if r.rollout_id == self._rollout_id]
        self._num_compared += len(rows)
        self._num_alike += sum(row.stable_class == row.candidate_class for row in rows)
        audited = [row for row in rows if row.audit]
        labels = [row for row in self._feedback_tail.poll() if row.kind == "feedback"]
        firsts = self._first.among(labels)
        corrected = (answer for answer, label in firsts if answer.class_name != label)
        self.corrections += count_corrections(corrected, weights)
        votes = [vote for vote in labels if vote.audit]
        if audited or votes:
            self._audited += audited
            self._votes += votes
            self._pairs = count_pairs(self._audited, self._votes, self._rollout_id)
        return self._pairs


class Controller:
    """Moves the document one tick at a time; the loop around it is the caller's."""

    def __init__(self, config: Config, store: Store, now_s: Callable[[], float]) -> None:
        self._config = config
        self._store = store
        self._now_s = now_s
        self._desk = ReleaseDesk(store, now_s)
        self.holder = str(uuid7(now_s()))
        self._lock = threading.Lock()
        self._fronts: dict[str, FrontReport] = {}
        # Kept when a front dies, so that within a controller's life counts only grow. The next
        # controller knows the living alone: a test of its own, over fewer requests.
        self._assigned: dict[tuple[str, Split], tuple[int, ...]] = {}
        self._slots: dict[str, _SlotReport] = {}
        self._evidence: tuple[str, Evidence] | None = None
        self._pairs = Pairs()
        self._labels: tuple[str, ArmLabels] | None = None

    def take_front_report(self, report: FrontReport) -> None:
        """Remember the latest heartbeat of a front."""
        with self._lock:
            known = self._fronts.get(report.front_id)
            if known is not None and known.at_s > report.at_s:
                return  # overtaken on its way; counts only grow
            self._fronts[report.front_id] = report
            for split, by_arm in report.assigned.items():
                self._assigned[report.front_id, split] = by_arm

    def take_slot_report(
        self,
        slot_id: str,
        at_s: float,
        warm: tuple[str, ...],
        failures: Mapping[str, str] | None = None,
        precisions: Mapping[str, Precision] | None = None,
    ) -> None:
        """Remember the latest heartbeat of a slot, and what its versions answer in."""
        with self._lock:
            self._slots[slot_id] = _SlotReport(at_s, warm, failures or {}, precisions or {})

    def tick(self) -> None:
        """Look once, and carry out what `advance` says."""
        document, tag = self._desk.read()
        held = self._desk.with_lease(document, self.holder, self._config.rollout.lease_s)
        if held is None:
            return  # another controller is alive
        observation = self._observe(held)
        following, events = advance(
            held, observation, self._config.rollout, self._config.experiment
        )
        if following == document:
            return
        try:
            self._desk.swap(following, tag)
        except ConflictError:
            return  # somebody wrote an intent meanwhile: look again at the next tick
        for event in events:
            logger.info("%s: %s", event.what, event.why)

    def status(self) -> dict[str, Any]:
        """What was seen lately, for operators."""
        with self._lock:
            fronts = [report.front_id for report in self._live_fronts()]
            slots = [asdict(slot) for slot in self._live_slots()]
        evidence = self._evidence
        return {
            "holder": self.holder,
            "live_fronts": fronts,
            "slots": slots,
            "pairs": asdict(self._pairs),
            "agreement": evidence[1].agreement if evidence else None,
            "events": [
                event.model_dump(mode="json", exclude={"rollout", "experiment"})
                for event in self._desk.audit_trail(last=_SHOWN_EVENTS)
            ],
        }

    def _observe(self, document: ReleaseDocument) -> Observation:
        rollout, experiment = document.rollout, document.experiment
        trial = experiment or rollout
        corrections = Corrections()
        if rollout is None:
            self._evidence, self._pairs = None, Pairs()
        else:
            if self._evidence is None or self._evidence[0] != rollout.id:
                self._evidence = rollout.id, Evidence(self._store, rollout, self._now_s)
            self._pairs = self._evidence[1].poll(rollout.weights)
            corrections = self._evidence[1].corrections
        tallies = self._tallied(experiment)
        with self._lock:
            slot_ready = rollout is not None and any(
                rollout.candidate in slot.warm for slot in self._live_slots()
            )
            return Observation(
                now_s=self._now_s(),
                fronts=self._live_fronts(),
                pairs=self._pairs,
                slot_ready=slot_ready,
                agreement=self._evidence[1].agreement if self._evidence else None,
                corrections=corrections,
                assigned=self._pooled(trial.id if trial is not None else ""),
                tallies=tallies,
            )

    def _tallied(self, experiment: Experiment | None) -> tuple[ArmTally, ...]:
        """Labels by arm of the experiment under way."""
        if experiment is None:
            self._labels = None
            return ()
        if self._labels is None or self._labels[0] != experiment.id:
            self._labels = experiment.id, ArmLabels(self._store, experiment, self._now_s)
        return self._labels[1].poll(experiment.began_s)

    def _pooled(self, trial: str) -> dict[tuple[int, ...], tuple[int, ...]]:
        """Requests by arm under every weight of a trial, over all fronts; forgets other trials."""
        for key in [key for key in self._assigned if key[1].trial != trial]:
            del self._assigned[key]
        pooled: dict[tuple[int, ...], tuple[int, ...]] = {}
        for (_, split), by_arm in self._assigned.items():
            before = pooled.get(split.weights, (0,) * len(by_arm))
            pooled[split.weights] = tuple(a + b for a, b in zip(before, by_arm, strict=True))
        return pooled

    def _live_slots(self) -> tuple[_SlotReport, ...]:
        fresh_s = self._now_s() - self._config.rollout.heartbeat_timeout_s
        for slot_id in [s for s, report in self._slots.items() if report.at_s < fresh_s]:
            del self._slots[slot_id]
        return tuple(self._slots.values())

    def _live_fronts(self) -> tuple[FrontReport, ...]:
        fresh_s = self._now_s() - self._config.rollout.heartbeat_timeout_s
        for front_id in [f for f, report in self._fronts.items() if report.at_s < fresh_s]:
            del self._fronts[front_id]
        return tuple(self._fronts.values())


@serve.deployment(name="rollout", num_replicas=1, max_ongoing_requests=64)
class RolloutController:
    """Runs a `Controller` on Ray Serve."""

    def __init__(self, config_tree: dict[str, Any]) -> None:
        """Start the loop on a thread of its own."""
        config = config_from(config_tree)
        self._controller = Controller(config, open_store(config.store), time.time)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._loop, daemon=True, name="rollout")
        self._thread.start()

    def __del__(self) -> None:
        """Stop the loop."""
        if hasattr(self, "_stopping"):
            self._stopping.set()

    def report_front(self, report: FrontReport) -> None:
        """Take a front's heartbeat."""
        self._controller.take_front_report(report)

    def report_slot(
        self,
        slot_id: str,
        at_s: float,
        warm: tuple[str, ...],
        failures: dict[str, str],
        precisions: dict[str, Precision],
    ) -> None:
        """Take a slot's heartbeat."""
        self._controller.take_slot_report(slot_id, at_s, warm, failures, precisions)

    def status(self) -> dict[str, Any]:
        """What was seen lately."""
        return self._controller.status()

    def check_health(self) -> None:
        """Tell Serve when the loop died."""
        if not self._thread.is_alive():
            raise RuntimeError("the rollout loop ended; the replica must be replaced")

    def _loop(self) -> None:
        while not self._stopping.wait(_TICK_S):
            try:
                self._controller.tick()
            except (LifelongError, OSError) as error:
                logger.warning("rollout tick failed, trying again: %s", error)

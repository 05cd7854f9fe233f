"""The release document: the one object that says which version users see.

Records only, and the questions that the records alone answer. It is stored as
``current.json`` under compare-and-swap; fronts and slots follow it, operators append
intents to it, and whoever holds its lease moves it. Everything a controller must remember
is in here, so that any other one can take over.
"""

from __future__ import annotations

import uuid
from typing import Any, Literal

from pydantic import Field, model_validator

from lifelong_ray.config import StepConfig, check_steps
from lifelong_ray.release.analysis import MetricRun
from lifelong_ray.release.experiment import Experiment, ExperimentPlan
from lifelong_ray.release.fronts import Split
from lifelong_ray.release.records import Record

Phase = Literal["Progressing", "Paused", "Healthy", "Degraded"]
"""Argo Rollouts' words; Healthy and Degraded only in the record of an ended rollout."""

Verb = Literal[
    "start",
    "promote",
    "abort",
    "pause",
    "resume",
    "rollback",
    "start_experiment",
    "end_experiment",
]
PauseCause = Literal["operator", "latency", "analysis", "sample_ratio", "evidence"]
What = Literal[
    "created",
    "started",
    "stepped",
    "paused",
    "resumed",
    "promotion_asked",
    "promoted",
    "aborted",
    "rollback_asked",
    "rolled_back",
    "rollback_cancelled",
    "experiment_started",
    "experiment_began",
    "experiment_reweighed",
    "experiment_ended",
    "refused",
]

_NUM_HANDLED_IDS = 200


class Intent(Record):
    """What somebody wants to happen to the release; a controller does it.

    Attributes:
        id: Names the wish: the same id never takes effect twice.
        verb: ``promote`` skips the remaining steps but not the evidence, unless forced.
        actor: Who wants it.
        reason: Why.
        at_s: Unix time.
        candidate: The version to start with; only for ``start``.
        steps: Its steps; empty means those of the config; only for ``start``.
        force: ``start`` without a passed gate, ``promote`` without evidence.
        experiment: What to find out; only for ``start_experiment``.
    """

    id: str = Field(
        default_factory=lambda: uuid.uuid4().hex, pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,99}$"
    )
    verb: Verb
    actor: str = Field(min_length=1)
    reason: str = ""
    at_s: float
    candidate: str | None = None
    steps: tuple[StepConfig, ...] = ()
    force: bool = False
    experiment: ExperimentPlan | None = None

    @model_validator(mode="after")
    def _fields_fit_the_verb(self) -> Intent:
        if (self.verb == "start") != (self.candidate is not None):
            raise ValueError("an intent names a candidate exactly when its verb is start")
        if (self.verb == "start_experiment") != (self.experiment is not None):
            raise ValueError("an intent has an experiment exactly when its verb starts one")
        if self.experiment is not None and self.experiment.end_s <= self.at_s:
            raise ValueError("an experiment must end later than it is asked for")
        if self.force and self.verb not in ("start", "promote"):
            raise ValueError(f"only start and promote can be forced, not {self.verb}")
        check_steps(self.steps)
        return self


class Rollout(Record):
    """One candidate on its way to stable.

    Attributes:
        id: Unique; names the evidence and the record of the rollout.
        candidate: The version that wants to replace stable.
        steps: What happens in which order.
        step_index: The step in force; -1 while the candidate's first capacity gets ready.
        phase: Progressing or Paused; Healthy or Degraded once it is over.
        paused_by: Why it is paused.
        weight: Per cent of requests that the candidate answers.
        shadow: Share of requests whose copies the other version answers too.
        salt: Decides, with the key, who gets the candidate.
        forced: Whether it was started without a passed gate.
        started_at_s: Unix time of the start.
        step_started_at_s: Unix time at which the step came into force.
        step_baseline: (requests, errors) of the candidate by front when the step began.
        latency_accepted: An operator resumed it in spite of its latency.
        sample_ratio_accepted: An operator resumed it although requests are not split by weight.
        weights: Unix time from which the candidate had which weight, in order.
        in_step: The looks at the metrics of the step in force.
        throughout: Those at the metrics of the whole rollout.
        undecided: Analyses that do not decide, which pause it until an operator accepts them.
        accepted: Analyses that did not decide and that an operator accepted: `step` until the
            step ends, `rollout`.
        promotion: An operator's wish to promote without the remaining steps.
        message: What it is waiting for.
    """

    id: str
    candidate: str
    steps: tuple[StepConfig, ...] = Field(min_length=1)
    step_index: int = Field(-1, ge=-1)
    phase: Phase = "Progressing"
    paused_by: PauseCause | None = None
    weight: int = Field(0, ge=0, le=100)
    shadow: float = Field(0.0, ge=0, le=1)
    salt: str
    forced: bool = False
    started_at_s: float
    step_started_at_s: float
    step_baseline: dict[str, tuple[int, int]] = Field(default_factory=dict)
    latency_accepted: bool = False
    sample_ratio_accepted: bool = False
    weights: tuple[tuple[float, int], ...] = ()
    in_step: tuple[MetricRun, ...] = ()
    throughout: tuple[MetricRun, ...] = ()
    undecided: tuple[Literal["step", "rollout"], ...] = ()
    accepted: tuple[Literal["step", "rollout"], ...] = ()
    promotion: Intent | None = None
    message: str = ""

    @property
    def variants(self) -> tuple[str, ...]:
        """Name by arm."""
        return ("stable", "candidate")

    @property
    def split(self) -> Split | None:
        """How requests are divided; None while one version answers them all."""
        if not 0 < self.weight < 100:
            return None
        return Split(self.id, (100 - self.weight, self.weight))

    @property
    def step(self) -> StepConfig | None:
        """The step in force; None before the first."""
        return self.steps[self.step_index] if self.step_index >= 0 else None

    @property
    def is_at_last_step(self) -> bool:
        """Whether only the promotion is left."""
        return self.step_index == len(self.steps) - 1


class Lease(Record):
    """Which controller may move the document, until when."""

    holder: str
    expires_at_s: float


class Event(Record):
    """One change, as the audit keeps it.

    Attributes:
        number: Position in the audit, without gaps.
        what: The kind of change.
        who: The actor of an intent, or the controller.
        why: The reason, with the numbers it rests on.
        from_version: What users saw, or the candidate on trial, before.
        to_version: What they see, or which version is on trial, after.
        at_s: Unix time.
        intent_id: The intent it carries out, or empty.
        evidence: The measured numbers.
        rollout: The rollout after the change, where one took part.
        experiment: The experiment after the change, where one took part.
    """

    number: int
    what: What
    who: str
    why: str
    from_version: str | None
    to_version: str | None
    at_s: float
    intent_id: str = ""
    evidence: dict[str, Any] = Field(default_factory=dict)
    rollout: Rollout | None = None
    experiment: Experiment | None = None


class ReleaseDocument(Record):
    """The only truth about the release.

    Attributes:
        revision: Grows with every write, so that no two contents are the same.
        seq: Grows with what fronts must acknowledge: the versions and the rollout.
        stable: The version users see; None before the first release.
        previous: The stable version before; what a rollback returns to.
        rollout: The candidate under way, if any.
        experiment: The experiment under way, if any; never beside a rollout.
        rollback: A rollback that waits until the fronts hold its target.
        intents: Wishes not yet handled, in order.
        handled: Ids of the latest handled wishes.
        lease: Who moves the document.
        outbox: Changes made by the last writes; `ReleaseDesk` copies them to the audit.
        next_audit: Number of the next change.
        message: What a waiting rollback waits for.
    """

    revision: int = 0
    seq: int = 0
    stable: str | None = None
    previous: str | None = None
    rollout: Rollout | None = None
    experiment: Experiment | None = None
    rollback: Intent | None = None
    intents: tuple[Intent, ...] = ()
    handled: tuple[str, ...] = ()
    lease: Lease | None = None
    outbox: tuple[Event, ...] = ()
    next_audit: int = 1
    message: str = ""

    @property
    def running_experiment(self) -> Experiment | None:
        """The experiment under way, unless it is about to end."""
        experiment = self.experiment
        return None if experiment is None or experiment.ended_by else experiment

    @property
    def trial(self) -> Rollout | Experiment | None:
        """What divides the requests among versions, if anything does."""
        experiment = self.experiment
        if experiment is not None and experiment.began_s is not None:
            return experiment
        return self.rollout

    def knows(self, intent_id: str) -> bool:
        """Whether an intent is waiting or was handled."""
        return intent_id in self.handled or any(i.id == intent_id for i in self.intents)

    def with_event(
        self,
        what: What,
        *,
        who: str,
        why: str,
        at_s: float,
        from_version: str | None,
        to_version: str | None,
        intent_id: str = "",
        evidence: dict[str, Any] | None = None,
        rollout: Rollout | None = None,
        experiment: Experiment | None = None,
    ) -> ReleaseDocument:
        """Return the document with one more change in its outbox."""
        event = Event(
            number=self.next_audit,
            what=what,
            who=who,
            why=why,
            from_version=from_version,
            to_version=to_version,
            at_s=at_s,
            intent_id=intent_id,
            evidence=evidence or {},
            rollout=rollout,
            experiment=experiment,
        )
        return self.changed(outbox=(*self.outbox, event), next_audit=self.next_audit + 1)

    def without_intent(self, intent: Intent) -> ReleaseDocument:
        """Return the document with `intent` handled."""
        return self.changed(
            intents=tuple(i for i in self.intents if i.id != intent.id),
            handled=(*self.handled, intent.id)[-_NUM_HANDLED_IDS:],
        )

    def acknowledgeable(self) -> tuple[object, ...]:
        """What fronts act on; `seq` grows exactly when this changes."""
        r = self.rollout
        rollout = (r.id, r.step_index, r.weight, r.shadow, r.phase) if r is not None else ()
        e = self.experiment
        experiment = (e.id, e.weights, e.began_s is not None) if e is not None else ()
        return (self.stable, self.previous, rollout, experiment)

    def numbered_after(self, before: ReleaseDocument) -> ReleaseDocument:
        """Return the document with the `seq` that follows from what changed since `before`."""
        if self.acknowledgeable() == before.acknowledgeable():
            return self
        return self.changed(seq=before.seq + 1)

    def changed(self, **changes: object) -> ReleaseDocument:
        """Return the document with other values for some fields."""
        return self.model_copy(update=changes)

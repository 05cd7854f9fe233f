"""The decisions of a release: which version answers, and when the candidate moves on.

Pure functions of the document and of what was observed. Two controllers that see the same
decide the same; one that starts anew goes on where another stopped. No clock, no files.

A rollout passes through its steps (`shadow`, `setWeight`, `pause`, `analysis`); each needs the
step before to be acknowledged by every live front, to have seen its requests and to have come
through its analysis, and capacity for its weight. After the last one the evidence decides: audit
labels, or corrections where the configuration says so. Missing data holds a rollout; it neither
promotes nor aborts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from lifelong_ray.config import ExperimentConfig, Measured, RolloutConfig
from lifelong_ray.release.analysis import Outcome, measured, outcome
from lifelong_ray.release.corrections import Corrections, CorrectionVerdict, judge_corrections
from lifelong_ray.release.document import Event, PauseCause, ReleaseDocument, Rollout
from lifelong_ray.release.evidence import Pairs, Verdict, judge_evidence
from lifelong_ray.release.experiment import ArmTally, Experiment, choose_arm
from lifelong_ray.release.experimenting import advance_experiment
from lifelong_ray.release.fronts import Counter, FrontReport, latency_quantile_ms, total
from lifelong_ray.release.sample_ratio import SampleRatio, SplitCounts, sample_ratio
from lifelong_ray.release.transitions import aborted, applied, promoted, rolled_back
from lifelong_ray.types import RolloutError

NUM_BUCKETS = 10_000
"""Keys fall into this many buckets; the weight says how many of them the candidate gets."""

_MIN_LATENCIES = 100  # A 99th percentile of fewer is mostly the slowest one.


@dataclass(frozen=True)
class Assignment:
    """Who answers one request.

    Attributes:
        variant: ``stable``, ``candidate``, or the version of an experiment's arm.
        version: The version of that arm.
        shadow: Whether the other version answers a copy too, for comparison.
        chosen: Whether the override decided.
    """

    variant: str
    version: str
    shadow: bool
    chosen: bool = False


@dataclass(frozen=True)
class Observation:
    """What a controller sees at one moment.

    Attributes:
        now_s: Unix time.
        fronts: Latest report of every front; silent ones no longer count as live.
        pairs: All labelled pairs of the document's rollout so far.
        slot_ready: Whether a slot has the candidate of the document's rollout warm.
        agreement: Share of the compared requests that both versions answered alike; None
            without any.
        corrections: Of answers that the document's rollout had either version give.
        assigned: Requests of the document's rollout that chance alone assigned, to stable and to
            the candidate. Those of a front that nobody remembers are left out with the weights
            they were assigned under, which favours neither side.
        tallies: Labels by arm of the document's experiment.
    """

    now_s: float
    fronts: tuple[FrontReport, ...]
    pairs: Pairs
    slot_ready: bool
    agreement: float | None = None
    corrections: Corrections = Corrections()  # noqa: RUF009 - frozen
    assigned: SplitCounts = field(default_factory=dict)
    tallies: tuple[ArmTally, ...] = ()


def assign(document: ReleaseDocument, key: str, override: str | None = None) -> Assignment:
    """Say which version answers a request; the same everywhere for one document.

    A key keeps its bucket for the whole rollout, and a rising weight only adds buckets, so
    nobody is moved back. Whether a copy is made is drawn independently of the variant.

    Args:
        document: The release document.
        key: Who asks, such as the session; a random one where nobody needs to stick.
        override: The arm, regardless of the weight: ``stable`` or ``never``, ``candidate`` or
            ``always``, or the version of an arm. Ignored until that arm has capacity; other
            values are ignored too.

    Raises:
        RolloutError: If nothing is released yet.
    """
    if document.stable is None:
        raise RolloutError("no version is released yet; train and release a base version first")
    rollout = document.rollout
    wish = (override or "").strip().lower()
    if document.experiment is not None and document.experiment.began_s is not None:
        return _assigned_to_arm(document.experiment, key, wish)
    if rollout is None or (rollout.weight == 0 and rollout.shadow == 0):
        return Assignment("stable", document.stable, shadow=False)
    wants_candidate = wish in ("always", "candidate", rollout.candidate)
    chosen = wants_candidate or wish in ("never", "stable", document.stable)
    by_chance = _bucket(b"variant", rollout.salt, key) < rollout.weight * (NUM_BUCKETS // 100)
    shadow = _bucket(b"shadow", rollout.salt, key) < rollout.shadow * NUM_BUCKETS
    if wants_candidate or (by_chance and not chosen):
        return Assignment("candidate", rollout.candidate, shadow, chosen)
    return Assignment("stable", document.stable, shadow, chosen)


def _assigned_to_arm(experiment: Experiment, key: str, wish: str) -> Assignment:
    wish = "stable" if wish in ("never", experiment.versions[0]) else wish
    chosen = wish in experiment.variants
    arm = (
        experiment.variants.index(wish)
        if chosen
        else choose_arm(experiment.salt, key, experiment.weights)
    )
    return Assignment(experiment.variants[arm], experiment.versions[arm], False, chosen)


def needed_versions(document: ReleaseDocument, config: RolloutConfig) -> frozenset[str]:
    """Return the versions a front holds: stable, previous, the arms, and soon the candidate.

    The candidate is asked for one step before the fronts must answer with it.
    """
    needed = {document.stable, document.previous}
    if document.experiment is not None:
        needed |= set(document.experiment.versions)
    rollout = document.rollout
    if rollout is not None:
        next_weight, _ = _next_shares(rollout)
        in_front = max(rollout.weight, next_weight) > config.slot_max_weight
        if in_front or rollout.is_at_last_step or rollout.promotion is not None:
            needed.add(rollout.candidate)
    return frozenset(version for version in needed if version is not None)


def needs_slot(document: ReleaseDocument, config: RolloutConfig) -> bool:
    """Whether a slot answers for the candidate, in this step or in one to come.

    It takes copies and small shares; a rollout that begins with a large share needs none.
    """
    rollout = document.rollout
    if rollout is None:
        return False
    weight, shadow = rollout.weight, rollout.shadow
    shares = [(weight, shadow)]
    for step in rollout.steps[rollout.step_index + 1 :]:
        weight = weight if step.setWeight is None else step.setWeight
        shadow = shadow if step.shadow is None else step.shadow
        shares.append((weight, shadow))
    return any(w <= config.slot_max_weight and (w or s) for w, s in shares)


def advance(
    document: ReleaseDocument,
    observation: Observation,
    config: RolloutConfig,
    experiments: ExperimentConfig = ExperimentConfig(),  # noqa: B008 - frozen
) -> tuple[ReleaseDocument, tuple[Event, ...]]:
    """Carry out the waiting intents in order, then take at most one decision.

    Args:
        document: As read; its lease is the caller's business.
        observation: What is seen now, about this very document.
        config: Steps and thresholds.
        experiments: Interval and confidence of experiments.

    Returns:
        The next document, equal to the given one when nothing is to be done, and the
        changes it brings, which also lie in its outbox.
    """
    before = document
    for intent in before.intents:
        document = applied(document, intent, at_s=observation.now_s, default_steps=config.steps)
    document = asked = document.numbered_after(before)
    if document.experiment is not None:
        is_observed = before.experiment is not None and before.experiment.id == (
            document.experiment.id
        )
        document = advance_experiment(
            document,
            _live(observation, config),
            observation.tallies if is_observed else (),
            observation.assigned if is_observed else {},
            experiments,
            now_s=observation.now_s,
            who=_controller(document),
            ratio_alpha=config.sample_ratio_alpha,
        )
    elif document.rollback is not None:
        document = _with_rollback(document, observation, config)
    elif _is_same_rollout(before.rollout, document.rollout):
        document = _Decider(document, observation, config).decide()
    document = document.numbered_after(asked)
    return document, document.outbox[len(before.outbox) :]


class _Decider:
    """One look at one rollout; every method returns the next document."""

    def __init__(
        self, document: ReleaseDocument, observation: Observation, config: RolloutConfig
    ) -> None:
        assert document.rollout is not None
        self.document = document
        self.rollout: Rollout = document.rollout
        self.config = config
        self.observation = observation
        self.live = _live(observation, config)
        self.in_step = _seen_in_step(self.rollout, observation.fronts)
        self.verdict: Verdict = judge_evidence(
            observation.pairs,
            alpha=config.alpha,
            margin=config.margin,
            min_labelled_pairs=config.min_labelled_pairs,
        )
        self.by_users: CorrectionVerdict = judge_corrections(
            observation.corrections,
            alpha=config.alpha,
            limit=config.max_correction_ratio,
            least=config.min_corrections,
        )
        self.ratio: SampleRatio = sample_ratio(observation.assigned)
        self.evidence = self.verdict if config.evidence == "audit" else self.by_users
        self.who = _controller(document)
        self._look()

    def _look(self) -> None:
        """Measure what is due, of the step and of the rollout."""
        rollout, now_s = self.rollout, self.observation.now_s
        step = rollout.step
        if step is None or rollout.paused_by == "operator":
            return
        values = self._values()
        changes: dict[str, object] = {}
        if step.analysis:
            changes["in_step"] = measured(
                rollout.in_step,
                step.analysis,
                values,
                began_s=rollout.step_started_at_s,
                now_s=now_s,
            )
        if self.config.analysis:
            changes["throughout"] = measured(
                rollout.throughout,
                self.config.analysis,
                values,
                began_s=rollout.started_at_s,
                now_s=now_s,
            )
        if changes:
            self.rollout = rollout.model_copy(update=changes)
            undecided = tuple(n for n, phase, _ in self._analyses() if phase == "Inconclusive")
            self.rollout = self.rollout.model_copy(update={"undecided": undecided})
            self.document = self.document.changed(rollout=self.rollout)

    def _values(self) -> dict[Measured, float | None]:
        """What there is to measure."""
        pairs, seen = self.verdict.pairs, self.in_step
        slow, usual = self._p99_ms()
        labelled = pairs.better + pairs.same + pairs.worse > 0
        return {
            "accuracy_difference": pairs.difference if labelled else None,
            "accuracy_difference_low": self.verdict.interval.low if labelled else None,
            "agreement": self.observation.agreement,
            "correction_ratio": self.observation.corrections.ratio,
            "error_share": seen.errors / seen.requests if seen.requests else None,
            "latency_ratio": slow / usual if slow and usual else None,
            "p99_ms": slow,
        }

    def _p99_ms(self) -> tuple[float | None, float | None]:
        """Of the candidate and of stable, inside the model; None where too few were measured."""
        versions = (self.rollout.candidate, self.document.stable)
        counts = [total(self.observation.fronts, v or "").latency_counts for v in versions]
        candidate, stable = (
            latency_quantile_ms(c, 0.99) if sum(c) >= _MIN_LATENCIES else None for c in counts
        )
        return candidate, stable

    def decide(self) -> ReleaseDocument:
        # What protects users comes first and waits for nobody.
        abort_reason = self._reason_to_abort()
        if abort_reason is not None:
            return aborted(
                self.document,
                who=self.who,
                why=abort_reason,
                at_s=self.observation.now_s,
                evidence=self._numbers(),
            )
        rollout, promotion = self.rollout, self.rollout.promotion
        if promotion is not None and promotion.force:
            return self._promote_once_warm(f"promotion forced by {promotion.actor}")
        if rollout.paused_by == "operator":
            return self.document
        doubt = self._reason_to_pause()
        if doubt is not None:
            return self._hold(doubt[1], cause=doubt[0])
        waiting = self._unacknowledged()
        if waiting is None and promotion is None:
            waiting = self._unfinished_step()
        if waiting is not None:
            # Evidence pauses end by evidence only, or the phase would flicker.
            cause: PauseCause | None = "evidence" if rollout.paused_by == "evidence" else None
            return self._hold(waiting, cause=cause)
        if promotion is None and not rollout.is_at_last_step and not self._must_decide_now():
            return self._next_step()
        if self.evidence.decision != "not_inferior":
            return self._hold(self.evidence.reason, cause="evidence")
        unmeasured = self._unmeasured()
        promoting = self._promote_once_warm(self.evidence.reason)
        return promoting if unmeasured is None else self._hold(unmeasured)

    def _reason_to_abort(self) -> str | None:
        step = self.rollout.step
        if step is not None:
            seen, limit = self.in_step, self.config.max_error_share
            if seen.requests >= max(1, step.min_requests) and seen.errors > limit * seen.requests:
                stable = total(self.observation.fronts, self.document.stable or "")
                return (
                    f"errors {_per_cent(seen)} of {seen.requests} requests, above "
                    f"{100 * limit:g} % ({_per_cent(stable)} stable)"
                )
        for _, phase, why in self._analyses():
            if phase == "Failed":
                return f"analysis failed: {why}"
        return self.evidence.reason if self.evidence.decision == "inferior" else None

    def _analyses(self) -> list[tuple[Literal["step", "rollout"], Outcome, str]]:
        """The analyses under way: of the step, and of the rollout."""
        rollout, step = self.rollout, self.rollout.step
        found: list[tuple[Literal["step", "rollout"], Outcome, str]] = []
        if step is not None and step.analysis:
            found.append(("step", *outcome(rollout.in_step, step.analysis)))
        if step is not None and self.config.analysis:
            found.append(("rollout", *outcome(rollout.throughout, self.config.analysis)))
        return found

    def _reason_to_pause(self) -> tuple[PauseCause, str] | None:
        """What somebody should look at: an undecided analysis, a wrong split, a slow model."""
        for name, phase, why in self._analyses():
            if phase == "Inconclusive" and name not in self.rollout.accepted:
                return "analysis", f"analysis inconclusive: {why}; resume accepts it"
        if self.rollout.paused_by == "sample_ratio":
            return "sample_ratio", self.rollout.message  # proven once is proven
        accepted = self.rollout.sample_ratio_accepted
        if not accepted and self.ratio.is_off(self.config.sample_ratio_alpha):
            return "sample_ratio", self._ratio_told()
        if self.rollout.latency_accepted or self.rollout.step is None:
            return None
        slow, usual = self._p99_ms()
        limit = self.config.max_latency_ratio
        if slow is None or usual is None or slow <= limit * usual:
            return None
        return "latency", (
            f"p99 inside the model {slow:.1f} ms against {usual:.1f} ms stable, "
            f"above {limit:g} times; resume accepts it"
        )

    def _ratio_told(self) -> str:
        observed, expected = self.ratio.observed, self.ratio.expected
        return (
            f"requests are not split by weight: chance assigned {observed[0]} to stable and "
            f"{observed[1]} to {self.rollout.candidate}, where {expected[0]:.0f} and "
            f"{expected[1]:.0f} were due; resume accepts it"
        )

    def _unacknowledged(self) -> str | None:
        if not self.live:
            return f"no front has reported for {self.config.heartbeat_timeout_s:g} s"
        behind = [r.front_id for r in self.live if r.doc_seq < self.document.seq]
        if behind:
            return f"waiting for {_names(behind)} to follow document {self.document.seq}"
        return None

    def _unfinished_step(self) -> str | None:
        step = self.rollout.step
        if step is None:
            return None
        if step.pause is not None:
            passed_s = self.observation.now_s - self.rollout.step_started_at_s
            if passed_s < step.pause:
                return f"{passed_s:.0f} of {step.pause:g} s paused"
        if self.in_step.requests < step.min_requests:
            return f"{self.in_step.requests} of {step.min_requests} requests seen"
        if step.analysis and "step" not in self.rollout.accepted:
            phase, why = outcome(self.rollout.in_step, step.analysis)
            return why if phase == "Running" else None
        return None

    def _must_decide_now(self) -> bool:
        """Whether the evidence could come no more: with all users there is nothing to compare."""
        if self.config.evidence != "corrections" or self.evidence.decision == "not_inferior":
            return False
        return self.rollout.weight < 100 and _next_shares(self.rollout)[0] == 100

    def _unmeasured(self) -> str | None:
        """Say which metric of the whole rollout nobody has seen yet."""
        phase, why = outcome(self.rollout.throughout, self.config.analysis)
        is_seen = all(run.last for run in self.rollout.throughout)
        return why if phase == "Running" and not (self.rollout.throughout and is_seen) else None

    def _next_step(self) -> ReleaseDocument:
        rollout = self.rollout
        weight, shadow = _next_shares(rollout)
        missing = self._missing_capacity(weight, shadow)
        if missing is not None:
            return self._hold(missing)
        following = rollout.model_copy(
            update={
                "step_index": rollout.step_index + 1,
                "phase": "Progressing",
                "paused_by": None,
                "weight": weight,
                "shadow": shadow,
                "step_started_at_s": self.observation.now_s,
                "step_baseline": rollout.step_baseline
                | _counts_by_front(rollout.candidate, self.observation.fronts),
                "weights": (*rollout.weights, (self.observation.now_s, weight)),
                "in_step": (),
                "accepted": tuple(name for name in rollout.accepted if name != "step"),
                "message": "step begun",
            }
        )
        why = (
            f"step {following.step_index + 1} of {len(rollout.steps)}: weight {weight} %, "
            f"shadow {100 * shadow:g} %"
        )
        if rollout.step is not None:
            why += f"; {self.in_step.requests} requests seen in the step before"
        return self._changed(following, "stepped", why)

    def _missing_capacity(self, weight: int, shadow: float) -> str | None:
        """Say what keeps the candidate from carrying these shares."""
        candidate = self.rollout.candidate
        if weight > self.config.slot_max_weight:
            return _cold(self.live, candidate)
        if (weight or shadow) and not self.observation.slot_ready:
            return f"waiting for a slot to load {candidate}"
        return None

    def _promote_once_warm(self, why: str) -> ReleaseDocument:
        missing = self._unacknowledged() or _cold(self.live, self.rollout.candidate)
        if missing is not None:
            return self._hold(f"{missing}; then {self.rollout.candidate} is promoted")
        return promoted(
            self.document,
            who=self.who,
            why=why,
            at_s=self.observation.now_s,
            evidence=self._numbers(),
        )

    def _hold(self, message: str, *, cause: PauseCause | None = None) -> ReleaseDocument:
        rollout = self.rollout
        held = rollout.model_copy(
            update={
                "phase": "Progressing" if cause is None else "Paused",
                "paused_by": cause,
                "message": message,
            }
        )
        if cause is not None and cause != rollout.paused_by:
            return self._changed(held, "paused", message)
        if cause is None and rollout.paused_by is not None:
            return self._changed(held, "resumed", f"no longer paused by {rollout.paused_by}")
        return self.document.changed(rollout=held)

    def _changed(
        self, rollout: Rollout, what: Literal["stepped", "paused", "resumed"], why: str
    ) -> ReleaseDocument:
        return self.document.changed(rollout=rollout).with_event(
            what,
            who=self.who,
            why=why,
            at_s=self.observation.now_s,
            from_version=self.document.stable,
            to_version=rollout.candidate,
            evidence=self._numbers(),
            rollout=rollout,
        )

    def _numbers(self) -> dict[str, Any]:
        pairs, verdict = self.verdict.pairs, self.verdict
        return {
            "better": pairs.better,
            "same": pairs.same,
            "worse": pairs.worse,
            "accuracy_difference": pairs.difference,
            "accuracy_difference_low": verdict.interval.low,
            "accuracy_difference_high": verdict.interval.high,
            "log_e_not_inferior": verdict.log_e_not_inferior,
            "log_e_inferior": verdict.log_e_inferior,
            "evidence": self.config.evidence,
            "corrections": self.observation.corrections.total,
            "correction_ratio": self.observation.corrections.ratio,
            "log_e_corrections_not_inferior": self.by_users.log_e_not_inferior,
            "alpha": self.config.alpha,
            "margin": self.config.margin,
            "assigned": list(self.ratio.observed),
            "assigned_expected": list(self.ratio.expected),
            "log_e_sample_ratio": self.ratio.log_e,
            "step_requests": self.in_step.requests,
            "step_errors": self.in_step.errors,
            "live_fronts": len(self.live),
        }


def _with_rollback(
    document: ReleaseDocument, observation: Observation, config: RolloutConfig
) -> ReleaseDocument:
    """Roll back once the target is warm; without any front there is nobody to wait for."""
    assert document.previous is not None
    cold = _cold(_live(observation, config), document.previous)
    if cold is not None:
        return document.changed(message=cold)
    return rolled_back(document, at_s=observation.now_s)


def _controller(document: ReleaseDocument) -> str:
    """Who moves the document."""
    lease = document.lease
    return f"controller {lease.holder}" if lease is not None else "controller"


def _is_same_rollout(before: Rollout | None, after: Rollout | None) -> bool:
    """Whether the observation is about this rollout; one just started was not observed yet."""
    return before is not None and after is not None and before.id == after.id


def _next_shares(rollout: Rollout) -> tuple[int, float]:
    """Weight and shadow share of the next step, or of this one when it is the last."""
    if rollout.is_at_last_step:
        return rollout.weight, rollout.shadow
    step = rollout.steps[rollout.step_index + 1]
    return (
        rollout.weight if step.setWeight is None else step.setWeight,
        rollout.shadow if step.shadow is None else step.shadow,
    )


def _live(observation: Observation, config: RolloutConfig) -> tuple[FrontReport, ...]:
    since_s = observation.now_s - config.heartbeat_timeout_s
    return tuple(report for report in observation.fronts if report.at_s >= since_s)


def _cold(live: Sequence[FrontReport], version: str) -> str | None:
    cold = [report.front_id for report in live if version not in report.warm_versions]
    return f"waiting for {_names(cold)} to load {version}" if cold else None


def _counts_by_front(version: str, fronts: Sequence[FrontReport]) -> dict[str, tuple[int, int]]:
    counters = {r.front_id: r.counters.get(version, Counter()) for r in fronts}
    return {name: (c.requests, c.errors) for name, c in counters.items()}


def _seen_in_step(rollout: Rollout, fronts: Sequence[FrontReport]) -> Counter:
    """Requests and errors of the candidate since the step began."""
    requests = errors = 0
    for name, counts in _counts_by_front(rollout.candidate, fronts).items():
        requests_before, errors_before = rollout.step_baseline.get(name, (0, 0))
        requests += max(0, counts[0] - requests_before)
        errors += max(0, counts[1] - errors_before)
    return Counter(requests, errors)


def _bucket(purpose: bytes, salt: str, key: str) -> int:
    text = f"{salt}\0{key}".encode("utf-8", "surrogatepass")
    digest = hashlib.blake2b(text, digest_size=8, person=purpose).digest()
    return int.from_bytes(digest, "big") % NUM_BUCKETS


def _per_cent(counter: Counter) -> str:
    return f"{100 * counter.errors / counter.requests:.1f} %" if counter.requests else "none"


def _names(front_ids: Sequence[str]) -> str:
    shown = ", ".join(sorted(front_ids)[:3])
    more = f" and {len(front_ids) - 3} more" if len(front_ids) > 3 else ""
    return f"front{'s' if len(front_ids) > 1 else ''} {shown}{more}"

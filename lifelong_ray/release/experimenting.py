"""What wishes, time and observations do to the experiment in the release document.

Pure, like `transitions` and `rollout`, beside which it stands: an experiment and a rollout never
run at the same time, and no experiment changes which version is stable.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from lifelong_ray.config import ExperimentConfig
from lifelong_ray.release.document import Intent, ReleaseDocument, What
from lifelong_ray.release.experiment import (
    Arm,
    ArmTally,
    Experiment,
    experiment_result,
    requests_by_arm,
    thompson_weights,
)
from lifelong_ray.release.fronts import FrontReport
from lifelong_ray.release.sample_ratio import SplitCounts, sample_ratio


def objection_to_experiment(document: ReleaseDocument, intent: Intent) -> str | None:
    """Say why an experiment may not be started or ended; None when it may."""
    running = document.running_experiment
    if intent.verb == "end_experiment":
        return None if running else "no experiment is under way, so there is nothing to end"
    plan = intent.experiment
    assert plan is not None
    versions = [arm.version for arm in plan.arms]
    if document.stable is None:
        return "no version is stable yet; release a base version first"
    if running:
        return f"the experiment {running.id} is under way; end it first"
    if document.experiment is not None:
        # A second one in its place would leave the first without its result.
        return f"the experiment {document.experiment.id} is being summed up; ask again in a second"
    if document.rollout is not None:
        return (
            f"the rollout of {document.rollout.candidate} is in progress; promote or abort it "
            "before an experiment"
        )
    if document.rollback is not None:
        return f"a rollback to {document.previous} is under way; wait for it or abort it"
    if document.stable not in versions:
        return (
            f"the arms {', '.join(versions)} lack {document.stable}, which is stable and what the "
            "others are compared with; give it a weight"
        )
    return None


def started_experiment(document: ReleaseDocument, intent: Intent, at_s: float) -> ReleaseDocument:
    """Return the document with a new experiment, whose arms are loaded first."""
    plan = intent.experiment
    assert plan is not None
    experiment_id = f"experiment-{intent.id}"
    experiment = Experiment(
        id=experiment_id,
        arms=tuple(sorted(plan.arms, key=lambda arm: arm.version != document.stable)),
        salt=experiment_id,
        metric=plan.metric,
        adaptive=plan.adaptive,
        started_by=intent.actor,
        reason=intent.reason,
        started_at_s=at_s,
        end_s=plan.end_s,
        kept_at_s=at_s,
        message="the arms are being loaded",
    )
    why = f"experiment asked: {intent.reason}" if intent.reason else "experiment asked"
    return _with(
        document, experiment, "experiment_started", intent.actor, why, at_s, intent_id=intent.id
    )


def ending(document: ReleaseDocument, intent: Intent, why: str) -> ReleaseDocument:
    """Return the document whose experiment ends at the controller's next look, which sums it up."""
    experiment = document.experiment
    assert experiment is not None
    asked = experiment.model_copy(
        update={"ended_by": intent.actor, "ended_why": why, "ended_intent_id": intent.id}
    )
    return document.changed(experiment=asked)


def advance_experiment(
    document: ReleaseDocument,
    live: Sequence[FrontReport],
    tallies: Sequence[ArmTally],
    assigned: SplitCounts,
    config: ExperimentConfig,
    *,
    now_s: float,
    who: str,
    ratio_alpha: float,
) -> ReleaseDocument:
    """End, begin, keep or reweigh the experiment, whichever comes first.

    Args:
        document: With an experiment.
        live: Latest reports of the fronts that still count.
        tallies: Labels by arm of this very experiment; empty if it was not observed yet.
        assigned: Its requests that chance assigned.
        config: Interval and confidence.
        now_s: Unix time.
        who: The controller's name.
        ratio_alpha: Of the check that requests are split by weight.
    """
    experiment = document.experiment
    assert experiment is not None
    if not experiment.ended_by and now_s >= experiment.end_s:
        update = {"ended_by": who, "ended_why": "its planned end has come"}
        experiment = experiment.model_copy(update=update)
    is_over = bool(experiment.ended_by)
    if experiment.began_s is None and not is_over:
        return _begun(document, experiment, live, now_s, who)
    if not is_over and now_s < experiment.kept_at_s + config.interval_s:
        return document
    tallies = tallies or (ArmTally(),) * len(experiment.arms)
    kept = {r.front_id: r.requests_by_arm.get(experiment.id) for r in live}
    known = {front: by_arm for front, by_arm in kept.items() if by_arm}
    experiment = experiment.model_copy(
        update={"requests": experiment.requests | known, "kept_at_s": now_s}
    )
    result = experiment_result(
        experiment,
        tallies,
        sample_ratio(assigned),
        at_s=now_s,
        alpha=config.alpha,
        ratio_alpha=ratio_alpha,
    )
    experiment = experiment.model_copy(update={"result": result})
    if is_over:
        ended = experiment.model_copy(update={"ended_at_s": now_s, "message": ""})
        ended_by, why = experiment.ended_by, f"experiment ended: {experiment.ended_why}"
        intent_id = experiment.ended_intent_id
        after = _with(
            document, ended, "experiment_ended", ended_by, why, now_s, intent_id=intent_id
        )
        return after.changed(experiment=None)
    if experiment.adaptive:
        return _reweighed(document, experiment, tallies, now_s, who)
    return document.changed(experiment=experiment)


def _begun(
    document: ReleaseDocument,
    experiment: Experiment,
    live: Sequence[FrontReport],
    now_s: float,
    who: str,
) -> ReleaseDocument:
    """Let the weights take effect once every live front can answer for every arm."""
    cold = sorted(
        report.front_id for report in live if set(experiment.versions) - set(report.warm_versions)
    )
    if not live or cold:
        message = f"waiting for {len(cold)} of {len(live)} fronts to load the arms"
        message = message if live else "waiting for a front"
        return document.changed(experiment=experiment.model_copy(update={"message": message}))
    begun = experiment.model_copy(update={"began_s": now_s, "kept_at_s": now_s, "message": ""})
    why = f"every front holds every arm; weights {_told(experiment)}"
    return _with(document, begun, "experiment_began", who, why, now_s)


def _reweighed(
    document: ReleaseDocument,
    experiment: Experiment,
    tallies: Sequence[ArmTally],
    now_s: float,
    who: str,
) -> ReleaseDocument:
    """Draw new weights from what was seen; the same draws wherever the same was seen."""
    if experiment.metric == "accuracy":
        right = [tally.correct for tally in tallies]
        wrong = [tally.labelled - tally.correct for tally in tallies]
    else:
        wrong = [tally.corrected for tally in tallies]
        counts = zip(requests_by_arm(experiment), wrong, strict=True)
        right = [max(0, number - corrected) for number, corrected in counts]
    if not any(right) and not any(wrong):
        return document.changed(experiment=experiment)  # nothing to go by
    seed = hashlib.blake2b(f"{experiment.salt} {right} {wrong}".encode(), digest_size=8)
    rng = np.random.default_rng(int.from_bytes(seed.digest(), "big"))
    weights = thompson_weights(right, wrong, rng)
    if weights == experiment.weights:
        return document.changed(experiment=experiment)
    arms = tuple(
        Arm(version=version, weight=weight)
        for version, weight in zip(experiment.versions, weights, strict=True)
    )
    moved = experiment.model_copy(update={"arms": arms})
    why = f"weights follow {experiment.metric}: {_told(moved)}"
    return _with(document, moved, "experiment_reweighed", who, why, now_s)


def _with(
    document: ReleaseDocument,
    experiment: Experiment,
    what: What,
    who: str,
    why: str,
    at_s: float,
    *,
    intent_id: str = "",
) -> ReleaseDocument:
    return document.changed(experiment=experiment).with_event(
        what,
        who=who,
        why=why,
        at_s=at_s,
        from_version=document.stable,
        to_version=document.stable,
        intent_id=intent_id,
        evidence=experiment.result.model_dump(mode="json") if experiment.result else None,
        experiment=experiment,
    )


def _told(experiment: Experiment) -> str:
    return ", ".join(f"{arm.version} {arm.weight} %" for arm in experiment.arms)

"""What each wish and each decision does to the release document.

Pure: a document goes in, the next one with its audit events comes out. Whether a change is
wise is decided in `rollout`; here is only whether the document allows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lifelong_ray.config import StepConfig
from lifelong_ray.release.document import Intent, ReleaseDocument, Rollout
from lifelong_ray.release.experimenting import (
    ending,
    objection_to_experiment,
    started_experiment,
)


def objection(document: ReleaseDocument, intent: Intent) -> str | None:
    """Say why the document does not allow what is asked; None when it does.

    >>> objection(ReleaseDocument(stable="v1"), Intent(verb="rollback", actor="ann", at_s=0))
    'there is no version before v1 to roll back to; release another version instead'
    """
    if intent.verb in ("start_experiment", "end_experiment"):
        return objection_to_experiment(document, intent)
    if intent.verb == "start":
        return _objection_to_start(document, intent)
    if intent.verb == "rollback":
        return _objection_to_rollback(document)
    if intent.verb == "abort" and document.rollback is not None:
        return None
    if document.rollout is None:
        return f"no rollout is in progress, so there is nothing to {intent.verb}"
    return _objection_to_steering(document.rollout, intent)


def applied(
    document: ReleaseDocument,
    intent: Intent,
    *,
    at_s: float,
    default_steps: Sequence[StepConfig],
) -> ReleaseDocument:
    """Return the document after a wish, which counts as handled, allowed or not.

    Args:
        document: Before.
        intent: The wish.
        at_s: Unix time.
        default_steps: Steps of a rollout whose intent names none.
    """
    refusal = objection(document, intent)
    document = document.without_intent(intent)
    rollout = document.rollout
    if refusal is not None:
        return document.with_event(
            "refused",
            who=intent.actor,
            why=f"{intent.verb} refused: {refusal}",
            at_s=at_s,
            from_version=document.stable,
            to_version=document.stable,
            intent_id=intent.id,
            rollout=rollout,
        )
    if intent.verb == "start_experiment":
        return started_experiment(document, intent, at_s)
    if intent.verb == "end_experiment":
        return ending(document, intent, intent.reason or "asked")
    if intent.verb == "start":
        return _started(document, intent, at_s, default_steps)
    if intent.verb == "rollback":
        if rollout is not None:
            document = aborted(
                document,
                who=intent.actor,
                why=_because(f"rollback to {document.previous} asked", intent),
                at_s=at_s,
                intent_id=intent.id,
            )
        if document.running_experiment is not None:
            document = ending(document, intent, f"rollback to {document.previous} asked")
        return _noted(
            document.changed(rollback=intent, message="asked, not yet looked at"), intent, at_s
        )
    if intent.verb == "abort":
        if document.rollback is not None:
            document = document.changed(rollback=None, message="").with_event(
                "rollback_cancelled",
                who=intent.actor,
                why=_because("rollback cancelled", intent),
                at_s=at_s,
                from_version=document.stable,
                to_version=document.stable,
                intent_id=intent.id,
            )
        if document.rollout is None:
            return document
        return aborted(
            document,
            who=intent.actor,
            why=_because("abort asked", intent),
            at_s=at_s,
            intent_id=intent.id,
        )
    assert rollout is not None
    return _noted(document.changed(rollout=_steered(rollout, intent)), intent, at_s)


def aborted(
    document: ReleaseDocument,
    *,
    who: str,
    why: str,
    at_s: float,
    intent_id: str = "",
    evidence: dict[str, Any] | None = None,
) -> ReleaseDocument:
    """Return the document without its candidate; users stay with, or return to, stable."""
    rollout = document.rollout
    assert rollout is not None
    ended = rollout.model_copy(
        update={"phase": "Degraded", "paused_by": None, "weight": 0, "shadow": 0.0, "message": why}
    )
    return document.changed(rollout=None).with_event(
        "aborted",
        who=who,
        why=why,
        at_s=at_s,
        from_version=rollout.candidate,
        to_version=document.stable,
        intent_id=intent_id,
        evidence=evidence,
        rollout=ended,
    )


def promoted(
    document: ReleaseDocument,
    *,
    who: str,
    why: str,
    at_s: float,
    evidence: dict[str, Any] | None = None,
) -> ReleaseDocument:
    """Return the document with the candidate as its stable version."""
    rollout = document.rollout
    assert rollout is not None
    ended = rollout.model_copy(
        update={"phase": "Healthy", "paused_by": None, "weight": 100, "message": why}
    )
    return document.changed(
        stable=rollout.candidate, previous=document.stable, rollout=None
    ).with_event(
        "promoted",
        who=who,
        why=why,
        at_s=at_s,
        from_version=document.stable,
        to_version=rollout.candidate,
        intent_id=rollout.promotion.id if rollout.promotion is not None else "",
        evidence=evidence,
        rollout=ended,
    )


def rolled_back(document: ReleaseDocument, *, at_s: float) -> ReleaseDocument:
    """Return the document with stable and previous exchanged, as its rollback asks."""
    intent = document.rollback
    assert intent is not None
    assert document.previous is not None
    return document.changed(
        stable=document.previous, previous=document.stable, rollback=None, message=""
    ).with_event(
        "rolled_back",
        who=intent.actor,
        why=_because("rollback asked", intent),
        at_s=at_s,
        from_version=document.stable,
        to_version=document.previous,
        intent_id=intent.id,
    )


def _objection_to_start(document: ReleaseDocument, intent: Intent) -> str | None:
    if document.stable is None:
        return (
            f"{intent.candidate} cannot be rolled out because no version is stable yet; "
            "release a base version first"
        )
    if document.rollout is not None:
        return (
            f"the rollout of {document.rollout.candidate} is in progress; "
            f"promote or abort it before {intent.candidate}"
        )
    experiment = document.running_experiment
    if experiment is not None:
        return f"the experiment {experiment.id} is under way; end it before {intent.candidate}"
    if document.rollback is not None:
        return f"a rollback to {document.previous} is under way; wait for it or abort it"
    if intent.candidate == document.stable:
        return f"{intent.candidate} is stable already"
    return None


def _objection_to_rollback(document: ReleaseDocument) -> str | None:
    if document.rollback is not None:
        return f"a rollback to {document.previous} is already under way: {document.message}"
    if document.previous is None:
        return (
            f"there is no version before {document.stable} to roll back to; "
            "release another version instead"
        )
    return None


def _objection_to_steering(rollout: Rollout, intent: Intent) -> str | None:
    asked = rollout.promotion
    if intent.verb == "promote" and asked is not None and (asked.force or not intent.force):
        return f"{asked.actor} already asked to promote {rollout.candidate}: {rollout.message}"
    if intent.verb == "pause" and rollout.paused_by == "operator":
        return f"the rollout of {rollout.candidate} is already {rollout.message}"
    if intent.verb == "resume" and rollout.paused_by in (None, "evidence"):
        return (
            f"the rollout of {rollout.candidate} was not paused by anyone; it waits by itself: "
            f"{rollout.message or 'for its next step'}"
        )
    return None


def _started(
    document: ReleaseDocument, intent: Intent, at_s: float, default_steps: Sequence[StepConfig]
) -> ReleaseDocument:
    assert intent.candidate is not None
    rollout_id = f"{intent.candidate}-{intent.id}"
    rollout = Rollout(
        id=rollout_id,
        candidate=intent.candidate,
        steps=intent.steps or tuple(default_steps),
        # A salt of its own: the first to meet a candidate are others each time.
        salt=rollout_id,
        forced=intent.force,
        started_at_s=at_s,
        step_started_at_s=at_s,
        message=f"{intent.candidate} is being loaded",
    )
    return document.changed(rollout=rollout).with_event(
        "started",
        who=intent.actor,
        why=_because("rollout asked" + (" without a passed gate" * intent.force), intent),
        at_s=at_s,
        from_version=document.stable,
        to_version=intent.candidate,
        intent_id=intent.id,
        rollout=rollout,
    )


def _steered(rollout: Rollout, intent: Intent) -> Rollout:
    """The rollout after pause, resume or promote."""
    changes: dict[str, object] = {}
    if intent.verb == "pause":
        message = _because(f"paused by {intent.actor}", intent)
        changes = {
            "phase": "Paused",
            "paused_by": "operator",
            "promotion": None,
            "message": message,
        }
    else:
        changes = {"phase": "Progressing", "paused_by": None}
        if intent.verb == "promote":
            changes |= {"promotion": intent, "message": f"promotion asked by {intent.actor}"}
        else:
            changes["message"] = f"resumed by {intent.actor}"
            if rollout.paused_by == "analysis":
                changes["accepted"] = tuple(sorted({*rollout.accepted, *rollout.undecided}))
            elif rollout.paused_by in ("latency", "sample_ratio"):
                changes[f"{rollout.paused_by}_accepted"] = True
    return rollout.model_copy(update=changes)


def _noted(document: ReleaseDocument, intent: Intent, at_s: float) -> ReleaseDocument:
    """The document with an event for a wish that moves no pointer yet."""
    rollout = document.rollout
    what, to_version = {
        "pause": ("paused", rollout.candidate if rollout else None),
        "resume": ("resumed", rollout.candidate if rollout else None),
        "promote": ("promotion_asked", rollout.candidate if rollout else None),
        "rollback": ("rollback_asked", document.previous),
    }[intent.verb]
    forced = " without evidence" if intent.verb == "promote" and intent.force else ""
    return document.with_event(
        what,  # type: ignore[arg-type]  # a str of the table above
        who=intent.actor,
        why=_because(f"{intent.verb} asked{forced}", intent),
        at_s=at_s,
        from_version=document.stable,
        to_version=to_version,
        intent_id=intent.id,
        rollout=rollout,
    )


def _because(what: str, intent: Intent) -> str:
    return f"{what}: {intent.reason}" if intent.reason else what

"""Wishes for the release, as the bodies of operators' requests describe them.

Knows the wire format. Whether a wish can be fulfilled is the release document's business.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError

from lifelong_ray.config import StepConfig, check_steps
from lifelong_ray.feedback import uuid7
from lifelong_ray.on_ray.http import RequestError
from lifelong_ray.release import ExperimentPlan, Intent

_STEPS = TypeAdapter(tuple[StepConfig, ...])


def rollout_intent(body: Mapping[str, Any], reason: str, at_s: float) -> Intent:
    """The wish for a rollout that a body describes.

    Args:
        body: ``candidate``, and perhaps ``steps`` and ``force``; the reason is known.
        reason: The operator's.
        at_s: Unix time.

    Raises:
        RequestError: If it describes none.
    """
    unknown = set(body) - {"candidate", "steps", "force", "reason"}
    if unknown or not isinstance(body.get("candidate"), str):
        raise RequestError(
            422,
            "bad_request",
            f"a rollout takes candidate, steps, force and reason; got {sorted(body)}",
        )
    try:
        steps = _STEPS.validate_python(body.get("steps") or ())
        check_steps(steps)
    except ValueError as error:
        raise RequestError(422, "bad_steps", str(error)) from None
    return Intent(
        id=str(uuid7(at_s)),
        verb="start",
        actor="operator",
        reason=reason,
        at_s=at_s,
        candidate=body["candidate"],
        steps=steps,
        force=_force(body),
    )


def experiment_intent(body: Mapping[str, Any], reason: str, at_s: float) -> Intent:
    """The wish for an experiment that a body describes.

    Args:
        body: ``arms``, ``end_s``, and perhaps ``metric`` and ``adaptive``; the reason is known.
        reason: The operator's.
        at_s: Unix time.

    Raises:
        RequestError: If it describes none.
    """
    plan = {name: value for name, value in body.items() if name != "reason"}
    try:
        return Intent(
            id=str(uuid7(at_s)),
            verb="start_experiment",
            actor="operator",
            reason=reason,
            at_s=at_s,
            experiment=ExperimentPlan.model_validate(plan),
        )
    except ValidationError as error:
        told = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise RequestError(422, "bad_experiment", told) from None


def steering_intent(verb: str, body: Mapping[str, Any], reason: str, at_s: float) -> Intent:
    """The wish about a rollout that a body describes: ``{"reason"?, "force"?}``.

    Args:
        verb: Promote, abort, pause, resume or rollback.
        body: Only a promotion may have ``force``: it then needs no evidence.
        reason: The operator's.
        at_s: Unix time.

    Raises:
        RequestError: If it describes none.
    """
    force = _force(body)
    if set(body) - {"reason", "force"} or (force and verb != "promote"):
        raise RequestError(422, "bad_request", f"{verb} takes a reason, and only promote a force")
    return Intent(
        id=str(uuid7(at_s)), verb=verb, actor="operator", reason=reason, at_s=at_s, force=force
    )


def ending_intent(body: Mapping[str, Any], reason: str, at_s: float) -> Intent:
    """The wish to end the experiment: ``{"reason"?}``.

    Raises:
        RequestError: If the body holds anything else.
    """
    if set(body) - {"reason"}:
        raise RequestError(422, "bad_request", f"an end takes a reason; got {sorted(body)}")
    return Intent(
        id=str(uuid7(at_s)), verb="end_experiment", actor="operator", reason=reason, at_s=at_s
    )


def _force(body: Mapping[str, Any]) -> bool:
    force = body.get("force", False)
    if not isinstance(force, bool):  # "false" is true to Python
        raise RequestError(422, "bad_request", f"force is {force!r:.40}, not true or false")
    return force

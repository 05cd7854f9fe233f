"""Wishes for the release, as the bodies of operators' requests describe them.

Knows the wire format. Whether a wish can be fulfilled is the release document's business.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from lifelong_ray.feedback import uuid7
from lifelong_ray.on_ray.http import RequestError
from lifelong_ray.release import ExperimentPlan, Intent


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
    force = body.get("force", False)
    if not isinstance(force, bool):  # "false" is true to Python
        raise RequestError(422, "bad_request", f"force is {force!r:.40}, not true or false")
    if set(body) - {"reason", "force"} or (force and verb != "promote"):
        raise RequestError(422, "bad_request", f"{verb} takes a reason, and only promote a force")
    return Intent(
        id=str(uuid7(at_s)), verb=verb, actor="operator", reason=reason, at_s=at_s, force=force
    )

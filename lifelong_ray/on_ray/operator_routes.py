"""The operators' routes: what the release does, what they wish of it, and how the data fares.

Knows who an operator is. What a wish may be is in `wishes`; fulfilling it is the
controller's business, which reads it from the release document.
"""

from __future__ import annotations

import hmac
import time
from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Depends, Header, Query, Request

from lifelong_ray.feedback import LogTail, detect_drift
from lifelong_ray.on_ray.comparisons import compared
from lifelong_ray.on_ray.front import clean_reason
from lifelong_ray.on_ray.http import RequestError, read_json
from lifelong_ray.on_ray.replica import Replica, ThisReplica
from lifelong_ray.on_ray.schedule import submit_update
from lifelong_ray.on_ray.wishes import (
    ending_intent,
    experiment_intent,
    rollout_intent,
    steering_intent,
)
from lifelong_ray.release import Intent
from lifelong_ray.types import NotFoundError

router = APIRouter(tags=["operators"])

_DAY_S = 86_400


def require_operator(authorization: str | None, admin_token: str) -> None:
    """Refuse who does not send the operators' token.

    Raises:
        RequestError: If the header ``Authorization`` is missing or another.
    """
    expected = f"Bearer {admin_token}"
    if not hmac.compare_digest((authorization or "").encode(), expected.encode()):
        raise RequestError(
            401,
            "unauthorized",
            "operators send 'Authorization: Bearer <token>'; lifelong status --token prints it",
        )


async def _for_operators(
    replica: ThisReplica, authorization: Annotated[str | None, Header()] = None
) -> Replica:
    require_operator(authorization, replica.secrets.admin_token)
    return replica


OperatedReplica = Annotated[Replica, Depends(_for_operators)]


@router.get("/admin/status")
async def admin_status(replica: OperatedReplica) -> dict[str, Any]:
    """The document, this front, and what the controller has seen."""
    return {
        "document": replica.front.document.model_dump(mode="json"),
        "front": replica.front.status(),
        "controller": await replica.controller.status.remote(),
    }


@router.get("/admin/versions")
async def admin_versions(replica: OperatedReplica) -> dict[str, Any]:
    """Every registered version with its lineage and gate."""
    registry = replica.front.registry

    def manifests() -> list[dict[str, Any]]:
        return [registry.manifest(v).model_dump(mode="json") for v in registry.versions()]

    return {"versions": await replica.front.in_thread(manifests)}


@router.get("/admin/rollout")
async def admin_rollout(replica: OperatedReplica) -> dict[str, Any]:
    """The rollout under way, if any."""
    document, _ = await replica.front.in_thread(replica.front.desk.read)
    return {
        "stable": document.stable,
        "previous": document.previous,
        "rollout": document.rollout.model_dump(mode="json") if document.rollout else None,
    }


@router.put("/admin/rollout", status_code=202)
async def admin_start(replica: OperatedReplica, request: Request) -> dict[str, Any]:
    """Start a rollout: ``{"candidate", "steps"?, "force"?, "reason"?}``."""
    body = await read_json(request)
    return await _wish(replica, rollout_intent(body, _reason(body), time.time()))


@router.post("/admin/rollout/{verb}", status_code=202)
async def admin_verb(replica: OperatedReplica, verb: str, request: Request) -> dict[str, Any]:
    """Promote, abort, pause, resume or rollback: ``{"reason"?, "force"?}``.

    Only a promotion can be forced: it then needs no evidence.
    """
    verbs = ("promote", "abort", "pause", "resume", "rollback")
    if verb not in verbs:
        raise RequestError(404, "unknown_verb", f"{verb} is not one of {', '.join(verbs)}")
    body = await read_json(request)
    return await _wish(replica, steering_intent(verb, body, _reason(body), time.time()))


@router.get("/admin/experiment")
async def admin_experiment(
    replica: OperatedReplica,
    id: Annotated[str | None, Query(min_length=1, max_length=200)] = None,
) -> dict[str, Any]:
    """The experiment under way with its result so far, if any; or an ended one by its `id`."""
    front = replica.front
    document, _ = await front.in_thread(front.desk.read)
    experiment = document.experiment
    if id is not None and (experiment is None or experiment.id != id):
        try:
            experiment = await front.in_thread(front.desk.experiment, id)
        except NotFoundError as error:
            raise RequestError(404, "unknown_experiment", str(error)) from None
    shown = experiment.model_dump(mode="json") if experiment is not None else None
    return {"experiment": shown}


@router.put("/admin/experiment", status_code=202)
async def admin_start_experiment(replica: OperatedReplica, request: Request) -> dict[str, Any]:
    """Start an experiment: ``{"arms", "end_s", "metric"?, "adaptive"?, "reason"?}``.

    Arms are ``{"version", "weight"}``, stable among them, with weights that add up to 100.
    """
    body = await read_json(request)
    return await _wish(replica, experiment_intent(body, _reason(body), time.time()))


@router.post("/admin/experiment/end", status_code=202)
async def admin_end_experiment(replica: OperatedReplica, request: Request) -> dict[str, Any]:
    """End the experiment and store its result; stable stays: ``{"reason"?}``."""
    body = await read_json(request)
    return await _wish(replica, ending_intent(body, _reason(body), time.time()))


@router.get("/admin/comparisons")
async def admin_comparisons(
    replica: OperatedReplica,
    rollout: Annotated[str | None, Query(min_length=1, max_length=200)] = None,
    hours: Annotated[float, Query(gt=0, le=744)] = 1.0,
    last: Annotated[int, Query(ge=0, le=10_000)] = 100,
) -> dict[str, Any]:
    """Pairs of answers: a summary per rollout, and the `last` of them.

    Those of one `rollout` from its start, or of all in the last `hours`.
    """

    def found() -> dict[str, Any]:
        return compared(replica.store, time.time, rollout_id=rollout, hours=hours, last=last)

    try:
        return await replica.front.in_thread(found)
    except NotFoundError as error:
        raise RequestError(404, "unknown_rollout", str(error)) from None


@router.get("/admin/drift")
async def admin_drift(replica: OperatedReplica) -> dict[str, Any]:
    """Whether the latest traffic scores differ from the stable version's hold-out scores."""
    return await replica.front.in_thread(_drift, replica)


@router.post("/admin/retrain", status_code=202)
async def admin_retrain(replica: OperatedReplica) -> dict[str, Any]:
    """Submit an update as a Ray job."""
    run_id = await replica.front.in_thread(submit_update, replica.config)
    return {"status": "submitted", "run_id": run_id}


async def _wish(replica: Replica, intent: Intent) -> dict[str, Any]:
    await replica.front.in_thread(replica.front.desk.request, intent)
    return {"status": "accepted", "intent_id": intent.id}


def _reason(body: Mapping[str, Any]) -> str:
    try:
        return clean_reason(body.get("reason", ""))
    except ValueError as error:
        raise RequestError(422, "bad_request", str(error)) from None


def _drift(replica: Replica) -> dict[str, Any]:
    stable, rules = replica.front.document.stable, replica.config.drift
    if stable is None:
        raise RequestError(503, "no_version", "no version is released yet")
    reference = replica.front.registry.manifest(stable).metrics.get("holdout_scores")
    rows = LogTail(replica.store, "predictions", time.time() - _DAY_S).poll()
    of_stable = sorted((row for row in rows if row.version == stable), key=lambda row: row.at_s)
    recent = [row.scores for row in of_stable][-rules.window_rows :]
    if not reference or len(recent) < rules.window_rows:
        return {"judged": False, "num_recent": len(recent)}
    report = detect_drift(np.asarray(reference), np.asarray(recent), rules)
    return {"judged": True, **report.__dict__}

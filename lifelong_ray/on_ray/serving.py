"""The Serve application: fronts that take HTTP, slots that hold a candidate.

Knows routes, wire formats and Ray Serve. What is answered is decided in `front`,
what is released in `rollout`. A version change is never a redeploy: fronts and
slots follow the release document.

Without postponed annotations: Serve pickles the ingress class by value, after which
FastAPI could not resolve names in them any more. It does so where the class is
decorated, so that whatever the class uses stands above it.
"""

import asyncio
import hmac
import logging
import math
import os
import random
import socket
import time
from typing import Annotated, Any

import numpy as np
from fastapi import FastAPI, Header, Query, Request
from fastapi.responses import JSONResponse, Response
from pydantic import TypeAdapter
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.types import Receive, Scope, Send

import lifelong_ray
from lifelong_ray.config import (
    AutoscalingConfig,
    Config,
    Precision,
    StepConfig,
    check_steps,
    config_from,
)
from lifelong_ray.feedback import (
    CleanImage,
    LogTail,
    SentImage,
    detect_drift,
    load_secrets,
    uuid7,
)
from lifelong_ray.on_ray import metrics
from lifelong_ray.on_ray.comparisons import compared
from lifelong_ray.on_ray.front import (
    Front,
    NoVersionError,
    Served,
    clean_label,
    clean_reason,
    each,
    top_k,
)
from lifelong_ray.on_ray.http import (
    ASKER_PARAMETERS,
    Asker,
    RequestError,
    Upload,
    answer_to_error,
    asker_of,
    describe_error,
    install_error_handlers,
    json_response,
    read_body,
    read_json,
    read_uploads,
    within,
)
from lifelong_ray.on_ray.model_process import ModelProcess
from lifelong_ray.on_ray.models import ModelHost, Models, VersionAnswer
from lifelong_ray.on_ray.open_inference import (
    CLASS,
    EXTENSIONS,
    HEADER_LENGTH,
    INPUT,
    PROBABILITIES,
    InferAnswer,
    decompressed,
    read_request,
    write_answer,
)
from lifelong_ray.on_ray.rollout import RolloutController
from lifelong_ray.on_ray.scaling import autoscaling
from lifelong_ray.on_ray.schedule import submit_update
from lifelong_ray.on_ray.warm import WarmVersion, WarmVersions
from lifelong_ray.on_ray.wishes import experiment_intent, steering_intent
from lifelong_ray.release import FrontReport, Intent, Registry, ReleaseDesk, needs_slot
from lifelong_ray.storage import Store, open_store
from lifelong_ray.types import BadImageError, NotFoundError, ServingError

logger = logging.getLogger(__name__)

APP_NAME = "lifelong_ray"
_WATCHED_S = 10.0  # A slot is watched for this long after it was asked.
_STEPS = TypeAdapter(tuple[StepConfig, ...])


class _Http(FastAPI):
    """Answers ``POST /predict`` ahead of FastAPI's layers, which take longer than a small model.

    FastAPI's own route stays, for OpenAPI and for what is served below a prefix of its own.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_prediction = scope["type"] == "http" and scope["path"] == "/predict"
        if not is_prediction or scope["method"] != "POST":
            await super().__call__(scope, receive, send)
            return
        front: FrontDeployment = serve.get_replica_context().servable_object  # type: ignore[assignment]
        request = Request(scope, receive)
        try:
            response = await front.predict(request)
        except Exception as error:  # noqa: BLE001 - is told to who asked
            response = answer_to_error(request, error)
        await response(scope, receive, send)


http = _Http(
    title="lifelong_ray",
    version=lifelong_ray.__version__,
    description="A classifier that keeps learning while it serves.",
)
install_error_handlers(http)


def model_host(config: Config, store: Store, precision: Precision) -> ModelHost:
    """Return where a replica's models live."""
    if config.serving.model_process:
        return ModelProcess(config, precision)
    return Models(Registry(store), config.serving, precision)


@serve.deployment(name="slot")
class Slot:
    """Holds the candidate of the rollout, isolated from the fronts."""

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits it
        self, config_tree: dict[str, Any], controller: DeploymentHandle[Any]
    ) -> None:
        """Load what the release document names, so that nobody asks before, and follow it."""
        self._config = config_from(config_tree)
        store = open_store(self._config.store)
        self._desk = ReleaseDesk(store, time.time)
        host = model_host(self._config, store, self._config.serving.slot.precision)
        self._warm = WarmVersions(host, self._config.serving, now_s=time.time)
        self._controller = controller
        self._slot_id = str(uuid7(time.time()))
        await self._follow_once()
        await self._warm.settled()
        self._follower = asyncio.create_task(self._follow())

    async def ask(self, version: str, image: CleanImage) -> VersionAnswer:
        """Answer with `version`, which must be warm."""
        return await self._warm.get(version).answer(SentImage.of(image))

    async def ping(self) -> None:
        """Give a sign of life, whatever the models do."""

    async def _follow_once(self) -> None:
        document, _ = await asyncio.to_thread(self._desk.read)
        wanted = document.rollout if needs_slot(document, self._config.rollout) else None
        self._warm.hold({wanted.candidate} if wanted is not None else set())
        self._controller.report_slot.remote(
            self._slot_id,
            time.time(),
            self._warm.names,
            dict(self._warm.failures),
            self._warm.precisions,
        )

    async def _follow(self) -> None:
        while True:
            try:
                await self._follow_once()
            except Exception as error:  # noqa: BLE001 - a slot that stops following is lost
                logger.warning("the release document could not be followed: %r", error)
            await asyncio.sleep(self._config.serving.poll_interval_s)


class _SlotClient:
    """Reaches the slot deployment through its Serve handle, and knows whether it is there."""

    def __init__(self, handle: DeploymentHandle[Any], ping_interval_s: float) -> None:
        self._handle = handle
        self._ping_interval_s = ping_interval_s
        self._asked_s = self._seen_s = -math.inf
        self._watching: asyncio.Task[None] | None = None

    async def ask(self, version: str, image: CleanImage) -> VersionAnswer:
        self._asked_s = time.monotonic()
        if self._watching is None or self._watching.done():
            self._watching = asyncio.create_task(self._watch())
        answer: VersionAnswer = await self._handle.ask.remote(version, image)
        return answer

    def was_there(self, within_s: float) -> bool:
        return time.monotonic() - self._seen_s < within_s

    async def _watch(self) -> None:
        """Ask for signs of life while the slot is asked for answers; else it could never sleep."""
        while time.monotonic() - self._asked_s < _WATCHED_S:
            try:
                await self._handle.ping.remote()
                self._seen_s = time.monotonic()
            except Exception as error:  # noqa: BLE001 - a slot that died; another one is started
                logger.warning("the slot gave no sign of life: %r", error)
            await asyncio.sleep(self._ping_interval_s)


class _ControllerClient:
    """Sends heartbeats to the controller without waiting for an answer."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle = handle

    def report(self, report: FrontReport) -> None:
        self._handle.report_front.remote(report)


@serve.deployment(name="front")
@serve.ingress(http)
class FrontDeployment:
    """Takes HTTP; answers with the stable version, which each replica holds itself."""

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits it
        self,
        config_tree: dict[str, Any],
        slot: DeploymentHandle[Any],
        controller: DeploymentHandle[Any],
    ) -> None:
        """Load and warm up what the release document names before taking traffic."""
        self._config = config_from(config_tree)
        self._store = open_store(self._config.store)
        self._secrets = load_secrets(self._store, os.environ)
        self._controller = controller
        self._metrics = metrics.FrontMetrics()
        self._front = Front(
            self._config,
            self._store,
            self._secrets,
            model_host(self._config, self._store, self._config.serving.front.precision),
            _SlotClient(slot, self._config.serving.poll_interval_s),
            _ControllerClient(controller),
            now_s=time.time,
            rng=random.Random(),
            on_look=self._metrics.tell,
        )
        await self._front.start()

    def __del__(self) -> None:
        """Write out the log when Serve takes the replica down."""
        if hasattr(self, "_front"):
            self._front.close()

    # -- predictions -------------------------------------------------------------------

    @http.post("/predict", tags=["predict"], openapi_extra=ASKER_PARAMETERS)
    async def predict(self, request: Request) -> Response:
        """Classify one image: a raw ``image/*`` body or the multipart field ``image``."""
        asker = asker_of(request)
        form = await read_uploads(request, field="image", max_bytes=self._config.images.max_bytes)
        upload = form.images[0]
        served = await within(asker.timeout_ms, self._answer(upload, asker))
        headers = {
            "x-prediction-id": served.request_id,
            "x-model-version": served.answer.version,
            "x-variant": served.variant,
            "x-cache": "hit" if served.answer.cached else "miss",
            "x-answered-by": "light" if served.answer.light else "full",
        }
        return json_response(self._as_json(served), headers)

    @http.post("/batch_predict", tags=["predict"], openapi_extra=ASKER_PARAMETERS)
    async def batch_predict(self, request: Request) -> Response:
        """Classify several multipart ``images``; a bad one gets its own error entry."""
        asker = asker_of(request)
        form = await read_uploads(request, field="images", max_bytes=self._config.images.max_bytes)

        async def one(upload: Upload) -> dict[str, Any]:
            try:
                return self._as_json(await self._answer(upload, asker))
            except BadImageError as error:
                _, code, message = describe_error(error)
                return {"error": {"code": code, "message": message, "request_id": ""}}

        asked = each([one(upload) for upload in form.images])
        return JSONResponse({"predictions": await within(asker.timeout_ms, asked)})

    async def _answer(self, upload: Upload, asker: Asker) -> Served:
        try:
            served = await self._front.answer(
                self._front.sent(upload.data, upload.content_type),
                key=asker.session or os.urandom(8).hex(),
                override=asker.canary,
                user=asker.session,
            )
        except NoVersionError as error:
            raise RequestError(503, "no_version", str(error)) from None
        answer = served.answer
        self._metrics.answered(
            answer.version,
            served.variant,
            answer.model_ms,
            cached=answer.cached,
            light=answer.light,
        )
        return served

    def _as_json(self, served: Served) -> dict[str, Any]:
        return {
            "request_id": served.request_id,
            "class": served.answer.class_name,
            "confidence": round(served.answer.confidence, 6),
            "top_k": top_k(served.answer, self._config.serving.top_k),
            "model_version": served.answer.version,
            "variant": served.variant,
            "audit": served.audit,
        }

    # -- labels ------------------------------------------------------------------------

    @http.post("/feedback", status_code=202, tags=["feedback"])
    async def feedback(self, request: Request) -> dict[str, Any]:
        """Correct or confirm an answer: ``{"request_id", "label", "user"?}``; durable at 202."""
        body = await read_json(request)
        request_id, user = body.get("request_id"), body.get("user", "")
        if not isinstance(request_id, str) or not isinstance(user, str):
            raise RequestError(422, "bad_request", "request_id and user must be strings")
        label = self._label(body.get("label"))
        await self._front.record_feedback(request_id, label, user)
        stable = self._front.stable
        known = stable is not None and label in stable.model.class_names
        return {"status": "recorded", "request_id": request_id, "new_class_proposal": not known}

    @http.post("/examples", status_code=202, tags=["feedback"])
    async def examples(
        self,
        request: Request,
        authorization: Annotated[str | None, Header()] = None,
        label: str | None = None,
    ) -> dict[str, Any]:
        """Operators: a labelled image; ``?label=`` or the multipart field ``label``."""
        self._require_operator(authorization)
        form = await read_uploads(request, field="image", max_bytes=self._config.images.max_bytes)
        name = self._label(label if label is not None else form.fields.get("label"))
        image = self._front.sent(form.images[0].data, form.images[0].content_type)
        content_hash = await self._front.record_example(image, name, "operator")
        return {"status": "recorded", "content_hash": content_hash}

    @staticmethod
    def _label(value: object) -> str:
        try:
            return clean_label(value)
        except ValueError as error:
            raise RequestError(422, "bad_label", str(error)) from None

    @staticmethod
    def _reason(body: dict[str, Any]) -> str:
        try:
            return clean_reason(body.get("reason", ""))
        except ValueError as error:
            raise RequestError(422, "bad_request", str(error)) from None

    # -- Open Inference Protocol v2 ----------------------------------------------------

    @http.get("/v2", tags=["open inference protocol"])
    async def v2(self) -> dict[str, Any]:
        """Server metadata."""
        return {
            "name": "lifelong_ray",
            "version": lifelong_ray.__version__,
            "extensions": list(EXTENSIONS),
        }

    @http.get("/v2/health/live", tags=["open inference protocol"])
    async def v2_live(self) -> dict[str, bool]:
        """Whether the process runs."""
        return {"live": True}

    @http.get("/v2/health/ready", tags=["open inference protocol"])
    async def v2_ready(self) -> JSONResponse:
        """Whether a version can answer."""
        ready = self._front.stable is not None
        return JSONResponse({"ready": ready, "live": True}, 200 if ready else 503)

    @http.get("/v2/models/{name}", tags=["open inference protocol"])
    @http.get("/v2/models/{name}/versions/{version}", tags=["open inference protocol"])
    async def v2_model(self, name: str, version: str | None = None) -> dict[str, Any]:
        """Model metadata."""
        stable = self._v2_version(name, version)
        shape = [-1, stable.model.image_size, stable.model.image_size, stable.model.channels]
        return {
            "name": name,
            "versions": [stable.version],
            "platform": "pytorch",
            "inputs": [{"name": INPUT, "datatype": "UINT8", "shape": shape}],
            "outputs": [
                {
                    "name": PROBABILITIES,
                    "datatype": "FP32",
                    "shape": [-1, len(stable.model.class_names)],
                },
                {"name": CLASS, "datatype": "BYTES", "shape": [-1]},
            ],
        }

    @http.get("/v2/models/{name}/ready", tags=["open inference protocol"])
    @http.get("/v2/models/{name}/versions/{version}/ready", tags=["open inference protocol"])
    async def v2_model_ready(self, name: str, version: str | None = None) -> dict[str, Any]:
        """Whether the stable version can answer."""
        self._v2_version(name, version)
        return {"name": name, "ready": True}

    @http.post("/v2/models/{name}/infer", tags=["open inference protocol"])
    @http.post("/v2/models/{name}/versions/{version}/infer", tags=["open inference protocol"])
    async def v2_infer(self, request: Request, name: str, version: str | None = None) -> Response:
        """Classify images: pixels as UINT8 (N, height, width, channels), or encoded as BYTES (N).

        Tensors are JSON or binary. One version answers all of them: the one in the path, or the
        one assigned.
        """
        max_bytes = self._config.images.max_bytes
        body = decompressed(
            await read_body(request, max_bytes=max_bytes),
            request.headers.get("content-encoding", ""),
            max_bytes=max_bytes,
        )
        asked = read_request(
            body, request.headers.get(HEADER_LENGTH), max_images=self._config.serving.max_queue
        )
        self._v2_version(name, version)
        served = await self._front.answer_together(
            [
                self._front.sent(image, None) if isinstance(image, bytes) else SentImage.of(image)
                for image in asked.images
            ],
            key=str(uuid7(time.time())),
            override="never" if version else None,
        )
        answer = InferAnswer(
            model_name=name,
            version=served[0].answer.version,
            class_names=[one.answer.class_name for one in served],
            probabilities=[one.answer.probabilities for one in served],
            parameters={
                "variant": served[0].variant,
                "prediction_ids": ",".join(one.request_id for one in served),
            },
        )
        content, headers = write_answer(asked, answer)
        return Response(content, headers=headers)

    def _v2_version(self, name: str, version: str | None) -> WarmVersion:
        if name != self._config.serving.model_name:
            raise RequestError(
                404, "unknown_model", f"no model {name}; this is {self._config.serving.model_name}"
            )
        stable = self._front.stable
        if stable is None:
            raise RequestError(503, "no_version", "no version can answer yet")
        if version not in (None, stable.version):
            raise RequestError(
                404,
                "unknown_version",
                f"version {version} does not answer here; stable is {stable.version}",
            )
        return stable

    # -- operators ---------------------------------------------------------------------

    def _require_operator(self, authorization: str | None) -> None:
        expected = f"Bearer {self._secrets.admin_token}"
        if not hmac.compare_digest((authorization or "").encode(), expected.encode()):
            raise RequestError(
                401,
                "unauthorized",
                "operators send 'Authorization: Bearer <token>'; lifelong status --token prints it",
            )

    @http.get("/admin/status", tags=["operators"])
    async def admin_status(
        self, authorization: Annotated[str | None, Header()] = None
    ) -> dict[str, Any]:
        """The document, this front, and what the controller has seen."""
        self._require_operator(authorization)
        return {
            "document": self._front.document.model_dump(mode="json"),
            "front": self._front.status(),
            "controller": await self._controller.status.remote(),
        }

    @http.get("/admin/versions", tags=["operators"])
    async def admin_versions(
        self, authorization: Annotated[str | None, Header()] = None
    ) -> dict[str, Any]:
        """Every registered version with its lineage and gate."""
        self._require_operator(authorization)
        registry = self._front.registry

        def manifests() -> list[dict[str, Any]]:
            return [registry.manifest(v).model_dump(mode="json") for v in registry.versions()]

        return {"versions": await self._front.in_thread(manifests)}

    @http.get("/admin/rollout", tags=["operators"])
    async def admin_rollout(
        self, authorization: Annotated[str | None, Header()] = None
    ) -> dict[str, Any]:
        """The rollout under way, if any."""
        self._require_operator(authorization)
        document, _ = await self._front.in_thread(self._front.desk.read)
        return {
            "stable": document.stable,
            "previous": document.previous,
            "rollout": document.rollout.model_dump(mode="json") if document.rollout else None,
        }

    @http.put("/admin/rollout", status_code=202, tags=["operators"])
    async def admin_start(
        self, request: Request, authorization: Annotated[str | None, Header()] = None
    ) -> dict[str, Any]:
        """Start a rollout: ``{"candidate", "steps"?, "force"?, "reason"?}``."""
        self._require_operator(authorization)
        body = await read_json(request)
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
        if not isinstance(body.get("force", False), bool):
            raise RequestError(422, "bad_request", f"force is {body['force']!r}, not true or false")
        return await self._request(
            Intent(
                id=str(uuid7(time.time())),
                verb="start",
                actor="operator",
                reason=self._reason(body),
                at_s=time.time(),
                candidate=body["candidate"],
                steps=steps,
                force=body.get("force", False),
            )
        )

    @http.post("/admin/rollout/{verb}", status_code=202, tags=["operators"])
    async def admin_verb(
        self,
        verb: str,
        request: Request,
        authorization: Annotated[str | None, Header()] = None,
    ) -> dict[str, Any]:
        """Promote, abort, pause, resume or rollback: ``{"reason"?, "force"?}``.

        Only a promotion can be forced: it then needs no evidence.
        """
        self._require_operator(authorization)
        verbs = ("promote", "abort", "pause", "resume", "rollback")
        if verb not in verbs:
            raise RequestError(404, "unknown_verb", f"{verb} is not one of {', '.join(verbs)}")
        body = await read_json(request)
        return await self._request(steering_intent(verb, body, self._reason(body), time.time()))

    async def _request(self, intent: Intent) -> dict[str, Any]:
        await self._front.in_thread(self._front.desk.request, intent)
        return {"status": "accepted", "intent_id": intent.id}

    @http.get("/admin/experiment", tags=["operators"])
    async def admin_experiment(
        self,
        authorization: Annotated[str | None, Header()] = None,
        id: Annotated[str | None, Query(min_length=1, max_length=200)] = None,
    ) -> dict[str, Any]:
        """The experiment under way with its result so far, if any; or an ended one by its `id`."""
        self._require_operator(authorization)
        document, _ = await self._front.in_thread(self._front.desk.read)
        experiment = document.experiment
        if id is not None and (experiment is None or experiment.id != id):
            try:
                experiment = await self._front.in_thread(self._front.desk.experiment, id)
            except NotFoundError as error:
                raise RequestError(404, "unknown_experiment", str(error)) from None
        shown = experiment.model_dump(mode="json") if experiment is not None else None
        return {"experiment": shown}

    @http.put("/admin/experiment", status_code=202, tags=["operators"])
    async def admin_start_experiment(
        self, request: Request, authorization: Annotated[str | None, Header()] = None
    ) -> dict[str, Any]:
        """Start an experiment: ``{"arms", "end_s", "metric"?, "adaptive"?, "reason"?}``.

        Arms are ``{"version", "weight"}``, stable among them, with weights that add up to 100.
        """
        self._require_operator(authorization)
        body = await read_json(request)
        return await self._request(experiment_intent(body, self._reason(body), time.time()))

    @http.post("/admin/experiment/end", status_code=202, tags=["operators"])
    async def admin_end_experiment(
        self, request: Request, authorization: Annotated[str | None, Header()] = None
    ) -> dict[str, Any]:
        """End the experiment and store its result; stable stays: ``{"reason"?}``."""
        self._require_operator(authorization)
        body = await read_json(request)
        if set(body) - {"reason"}:
            raise RequestError(422, "bad_request", f"an end takes a reason; got {sorted(body)}")
        return await self._request(
            Intent(
                id=str(uuid7(time.time())),
                verb="end_experiment",
                actor="operator",
                reason=self._reason(body),
                at_s=time.time(),
            )
        )

    @http.get("/admin/comparisons", tags=["operators"])
    async def admin_comparisons(
        self,
        authorization: Annotated[str | None, Header()] = None,
        rollout: Annotated[str | None, Query(min_length=1, max_length=200)] = None,
        hours: Annotated[float, Query(gt=0, le=744)] = 1.0,
        last: Annotated[int, Query(ge=0, le=10_000)] = 100,
    ) -> dict[str, Any]:
        """Pairs of answers: a summary per rollout, and the `last` of them.

        Those of one `rollout` from its start, or of all in the last `hours`.
        """
        self._require_operator(authorization)

        def found() -> dict[str, Any]:
            return compared(self._store, time.time, rollout_id=rollout, hours=hours, last=last)

        try:
            return await self._front.in_thread(found)
        except NotFoundError as error:
            raise RequestError(404, "unknown_rollout", str(error)) from None

    @http.get("/admin/drift", tags=["operators"])
    async def admin_drift(
        self, authorization: Annotated[str | None, Header()] = None
    ) -> dict[str, Any]:
        """Whether the latest traffic scores differ from the stable version's hold-out scores."""
        self._require_operator(authorization)
        return await self._front.in_thread(self._drift)

    def _drift(self) -> dict[str, Any]:
        stable = self._front.document.stable
        if stable is None:
            raise RequestError(503, "no_version", "no version is released yet")
        reference = self._front.registry.manifest(stable).metrics.get("holdout_scores")
        since_s = time.time() - 86_400
        rows = [
            r for r in LogTail(self._store, "predictions", since_s).poll() if r.version == stable
        ]
        recent = [r.scores for r in sorted(rows, key=lambda r: r.at_s)]
        recent = recent[-self._config.drift.window_rows :]
        if not reference or len(recent) < self._config.drift.window_rows:
            return {"judged": False, "num_recent": len(recent)}
        report = detect_drift(np.asarray(reference), np.asarray(recent), self._config.drift)
        return {"judged": True, **report.__dict__}

    @http.post("/admin/retrain", status_code=202, tags=["operators"])
    async def admin_retrain(
        self, authorization: Annotated[str | None, Header()] = None
    ) -> dict[str, Any]:
        """Submit an update as a Ray job."""
        self._require_operator(authorization)
        run_id = await self._front.in_thread(submit_update, self._config)
        return {"status": "submitted", "run_id": run_id}


def build_app(config: Config) -> serve.Application:
    """Bind the application: one controller, a slot, the fronts."""
    tree = config.model_dump(mode="json")
    # The decorator is typed as giving the class it was put on; it gives a Deployment.
    deployments: tuple[serve.Deployment, ...] = (RolloutController, Slot, FrontDeployment)  # type: ignore[assignment]
    controller, slot, front = deployments
    rules = controller.options(ray_actor_options={"num_cpus": 0.1}).bind(tree)
    candidate = slot.options(**_replicas("slot", config)).bind(tree, rules)
    return front.options(**_replicas("front", config)).bind(tree, candidate, rules)


def _replicas(deployment: str, config: Config) -> dict[str, Any]:
    scaling: AutoscalingConfig = getattr(config.serving, deployment)
    actor: dict[str, Any] = {"num_cpus": scaling.num_cpus, "num_gpus": scaling.num_gpus}
    if scaling.labels:
        actor["label_selector"] = dict(scaling.labels)
    return {
        "autoscaling_config": autoscaling(config, deployment),
        "max_ongoing_requests": config.serving.max_ongoing_requests,
        "ray_actor_options": actor,
        # Every answer is in the prediction log, and counted.
        "logging_config": {"log_level": "WARNING", "enable_access_log": False},
    }


def require_free_port(host: str, port: int) -> None:
    """Refuse a port that something else has, or that cannot be had.

    Two HAProxy processes on one port share its traffic silently, so Serve itself
    would not notice.

    Raises:
        ServingError: If the port is taken.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        # Connections that ended a moment ago do not hold the port.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ServingError(
                f"port {port} on {host} cannot be used ({error.strerror}); stop what listens "
                "there or choose another serving.port"
            ) from None


def start_app(config: Config) -> str:
    """Start the application on the running Ray and return its base URL.

    Raises:
        ServingError: If the port is taken.
    """
    require_free_port(config.serving.host, config.serving.port)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(http_options={"host": config.serving.host, "port": config.serving.port})
    serve.run(build_app(config), name=APP_NAME, route_prefix="/")
    return f"http://{config.serving.host}:{config.serving.port}"


def stop_app() -> None:
    """Stop the application, letting its fronts write out their log."""
    serve.delete(APP_NAME)

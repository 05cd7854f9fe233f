"""The Serve application: fronts that take HTTP, slots that hold a candidate.

Knows Ray Serve, and the routes of predictions and labels; those of operators and of the
Open Inference Protocol have modules of their own. What is answered is decided in `front`,
what is released in `rollout`. A version change is never a redeploy: fronts and slots
follow the release document.

Without postponed annotations: Serve pickles the ingress class by value, after which
FastAPI could not resolve names in them any more. It does so where the class is
decorated, so that whatever the class uses stands above it.
"""

import asyncio
import logging
import math
import os
import random
import socket
import time
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import FastAPI, Header, Request
from fastapi.responses import JSONResponse, Response
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.types import Receive, Scope, Send

import lifelong_ray
from lifelong_ray.config import AutoscalingConfig, Config, Precision, config_from
from lifelong_ray.feedback import CleanImage, SentImage, load_secrets, uuid7
from lifelong_ray.on_ray import metrics, open_inference_routes, operator_routes
from lifelong_ray.on_ray.front import (
    Front,
    NoVersionError,
    Served,
    clean_label,
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
    read_json,
    read_uploads,
    within,
)
from lifelong_ray.on_ray.model_process import ModelProcess
from lifelong_ray.on_ray.models import ModelHost, Models, ModelThread, VersionAnswer
from lifelong_ray.on_ray.operator_routes import require_operator
from lifelong_ray.on_ray.replica import Replica
from lifelong_ray.on_ray.rollout import RolloutController
from lifelong_ray.on_ray.scaling import autoscaling
from lifelong_ray.on_ray.warm import WarmVersions
from lifelong_ray.release import FrontReport, Registry, ReleaseDesk, needs_slot
from lifelong_ray.storage import Store, open_store
from lifelong_ray.types import BadImageError, ServingError

logger = logging.getLogger(__name__)

APP_NAME = "lifelong_ray"
_WATCHED_S = 10.0  # A slot is watched for this long after it was asked.


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
    # Their order on the page: Serve moves the ingress class's own routes behind all others.
    openapi_tags=[
        {"name": "predict"},
        {"name": "feedback"},
        {"name": "open inference protocol"},
        {"name": "operators"},
    ],
)
install_error_handlers(http)
http.include_router(open_inference_routes.router)
http.include_router(operator_routes.router)


def model_host(config: Config, store: Store, precision: Precision) -> ModelHost:
    """Return where a replica's models live."""
    if config.serving.model_process:
        return ModelProcess(config, precision)
    return ModelThread(Models(Registry(store), config.serving, precision))


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

    async def ask_together(
        self, version: str, images: list[CleanImage]
    ) -> list[VersionAnswer | Exception]:
        """Answer several images, or say for each what is wrong."""
        answers = await asyncio.gather(
            *(self.ask(version, image) for image in images), return_exceptions=True
        )
        return [
            answer if isinstance(answer, VersionAnswer | Exception) else RuntimeError(repr(answer))
            for answer in answers
        ]

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
        self._watch_a_while()
        answer: VersionAnswer = await self._handle.ask.remote(version, image)
        return answer

    async def ask_together(
        self, version: str, images: Sequence[CleanImage]
    ) -> list[VersionAnswer | Exception]:
        self._watch_a_while()
        answers: list[VersionAnswer | Exception] = await self._handle.ask_together.remote(
            version, images
        )
        return answers

    def was_there(self, within_s: float) -> bool:
        return time.monotonic() - self._seen_s < within_s

    def _watch_a_while(self) -> None:
        self._asked_s = time.monotonic()
        if self._watching is None or self._watching.done():
            self._watching = asyncio.create_task(self._watch())

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
        store = open_store(self._config.store)
        self._secrets = load_secrets(store, os.environ)
        self._metrics = metrics.FrontMetrics()
        self._front = Front(
            self._config,
            store,
            self._secrets,
            model_host(self._config, store, self._config.serving.front.precision),
            _SlotClient(slot, self._config.serving.poll_interval_s),
            _ControllerClient(controller),
            now_s=time.time,
            rng=random.Random(),
            on_look=self._metrics.tell,
        )
        self.replica = Replica(self._config, store, self._secrets, self._front, controller)
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
        form = await read_uploads(
            request,
            field="images",
            max_bytes=self._config.images.max_bytes,
            max_images=self._config.serving.max_queue,
        )

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
                key=asker.session or f"{random.getrandbits(64):x}",
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
        require_operator(authorization, self._secrets.admin_token)
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

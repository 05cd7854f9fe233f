"""The routes of the Open Inference Protocol v2; its wire format is in `open_inference`."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

import lifelong_ray
from lifelong_ray.feedback import SentImage, uuid7
from lifelong_ray.on_ray.http import RequestError, read_body
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
from lifelong_ray.on_ray.replica import Replica, ThisReplica
from lifelong_ray.on_ray.warm import WarmVersion

router = APIRouter(tags=["open inference protocol"])


@router.get("/v2")
async def v2() -> dict[str, Any]:
    """Server metadata."""
    return {
        "name": "lifelong_ray",
        "version": lifelong_ray.__version__,
        "extensions": list(EXTENSIONS),
    }


@router.get("/v2/health/live")
async def v2_live() -> dict[str, bool]:
    """Whether the process runs."""
    return {"live": True}


@router.get("/v2/health/ready")
async def v2_ready(replica: ThisReplica) -> JSONResponse:
    """Whether a version can answer."""
    ready = replica.front.stable is not None
    return JSONResponse({"ready": ready, "live": True}, 200 if ready else 503)


@router.get("/v2/models/{name}")
@router.get("/v2/models/{name}/versions/{version}")
async def v2_model(replica: ThisReplica, name: str, version: str | None = None) -> dict[str, Any]:
    """Model metadata."""
    stable = _stable(replica, name, version)
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


@router.get("/v2/models/{name}/ready")
@router.get("/v2/models/{name}/versions/{version}/ready")
async def v2_model_ready(
    replica: ThisReplica, name: str, version: str | None = None
) -> dict[str, Any]:
    """Whether the stable version can answer."""
    _stable(replica, name, version)
    return {"name": name, "ready": True}


@router.post("/v2/models/{name}/infer")
@router.post("/v2/models/{name}/versions/{version}/infer")
async def v2_infer(
    replica: ThisReplica, request: Request, name: str, version: str | None = None
) -> Response:
    """Classify images: pixels as UINT8 (N, height, width, channels), or encoded as BYTES (N).

    Tensors are JSON or binary. One version answers all of them: the one in the path, or the
    one assigned.
    """
    front, max_bytes = replica.front, replica.config.images.max_bytes
    body = decompressed(
        await read_body(request, max_bytes=max_bytes),
        request.headers.get("content-encoding", ""),
        max_bytes=max_bytes,
    )
    asked = read_request(
        body, request.headers.get(HEADER_LENGTH), max_images=replica.config.serving.max_queue
    )
    _stable(replica, name, version)
    served = await front.answer_together(
        [
            front.sent(image, None) if isinstance(image, bytes) else SentImage.of(image)
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


def _stable(replica: Replica, name: str, version: str | None) -> WarmVersion:
    """The stable version, if that is what `name` and `version` of a path mean."""
    if name != replica.config.serving.model_name:
        raise RequestError(
            404, "unknown_model", f"no model {name}; this is {replica.config.serving.model_name}"
        )
    stable = replica.front.stable
    if stable is None:
        raise RequestError(503, "no_version", "no version can answer yet")
    if version not in (None, stable.version):
        raise RequestError(
            404,
            "unknown_version",
            f"version {version} does not answer here; stable is {stable.version}",
        )
    return stable

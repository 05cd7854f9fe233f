"""The edge of HTTP: bodies bounded before they are read, errors in one shape.

Knows status codes and wire formats. Does not know models, versions or the log.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
from collections.abc import Awaitable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.types import Message

from lifelong_ray.types import (
    BadImageError,
    BadRequestIdError,
    ConfigError,
    GateRefusedError,
    LifelongError,
    ModelHostGoneError,
    OverloadedError,
    RolloutError,
    StorageFullError,
    VersionError,
)

logger = logging.getLogger(__name__)

T = TypeVar("T")
_MOST_DIGITS = 18  # Of a length in bytes.
# A body that comes byte by byte would hold one of the requests that a replica takes at a time, and
# neither Serve nor HAProxy ends it. One that keeps the pace may take the time its size needs.
_BODY_BEGINS_WITHIN_S = 10.0
_LEAST_BYTES_PER_S = 10_000

_STATUS_AND_CODE: tuple[tuple[type[LifelongError], int, str], ...] = (
    (BadRequestIdError, 404, "unknown_request_id"),
    (OverloadedError, 429, "overloaded"),
    (ModelHostGoneError, 503, "loading"),
    (GateRefusedError, 409, "gate_refused"),
    (RolloutError, 409, "rollout_conflict"),
    (VersionError, 404, "unknown_version"),
    (StorageFullError, 507, "storage_full"),
    (ConfigError, 422, "bad_config"),
    (LifelongError, 500, "internal"),
)


class RequestError(LifelongError):
    """A request that cannot be answered as it is.

    Attributes:
        status: HTTP status.
        code: Stable machine-readable reason.
    """

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


@dataclass(frozen=True)
class Upload:
    """Bytes a client sent as an image, unchecked."""

    data: bytes
    content_type: str | None


@dataclass(frozen=True)
class UploadForm:
    """Images and text fields of one request."""

    images: tuple[Upload, ...]
    fields: Mapping[str, str]


@dataclass(frozen=True)
class Asker:
    """What the headers of a request say about who asks, and how.

    Attributes:
        session: Whom an answer's version sticks to; empty means nobody.
        canary: The arm that shall answer, or ``always`` or ``never`` for the candidate; empty
            leaves it to chance.
        timeout_ms: How long the client waits; None means for ever.
    """

    session: str
    canary: str
    timeout_ms: float | None


def asker_of(request: Request) -> Asker:
    """Read the headers that `ASKER_PARAMETERS` describes.

    Not as FastAPI's parameters, whose checks would take longer than an answer of a small model.

    Raises:
        RequestError: If the deadline is no number above 0.
    """
    headers = request.headers
    said, timeout_ms = headers.get("x-timeout-ms"), None
    if said is not None:
        try:
            timeout_ms = float(said)
        except ValueError:
            timeout_ms = 0.0
        if not 0 < timeout_ms < math.inf:
            raise RequestError(
                422, "bad_timeout", f"x-timeout-ms is {said!r:.40}; give milliseconds above 0"
            )
    canary = headers.get("x-variant") or headers.get("x-canary", "")
    return Asker(headers.get("x-session-id", ""), canary, timeout_ms)


def _header(name: str, description: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {
        "in": "header",
        "name": name,
        "required": False,
        "description": description,
        "schema": schema,
    }


ASKER_PARAMETERS: dict[str, Any] = {
    "parameters": [
        _header("x-session-id", "Whom the version sticks to.", {"type": "string"}),
        _header(
            "x-canary",
            "Whether the candidate answers; by chance if left out.",
            {"type": "string", "enum": ["always", "never"]},
        ),
        _header(
            "x-variant",
            "The arm that answers: stable, candidate, or the version of an experiment's arm.",
            {"type": "string"},
        ),
        _header(
            "x-timeout-ms",
            "Milliseconds after which nobody waits for the answer any more.",
            {"type": "number", "exclusiveMinimum": 0},
        ),
    ]
}
"""What OpenAPI tells of the headers that `asker_of` reads."""


async def read_uploads(
    request: Request, *, field: str, max_bytes: int, max_images: int = 1
) -> UploadForm:
    """Read images from a raw body or from the multipart field `field`.

    The body is cut off as soon as it exceeds `max_bytes`, whatever its headers claim, or comes too
    slowly.

    Raises:
        BadImageError: If the body is too large.
        RequestError: If it comes too slowly, or is multipart and malformed, lacks the field or
            has it more than `max_images` times.
    """
    bounded = Request(request.scope, _bounded_receive(request, max_bytes))
    content_type = request.headers.get("content-type", "")
    if not content_type.lower().startswith("multipart/form-data"):
        return UploadForm((Upload(await bounded.body(), content_type or None),), {})
    try:
        async with bounded.form(max_part_size=max_bytes) as form:
            images = []
            for part in form.getlist(field):
                data = await part.read() if isinstance(part, UploadFile) else part.encode()
                kind = part.content_type if isinstance(part, UploadFile) else None
                images.append(Upload(data, kind))
            fields = {k: v for k, v in form.items() if isinstance(v, str)}
    except (MultiPartException, HTTPException, ValueError) as error:
        # A part's own charset can make text of it that is none: ValueError, mostly UnicodeError.
        raise RequestError(
            400, "bad_multipart", f"the multipart body is malformed: {error}"
        ) from None
    if not images:
        raise RequestError(
            400, "missing_image", f"the multipart body has no field {field!r} with an image"
        )
    if len(images) > max_images:
        raise RequestError(
            413,
            "too_many_images",
            f"{len(images)} images in the field {field!r} of one request; at most {max_images}",
        )
    return UploadForm(tuple(images), fields)


async def read_json(request: Request, *, max_bytes: int = 1_000_000) -> dict[str, Any]:
    """Read a JSON object; an empty body is an empty one.

    Raises:
        RequestError: If the body is not a JSON object, or comes too slowly.
    """
    bounded = Request(request.scope, _bounded_receive(request, max_bytes))
    try:
        value = json.loads(await bounded.body() or b"{}")
    except (ValueError, RecursionError) as error:
        raise RequestError(400, "not_json", f"the body is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise RequestError(
            400, "not_json", f"the body is a JSON {type(value).__name__}, not an object"
        )
    return value


async def within(timeout_ms: float | None, asked: Awaitable[T]) -> T:
    """Wait for an answer as long as the client does; what it would cost later is not spent.

    Raises:
        RequestError: If it is not there in time.
    """
    if timeout_ms is None:
        return await asked
    try:
        return await asyncio.wait_for(asked, timeout_ms / 1_000)
    except TimeoutError:
        # Not 504, of which HAProxy makes a 500 of its own.
        raise RequestError(
            408, "deadline_exceeded", f"no answer within x-timeout-ms of {timeout_ms:g}"
        ) from None


async def read_body(request: Request, *, max_bytes: int) -> bytes:
    """Read a body.

    Raises:
        BadImageError: As soon as it exceeds `max_bytes`.
        RequestError: If it comes too slowly.
    """
    return await Request(request.scope, _bounded_receive(request, max_bytes)).body()


def _bounded_receive(request: Request, max_bytes: int) -> Any:
    declared = request.headers.get("content-length", "0")
    # Python makes no number of thousands of digits.
    if declared.isdecimal() and (len(declared) > _MOST_DIGITS or int(declared) > max_bytes):
        raise BadImageError(
            "body_too_large",
            f"the body has {declared:.40} bytes; at most {max_bytes} are taken",
            status=413,
        )
    seen = 0
    began_s = asyncio.get_running_loop().time()

    async def receive() -> Message:
        nonlocal seen
        patience_s = _BODY_BEGINS_WITHIN_S + seen / _LEAST_BYTES_PER_S
        try:
            async with asyncio.timeout_at(began_s + patience_s):
                message = await request.receive()
        except TimeoutError:
            raise RequestError(
                408,
                "body_too_slow",
                f"{seen} bytes of the body came within {patience_s:.0f} s and its end did not; "
                f"send at least {_LEAST_BYTES_PER_S} bytes a second",
            ) from None
        if message["type"] == "http.disconnect":
            # Not the server's failure, as Starlette's own exception would be told.
            raise RequestError(400, "disconnected", "the client left before its body was there")
        seen += len(message.get("body", b""))
        if seen > max_bytes:
            raise BadImageError("body_too_large", f"the body exceeds {max_bytes} bytes", status=413)
        return message

    return receive


def describe_error(error: Exception) -> tuple[int, str, str]:
    """Status, code and message of an error.

    >>> describe_error(OverloadedError("full"))
    (429, 'overloaded', 'full')
    """
    if isinstance(error, BadImageError | RequestError):
        return error.status, error.code, str(error)
    for kind, status, code in _STATUS_AND_CODE:
        if isinstance(error, kind):
            return status, code, str(error)
    return 500, "internal", "the server failed; its log has the details"


def answer_to_error(request: Request, error: Exception) -> Response:
    """Answer as ``{"error": {"code", "message", "request_id"}}``.

    The Open Inference Protocol's own paths get its ``{"error": "..."}`` instead.
    """
    if isinstance(error, HTTPException):
        status, code, message = error.status_code, "http_error", str(error.detail)
    elif isinstance(error, RequestValidationError):
        status, code = 422, "bad_request"
        message = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
    else:
        status, code, message = describe_error(error)
    if status == 500:
        logger.error("request to %s failed", request.url.path, exc_info=error)
    headers = {"retry-after": "1"} if status in (429, 503) else {}
    if code == "body_too_slow":
        headers["connection"] = "close"  # Nobody reads what is still to come.
    # What a message quotes may hold what JSON's bytes cannot.
    message = message.encode("utf-8", "backslashreplace").decode()
    if request.url.path.startswith("/v2"):
        return JSONResponse({"error": message}, status, headers=headers)
    body = {
        "code": code,
        "message": message,
        "request_id": request.headers.get("x-request-id", ""),
    }
    return JSONResponse({"error": body}, status, headers=headers)


def install_error_handlers(app: FastAPI) -> None:
    """Have every error answered by `answer_to_error`."""

    async def answer(request: Request, error: Exception) -> Response:
        return answer_to_error(request, error)

    for kind in (LifelongError, HTTPException, RequestValidationError, Exception):
        app.add_exception_handler(kind, answer)


_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


def json_response(value: object, headers: Mapping[str, str]) -> Response:
    """Make a JSON answer, as `JSONResponse` does, in half the time."""
    return Response(_encode(value).encode(), headers=dict(headers), media_type="application/json")

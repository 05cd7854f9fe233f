"""The edge of HTTP: bounded bodies, and one shape for every error."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from pydantic import BaseModel
from starlette.types import Message

from lifelong_ray.on_ray import http as edge
from lifelong_ray.on_ray.http import (
    Asker,
    RequestError,
    answer_to_error,
    asker_of,
    install_error_handlers,
    read_body,
    read_json,
    read_uploads,
    within,
)
from lifelong_ray.types import (
    BadImageError,
    BadRequestIdError,
    ConflictError,
    GateRefusedError,
    OverloadedError,
    RolloutError,
    StorageFullError,
    VersionDamagedError,
    VersionError,
)

MAX_BYTES = 1_000


class Typed(BaseModel):
    number: int


def make_app() -> FastAPI:
    app = FastAPI()
    install_error_handlers(app)

    @app.post("/upload")
    async def upload(request: Request) -> dict[str, Any]:
        form = await read_uploads(request, field="image", max_bytes=MAX_BYTES, max_images=2)
        return {
            "images": [[len(image.data), image.content_type] for image in form.images],
            "fields": dict(form.fields),
        }

    @app.post("/json")
    async def json(request: Request) -> dict[str, Any]:
        return await read_json(request, max_bytes=MAX_BYTES)

    @app.post("/typed")
    async def typed(body: Typed) -> int:
        return body.number

    @app.get("/fail/{name}")
    @app.get("/v2/fail/{name}")
    async def fail(name: str) -> None:
        raise ERRORS[name]

    return app


ERRORS: dict[str, Exception] = {
    "image": BadImageError("truncated_image", "cut short"),
    "request": RequestError(418, "teapot", "short and stout"),
    "id": BadRequestIdError("not ours"),
    "overloaded": OverloadedError("512 images are waiting"),
    "gate": GateRefusedError("not passed"),
    "rollout": RolloutError("already under way"),
    "version": VersionError("no such version"),
    "damaged": VersionDamagedError("checksum"),
    "full": StorageFullError("no space left"),
    "conflict": ConflictError("somebody was first"),
    "surprise": RuntimeError("secret detail"),
}


def call(method: str, path: str, **arguments: Any) -> httpx.Response:
    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(make_app(), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, **arguments)

    return asyncio.run(send())


async def in_pieces(num_bytes: int) -> AsyncIterator[bytes]:
    """A body that comes without Content-Length."""
    for _ in range(0, num_bytes, 100):
        yield b"x" * 100


def error_of(response: httpx.Response) -> dict[str, str]:
    body = response.json()
    assert list(body) == ["error"]
    assert sorted(body["error"]) == ["code", "message", "request_id"]
    assert body["error"]["message"]
    error: dict[str, str] = body["error"]
    return error


def test_a_raw_body_is_one_image_with_its_content_type() -> None:
    response = call("POST", "/upload", content=b"abc", headers={"content-type": "image/png"})

    assert response.json() == {"images": [[3, "image/png"]], "fields": {}}


def test_multipart_images_keep_their_order_and_the_fields_stay_beside() -> None:
    files = [("image", ("a", b"1", "image/png")), ("image", ("b", b"22", "image/bmp"))]

    response = call("POST", "/upload", files=files, data={"label": "boot"})

    assert response.json() == {
        "images": [[1, "image/png"], [2, "image/bmp"]],
        "fields": {"label": "boot"},
    }


def test_more_images_than_may_ever_wait_are_refused_for_good() -> None:
    files = [("image", (str(n), b"1", "image/png")) for n in range(3)]

    response = call("POST", "/upload", files=files)

    assert response.status_code == 413
    assert error_of(response)["code"] == "too_many_images"
    assert "retry-after" not in response.headers


def test_the_content_type_of_a_form_may_be_written_in_capitals() -> None:
    body = b'--b\r\ncontent-disposition: form-data; name="image"\r\n\r\nabc\r\n--b--\r\n'

    response = call(
        "POST",
        "/upload",
        content=body,
        headers={"content-type": "Multipart/Form-Data; boundary=b"},
    )

    assert [size for size, _ in response.json()["images"]] == [3]


def test_a_body_of_exactly_the_limit_is_taken() -> None:
    assert call("POST", "/upload", content=b"x" * MAX_BYTES).status_code == 200
    assert call("POST", "/upload", content=in_pieces(MAX_BYTES)).status_code == 200


@pytest.mark.parametrize("path", ["/upload", "/json"])
@pytest.mark.parametrize(
    "body",
    [
        pytest.param({"content": b"x" * (MAX_BYTES + 1)}, id="declared"),
        pytest.param({"content": in_pieces}, id="undeclared"),
        pytest.param({"content": in_pieces, "headers": {"content-length": "10"}}, id="lied"),
        pytest.param({"files": {"image": ("a", b"x" * 2 * MAX_BYTES)}}, id="multipart"),
    ],
)
def test_a_body_beyond_the_limit_is_refused(path: str, body: dict[str, Any]) -> None:
    if body.get("content") is in_pieces:
        body = {**body, "content": in_pieces(5 * MAX_BYTES)}

    response = call("POST", path, **body)

    assert response.status_code == 413
    assert error_of(response)["code"] == "body_too_large"


def test_a_body_without_length_is_not_read_beyond_the_limit() -> None:
    num_sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal num_sent
        while num_sent < 1_000:
            num_sent += 1
            yield b"x" * 100

    assert call("POST", "/upload", content=endless()).status_code == 413
    assert num_sent <= MAX_BYTES // 100 + 2


@pytest.mark.parametrize(
    ("content", "content_type", "code"),
    [
        (b"--x\r\nno headers", "multipart/form-data; boundary=x", "bad_multipart"),
        (b"--x\r\n", "multipart/form-data", "bad_multipart"),
        (b"--x--\r\n", "multipart/form-data; boundary=x", "missing_image"),
    ],
    ids=["broken", "without boundary", "empty"],
)
def test_broken_multipart_bodies_are_the_clients_mistake(
    content: bytes, content_type: str, code: str
) -> None:
    response = call("POST", "/upload", content=content, headers={"content-type": content_type})

    assert response.status_code == 400
    assert error_of(response)["code"] == code


@pytest.mark.parametrize(
    ("charset", "text"),
    [("utf-7", b"+2AA-"), ("unicode_escape", b"\\ud800"), ("undefined", b"x")],
)
def test_a_text_part_whose_charset_makes_no_text_is_the_clients_mistake(
    charset: str, text: bytes
) -> None:
    head = b'--x\r\ncontent-disposition: form-data; name="image"\r\n\r\n'
    content_type = f"multipart/form-data; boundary=x; charset={charset}"

    response = call(
        "POST",
        "/upload",
        content=head + text + b"\r\n--x--\r\n",
        headers={"content-type": content_type},
    )

    assert response.status_code == 400
    assert error_of(response)["code"] == "bad_multipart"


@pytest.mark.parametrize(
    "content", [b"{", b"[1]", b"\xff\xfe", b"[" * 900, b'"text"', b"null"], ids=repr
)
def test_what_is_not_a_json_object_is_refused(content: bytes) -> None:
    response = call("POST", "/json", content=content)

    assert response.status_code == 400
    assert error_of(response)["code"] == "not_json"


def test_json_nested_beyond_the_parser_is_refused() -> None:
    app = FastAPI()
    install_error_handlers(app)

    @app.post("/deep")
    async def deep(request: Request) -> dict[str, Any]:
        return await read_json(request)

    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.post("/deep", content=b'{"a":' + b"[" * 500_000)

    response = asyncio.run(send())

    assert response.status_code == 400
    assert error_of(response)["code"] == "not_json"


def test_an_empty_body_is_an_empty_object() -> None:
    assert call("POST", "/json").json() == {}


@pytest.mark.parametrize(
    ("name", "status", "code"),
    [
        ("image", 400, "truncated_image"),
        ("request", 418, "teapot"),
        ("id", 404, "unknown_request_id"),
        ("overloaded", 429, "overloaded"),
        ("gate", 409, "gate_refused"),
        ("rollout", 409, "rollout_conflict"),
        ("version", 404, "unknown_version"),
        ("damaged", 404, "unknown_version"),
        ("full", 507, "storage_full"),
        ("conflict", 500, "internal"),
        ("surprise", 500, "internal"),
    ],
)
def test_every_error_has_its_status_and_the_one_shape(name: str, status: int, code: str) -> None:
    response = call("GET", f"/fail/{name}", headers={"x-request-id": "mine"})

    assert response.status_code == status
    error = error_of(response)
    assert error["code"] == code
    assert error["request_id"] == "mine"


def test_an_unexpected_error_does_not_show_its_details() -> None:
    assert "secret" not in call("GET", "/fail/surprise").text


def test_overload_says_when_to_come_back() -> None:
    assert call("GET", "/fail/overloaded").headers["retry-after"] == "1"
    assert "retry-after" not in call("GET", "/fail/gate").headers


@pytest.mark.parametrize(
    ("method", "path", "arguments", "status"),
    [
        ("GET", "/nowhere", {}, 404),
        ("PATCH", "/upload", {}, 405),
        ("POST", "/typed", {"json": {"number": "one"}}, 422),
    ],
)
def test_the_frameworks_own_errors_have_the_same_shape(
    method: str, path: str, arguments: dict[str, Any], status: int
) -> None:
    response = call(method, path, **arguments)

    assert response.status_code == status
    error_of(response)


def test_open_inference_paths_get_that_protocols_shape() -> None:
    response = call("GET", "/v2/fail/version")

    assert response.status_code == 404
    assert response.json() == {"error": "no such version"}


def test_an_answer_in_time_is_given_and_one_without_a_deadline_is_waited_for() -> None:
    async def answer() -> str:
        await asyncio.sleep(0.01)
        return "answer"

    assert asyncio.run(within(5_000, answer())) == "answer"
    assert asyncio.run(within(None, answer())) == "answer"


def test_work_that_nobody_waits_for_any_more_is_dropped() -> None:
    dropped = []

    async def answer() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            dropped.append(True)
            raise

    with pytest.raises(RequestError) as caught:
        asyncio.run(within(20, answer()))

    assert (caught.value.status, caught.value.code) == (408, "deadline_exceeded")
    assert dropped


def asking(**headers: str) -> Request:
    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return Request({"type": "http", "headers": raw})


def asked_with(headers: dict[str, str], *messages: Message) -> Request:
    sent = iter(messages)

    async def receive() -> Message:
        return next(sent)

    raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    scope = {"type": "http", "method": "POST", "path": "/predict", "headers": raw}
    return Request(scope, receive)


def test_a_length_that_is_no_number_python_makes_is_too_large() -> None:
    request = asked_with({"content-length": "9" * 5_000})

    with pytest.raises(BadImageError, match="at most 10 are taken"):
        asyncio.run(read_body(request, max_bytes=10))


def test_a_client_that_leaves_while_it_sends_is_no_failure_of_the_server() -> None:
    begun: Message = {"type": "http.request", "body": b"abc", "more_body": True}
    request = asked_with({}, begun, {"type": "http.disconnect"})

    with pytest.raises(RequestError) as caught:
        asyncio.run(read_body(request, max_bytes=10))

    assert (caught.value.status, caught.value.code) == (400, "disconnected")


@pytest.mark.parametrize(("bytes_at_once", "is_answered"), [(1, False), (20, True)])
def test_a_body_may_take_long_only_if_it_is_long(
    monkeypatch: pytest.MonkeyPatch, bytes_at_once: int, is_answered: bool
) -> None:
    monkeypatch.setattr(edge, "_BODY_BEGINS_WITHIN_S", 0.05)
    monkeypatch.setattr(edge, "_LEAST_BYTES_PER_S", 500)
    num_sent = 0

    async def receive() -> Message:
        nonlocal num_sent
        num_sent += 1
        await asyncio.sleep(0.02)
        return {"type": "http.request", "body": b"x" * bytes_at_once, "more_body": num_sent < 10}

    request = Request({"type": "http", "path": "/predict", "headers": []}, receive)
    reading = read_body(request, max_bytes=1_000)

    if is_answered:
        assert asyncio.run(reading) == b"x" * 10 * bytes_at_once
        return
    with pytest.raises(RequestError, match="at least 500 bytes a second") as caught:
        asyncio.run(reading)
    response = answer_to_error(request, caught.value)
    assert (response.status_code, response.headers["connection"]) == (408, "close")


def test_an_error_that_quotes_what_is_no_text_is_told_all_the_same() -> None:
    response = answer_to_error(asked_with({}), VersionError("there is no version \ud800"))

    assert response.status_code == 404
    assert b"there is no version \\\\ud800" in response.body


def test_headers_say_who_asks_and_how_long_they_wait() -> None:
    asker = asker_of(asking(x_session_id="ada", x_canary="always", x_timeout_ms="50"))

    assert asker == Asker("ada", "always", 50.0)
    assert asker_of(asking()) == Asker("", "", None)
    assert asker_of(asking(x_variant="v1.2", x_canary="always")) == Asker("", "v1.2", None)


@pytest.mark.parametrize("said", ["0", "-1", "soon", "nan", "inf", ""])
def test_a_deadline_that_is_none_is_named(said: str) -> None:
    with pytest.raises(RequestError, match="x-timeout-ms") as caught:
        asker_of(asking(x_timeout_ms=said))

    assert (caught.value.status, caught.value.code) == (422, "bad_timeout")

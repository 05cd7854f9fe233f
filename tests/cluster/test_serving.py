"""The application on real Ray Serve: bad requests, labels, and version changes under traffic.

One application with two fronts serves every test of the module; the version change comes
last, because a rollback is refused only as long as there is no previous version.
"""

from __future__ import annotations

import contextlib
import io
import random
import select
import socket
import struct
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from ray import serve
from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput
from tritonclient.utils import InferenceServerException

from lifelong_ray.client import ApiError, LifelongClient
from lifelong_ray.config import Config
from lifelong_ray.feedback import (
    RequestIds,
    Secrets,
    encode_png,
    load_secrets,
    read_comparisons,
    read_feedback,
    read_images,
    read_predictions,
    take_snapshot,
)
from lifelong_ray.on_ray.serving import start_app, stop_app
from lifelong_ray.release import ReleaseDesk, ReleaseDocument
from lifelong_ray.storage import Store, open_store
from tests.conftest import free_port
from tests.unit.on_ray.world import CLASSES, add_version, make_image, settings, train_base

MAX_BYTES = 200_000
PNG = {"content-type": "image/png"}


@dataclass(frozen=True)
class App:
    """The running application and what stands behind it."""

    url: str
    config: Config
    store: Store
    secrets: Secrets

    @property
    def operator(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.secrets.admin_token}"}

    def document(self) -> ReleaseDocument:
        """The release document, but for the controller's lease, which is renewed by itself."""
        document, _ = ReleaseDesk(self.store, time.time).read()
        return document.changed(lease=None, revision=0)

    def stable(self) -> str | None:
        return self.document().stable


@pytest.fixture(scope="module")
def app(ray_session: object, tmp_path_factory: pytest.TempPathFactory) -> Iterator[App]:
    front = {"min_replicas": 2, "max_replicas": 2}
    config = settings(
        store={"url": str(tmp_path_factory.mktemp("store"))},
        images={"max_bytes": MAX_BYTES},
        feedback={"audit_share": 1.0, "flush_interval_s": 0.2},
        rollout={"margin": 0.1, "min_labelled_pairs": 20},
        serving={"port": free_port(), "front": front, "poll_interval_s": 0.1},
    )
    store = open_store(config.store)
    train_base(store, config)
    add_version(store, "v1.1")
    add_version(store, "v1.2", gate=False)
    url = start_app(config)
    try:
        yield App(url, config, store, load_secrets(store, {}))
    finally:
        stop_app()
        serve.shutdown()


@pytest.fixture(scope="module")
def http(app: App) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=app.url, timeout=30.0) as client:
        yield client


@pytest.fixture(scope="module")
def images() -> dict[str, bytes]:
    rng = np.random.default_rng(3)
    return {name: encode_png(make_image(name, rng)) for name in CLASSES}


def until(condition: Callable[[], bool], what: str, timeout_s: float = 60.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline_s:
            pytest.fail(f"{what} did not happen within {timeout_s} s")
        time.sleep(0.05)


def gigapixel_png() -> bytes:
    """A PNG whose header claims 100,000 x 100,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + crc

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 0, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(b"\0" * 100))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


def truncated_png() -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, format="PNG")
    return buffer.getvalue()[:2_000]


def in_pieces(num_bytes: int) -> Iterator[bytes]:
    for _ in range(0, num_bytes, 10_000):
        yield b"x" * 10_000


# -- good requests ----------------------------------------------------------------------------


def test_an_answer_names_its_version_in_body_and_headers(
    app: App, http: httpx.Client, images: dict[str, bytes]
) -> None:
    response = http.post("/predict", content=images["top"], headers=PNG)

    assert response.status_code == 200
    body = response.json()
    assert sorted(body) == [
        "audit",
        "class",
        "confidence",
        "model_version",
        "request_id",
        "top_k",
        "variant",
    ]
    assert (body["class"], body["model_version"], body["variant"]) == ("top", "v1", "stable")
    assert [sorted(entry) for entry in body["top_k"]] == [["class", "confidence"]] * 3
    assert body["top_k"][0] == {"class": "top", "confidence": body["confidence"]}
    assert response.headers["x-prediction-id"] == body["request_id"]
    assert response.headers["x-model-version"] == "v1"
    assert response.headers["x-variant"] == "stable"
    proof = RequestIds(app.secrets.signing_key).verify(body["request_id"])
    assert (proof.version, proof.class_name, proof.audit) == ("v1", "top", True)


def test_multipart_images_are_answered_too(http: httpx.Client, images: dict[str, bytes]) -> None:
    response = http.post("/predict", files={"image": ("a.png", images["low"], "image/png")})

    assert response.json()["class"] == "low"


def test_a_batch_with_one_bad_image_answers_the_others_in_order(
    http: httpx.Client, images: dict[str, bytes]
) -> None:
    contents = [images["low"], b"no image", images["top"], images["middle"]]
    files = [("images", (f"{i}.png", data, "image/png")) for i, data in enumerate(contents)]

    response = http.post("/batch_predict", files=files)

    assert response.status_code == 200
    first, bad, *others = response.json()["predictions"]
    assert [entry["class"] for entry in (first, *others)] == ["low", "top", "middle"]
    assert bad["error"]["code"] == "not_an_image"


def test_open_inference_protocol_names_and_asks_the_model(
    http: httpx.Client, images: dict[str, bytes]
) -> None:
    metadata = http.get("/v2/models/classifier").json()
    tensor = np.stack([np.asarray(Image.open(io.BytesIO(images[n])))[:, :, None] for n in CLASSES])
    inputs = [
        {
            "name": "image",
            "datatype": "UINT8",
            "shape": list(tensor.shape),
            "data": tensor.ravel().tolist(),
        }
    ]
    answer = http.post("/v2/models/classifier/infer", json={"id": "mine", "inputs": inputs}).json()

    assert http.get("/v2").json()["name"] == "lifelong_ray"
    assert http.get("/v2/health/live").json() == {"live": True}
    assert http.get("/v2/health/ready").json()["ready"] is True
    assert http.get("/v2/models/classifier/versions/v1/ready").json()["ready"] is True
    assert metadata["versions"] == ["v1"]
    assert metadata["inputs"] == [{"name": "image", "datatype": "UINT8", "shape": [-1, 8, 8, 1]}]
    assert metadata["outputs"][0]["shape"] == [-1, 3]
    assert (answer["id"], answer["model_version"]) == ("mine", "v1")
    probabilities, classes = answer["outputs"]
    assert classes["data"] == list(CLASSES)
    assert probabilities["shape"] == [3, 3]
    assert np.reshape(probabilities["data"], (3, 3)).sum(1) == pytest.approx(1, abs=1e-5)
    named = http.post("/v2/models/classifier/versions/v1/infer", json={"inputs": inputs}).json()
    assert named["model_version"] == "v1"


@pytest.fixture
def triton(app: App) -> Iterator[InferenceServerClient]:
    """Triton's own client, as it comes."""
    client = InferenceServerClient(app.url.removeprefix("http://"))
    yield client
    client.close()


def as_input(values: np.ndarray, datatype: str) -> InferInput:
    tensor = InferInput("image", list(values.shape), datatype)
    tensor.set_data_from_numpy(values)
    return tensor


@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
def test_an_unmodified_triton_client_is_answered(
    triton: InferenceServerClient, images: dict[str, bytes], compression: str | None
) -> None:
    decoded = [np.asarray(Image.open(io.BytesIO(images[n])))[:, :, None] for n in CLASSES]
    encoded = np.array([images[n] for n in CLASSES], dtype=object)
    wanted = [InferRequestedOutput("class"), InferRequestedOutput("probabilities")]

    assert triton.is_server_live()
    assert triton.is_server_ready()
    assert triton.is_model_ready("classifier")
    assert triton.get_model_metadata("classifier")["inputs"][0]["datatype"] == "UINT8"
    assert "binary_tensor_data" in triton.get_server_metadata()["extensions"]
    for tensor in (as_input(np.stack(decoded), "UINT8"), as_input(encoded, "BYTES")):
        answer = triton.infer(
            "classifier",
            [tensor],
            outputs=wanted,
            request_id="mine",
            request_compression_algorithm=compression,
            response_compression_algorithm=compression,
        )
        assert [name.decode() for name in answer.as_numpy("class")] == list(CLASSES)
        assert answer.as_numpy("probabilities").shape == (3, 3)
        assert answer.as_numpy("probabilities").sum(1) == pytest.approx(1, abs=1e-5)
        assert answer.get_response()["id"] == "mine"


def test_a_triton_client_is_told_what_is_wrong(triton: InferenceServerClient) -> None:
    broken = as_input(np.array([b"no image"], dtype=object), "BYTES")
    with pytest.raises(InferenceServerException, match="not an image"):
        triton.infer("classifier", [broken])
    floats = as_input(np.zeros((1, 8, 8, 1), np.float32), "FP32")
    with pytest.raises(InferenceServerException, match="images are UINT8 pixels"):
        triton.infer("classifier", [floats])
    with pytest.raises(InferenceServerException, match="no model other"):
        triton.infer("other", [broken])


def test_an_answer_that_comes_too_late_is_not_waited_for(
    http: httpx.Client, images: dict[str, bytes]
) -> None:
    late = http.post("/predict", content=images["low"], headers=PNG | {"x-timeout-ms": "0.001"})
    wrong = http.post("/predict", content=images["low"], headers=PNG | {"x-timeout-ms": "soon"})
    good = http.post("/predict", content=images["low"], headers=PNG | {"x-timeout-ms": "20000"})

    assert (late.status_code, late.json()["error"]["code"]) == (408, "deadline_exceeded")
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (422, "bad_timeout")
    assert good.status_code == 200


def test_the_api_describes_itself(http: httpx.Client) -> None:
    paths = http.get("/openapi.json").json()["paths"]

    assert paths.keys() >= {
        "/predict",
        "/batch_predict",
        "/feedback",
        "/examples",
        "/v2",
        "/v2/health/live",
        "/v2/health/ready",
        "/v2/models/{name}",
        "/v2/models/{name}/infer",
        "/v2/models/{name}/versions/{version}/infer",
        "/admin/status",
        "/admin/rollout",
        "/admin/rollout/{verb}",
        "/admin/versions",
        "/admin/comparisons",
        "/admin/experiment",
        "/admin/experiment/end",
        "/admin/drift",
        "/admin/retrain",
    }
    assert http.get("/docs").status_code == 200


# -- bad requests -------------------------------------------------------------------------------

ID = "00000000-0000-7000-8000-000000000000.AAJ2MXRvcA"

BAD_REQUESTS: dict[str, tuple[int, str, Callable[[], dict[str, Any]]]] = {
    "not an image": (400, "not_an_image", lambda: {"content": b"hello", "headers": PNG}),
    "truncated": (400, "truncated_image", lambda: {"content": truncated_png(), "headers": PNG}),
    "empty": (400, "empty_body", lambda: {"content": b"", "headers": PNG}),
    "ten gigapixels": (
        413,
        "too_many_pixels",
        lambda: {"content": gigapixel_png(), "headers": PNG},
    ),
    "wrong type": (
        415,
        "unsupported_media_type",
        lambda: {"content": b"hello", "headers": {"content-type": "text/plain"}},
    ),
    "too large": (413, "body_too_large", lambda: {"content": b"x" * (MAX_BYTES + 1)}),
    "too large, of unknown length": (
        413,
        "body_too_large",
        lambda: {"content": in_pieces(3 * MAX_BYTES)},
    ),
    "too large, in a form": (
        413,
        "body_too_large",
        lambda: {"files": {"image": ("a.png", b"x" * 2 * MAX_BYTES, "image/png")}},
    ),
    "form without image": (
        400,
        "missing_image",
        lambda: {"files": {"picture": ("a.png", b"x", "image/png")}},
    ),
    "broken form": (
        400,
        "bad_multipart",
        lambda: {
            "content": b"--x\r\nno header\r\n\r\n",
            "headers": {"content-type": "multipart/form-data; boundary=x"},
        },
    ),
    "unknown path": (404, "http_error", lambda: {"url": "/nowhere"}),
    "wrong method": (405, "http_error", lambda: {"method": "GET"}),
    "feedback that is not JSON": (
        400,
        "not_json",
        lambda: {"url": "/feedback", "content": b"{"},
    ),
    "feedback without id": (
        422,
        "bad_request",
        lambda: {"url": "/feedback", "json": {"label": "top"}},
    ),
    "made up id": (
        404,
        "unknown_request_id",
        lambda: {"url": "/feedback", "json": {"request_id": "made-up", "label": "top"}},
    ),
    "forged id": (
        404,
        "unknown_request_id",
        lambda: {"url": "/feedback", "json": {"request_id": ID, "label": "top"}},
    ),
    "label missing": (
        422,
        "bad_label",
        lambda: {"url": "/feedback", "json": {"request_id": ID}},
    ),
    "label too long": (
        422,
        "bad_label",
        lambda: {"url": "/feedback", "json": {"request_id": ID, "label": "x" * 201}},
    ),
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_a_bad_request_gets_a_clear_error_and_the_next_good_one_its_answer(
    http: httpx.Client, images: dict[str, bytes], name: str
) -> None:
    status, code, make = BAD_REQUESTS[name]
    request = {"method": "POST", "url": "/predict", **make()}
    request["headers"] = {**request.get("headers", {}), "x-request-id": "mine"}

    response = http.request(**request)
    good = http.post("/predict", content=images["middle"], headers=PNG)

    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert (error["code"], error["request_id"]) == (code, "mine")
    assert len(error["message"]) > 5
    assert (good.status_code, good.json()["class"]) == (200, "middle")


def test_clients_that_send_a_byte_a_second_are_dropped_and_hold_up_nobody(
    app: App, http: httpx.Client, images: dict[str, bytes]
) -> None:
    head = b"POST /predict HTTP/1.1\r\nhost: here\r\ncontent-type: image/png\r\n"
    heads = [
        head + b"content-length: 1000\r\n\r\n",
        head + b"transfer-encoding: chunked\r\n\r\n",
    ]
    pieces = [b"x", b"1\r\nx\r\n"]
    address = (httpx.URL(app.url).host, httpx.URL(app.url).port)
    others, waits_s = [], []
    with contextlib.ExitStack() as stack:
        slow = [
            stack.enter_context(socket.create_connection(address, timeout=10)) for _ in range(40)
        ]
        for number, client in enumerate(slow):
            client.sendall(heads[number % 2])
        began_s = time.monotonic()
        waiting: list[socket.socket] = slow
        while waiting and time.monotonic() < began_s + 20:
            for number, client in enumerate(slow):
                if client in waiting:
                    client.sendall(pieces[number % 2])
            asked_s = time.monotonic()
            others.append(http.post("/predict", content=images["top"], headers=PNG).status_code)
            waits_s.append(time.monotonic() - asked_s)
            time.sleep(1)
            answered, _, _ = select.select(waiting, [], [], 0)
            waiting = [client for client in waiting if client not in answered]
        lasted_s = time.monotonic() - began_s
        answers = [client.recv(100) for client in slow]

    assert waiting == []
    assert 9 < lasted_s < 15
    assert {answer.split(b"\r\n")[0].split()[1] for answer in answers} == {b"408"}
    assert set(others) == {200}
    assert max(waits_s) < 1


def test_an_altered_request_id_is_refused(http: httpx.Client, images: dict[str, bytes]) -> None:
    request_id = http.post("/predict", content=images["low"], headers=PNG).json()["request_id"]
    altered = request_id[:-1] + ("A" if request_id[-1] != "A" else "B")

    response = http.post("/feedback", json={"request_id": altered, "label": "top"})

    assert (response.status_code, response.json()["error"]["code"]) == (404, "unknown_request_id")


V2_GOOD = {"name": "image", "datatype": "UINT8", "shape": [1, 2, 2, 1], "data": [0, 1, 2, 3]}


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("other/infer", {"inputs": [V2_GOOD]}, 404),
        ("classifier/versions/v9/infer", {"inputs": [V2_GOOD]}, 404),
        ("classifier/infer", {}, 400),
        ("classifier/infer", {"inputs": [V2_GOOD, V2_GOOD]}, 400),
        ("classifier/infer", {"inputs": [V2_GOOD], "id": {}}, 400),
        ("classifier/infer", {"inputs": [{**V2_GOOD, "datatype": "FP32"}]}, 400),
        ("classifier/infer", {"inputs": [{**V2_GOOD, "shape": [1, 3, 2, 1]}]}, 400),
        ("classifier/infer", {"inputs": [{**V2_GOOD, "shape": [2, 2]}]}, 400),
        ("classifier/infer", {"inputs": [{**V2_GOOD, "shape": "big"}]}, 400),
        ("classifier/infer", {"inputs": [{**V2_GOOD, "data": [0, 1, 2, 256]}]}, 400),
        ("classifier/infer", {"inputs": [{**V2_GOOD, "data": [0, 1, 2, 10**30]}]}, 400),
        ("classifier/infer", {"inputs": [{**V2_GOOD, "data": None}]}, 400),
        (
            "classifier/infer",
            {"inputs": [{**V2_GOOD, "shape": [600, 1, 1, 1], "data": [0] * 600}]},
            413,
        ),
    ],
)
def test_open_inference_errors_have_that_protocols_shape(
    http: httpx.Client, path: str, body: dict[str, Any], status: int
) -> None:
    response = http.post(f"/v2/models/{path}", json=body)

    assert response.status_code == status, response.text
    assert list(response.json()) == ["error"]
    assert isinstance(response.json()["error"], str)


# -- operators -----------------------------------------------------------------------------------


@pytest.mark.parametrize("token", [None, "Bearer wrong", "Basic b3BlcmF0b3I6", "Bearer"])
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/admin/status"),
        ("GET", "/admin/rollout"),
        ("PUT", "/admin/rollout"),
        ("POST", "/admin/rollout/promote"),
        ("GET", "/admin/versions"),
        ("GET", "/admin/comparisons"),
        ("GET", "/admin/experiment"),
        ("PUT", "/admin/experiment"),
        ("POST", "/admin/experiment/end"),
        ("GET", "/admin/drift"),
        ("POST", "/admin/retrain"),
        ("POST", "/examples"),
    ],
)
def test_operators_need_their_token(
    http: httpx.Client, method: str, path: str, token: str | None
) -> None:
    headers = {} if token is None else {"authorization": token}

    response = http.request(method, path, headers=headers)

    assert (response.status_code, response.json()["error"]["code"]) == (401, "unauthorized")


def with_steps(*steps: dict[str, Any]) -> dict[str, Any]:
    """What starts a rollout of a good version by these steps."""
    return {"candidate": "v1.1", "steps": list(steps)}


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("POST", "/admin/rollout/destroy", {}, 404, "unknown_verb"),
        ("PUT", "/admin/rollout", {"candidate": "v7"}, 404, "unknown_version"),
        ("PUT", "/admin/rollout", {"candidate": "../v1"}, 404, "unknown_version"),
        ("PUT", "/admin/rollout", {"candidate": "v1.2"}, 409, "gate_refused"),
        ("PUT", "/admin/rollout", {"candidate": "v1"}, 409, "rollout_conflict"),
        ("PUT", "/admin/rollout", {}, 422, "bad_request"),
        ("PUT", "/admin/rollout", {"candidate": "v1.1", "weight": 5}, 422, "bad_request"),
        ("PUT", "/admin/rollout", {"candidate": "v1.2", "force": "no"}, 422, "bad_request"),
        ("PUT", "/admin/rollout", {"candidate": "v1.1", "steps": 5}, 422, "bad_steps"),
        ("PUT", "/admin/rollout", {"candidate": "v1.1", "steps": [{}]}, 422, "bad_steps"),
        ("PUT", "/admin/rollout", with_steps({"setWeight": 101}), 422, "bad_steps"),
        ("PUT", "/admin/rollout", with_steps({"setWeight": 0}), 422, "bad_steps"),
        ("PUT", "/admin/rollout", with_steps({"pause": 1}, {"setWeight": 5}), 422, "bad_steps"),
        ("PUT", "/admin/rollout", with_steps({"shadow": 0.5, "pause": 1}), 422, "bad_steps"),
        ("PUT", "/admin/rollout", with_steps({"setWeight": 5, "tries": 2}), 422, "bad_steps"),
        ("POST", "/admin/rollout/rollback", {}, 409, "rollout_conflict"),
        ("POST", "/admin/rollout/promote", {}, 409, "rollout_conflict"),
    ],
)
def test_what_the_release_does_not_allow_is_refused_and_changes_nothing(
    app: App, http: httpx.Client, method: str, path: str, body: Any, status: int, code: str
) -> None:
    before = app.document()

    response = http.request(method, path, json=body, headers=app.operator)

    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert app.document() == before
    rollout = http.get("/admin/rollout", headers=app.operator).json()
    assert rollout == {"stable": "v1", "previous": None, "rollout": None}


def test_operators_see_versions_fronts_and_drift(app: App, http: httpx.Client) -> None:
    def live_fronts() -> list[str]:
        status = http.get("/admin/status", headers=app.operator).json()
        assert status["document"]["stable"] == "v1"
        assert status["front"]["warm_versions"] == ["v1"]
        fronts: list[str] = status["controller"]["live_fronts"]
        return fronts

    until(lambda: len(live_fronts()) == 2, "both fronts' heartbeats")
    versions = http.get("/admin/versions", headers=app.operator).json()["versions"]
    assert [v["version"] for v in versions] == ["v1", "v1.1", "v1.2"]
    assert http.get("/admin/drift", headers=app.operator).json()["judged"] is False


# -- labels --------------------------------------------------------------------------------------


def test_feedback_is_in_the_log_once_it_is_acknowledged(
    app: App, http: httpx.Client, images: dict[str, bytes]
) -> None:
    request_id = http.post("/predict", content=images["low"], headers=PNG).json()["request_id"]

    response = http.post(
        "/feedback", json={"request_id": request_id, "label": " wellington ", "user": "ada"}
    )

    assert response.status_code == 202
    assert response.json()["new_class_proposal"] is True
    rows = read_feedback(app.store, take_snapshot(app.store, 0.0)).rows
    [row] = [row for row in rows if row.request_id == request_id]
    assert (row.kind, row.label, row.audit) == ("feedback", "wellington", True)
    assert row.user not in {"", "ada"}


def test_a_prediction_and_its_image_are_in_the_log_soon(
    app: App, http: httpx.Client, images: dict[str, bytes]
) -> None:
    request_id = http.post("/predict", content=images["top"], headers=PNG).json()["request_id"]

    def rows() -> Any:
        found = read_predictions(app.store, take_snapshot(app.store, 0.0)).rows
        return [row for row in found if row.request_id == request_id]

    until(lambda: len(rows()) == 1, "the prediction in the log", 10.0)
    [row] = rows()
    assert (row.version, row.class_name, row.class_names) == ("v1", "top", CLASSES)
    stored = read_images(app.store, take_snapshot(app.store, 0.0), [row.content_hash])
    assert encode_png(stored[row.content_hash]) == images["top"]


def test_an_operators_example_is_in_the_log_with_its_image(
    app: App, http: httpx.Client, images: dict[str, bytes]
) -> None:
    nameless = http.post("/examples", content=images["low"], headers={**PNG, **app.operator})
    with LifelongClient(app.url, admin_token=app.secrets.admin_token) as client:
        image = client.add_example(images["low"], "low")

    assert (nameless.status_code, nameless.json()["error"]["code"]) == (422, "bad_label")
    snapshot = take_snapshot(app.store, 0.0)
    [row] = [r for r in read_feedback(app.store, snapshot).rows if r.kind == "example"]
    assert (row.label, row.content_hash) == ("low", image)
    assert image in read_images(app.store, snapshot, [image])


# -- versions change under traffic -----------------------------------------------------------------


@dataclass
class Traffic:
    """Steady users on several connections who label every answer they are asked about."""

    app: App
    images: dict[str, bytes]
    stopped: threading.Event = field(default_factory=threading.Event)
    versions: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def __enter__(self) -> Traffic:
        self.threads = [threading.Thread(target=self._use, args=(seed,)) for seed in range(4)]
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        for thread in self.threads:
            thread.join()

    def _use(self, seed: int) -> None:
        rng = random.Random(seed)
        with LifelongClient(self.app.url) as client:
            while not self.stopped.is_set():
                name = rng.choice(CLASSES)
                try:
                    answer = client.predict(self.images[name])
                    client.feedback(answer.request_id, name)
                    said = RequestIds(self.app.secrets.signing_key).verify(answer.request_id)
                    assert said.version == answer.model_version
                    assert answer.class_name == name
                except Exception as error:
                    self.failures.append(repr(error))
                else:
                    self.versions[answer.model_version] += 1
                time.sleep(0.01)


def test_versions_change_under_traffic_without_a_failed_request(
    app: App, images: dict[str, bytes]
) -> None:
    steps = [{"setWeight": 50, "min_requests": 20}]
    with (
        LifelongClient(app.url, admin_token=app.secrets.admin_token) as operator,
        Traffic(app, images) as traffic,
    ):

        def answers(version: str) -> None:
            before = traffic.versions[version]
            until(lambda: traffic.versions[version] > before + 20, f"20 answers of {version}")

        answers("v1")
        operator.start_rollout("v1.1", steps=steps, force=True, reason="the same weights")
        with pytest.raises(ApiError, match="409 rollout_conflict"):
            operator.start_rollout("v1.2", force=True)
        until(lambda: app.stable() == "v1.1", "the promotion on audit labels")
        promoted = operator.status()
        answers("v1.1")
        operator.rollout("rollback", reason="a drill")
        until(lambda: app.stable() == "v1", "the rollback")
        answers("v1")
        operator.rollout("rollback", reason="forward again")
        until(lambda: app.stable() == "v1.1", "the way forward")
        answers("v1.1")

    assert traffic.failures == []
    assert traffic.versions.keys() == {"v1", "v1.1"}
    events = ReleaseDesk(app.store, time.time).audit_trail()
    kinds = [event.what for event in events]
    assert kinds[:3] == ["created", "started", "stepped"]
    assert [k for k in kinds if k in ("promoted", "rolled_back", "aborted")] == [
        "promoted",
        "rolled_back",
        "rolled_back",
    ]
    promotion = next(event for event in events if event.what == "promoted")
    assert promotion.evidence["same"] >= 20
    assert promotion.evidence["better"] == promotion.evidence["worse"] == 0
    assert promotion.evidence["live_fronts"] == 2
    assert promoted["document"]["previous"] in (None, "v1")
    pairs = read_comparisons(app.store, take_snapshot(app.store, 0.0)).rows
    assert {row.stable_version for row in pairs} == {"v1"}
    assert {row.candidate_version for row in pairs} == {"v1.1"}


def test_an_experiment_divides_requests_is_measured_and_leaves_stable_alone(
    app: App, images: dict[str, bytes]
) -> None:
    stable = app.stable()
    other = {"v1": "v1.1", "v1.1": "v1"}[str(stable)]
    weights = {str(stable): 50, other: 50}
    with (
        LifelongClient(app.url, admin_token=app.secrets.admin_token) as operator,
        Traffic(app, images) as traffic,
    ):
        operator.start_experiment(weights, end_s=time.time() + 600, reason="a drill")
        until(lambda: traffic.versions[other] > 50, f"50 answers of {other}")
        with pytest.raises(ApiError, match="409 rollout_conflict"):
            operator.start_rollout("v1.2", force=True)
        mine = [operator.predict(images["top"], session_id="ada").model_version for _ in range(10)]
        named = operator.predict(images["top"], variant=other)
        running = operator.experiment()
        operator.end_experiment(reason="seen enough")
        until(lambda: operator.experiment() is None, "the end of the experiment")
        until(
            lambda: {operator.predict(images["top"]).model_version for _ in range(20)} == {stable},
            "the return to stable",
        )

    assert traffic.failures == []
    assert app.stable() == stable
    assert len(set(mine)) == 1
    assert (named.model_version, named.variant) == (other, other)
    assert running is not None
    ended = ReleaseDesk(app.store, time.time).experiment(running["id"])
    assert ended.result is not None
    assert ended.result.is_split_by_weight
    assert [arm.version for arm in ended.result.arms] == [stable, other]
    for arm in ended.result.arms:
        assert arm.requests > 20
        assert arm.labelled > 20
        assert arm.correct == arm.labelled


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("GET", "/admin/comparisons?last=-1", None, 422, "bad_request"),
        ("GET", "/admin/comparisons?last=x", None, 422, "bad_request"),
        ("GET", "/admin/comparisons?hours=0", None, 422, "bad_request"),
        ("GET", "/admin/comparisons?rollout=r9", None, 404, "unknown_rollout"),
        ("GET", "/admin/comparisons?rollout=../current", None, 404, "unknown_rollout"),
        ("GET", "/admin/experiment?id=e9", None, 404, "unknown_experiment"),
        ("POST", "/admin/experiment/end", {}, 409, "rollout_conflict"),
        ("POST", "/admin/experiment/end", {"now": True}, 422, "bad_request"),
        ("PUT", "/admin/experiment", {}, 422, "bad_experiment"),
        ("PUT", "/admin/experiment", {"v1": 60, "v1.1": 60}, 422, "bad_experiment"),
        ("PUT", "/admin/experiment", {"v1": 60, "v9": 40}, 404, "unknown_version"),
        ("PUT", "/admin/experiment", {"v1": 60, "v1.2": 40}, 409, "gate_refused"),
    ],
)
def test_an_experiment_that_cannot_be_is_refused_and_changes_nothing(
    app: App,
    http: httpx.Client,
    method: str,
    path: str,
    body: dict[str, Any] | None,
    status: int,
    code: str,
) -> None:
    if body and "v1" in body:
        arms = [{"version": version, "weight": weight} for version, weight in body.items()]
        body = {"arms": arms, "end_s": time.time() + 60}
    before = app.document()

    response = http.request(method, path, json=body, headers=app.operator)

    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert app.document() == before


def test_comparisons_of_a_rollout_are_summed_up(app: App, http: httpx.Client) -> None:
    events = ReleaseDesk(app.store, time.time).audit_trail()
    started = next(event for event in events if event.what == "started")

    response = http.get(
        "/admin/comparisons",
        params={"rollout": f"v1.1-{started.intent_id}", "last": 3},
        headers=app.operator,
    )

    body = response.json()
    assert response.status_code == 200
    [summary] = body["rollouts"]
    assert len(body["comparisons"]) == 3
    assert summary["agreement"] == 1.0
    assert summary["confidence_difference"] == pytest.approx(0.0, abs=1e-5)
    assert summary["audited"]["both_right"] >= 20
    assert summary["stable_latency"]["median_ms"] > 0

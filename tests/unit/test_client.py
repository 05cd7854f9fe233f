"""The Python client against a server that records what it is sent."""

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from lifelong_ray.client import ApiError, ClientPrediction, LifelongClient
from lifelong_ray.types import LifelongError, ServingError
from tests.conftest import free_port

ANSWER = {
    "request_id": "r1",
    "class": "7",
    "confidence": 0.9,
    "top_k": [],
    "model_version": "v1",
    "variant": "stable",
    "audit": True,
}


@dataclass
class Sent:
    method: str
    path: str
    query: dict[str, list[str]]
    headers: dict[str, str]
    body: bytes


@dataclass
class Server:
    """Answers every request the same way and keeps what came in."""

    url: str
    status: int = 200
    body: bytes = b"{}"
    promised_bytes: int = 0
    requests: list[Sent] = field(default_factory=list)

    def answer(self, status: int, body: Any) -> None:
        self.status = status
        self.body = body if isinstance(body, bytes) else json.dumps(body).encode()


@pytest.fixture
def server() -> Iterator[Server]:
    class Handler(BaseHTTPRequestHandler):
        def serve(self) -> None:
            address = urlsplit(self.path)
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            headers = {k.lower(): v for k, v in self.headers.items()}
            found.requests.append(
                Sent(self.command, address.path, parse_qs(address.query), headers, body)
            )
            self.send_response(found.status)
            self.send_header("content-length", str(found.promised_bytes or len(found.body)))
            self.end_headers()
            self.wfile.write(found.body)

        do_GET = do_POST = do_PUT = serve  # noqa: N815 - the base class's

        def log_message(self, format: str, *args: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    found = Server(f"http://127.0.0.1:{http.server_address[1]}")
    thread = threading.Thread(target=http.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield found
    finally:
        http.shutdown()
        http.server_close()
        thread.join()


@pytest.fixture
def client(server: Server) -> Iterator[LifelongClient]:
    with LifelongClient(server.url, admin_token="secret") as opened:
        yield opened


def test_an_image_is_sent_as_it_is_and_its_answer_read(
    server: Server, client: LifelongClient
) -> None:
    server.answer(200, ANSWER)

    answer = client.predict(b"bytes", "image/jpeg", session_id="ada", canary="never")

    sent = server.requests[0]
    assert answer == ClientPrediction("r1", "7", 0.9, "v1", "stable", audit=True)
    assert (sent.method, sent.path, sent.body) == ("POST", "/predict", b"bytes")
    assert sent.headers["content-type"] == "image/jpeg"
    assert sent.headers["x-session-id"] == "ada"
    assert sent.headers["x-canary"] == "never"


def test_nothing_is_said_about_session_or_canary_unless_given(
    server: Server, client: LifelongClient
) -> None:
    server.answer(200, ANSWER)

    client.predict(b"bytes")

    assert not {"x-session-id", "x-canary"} & server.requests[0].headers.keys()


def test_feedback_names_the_request(server: Server, client: LifelongClient) -> None:
    server.answer(202, {"status": "recorded"})

    client.feedback("r1", "8", user="ada")

    sent = server.requests[0]
    assert sent.path == "/feedback"
    assert json.loads(sent.body) == {"request_id": "r1", "label": "8", "user": "ada"}


def test_an_example_travels_with_its_label_and_the_token(
    server: Server, client: LifelongClient
) -> None:
    server.answer(202, {"content_hash": "ab"})

    assert client.add_example(b"bytes", "T-shirt/top & more") == "ab"

    sent = server.requests[0]
    assert (sent.path, sent.query) == ("/examples", {"label": ["T-shirt/top & more"]})
    assert sent.headers["authorization"] == "Bearer secret"


def test_without_a_token_none_is_sent(server: Server) -> None:
    with LifelongClient(server.url) as client:
        client.status()

    assert "authorization" not in server.requests[0].headers


def test_operators_start_and_end_rollouts(server: Server, client: LifelongClient) -> None:
    client.start_rollout("v1.1", steps=[{"setWeight": 5}], force=True, reason="why")
    client.start_rollout("v1.2")
    client.rollout("abort", reason="no")
    client.drift()

    first, second, third, fourth = server.requests
    assert (first.method, first.path) == ("PUT", "/admin/rollout")
    assert json.loads(first.body) == {
        "candidate": "v1.1",
        "force": True,
        "reason": "why",
        "steps": [{"setWeight": 5}],
    }
    assert "steps" not in json.loads(second.body)
    assert (third.path, json.loads(third.body)) == ("/admin/rollout/abort", {"reason": "no"})
    assert (fourth.method, fourth.path) == ("GET", "/admin/drift")


@pytest.mark.parametrize(
    ("status", "body", "code", "message"),
    [
        (
            422,
            {"error": {"code": "bad_label", "message": "too long", "request_id": ""}},
            "bad_label",
            "too long",
        ),
        (502, b"<html>Bad gateway</html>", "http_error", "Bad gateway"),
        (500, {"detail": "oops"}, "http_error", "oops"),
        (500, {"error": "oops"}, "http_error", "oops"),
        (500, ["oops"], "http_error", "oops"),
        (503, b"", "http_error", "503"),
    ],
)
def test_a_refusal_is_an_error_with_its_code(
    server: Server, client: LifelongClient, status: int, body: Any, code: str, message: str
) -> None:
    server.answer(status, body)

    with pytest.raises(ApiError, match=message) as caught:
        client.predict(b"bytes")

    assert (caught.value.status, caught.value.code) == (status, code)
    assert isinstance(caught.value, LifelongError)


def test_an_answer_that_is_no_json_is_an_error(server: Server, client: LifelongClient) -> None:
    server.answer(200, b"hello")

    with pytest.raises(ApiError, match=r"200 .*hello"):
        client.predict(b"bytes")


def test_a_server_that_is_not_there_is_named() -> None:
    port = free_port()

    with (
        LifelongClient(f"http://127.0.0.1:{port}", timeout_s=2.0) as client,
        pytest.raises(ServingError, match=rf"127\.0\.0\.1:{port}.* does not answer POST /predict"),
    ):
        client.predict(b"bytes")


def test_a_server_that_hangs_up_is_an_error_of_ours(server: Server) -> None:
    server.answer(200, b"")
    server.promised_bytes = 10

    with (
        LifelongClient(server.url) as client,
        pytest.raises(ServingError, match="does not answer GET /admin/status"),
    ):
        client.status()


def test_operators_start_show_and_end_experiments(server: Server, client: LifelongClient) -> None:
    server.answer(200, {"experiment": {"id": "e1"}})

    client.start_experiment({"v1": 80, "v1.1": 20}, end_s=9.0, reason="why")
    shown = client.experiment("e1")
    client.end_experiment(reason="done")

    started, asked, ended = server.requests
    assert (started.method, started.path) == ("PUT", "/admin/experiment")
    assert json.loads(started.body)["arms"] == [
        {"version": "v1", "weight": 80},
        {"version": "v1.1", "weight": 20},
    ]
    assert (asked.query, shown) == ({"id": ["e1"]}, {"id": "e1"})
    assert (ended.path, json.loads(ended.body)) == ("/admin/experiment/end", {"reason": "done"})


def test_comparisons_are_those_of_a_rollout_or_of_some_hours(
    server: Server, client: LifelongClient
) -> None:
    server.answer(200, {"rollouts": []})

    client.comparisons(rollout="r1", last=5)
    client.comparisons(hours=2)

    assert server.requests[0].query == {"rollout": ["r1"], "last": ["5"]}
    assert server.requests[1].query == {"hours": ["2"], "last": ["100"]}


def test_an_arm_may_be_named(server: Server, client: LifelongClient) -> None:
    server.answer(200, ANSWER)

    client.predict(b"bytes", variant="v1.2")

    assert server.requests[0].headers["x-variant"] == "v1.2"

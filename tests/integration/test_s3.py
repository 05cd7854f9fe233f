"""The store and the log against a real S3 server in a process of its own."""

import http.client
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import numpy as np
import pytest

from lifelong_ray.config import FeedbackConfig, StoreConfig
from lifelong_ray.feedback import (
    CleanImage,
    LogTail,
    LogWriter,
    content_hash,
    load_secrets,
    read_feedback,
    read_images,
    read_predictions,
    take_snapshot,
)
from lifelong_ray.storage import S3Store, Store, open_store
from lifelong_ray.types import (
    AlreadyExistsError,
    ConfigError,
    ConflictError,
    Feedback,
    NotFoundError,
    Prediction,
    StorageError,
)
from tests.conftest import free_port
from tests.integration.conftest import BUCKET


@pytest.fixture
def config(endpoint_url: str) -> StoreConfig:
    return StoreConfig(url=f"s3://{BUCKET}/{uuid.uuid4().hex}/deep", endpoint_url=endpoint_url)


@pytest.fixture
def store(config: StoreConfig) -> Store:
    return open_store(config)


def test_what_was_put_is_read_back_and_created_once(store: Store) -> None:
    store.put_new("versions/v1/model", b"weights")

    with pytest.raises(AlreadyExistsError, match="versions/v1/model"):
        store.put_new("versions/v1/model", b"other")

    assert store.read("versions/v1/model") == b"weights"
    assert store.exists("versions/v1/model")


def test_an_empty_object_is_an_object(store: Store) -> None:
    store.put_new("empty", b"")

    assert store.read("empty") == b""
    with pytest.raises(AlreadyExistsError):
        store.put_new("empty", b"x")


def test_a_missing_object_says_so(store: Store) -> None:
    with pytest.raises(NotFoundError, match="gone"):
        store.read("gone")
    assert not store.exists("gone")
    store.delete("gone")


def test_a_swap_wins_once(store: Store) -> None:
    first = store.swap("doc", b"1", None)
    second = store.swap("doc", b"2", first)

    with pytest.raises(ConflictError):
        store.swap("doc", b"3", first)
    with pytest.raises(ConflictError):
        store.swap("doc", b"3", None)

    assert store.read_tagged("doc") == (b"2", second)
    store.delete("doc")
    with pytest.raises(ConflictError):
        store.swap("doc", b"3", second)


def test_a_prefix_is_a_plain_string_and_listings_are_fresh(
    store: Store, config: StoreConfig
) -> None:
    other = open_store(config)
    assert other.list("") == []
    for key in ("versions/v1/m", "versions/v1.1/m", "other"):
        store.put_new(key, b"")

    assert other.list("versions/v1") == ["versions/v1.1/m", "versions/v1/m"]
    assert other.list("versions/v1/") == ["versions/v1/m"]
    assert other.list("") == ["other", "versions/v1.1/m", "versions/v1/m"]


def test_listings_longer_than_a_page_are_complete(store: Store) -> None:
    assert isinstance(store, S3Store)
    keys = [f"many/{n:04}" for n in range(1_005)]

    def put_some(start: int) -> None:
        for key in keys[start::8]:
            store.put_new(key, b"")

    threads = [threading.Thread(target=put_some, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert store.list("many/") == keys


def test_no_swap_is_lost_among_many_clients(store: Store, config: StoreConfig) -> None:
    store.put_new("counter", b"0")

    def add_some() -> None:
        mine = open_store(config)
        for _ in range(5):
            while True:
                data, tag = mine.read_tagged("counter")
                try:
                    mine.swap("counter", str(int(data) + 1).encode(), tag)
                    break
                except ConflictError:
                    continue

    threads = [threading.Thread(target=add_some) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert store.read("counter") == b"20"


def test_the_probe_leaves_nothing_behind(store: Store, config: StoreConfig) -> None:
    assert isinstance(store, S3Store)

    store.probe()

    assert store._fs.find(config.url) == []


def test_keys_are_checked_as_on_disk(store: Store) -> None:
    for key in ("", "/a", "a/../b", ".hidden"):
        with pytest.raises(ValueError, match="key"):
            store.put_new(key, b"")


def test_a_missing_bucket_and_a_missing_server_are_explained(endpoint_url: str) -> None:
    with pytest.raises(StorageError, match="bucket nowhere does not exist"):
        open_store(StoreConfig(url="s3://nowhere/x", endpoint_url=endpoint_url))
    dead = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(StorageError, match="s3://b/x"):
        open_store(StoreConfig(url="s3://b/x", endpoint_url=dead))


def test_a_shared_store_keeps_no_secrets(store: Store) -> None:
    with pytest.raises(ConfigError, match="LIFELONG_SIGNING_KEY is not set"):
        load_secrets(store, {})


# ---------------------------------------------------------------- the log


def test_the_log_is_written_and_read_on_s3(store: Store) -> None:
    now_s = time.time()
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    name = content_hash(pixels)
    answer = Prediction(
        "r1", now_s, name, "cat", (0.5,), ("cat",), "v1", "stable", "", 1.0, True, 1.0
    )
    label = Feedback("f1", now_s, "feedback", "dog", "r1", "", "ada", True)
    tail = LogTail(store, "feedback", now_s)
    writer = LogWriter(store, FeedbackConfig(group_commit_s=0.001), "front-1")
    writer.start()

    assert tail.poll() == []
    writer.log_prediction(answer, CleanImage.of(pixels))
    writer.record_feedback([label], ())
    writer.close()

    snapshot = take_snapshot(store, now_s)
    assert read_predictions(store, snapshot).rows == (answer,)
    assert read_feedback(store, snapshot).rows == (label,)
    np.testing.assert_array_equal(read_images(store, snapshot, [name])[name], pixels)
    assert tail.poll() == [label]
    assert tail.poll() == []


# ---------------------------------------------------------------- misbehaving servers


class Proxy(BaseHTTPRequestHandler):
    """Passes requests on, after dropping headers, and may lose or replace answers."""

    protocol_version = "HTTP/1.1"
    server_port: ClassVar[int]
    dropped_headers: ClassVar[set[str]] = set()
    lose_answers_to_puts: ClassVar[int] = 0
    busy_puts: ClassVar[int] = 0

    def pass_on(self) -> None:
        kind = type(self)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.command == "PUT" and kind.busy_puts:
            kind.busy_puts -= 1
            self.reply(409, b"<Error><Code>ConditionalRequestConflict</Code></Error>", {})
            return
        kept = {k: v for k, v in self.headers.items() if k.lower() not in self.dropped_headers}
        upstream = http.client.HTTPConnection("127.0.0.1", self.server_port, timeout=10)
        try:
            upstream.request(self.command, self.path, body, kept)
            answer = upstream.getresponse()
            content = answer.read()
            if self.command == "PUT" and kind.lose_answers_to_puts:
                kind.lose_answers_to_puts -= 1
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            self.reply(answer.status, content, dict(answer.getheaders()))
        finally:
            upstream.close()

    def reply(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        own = {"content-length", "transfer-encoding", "connection", "server", "date"}
        for name, value in headers.items():
            if name.lower() not in own:
                self.send_header(name, value)
        length = headers.get("Content-Length", "0") if self.command == "HEAD" else len(content)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = pass_on  # noqa: N815 - the base class's

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def proxy(server_port: int, config: StoreConfig) -> Iterator[tuple[type[Proxy], StoreConfig]]:
    class Own(Proxy):
        pass

    Own.server_port = server_port
    server = ThreadingHTTPServer(("127.0.0.1", 0), Own)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield (
            Own,
            config.model_copy(
                update={"endpoint_url": f"http://127.0.0.1:{server.server_address[1]}"}
            ),
        )
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.parametrize("header", ["If-None-Match", "If-Match"])
def test_a_server_that_ignores_conditions_is_refused(
    proxy: tuple[type[Proxy], StoreConfig], header: str
) -> None:
    handler, config = proxy
    handler.dropped_headers = {header.lower()}

    with pytest.raises(ConfigError, match=f"ignores {header}, so two writers could both win"):
        open_store(config)


def test_a_write_whose_answer_is_lost_looks_like_a_lost_race(
    proxy: tuple[type[Proxy], StoreConfig],
) -> None:
    handler, config = proxy
    store = open_store(config)
    tag = store.swap("doc", b"1, nonce a", None)
    handler.lose_answers_to_puts = 1

    with pytest.raises(ConflictError):
        store.swap("doc", b"2, nonce b", tag)

    assert store.read("doc") == b"2, nonce b"


def test_feedback_whose_answer_is_lost_is_acknowledged_and_read_once(
    proxy: tuple[type[Proxy], StoreConfig],
) -> None:
    handler, config = proxy
    store = open_store(config)
    writer = LogWriter(store, FeedbackConfig(group_commit_s=0.001), "w")
    handler.lose_answers_to_puts = 1

    writer.record_feedback([Feedback("f1", 0.0, "feedback", "x", "r1", "", "", False)], ())

    assert len(read_feedback(store, take_snapshot(store, 0.0)).rows) == 1


def test_a_conflict_under_way_is_tried_again(proxy: tuple[type[Proxy], StoreConfig]) -> None:
    handler, config = proxy
    store = open_store(config)
    handler.busy_puts = 2

    store.put_new("a", b"x")

    assert store.read("a") == b"x"
    assert handler.busy_puts == 0

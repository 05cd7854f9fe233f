"""Drives an HTTP server with a fixed number of connections, each waiting for its answer.

A closed loop: a connection sends its next request once the last one is answered, so that what
is counted is what the server can do with so many clients. Requests are bytes prepared before
the clock starts, and one event loop reads the answers: on a machine that client and server share,
the client must cost little, and the same for every server.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from time import perf_counter

import numpy as np

_HEAD_END = b"\r\n\r\n"
_LAST_CHUNK = b"0\r\n\r\n"


@dataclass(frozen=True)
class Load:
    """What was answered.

    Attributes:
        seconds: How long was measured.
        latencies_ms: Of every answer with status 200 that came in that time.
        errors: Other answers and broken connections, by what they were.
    """

    seconds: float
    latencies_ms: tuple[float, ...]
    errors: dict[str, int]

    @property
    def requests_per_s(self) -> float:
        """Good answers per second."""
        return len(self.latencies_ms) / self.seconds

    @property
    def num_errors(self) -> int:
        """All that was not a good answer."""
        return sum(self.errors.values())

    def latency_ms(self, quantile: float) -> float | None:
        """A quantile of the good answers' latency; None without any."""
        if not self.latencies_ms:
            return None
        return float(np.quantile(self.latencies_ms, quantile))


def post(path: str, body: bytes, content_type: str, headers: str = "") -> bytes:
    """A whole HTTP/1.1 request that keeps its connection."""
    head = (
        f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: {content_type}\r\n"
        f"content-length: {len(body)}\r\n{headers}\r\n"
    )
    return head.encode() + body


async def drive(
    port: int,
    requests: Iterator[bytes],
    *,
    connections: int,
    seconds: float,
    warm_up_s: float = 1.0,
    check: Callable[[bytes], str] | None = None,
) -> Load:
    """Send `requests` in turn over so many connections and return what came back.

    Args:
        port: On 127.0.0.1.
        requests: Whole requests, as `post` makes them; never ends.
        connections: How many are open, each with one request under way.
        seconds: How long is measured, after the warm-up.
        warm_up_s: How long before that.
        check: Given the body of a good answer, says what is wrong with it, or nothing.
    """
    began_s = perf_counter() + warm_up_s
    tally = _Tally(requests, began_s, began_s + seconds, check)
    loop = asyncio.get_running_loop()

    async def keep_one_open() -> None:
        while perf_counter() < tally.until_s:
            try:
                _, connection = await loop.create_connection(
                    lambda: _Connection(tally), "127.0.0.1", port
                )
            except OSError as error:
                tally.failed(type(error).__name__)
                await asyncio.sleep(0.05)
                continue
            await connection.ended

    await asyncio.gather(*(keep_one_open() for _ in range(connections)))
    return Load(seconds, tuple(tally.latencies_ms), dict(tally.errors))


@dataclass
class _Tally:
    requests: Iterator[bytes]
    from_s: float
    until_s: float
    check: Callable[[bytes], str] | None
    latencies_ms: list[float] = field(default_factory=list)
    errors: dict[str, int] = field(default_factory=dict)

    def failed(self, what: str) -> None:
        if self.from_s <= perf_counter() < self.until_s:
            self.errors[what] = self.errors.get(what, 0) + 1


class _Connection(asyncio.Protocol):
    """One connection: one request under way until time is up."""

    def __init__(self, tally: _Tally) -> None:
        self._tally = tally
        self._received = b""
        self._sent_s = 0.0
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._send()

    def data_received(self, data: bytes) -> None:
        self._received += data
        answer = _whole_answer(self._received)
        if answer is None:
            return
        self._received = b""
        now_s = perf_counter()
        status, body = answer
        tally = self._tally
        if tally.from_s <= now_s < tally.until_s:
            wrong = f"status {status}" if status != 200 else ""
            if not wrong and tally.check is not None:
                wrong = tally.check(body)
            if wrong:
                tally.failed(wrong)
            else:
                tally.latencies_ms.append((now_s - self._sent_s) * 1_000)
        if now_s < tally.until_s:
            self._send()
        else:
            self._transport.close()

    def connection_lost(self, _: Exception | None) -> None:
        if perf_counter() < self._tally.until_s:
            self._tally.failed("connection lost")
        if not self.ended.done():
            self.ended.set_result(None)

    def _send(self) -> None:
        self._sent_s = perf_counter()
        self._transport.write(next(self._tally.requests))


def _whole_answer(received: bytes) -> tuple[int, bytes] | None:
    """Status and body once all of an answer is there."""
    end = received.find(_HEAD_END)
    if end < 0:
        return None
    head, body = received[:end].lower(), received[end + len(_HEAD_END) :]
    place = head.find(b"content-length:")
    if place >= 0:
        length = int(head[place + 15 :].split(b"\r\n", 1)[0])
        return (int(head[9:12]), body) if len(body) >= length else None
    if b"transfer-encoding: chunked" in head:
        return (int(head[9:12]), body) if body.endswith(_LAST_CHUNK) else None
    return int(head[9:12]), body


@dataclass(frozen=True)
class Sent:
    """One request of a paced load.

    Attributes:
        due_s: When it was to be sent, by `time.perf_counter`.
        latency_ms: From then until its answer was there; a wait for a free connection counts.
        wrong: What was wrong with the answer; empty where it was good.
    """

    due_s: float
    latency_ms: float
    wrong: str


class Pace:
    """An open loop: requests come at their times, whether the server keeps up or not.

    Answers are looked at when the load has ended, so that the client costs as little as it can.

    Args:
        port: On 127.0.0.1.
        requests: Whole requests, as `post` makes them, sent in turn.
        per_s: How many are sent each second.
        connections: How many may be under way; more wait, and their waiting counts.
        check: Given the body of a good answer, says what is wrong with it, or nothing.
    """

    def __init__(
        self,
        port: int,
        requests: Sequence[bytes],
        *,
        per_s: float,
        connections: int = 64,
        check: Callable[[bytes], str] | None = None,
    ) -> None:
        self._port = port
        self._requests = cycle(requests)
        self._gap_s = 1 / per_s
        self._connections = connections
        self._check = check
        self._due: deque[float] = deque()
        self._idle: list[_PacedConnection] = []
        self._answers: list[tuple[float, float, int, bytes]] = []
        self.sent: list[Sent] = []

    async def run(self, until: Callable[[], bool]) -> None:
        """Send until the time has come, and wait for the last answers."""
        loop = asyncio.get_running_loop()
        opened = [
            await loop.create_connection(lambda: _PacedConnection(self), "127.0.0.1", self._port)
            for _ in range(self._connections)
        ]
        due_s = perf_counter()
        while not until():
            now_s = perf_counter()
            while due_s <= now_s:
                self._due.append(due_s)
                due_s += self._gap_s
            while self._due and self._idle:
                self._idle.pop().send(self._due.popleft())
            await asyncio.sleep(0.001)
        deadline_s = perf_counter() + 10.0
        while (self._due or len(self._idle) < len(opened)) and perf_counter() < deadline_s:
            await asyncio.sleep(0.01)
        for transport, _ in opened:
            transport.close()
        self.sent = [self._judged(*answer) for answer in self._answers]
        self._answers.clear()

    def between(self, from_s: float, until_s: float) -> list[Sent]:
        """What was due in a stretch of time."""
        return [one for one in self.sent if from_s <= one.due_s < until_s]

    def answered(
        self, connection: _PacedConnection, due_s: float, status: int, body: bytes
    ) -> None:
        """Note an answer, and give its connection something to do."""
        self._answers.append((due_s, perf_counter(), status, body))
        if status == 0:
            return
        if self._due:
            connection.send(self._due.popleft())
        else:
            self._idle.append(connection)

    def ready(self, connection: _PacedConnection) -> None:
        """Note a connection without a request."""
        self._idle.append(connection)

    def next_request(self) -> bytes:
        """What is sent next."""
        return next(self._requests)

    def _judged(self, due_s: float, at_s: float, status: int, body: bytes) -> Sent:
        wrong = "" if status == 200 else f"status {status}" if status else "connection lost"
        if not wrong and self._check is not None:
            wrong = self._check(body)
        return Sent(due_s, (at_s - due_s) * 1_000, wrong)


class _PacedConnection(asyncio.Protocol):
    def __init__(self, pace: Pace) -> None:
        self._pace = pace
        self._received = b""
        self._due_s = 0.0
        self._waits = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._pace.ready(self)

    def send(self, due_s: float) -> None:
        self._due_s, self._waits = due_s, True
        self._transport.write(self._pace.next_request())

    def data_received(self, data: bytes) -> None:
        self._received += data
        answer = _whole_answer(self._received)
        if answer is not None:
            self._received, self._waits = b"", False
            self._pace.answered(self, self._due_s, *answer)

    def connection_lost(self, _: Exception | None) -> None:
        if self._waits:
            self._pace.answered(self, self._due_s, 0, b"")

"""The client process of the demo: sends images at a steady rate and labels some answers.

Runs as ``python -m lifelong_ray.demo.traffic``; knows the API and the true labels,
nothing else. Takes the name of the pool to send from, or ``stop``, on standard input;
writes one JSON line per request to ``--log``.
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, TextIO

import httpx
import numpy as np
import typer

from lifelong_ray.datasets import LabelledImages
from lifelong_ray.feedback import encode_png

_TIMEOUT_S = 30.0
# A client that queued without end while the server is slow would, on two cores, be what keeps
# it slow: the connection pool looks through all that waits at every answer.
_MOST_UNDER_WAY = 32
POOLS = ("calm", "changed", "later")


@dataclass(frozen=True)
class SentRequest:
    """One line of the client's log.

    Attributes:
        at_s: Unix time of the answer.
        changed: Whether the image was from the changed world.
        label: The true class.
        answer: The class answered, or ``""``.
        version: The answering version, or ``""``.
        variant: The arm, or ``""``.
        latency_ms: From sending to the answer, milliseconds.
        audit: Whether the server asked for a label.
        labelled: Whether feedback was given and acknowledged.
        failure: What went wrong, or ``""``.
    """

    at_s: float
    changed: bool
    label: str
    answer: str
    version: str
    variant: str
    latency_ms: float
    audit: bool
    labelled: bool
    failure: str


def save_pools(
    path: Path, calm: LabelledImages, changed: LabelledImages, later: LabelledImages
) -> None:
    """Write the pools as encoded images for the client process."""
    pools = {
        name: [
            (encode_png(image).hex(), label)
            for image, label in zip(p.images, p.labels, strict=True)
        ]
        for name, p in zip(POOLS, (calm, changed, later), strict=True)
    }
    path.write_text(json.dumps(pools), encoding="utf-8")


def read_log(path: Path) -> list[SentRequest]:
    """Read the client's log, leaving out a line that is still being written."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            rows.append(SentRequest(**json.loads(line)))
    return rows


class _Client:
    def __init__(
        self, http: httpx.AsyncClient, log: TextIO, rng: np.random.Generator, correct_share: float
    ) -> None:
        self._http = http
        self._log = log
        self._rng = rng
        self._correct_share = correct_share

    async def send(self, image: bytes, label: str, *, changed: bool) -> None:
        started_s = time.time()
        body: dict[str, Any] = {}
        labelled = False
        failure = ""
        latency_ms = 0.0
        try:
            response = await self._http.post(
                "/predict", content=image, headers={"content-type": "image/png"}
            )
            latency_ms = (time.time() - started_s) * 1_000
            if response.status_code != 200:
                failure = f"predict {response.status_code}: {response.text[:200]}"
            else:
                body = response.json()
                wrong = body["class"] != label
                if body["audit"] or (wrong and self._rng.random() < self._correct_share):
                    vote = {"request_id": body["request_id"], "label": label}
                    answer = await self._http.post("/feedback", json=vote)
                    labelled = answer.status_code == 202
                    if not labelled:
                        failure = f"feedback {answer.status_code}: {answer.text[:200]}"
        except Exception as error:  # noqa: BLE001 - whatever it was, this request failed
            failure = f"{type(error).__name__}: {error}"
        row = SentRequest(
            at_s=time.time(),
            changed=changed,
            label=label,
            answer=body.get("class", ""),
            version=body.get("model_version", ""),
            variant=body.get("variant", ""),
            latency_ms=round(latency_ms, 2),
            audit=bool(body.get("audit", False)),
            labelled=labelled,
            failure=failure,
        )
        self._log.write(json.dumps(asdict(row)) + "\n")
        self._log.flush()


@dataclass
class _Orders:
    """What the parent process wants; written by a thread, read by the sender."""

    pool: str = POOLS[0]
    stopped: bool = False

    def listen(self) -> None:
        """Follow standard input until told to stop, or until the parent is gone."""
        for line in sys.stdin:
            if line.strip() in POOLS:
                self.pool = line.strip()
            elif line.strip() == "stop":
                break
        self.stopped = True


async def _send_steadily(
    url: str,
    pools: dict[str, list[tuple[bytes, str]]],
    log: TextIO,
    orders: _Orders,
    *,
    rate: float,
    correct_share: float,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    positions = dict.fromkeys(POOLS, 0)
    sequences = {name: rng.permutation(len(pool)) for name, pool in pools.items()}
    limits = httpx.Limits(max_connections=_MOST_UNDER_WAY)
    free = asyncio.Semaphore(_MOST_UNDER_WAY)
    async with httpx.AsyncClient(base_url=url, timeout=_TIMEOUT_S, limits=limits) as http:
        client = _Client(http, log, rng, correct_share)
        under_way: set[asyncio.Task[None]] = set()
        due_s = time.monotonic()
        while not orders.stopped:
            await free.acquire()
            name = orders.pool
            image, label = pools[name][sequences[name][positions[name] % len(pools[name])]]
            positions[name] += 1
            task = asyncio.create_task(client.send(image, label, changed=name != POOLS[0]))
            under_way.add(task)
            task.add_done_callback(under_way.discard)
            task.add_done_callback(lambda _: free.release())
            due_s = max(due_s + 1 / rate, time.monotonic() - 1.0)
            await asyncio.sleep(max(0.0, due_s - time.monotonic()))
        await asyncio.gather(*under_way)


def main(
    url: Annotated[str, typer.Option(help="Base URL of the application.")],
    pools: Annotated[Path, typer.Option(help="File written by save_pools.")],
    log: Annotated[Path, typer.Option(help="JSON lines, one per request.")],
    rate: Annotated[float, typer.Option(help="Requests per second.")] = 40.0,
    correct_share: Annotated[
        float, typer.Option(help="Share of the wrong answers, beside the audit, corrected.")
    ] = 0.7,
    seed: Annotated[int, typer.Option(help="Decides order and corrections.")] = 0,
) -> None:
    """Send images until told to stop."""
    loaded = {
        name: [(bytes.fromhex(image), label) for image, label in pool]
        for name, pool in json.loads(pools.read_text(encoding="utf-8")).items()
    }
    orders = _Orders()
    threading.Thread(target=orders.listen, daemon=True).start()
    with log.open("a", encoding="utf-8") as out:
        asyncio.run(
            _send_steadily(
                url, loaded, out, orders, rate=rate, correct_share=correct_share, seed=seed
            )
        )


if __name__ == "__main__":
    typer.run(main)

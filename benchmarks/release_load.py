"""What users notice of a release: version changes, rollbacks and a shadow that stalls, under load.

    python benchmarks/release_load.py --out benchmarks/results/release_load.json

One lifelong_ray application serves a tiny model. Requests come at a share of what it can do, in an
open loop, so that a server that falls behind is seen to. Stretches of the same run are compared:
those around a change with those between changes, those with a stalled slot with those without.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import httpx
import numpy as np
import typer
from common import set_up, table, write
from load import Pace, Sent, drive
from servers import CASES, SERVERS, bodies, request, running, served, until_it_answers

from lifelong_ray.config import Config
from lifelong_ray.feedback import load_secrets, read_request_id
from lifelong_ray.learning import Learner
from lifelong_ray.release import Registry
from lifelong_ray.storage import open_store

_ROOT = Path(__file__).resolve().parent.parent
_CASE, _SERVER = CASES["tiny-png"], SERVERS["lifelong_ray"]
_SETTLE_S = 1.0
_IMAGES = 64
_OTHER = "v1.1"


def main(
    changes: Annotated[int, typer.Option(help="Promotions.")] = 20,
    rollbacks: Annotated[int, typer.Option(help="Rollbacks.")] = 5,
    share: Annotated[float, typer.Option(help="Of capacity, during changes.")] = 0.7,
    stall_share: Annotated[float, typer.Option(help="Of capacity, while the slot stalls.")] = 0.5,
    stalls: Annotated[int, typer.Option(help="Times that the slot stalls.")] = 3,
    seconds: Annotated[float, typer.Option(help="Of a stretch without change.")] = 6.0,
    out: Annotated[Path | None, typer.Option(help="JSON to write.")] = None,
) -> None:
    """Measure both."""
    # A stalled slot would end its rollout by its errors, and with it what is to be measured.
    rollout = {"max_error_share": 1.0}
    with tempfile.TemporaryDirectory(prefix="lifelong-release-") as name:
        folder = Path(name)
        config = served(_CASE, folder, rollout)
        _add_version(config)
        requests = [request(_SERVER, _CASE, body) for body in bodies(_CASE, _IMAGES)]
        with running(_SERVER, _CASE, config, folder) as port:
            until_it_answers(port, requests[0])
            load = asyncio.run(drive(port, cycle(requests), connections=64, seconds=seconds))
            capacity = load.requests_per_s
            print(f"capacity: {capacity:.0f} requests/s", flush=True)
            operator = Operator(config, port)
            report = {
                "capacity_requests_per_s": capacity,
                "changes": _changes(
                    operator, port, requests, capacity * share, changes, rollbacks, seconds
                ),
                "stalled_shadow": _stalls(
                    operator, port, requests, capacity * stall_share, stalls, seconds
                ),
            }
    print(_table(report))
    setup = set_up(
        changes=changes,
        rollbacks=rollbacks,
        share=share,
        stall_share=stall_share,
        stalls=stalls,
        seconds=seconds,
    )
    write(out, {"setup": setup, **report})


def _add_version(config: Config) -> None:
    """Register v1 once more; its classes have other names, which tell who really answered."""
    registry = Registry(open_store(config.store))
    manifest, files = registry.load("v1")
    learner = Learner.from_files(files)
    other = replace(learner, class_names=tuple(f"{name} {_OTHER}" for name in learner.class_names))
    registry.register(
        manifest.model_copy(
            update={
                "version": _OTHER,
                "parent": "v1",
                "kind": "update",
                "class_names": other.class_names,
                "files": {},
            }
        ),
        other.to_files(),
    )


def _inconsistent(body: bytes) -> str:
    """What speaks of two versions in one answer, or nothing."""
    answer = json.loads(body)
    version = answer["model_version"]
    by_class = _OTHER if answer["class"].endswith(_OTHER) else "v1"
    by_id = read_request_id(answer["request_id"]).version
    if {version, by_class, by_id} != {version}:
        return f"an answer of {by_class} as {version}, with an id of {by_id}"
    return ""


class Operator:
    """Steers the release over HTTP."""

    def __init__(self, config: Config, port: int) -> None:
        token = load_secrets(open_store(config.store), {}).admin_token
        self._http = httpx.Client(
            base_url=f"http://127.0.0.1:{port}",
            headers={"authorization": f"Bearer {token}"},
            timeout=30.0,
        )

    def status(self) -> dict[str, Any]:
        """As `GET /admin/status` tells it."""
        told: dict[str, Any] = self._http.get("/admin/status").raise_for_status().json()
        return told

    def start(self, candidate: str, **options: Any) -> None:
        """Start a rollout and wait until its first step is in force."""
        body = {"candidate": candidate, **options}
        self._http.put("/admin/rollout", json=body).raise_for_status()
        self.wait(lambda document: (document["rollout"] or {}).get("step_index", -1) >= 0)

    def ask(self, verb: str, **options: Any) -> None:
        """Promote, abort or roll back."""
        self._http.post(f"/admin/rollout/{verb}", json=options).raise_for_status()

    def wait(self, reached: Callable[[dict[str, Any]], bool]) -> None:
        """Wait until the document in force at the front is as wanted."""
        deadline_s = perf_counter() + 60
        while not reached(self.status()["document"]):
            if perf_counter() > deadline_s:
                raise RuntimeError(f"the release does not move: {self.status()}")
            time.sleep(0.2)


def _stable(operator: Operator) -> str:
    stable: str = operator.status()["document"]["stable"]
    return stable


def _promote(operator: Operator) -> None:
    candidate = "v1" if _stable(operator) == _OTHER else _OTHER
    operator.start(candidate, steps=[{"setWeight": 100, "min_requests": 0}])
    operator.ask("promote", force=True)
    operator.wait(lambda document: document["stable"] == candidate)


def _roll_back(operator: Operator) -> None:
    wanted = operator.status()["document"]["previous"]
    operator.ask("rollback")
    operator.wait(lambda document: document["stable"] == wanted)


Stretch = tuple[float, float]


def _changes(
    operator: Operator,
    port: int,
    requests: Sequence[bytes],
    per_s: float,
    num_changes: int,
    num_rollbacks: int,
    seconds: float,
) -> dict[str, Any]:
    stretches: dict[str, list[Stretch]] = {"steady": [], "promotion": [], "rollback": []}

    def stretch(kind: str, act: Callable[[], None]) -> None:
        began_s = perf_counter()
        act()
        stretches[kind].append((began_s, perf_counter()))

    def act(move: Callable[[Operator], None]) -> Callable[[], None]:
        def whole() -> None:
            move(operator)
            time.sleep(_SETTLE_S)

        return whole

    def play() -> None:
        time.sleep(2.0)
        every = max(1, num_changes // max(1, num_rollbacks))
        for number in range(num_changes):
            stretch("steady", lambda: time.sleep(seconds))
            stretch("promotion", act(_promote))
            if number % every == every - 1 and len(stretches["rollback"]) < num_rollbacks:
                stretch("rollback", act(_roll_back))
            print(f"change {number + 1}: stable is {_stable(operator)}", flush=True)
        stretch("steady", lambda: time.sleep(seconds))

    pace = _under_load(port, requests, per_s, play)
    by_kind = {
        kind: [one for began, ended in found for one in pace.between(began, ended)]
        for kind, found in stretches.items()
    }
    steady = _p99_ms(by_kind["steady"])
    lengths = {kind: [end - begin for begin, end in found] for kind, found in stretches.items()}
    return {
        "requests_per_s": per_s,
        "promotions": len(stretches["promotion"]),
        "rollbacks": len(stretches["rollback"]),
        "requests": len(pace.sent),
        "failed": sum(bool(one.wrong) for one in pace.sent),
        "failures": sorted({one.wrong for one in pace.sent if one.wrong}),
        "p50_steady_ms": statistics.median(one.latency_ms for one in by_kind["steady"]),
        "p99_steady_ms": steady,
        "p99_promotion_ms": _p99_ms(by_kind["promotion"]),
        "p99_rollback_ms": _p99_ms(by_kind["rollback"]),
        "p99_promotion_over_steady": _p99_ms(by_kind["promotion"]) / steady,
        "p99_rollback_over_steady": _p99_ms(by_kind["rollback"]) / steady,
        "stretches_p99_ms": {
            kind: [round(_p99_ms(pace.between(*one)), 1) for one in found]
            for kind, found in stretches.items()
        },
        "promotion_s": statistics.median(lengths["promotion"]) - _SETTLE_S,
        "rollback_s": statistics.median(lengths["rollback"]) - _SETTLE_S,
    }


def _stalls(
    operator: Operator,
    port: int,
    requests: Sequence[bytes],
    per_s: float,
    num_stalls: int,
    seconds: float,
) -> dict[str, Any]:
    stretches: dict[str, list[Stretch]] = {"alone": [], "stalled": []}
    dropped = []

    def stretch(kind: str) -> None:
        began_s = perf_counter()
        time.sleep(seconds)
        stretches[kind].append((began_s, perf_counter()))

    def play() -> None:
        candidate = "v1" if _stable(operator) == _OTHER else _OTHER
        for _ in range(num_stalls):
            stretch("alone")
            operator.start(candidate, steps=[{"shadow": 0.5, "min_requests": 0}, {"pause": 3600}])
            before = operator.status()["front"]["dropped_comparisons"]
            with _stopped("slot"):
                time.sleep(_SETTLE_S)
                stretch("stalled")
                dropped.append(operator.status()["front"]["dropped_comparisons"] - before)
            operator.ask("abort")
            operator.wait(lambda document: document["rollout"] is None)
            print(f"stall: {dropped[-1]} copies dropped", flush=True)
            time.sleep(3 * _SETTLE_S)

    pace = _under_load(port, requests, per_s, play)
    p99_ms = {
        kind: [_p99_ms(pace.between(*one)) for one in found] for kind, found in stretches.items()
    }
    return {
        "requests_per_s": per_s,
        "shadow": 0.5,
        "requests": len(pace.sent),
        "failed": sum(bool(one.wrong) for one in pace.sent),
        "failures": sorted({one.wrong for one in pace.sent if one.wrong}),
        "p99_alone_ms": statistics.median(p99_ms["alone"]),
        "p99_stalled_ms": statistics.median(p99_ms["stalled"]),
        "p99_stalled_over_alone": statistics.median(p99_ms["stalled"])
        / statistics.median(p99_ms["alone"]),
        "stretches_p99_ms": {kind: [round(p, 1) for p in found] for kind, found in p99_ms.items()},
        "dropped_copies": dropped,
    }


def _under_load(
    port: int, requests: Sequence[bytes], per_s: float, play: Callable[[], None]
) -> Pace:
    """Do something, on a thread, while requests come."""
    failed: list[BaseException] = []

    def guarded() -> None:
        try:
            play()
        except BaseException as error:  # noqa: BLE001 - raised again once the load has ended
            failed.append(error)

    story = threading.Thread(target=guarded)

    async def send() -> Pace:
        pace = Pace(port, requests, per_s=per_s, check=_inconsistent)
        story.start()
        await pace.run(until=lambda: not story.is_alive())
        return pace

    pace = asyncio.run(send())
    if failed:
        raise failed[0]
    return pace


@contextmanager
def _stopped(deployment: str) -> Iterator[None]:
    """Have every process of a deployment stand still."""
    pids = _replicas(deployment)
    if not pids:
        raise RuntimeError(f"no replica of {deployment} is running")
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def _replicas(deployment: str) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
            if command.startswith("ray::ServeReplica") and f":{deployment}" in command:
                found.append(int(entry.name))
    return found


def _p99_ms(sent: Sequence[Sent]) -> float:
    return float(np.quantile([one.latency_ms for one in sent], 0.99))


def _table(report: dict[str, Any]) -> str:
    rows = [
        (part, name, value)
        for part in ("changes", "stalled_shadow")
        for name, value in report[part].items()
        if not isinstance(value, list | dict)
    ]
    return table(("part", "figure", "measured"), rows)


if __name__ == "__main__":
    sys.path.insert(0, str(_ROOT))
    typer.run(main)

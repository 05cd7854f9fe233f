"""Throughput and latency of `POST /predict`, beside other servers of the same model.

    python benchmarks/serving.py --out benchmarks/results/serving.json

Every server runs alone on this machine, as one process group that is started and ended for each
round; rounds are interleaved, so that whatever slows the machine slows all of them. The client is
`load.py`: a closed loop, in this process, which sends every image once. What is served is one
version from lifelong_ray's registry; ours runs with everything on: assignment, log, metrics, and a
rollout controller. `lifelong_ray_bare` is ours without the first three, which says what they cost;
`lifelong_ray_thread`, asked for by name, has its models on a thread of the front's process:

    python benchmarks/serving.py --servers lifelong_ray,lifelong_ray_thread,ray --cases tiny-png \
        --connections 16,64 --out benchmarks/results/serving_thread.json

`make peers` makes the environments of the other servers; one that is missing is left out and said
so.
"""

from __future__ import annotations

import asyncio
import signal
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from common import set_up, table, write
from load import Load, drive
from servers import (
    CASES,
    SERVERS,
    Case,
    Server,
    bodies,
    missing,
    request,
    running,
    served,
    torch_loop,
    until_it_answers,
)

from lifelong_ray.config import Config
from lifelong_ray.feedback import load_secrets
from lifelong_ray.storage import open_store

_ROOT = Path(__file__).resolve().parent.parent
_WARM_UP_S = 1.0
_LOOP = "torch"
_OURS, _BARE = "lifelong_ray", "lifelong_ray_bare"
_DEFAULT_SERVERS = ",".join(name for name in SERVERS if name != "lifelong_ray_thread")


def main(
    servers: Annotated[str, typer.Option(help=f"Of {', '.join(SERVERS)}.")] = _DEFAULT_SERVERS,
    cases: Annotated[str, typer.Option(help=f"Of {', '.join(CASES)}.")] = ",".join(CASES),
    connections: Annotated[str, typer.Option(help="Numbers of connections.")] = "1,16,64",
    seconds: Annotated[float, typer.Option(help="Measured per number of connections.")] = 6.0,
    rounds: Annotated[int, typer.Option(help="Starts of each server.")] = 3,
    out: Annotated[Path | None, typer.Option(help="JSON to write.")] = None,
) -> None:
    """Measure every server, round by round."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # no end leaves a server behind
    wanted, asked = _chosen(servers, SERVERS), _chosen(cases, CASES)
    counts = [int(count) for count in connections.split(",")]
    report: dict[str, Any] = {}
    for name in asked:
        case = CASES[name]
        images = bodies(case, round(case.most_per_s * (seconds + _WARM_UP_S) * len(counts)))
        with tempfile.TemporaryDirectory(prefix="lifelong-serving-") as folder:
            config = served(case, Path(folder))
            found: dict[str, Any] = {}
            for number in range(rounds):
                speed = torch_loop(case, config, seconds)
                found.setdefault(_LOOP, {"images": []})["images"].append(speed)
                print(f"{name}, round {number}, {_LOOP}: {speed:.0f} images/s", flush=True)
                for server in wanted:
                    if reason := missing(SERVERS[server]):
                        found[server] = {"skipped": reason}
                        continue
                    measured = _measured(
                        SERVERS[server], case, config, Path(folder), images, counts, seconds
                    )
                    found.setdefault(server, {"rounds": []})["rounds"].append(measured)
                    _say(name, server, number, measured)
            report[name] = {server: _summary(its) for server, its in found.items()}
            print(_table(report[name]), flush=True)
    setup = set_up(connections=counts, seconds=seconds, rounds=rounds, threads=_threads(asked))
    found_ratios = {name: ratios(its) for name, its in report.items()}
    write(out, {"setup": setup, "cases": report, "ratios": found_ratios})


def _chosen(names: str, known: dict[str, Any]) -> list[str]:
    wanted = names.split(",")
    if unknown := set(wanted) - known.keys():
        raise typer.BadParameter(f"{min(unknown)} is not known; choose from {', '.join(known)}")
    return wanted


def _threads(cases: Sequence[str]) -> dict[str, int]:
    return {name: CASES[name].threads for name in cases}


class Once(Iterator[bytes]):
    """Gives each request once and begins again only when all are used up."""

    def __init__(self, requests: Sequence[bytes]) -> None:
        self._requests = requests
        self._given = 0

    def __next__(self) -> bytes:
        request = self._requests[self._given % len(self._requests)]
        self._given += 1
        return request

    @property
    def num_repeated(self) -> int:
        """How many were not new."""
        return max(0, self._given - len(self._requests))


def _measured(
    server: Server,
    case: Case,
    config: Config,
    folder: Path,
    images: Sequence[bytes],
    counts: Sequence[int],
    seconds: float,
) -> dict[str, Any]:
    """Start a server, ask it with so many connections one after another, and end it."""
    requests = [request(server, case, image) for image in images]
    with running(server, case, config, folder) as port:
        until_it_answers(port, requests[0])
        once = Once(requests)
        loads = {
            count: asyncio.run(
                drive(port, once, connections=count, seconds=seconds, warm_up_s=_WARM_UP_S)
            )
            for count in counts
        }
        told = {"loads": loads, "repeated": once.num_repeated}
        return told | ({"not_logged": _not_logged(config, port)} if server.keeps_log else {})


def _not_logged(config: Config, port: int) -> int:
    """Predictions that the front's log had no room for."""
    token = load_secrets(open_store(config.store), {}).admin_token
    answer = httpx.get(
        f"http://127.0.0.1:{port}/admin/status",
        headers={"authorization": f"Bearer {token}"},
        timeout=30.0,
    )
    dropped: int = answer.raise_for_status().json()["front"]["dropped_predictions"]
    return dropped


def _say(case: str, server: str, number: int, measured: dict[str, Any]) -> None:
    told = ", ".join(
        f"{load.requests_per_s:.0f}/s at {count} (p99 {load.latency_ms(0.99) or 0:.1f} ms, "
        f"{load.num_errors} errors)"
        for count, load in measured["loads"].items()
    )
    print(f"{case}, round {number}, {server}: {told}", flush=True)


def _summary(found: dict[str, Any]) -> dict[str, Any]:
    """Medians over the rounds, by number of connections."""
    if "skipped" in found:
        return found
    if "images" in found:
        speeds = found["images"]
        return {
            "images_per_s": statistics.median(speeds),
            "rounds_images_per_s": [round(speed, 1) for speed in speeds],
        }
    rounds: list[dict[str, Any]] = found["rounds"]
    told = {
        key: sum(one[key] for one in rounds)
        for key in ("repeated", "not_logged")
        if key in rounds[0]
    }
    by_count = {
        str(count): _median([one["loads"][count] for one in rounds]) for count in rounds[0]["loads"]
    }
    return {"connections": by_count, **told}


def _median(loads: Sequence[Load]) -> dict[str, Any]:
    def over(values: list[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return statistics.median(known) if known else None

    def rounded(value: float | None) -> float | None:
        return None if value is None else round(value, 2)

    p99_ms = [load.latency_ms(0.99) for load in loads]
    return {
        "requests_per_s": over([load.requests_per_s for load in loads]),
        "p50_ms": over([load.latency_ms(0.5) for load in loads]),
        "p99_ms": over(p99_ms),
        "errors": sum(load.num_errors for load in loads),
        "error_kinds": sorted({kind for load in loads for kind in load.errors}),
        "rounds_requests_per_s": [round(load.requests_per_s, 1) for load in loads],
        "rounds_p99_ms": [rounded(value) for value in p99_ms],
    }


def ratios(servers: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """What a case comes to for ours, by number of connections.

    Args:
        servers: Of one case, as the report has them.

    Returns:
        ``requests_over_X`` and ``p99_over_X``, ours as times that of another server;
        ``account_share``, the share of the requests per second that log, assignment and metrics
        cost, with the lowest and highest of the rounds; ``share_of_torch``, of the images per
        second of the model alone. None where a server answered nothing.
    """
    ours = servers.get(_OURS, {}).get("connections", {})
    return {count: _ratios_of(figures, count, servers) for count, figures in ours.items()}


def _ratios_of(
    ours: dict[str, Any], count: str, servers: dict[str, Any]
) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for name, its in servers.items():
        other = its.get("connections", {}).get(count)
        if other is not None and name not in (_OURS, _BARE):
            found[f"requests_over_{name}"] = _over(ours, other, "requests_per_s")
            found[f"p99_over_{name}"] = _over(ours, other, "p99_ms")
    if bare := servers.get(_BARE, {}).get("connections", {}).get(count):
        found |= _account(ours, bare)
    if alone := servers.get(_LOOP):
        found["share_of_torch"] = ours["requests_per_s"] / alone["images_per_s"]
    return found


def _account(ours: dict[str, Any], bare: dict[str, Any]) -> dict[str, float | None]:
    kept = _over(ours, bare, "requests_per_s")
    if kept is None:
        return {"account_share": None}
    key = "rounds_requests_per_s"
    by_round = [
        1 - with_it / without for with_it, without in zip(ours[key], bare[key], strict=True)
    ]
    return {
        "account_share": 1 - kept,
        "account_share_lowest": min(by_round),
        "account_share_highest": max(by_round),
    }


def _over(ours: dict[str, Any], other: dict[str, Any], key: str) -> float | None:
    return ours[key] / other[key] if ours[key] is not None and other[key] else None


def _table(servers: dict[str, Any]) -> str:
    rows = [
        (server, count, its["requests_per_s"], its["p50_ms"], its["p99_ms"], its["errors"])
        for server, found in servers.items()
        for count, its in found.get("connections", {}).items()
    ]
    return table(("server", "connections", "requests/s", "p50, ms", "p99, ms", "errors"), rows)


if __name__ == "__main__":
    sys.path.insert(0, str(_ROOT))
    typer.run(main)

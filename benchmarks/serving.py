"""Throughput and latency of `POST /predict`, beside other servers of the same model.

    python benchmarks/serving.py --out benchmarks/results/serving.json

Every server runs alone on this machine, as one process group that is started and ended for each
round; rounds are interleaved, so that whatever slows the machine slows all of them. The client is
`load.py`: a closed loop, in this process. What is served is one version from lifelong_ray's
registry; ours runs with everything on: assignment, log, metrics, and a rollout controller.

`make peers` makes the environments of the other servers; one that is missing is left out and said
so.
"""

from __future__ import annotations

import asyncio
import io
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
import yaml
from common import set_up, table, write
from load import Load, drive, post
from PIL import Image

from lifelong_ray.config import Config, config_from
from lifelong_ray.cycle import run_base
from lifelong_ray.datasets import LabelledImages
from lifelong_ray.fitting import fit_alone
from lifelong_ray.storage import open_store

_ROOT = Path(__file__).resolve().parent.parent
_PEERS = _ROOT / "benchmarks" / "peers"
_START_S, _STOP_S = 180.0, 20.0
_MARK = "LIFELONG_BENCHMARK"
_LOOP = "torch"
# Serve reads these when it starts; ours is run with them by `make serve`.
_FAST_SERVE = {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}


@dataclass(frozen=True)
class Case:
    """A model and the images that it is asked about.

    Attributes:
        model: As the configuration's branch.
        pixels: Height and width of the images sent.
        encoding: PNG or JPEG.
        threads: Of torch, in the servers that can be told.
    """

    model: dict[str, Any]
    pixels: int
    encoding: str
    threads: int = 1


_TINY = {"name": "convnet", "widths": [8, 16], "image_size": 32, "channels": 3}
_RESNET = {"name": "benchmarks.models:resnet18", "image_size": 32, "channels": 3}
CASES = {
    "tiny-png": Case(_TINY, 32, "PNG"),
    "tiny-jpeg": Case(_TINY, 224, "JPEG"),
    "resnet18-png": Case(_RESNET, 32, "PNG"),
    "resnet18-png-2": Case(_RESNET, 32, "PNG", threads=2),
}


@dataclass(frozen=True)
class Server:
    """One way to serve the model.

    Attributes:
        arguments: Of the environment's Python, with {port} and {config} to be filled in.
        environment: Folder of its virtual environment, below the project.
        path: Where it takes images.
        field: The multipart field in which it takes them; empty means as the body.
        variables: Added to the process's environment.
    """

    arguments: tuple[str, ...]
    environment: str = ".venv"
    path: str = "/predict"
    field: str = ""
    variables: tuple[tuple[str, str], ...] = ()


_RAY = ("-m", "ray.serve.scripts", "run")
_UVICORN = ("-m", "uvicorn", "fastapi_app:app", "--log-level", "warning", "--port", "{port}")
SERVERS = {
    "lifelong_ray": Server(
        (*_RAY, "serve_app:app", "config={config}"), variables=tuple(_FAST_SERVE.items())
    ),
    "ray": Server((*_RAY, "{ray_config}"), variables=tuple(_FAST_SERVE.items())),
    "fastapi": Server(_UVICORN, ".venv-peers/fastapi"),
    "fastapi_batch": Server(_UVICORN, ".venv-peers/fastapi", "/batched"),
    "litserve": Server(("litserve_app.py",), ".venv-peers/litserve", field="image"),
    "bentoml": Server(
        ("-m", "bentoml", "serve", "bentoml_app:Classifier", "--port", "{port}"),
        ".venv-peers/bentoml",
        field="images",
    ),
}


def main(
    servers: Annotated[str, typer.Option(help=f"Of {', '.join(SERVERS)}.")] = ",".join(SERVERS),
    cases: Annotated[str, typer.Option(help=f"Of {', '.join(CASES)}.")] = ",".join(CASES),
    connections: Annotated[str, typer.Option(help="Numbers of connections.")] = "1,16,64",
    seconds: Annotated[float, typer.Option(help="Measured per number of connections.")] = 6.0,
    rounds: Annotated[int, typer.Option(help="Starts of each server.")] = 3,
    out: Annotated[Path | None, typer.Option(help="JSON to write.")] = None,
) -> None:
    """Measure every server, round by round."""
    wanted, asked = _chosen(servers, SERVERS), _chosen(cases, CASES)
    counts = [int(count) for count in connections.split(",")]
    report: dict[str, Any] = {}
    for name in asked:
        case = CASES[name]
        with tempfile.TemporaryDirectory(prefix="lifelong-serving-") as folder:
            config = served(case, Path(folder))
            found: dict[str, Any] = {}
            for number in range(rounds):
                speed = _torch_loop(case, config, seconds)
                found.setdefault(_LOOP, {"images": []})["images"].append(speed)
                print(f"{name}, round {number}, {_LOOP}: {speed:.0f} images/s", flush=True)
                for server in wanted:
                    if reason := _missing(SERVERS[server]):
                        found[server] = {"skipped": reason}
                        continue
                    loads = _measured(SERVERS[server], case, config, Path(folder), counts, seconds)
                    found.setdefault(server, {"rounds": []})["rounds"].append(loads)
                    _say(name, server, number, loads)
            report[name] = {server: _summary(its) for server, its in found.items()}
            print(_table(report[name]), flush=True)
    setup = set_up(connections=counts, seconds=seconds, rounds=rounds)
    write(out, {"setup": setup, "cases": report})


def _chosen(names: str, known: dict[str, Any]) -> list[str]:
    wanted = names.split(",")
    if unknown := set(wanted) - known.keys():
        raise typer.BadParameter(f"{min(unknown)} is not known; choose from {', '.join(known)}")
    return wanted


def _missing(server: Server) -> str:
    python = _ROOT / server.environment / "bin" / "python"
    return "" if python.exists() else f"{server.environment} is missing; make peers makes it"


def served(case: Case, folder: Path, rollout: dict[str, Any] | None = None) -> Config:
    """Put a version of the case's model into a store of its own."""
    rng = np.random.default_rng(0)
    labels = ("low", "high") * 30
    images = []
    for label in labels:
        pixels = rng.integers(0, 60, (32, 32, 3), dtype=np.uint8)
        pixels[16:] += 180 if label == "low" else 0
        pixels[:16] += 180 if label == "high" else 0
        images.append(pixels)
    config = config_from(
        {
            "store": {"url": str(folder / "store")},
            "model": case.model,
            "learning": {"base": {"epochs": 4}, "analytic": {"num_features": 64}},
            "serving": {
                "front": {"max_replicas": 1},
                "port": _free_port(),
                "model_threads": case.threads,
                "cache_bytes": 0,
            },
            "rollout": rollout or {},
        }
    )
    store = open_store(config.store)
    source = LabelledImages(tuple(images), labels)
    report = run_base(config, store, fit_alone, source, run_id="base", now_s=time.time)
    if not report.released:
        raise RuntimeError(f"the base version did not pass its gate: {report.gate}")
    (folder / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return config


def bodies(case: Case) -> list[bytes]:
    """Some images, each encoded."""
    rng, bodies = np.random.default_rng(1), []
    for _ in range(64):
        coarse = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((case.pixels, case.pixels), Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        image.save(buffer, format=case.encoding)
        bodies.append(buffer.getvalue())
    return bodies


def _measured(
    server: Server, case: Case, config: Config, folder: Path, counts: list[int], seconds: float
) -> dict[int, Load]:
    """Start a server, ask it with so many connections one after another, and end it."""
    requests = [request(server, case, body) for body in bodies(case)]
    with running(server, case, config, folder) as port:
        until_it_answers(port, requests[0])
        return {
            count: asyncio.run(drive(port, requests, connections=count, seconds=seconds))
            for count in counts
        }


def request(server: Server, case: Case, body: bytes) -> bytes:
    kind = f"image/{case.encoding.lower()}"
    if not server.field:
        return post(server.path, body, kind)
    boundary = "a-line-that-no-image-has"
    head = (
        f"--{boundary}\r\ncontent-disposition: form-data; "
        f'name="{server.field}"; filename="image"\r\ncontent-type: {kind}\r\n\r\n'
    )
    form = head.encode() + body + f"\r\n--{boundary}--\r\n".encode()
    return post(server.path, form, f"multipart/form-data; boundary={boundary}")


def _torch_loop(case: Case, config: Config, seconds: float) -> float:
    """Images/s of the model alone, in batches of 32, in a process of its own."""
    program = _PEERS / "torch_loop.py"
    printed = subprocess.run(
        [sys.executable, str(program), str(seconds)],
        env=_environ(case, config),
        capture_output=True,
        text=True,
        check=True,
    )
    return float(printed.stdout)


def _environ(case: Case, config: Config) -> dict[str, str]:
    return {
        **os.environ,
        "PEER_STORE": config.store.url,
        "PEER_PORT": str(config.serving.port),
        "PEER_THREADS": str(case.threads),
        "PYTHONPATH": os.pathsep.join((str(_PEERS), str(_ROOT))),
        "OMP_NUM_THREADS": str(case.threads),
        "RAY_SERVE_LOG_TO_STDERR": "0",
    }


@contextmanager
def running(server: Server, case: Case, config: Config, folder: Path) -> Iterator[int]:
    """Run a server as a process group; yields its port."""
    port = config.serving.port
    mark = uuid.uuid4().hex
    ray_config = folder / "ray.yaml"
    ray_config.write_text(
        yaml.safe_dump(
            {
                "http_options": {"host": "127.0.0.1", "port": port},
                "applications": [{"name": "bare", "import_path": "ray_app:app"}],
            }
        )
    )
    filled = {"port": port, "config": folder / "config.yaml", "ray_config": ray_config}
    python = _ROOT / server.environment / "bin" / "python"
    arguments = [str(python), *(word.format(**filled) for word in server.arguments)]
    environ = {**_environ(case, config), **dict(server.variables), _MARK: mark}
    log = folder / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            arguments,
            cwd=_ROOT if "serve_app:app" in arguments else _PEERS,
            env=environ,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            yield port
        except ServerError as error:
            raise ServerError(f"{error}; its last words:\n{log.read_text()[-2_000:]}") from None
        finally:
            _end(process, mark)


class ServerError(RuntimeError):
    """A server that does not serve."""


def until_it_answers(port: int, request: bytes) -> None:
    """Ask until a good answer comes.

    Raises:
        ServerError: If none does.
    """
    deadline_s = time.monotonic() + _START_S
    while time.monotonic() < deadline_s:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=10.0) as connection:
                connection.sendall(request)
                if connection.recv(64).startswith(b"HTTP/1.1 200"):
                    return
        except OSError:
            pass
        time.sleep(0.2)
    raise ServerError(f"no good answer within {_START_S:g} s")


def _end(process: subprocess.Popen[bytes], mark: str) -> None:
    """End a server and whatever it has started, which may have left its process group."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGINT)
    try:
        process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if f"{_MARK}={mark}".encode() in (entry / "environ").read_bytes():
                    os.kill(int(entry.name), signal.SIGKILL)
            except OSError:
                continue


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _say(case: str, server: str, number: int, loads: dict[int, Load]) -> None:
    told = ", ".join(
        f"{load.requests_per_s:.0f}/s at {count} (p99 {load.latency_ms(0.99) or 0:.1f} ms, "
        f"{load.num_errors} errors)"
        for count, load in loads.items()
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
    rounds: list[dict[int, Load]] = found["rounds"]
    return {str(count): _median([loads[count] for loads in rounds]) for count in rounds[0]}


def _median(loads: list[Load]) -> dict[str, Any]:
    def over(values: list[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return statistics.median(known) if known else None

    return {
        "requests_per_s": over([load.requests_per_s for load in loads]),
        "p50_ms": over([load.latency_ms(0.5) for load in loads]),
        "p99_ms": over([load.latency_ms(0.99) for load in loads]),
        "errors": sum(load.num_errors for load in loads),
        "error_kinds": sorted({kind for load in loads for kind in load.errors}),
        "rounds_requests_per_s": [round(load.requests_per_s, 1) for load in loads],
    }


def _table(servers: dict[str, Any]) -> str:
    rows = [
        (server, count, its["requests_per_s"], its["p50_ms"], its["p99_ms"], its["errors"])
        for server, found in servers.items()
        if "skipped" not in found and server != _LOOP
        for count, its in found.items()
    ]
    return table(("server", "connections", "requests/s", "p50, ms", "p99, ms", "errors"), rows)


if __name__ == "__main__":
    sys.path.insert(0, str(_ROOT))
    typer.run(main)

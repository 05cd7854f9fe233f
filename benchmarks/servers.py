"""The servers that `serving.py` and `release_load.py` ask, and what they are asked.

Every server runs alone, as one process group that is ended together with whatever it started.
What is served is one version of a case's model, from a lifelong_ray registry of its own.
"""

from __future__ import annotations

import io
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from load import post
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
# Serve reads these when it starts; ours is run with them by `make serve`.
_FAST_SERVE = {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}


@dataclass(frozen=True)
class Case:
    """A model and the images that it is asked about.

    Attributes:
        model: As the configuration's branch.
        pixels: Height and width of the images sent.
        encoding: PNG or JPEG.
        most_per_s: More requests per second than any server answers.
        threads: Of torch, in the servers that can be told.
    """

    model: dict[str, Any]
    pixels: int
    encoding: str
    most_per_s: int
    threads: int = 1


_TINY = {"name": "convnet", "widths": [8, 16], "image_size": 32, "channels": 3}
_RESNET = {"name": "benchmarks.models:resnet18", "image_size": 32, "channels": 3}
CASES = {
    "tiny-png": Case(_TINY, 32, "PNG", 5_000),
    "tiny-jpeg": Case(_TINY, 224, "JPEG", 2_500),
    "resnet18-png": Case(_RESNET, 32, "PNG", 1_000),
    "resnet18-png-2": Case(_RESNET, 32, "PNG", 1_000, threads=2),
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
        keeps_log: Whether it is lifelong_ray with its prediction log.
    """

    arguments: tuple[str, ...]
    environment: str = ".venv"
    path: str = "/predict"
    field: str = ""
    variables: tuple[tuple[str, str], ...] = ()
    keeps_log: bool = False


_RAY = ("-m", "ray.serve.scripts", "run")
_OURS = (*_RAY, "serve_app:app", "config={config}")
_UVICORN = ("-m", "uvicorn", "fastapi_app:app", "--log-level", "warning", "--port", "{port}")
SERVERS = {
    "lifelong_ray": Server(_OURS, variables=tuple(_FAST_SERVE.items()), keeps_log=True),
    "lifelong_ray_bare": Server(
        (*_RAY, "lifelong_bare_app:app", "config={config}"), variables=tuple(_FAST_SERVE.items())
    ),
    "lifelong_ray_thread": Server(
        (*_OURS, "serving.model_process=false"),
        variables=tuple(_FAST_SERVE.items()),
        keeps_log=True,
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


def missing(server: Server) -> str:
    """Why a server cannot be started; empty where it can."""
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


def bodies(case: Case, number: int) -> list[bytes]:
    """So many images, each encoded, no two alike."""
    rng, bodies = np.random.default_rng(1), []
    for _ in range(number):
        coarse = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((case.pixels, case.pixels), Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        image.save(buffer, format=case.encoding)
        bodies.append(buffer.getvalue())
    return bodies


def request(server: Server, case: Case, body: bytes) -> bytes:
    """The whole request in which a server takes an image."""
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


def torch_loop(case: Case, config: Config, seconds: float) -> float:
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

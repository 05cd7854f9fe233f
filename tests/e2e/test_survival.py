"""A store outlives what runs on it: overload, the death of the cluster, and of its processes.

An application behind HAProxy, started as an operator does, in a Ray of its own: what is killed here
would take the Ray of the other tests with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np
import pytest
import yaml

from lifelong_ray.client import ApiError, LifelongClient
from lifelong_ray.config import Config
from lifelong_ray.feedback import encode_png, load_secrets
from lifelong_ray.release import Registry, ReleaseDesk, ReleaseDocument
from lifelong_ray.storage import Store, open_store
from lifelong_ray.types import ServingError
from tests.conftest import SCRATCH, free_port, started_processes
from tests.unit.on_ray.world import CLASSES, add_version, make_image, settings, train_base

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
MARK = f"LIFELONG_TEST_SERVER={uuid.uuid4().hex}"
PATIENCE_S = 60
MAX_QUEUE = 16
SESSIONS = tuple(f"user-{number}" for number in range(40))
STEPS = [
    {"shadow": 1.0, "min_requests": 20},
    {"setWeight": 20, "min_requests": 60},
    {"setWeight": 50, "min_requests": 60},
]


@dataclass(frozen=True)
class World:
    """A store with versions, and how to serve it."""

    config: Config
    store: Store
    folder: Path
    images: dict[str, bytes]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.config.serving.port}"

    def document(self) -> ReleaseDocument:
        return ReleaseDesk(self.store, time.time).read()[0]

    def operator(self) -> LifelongClient:
        return LifelongClient(self.url, admin_token=load_secrets(self.store, {}).admin_token)

    @contextlib.contextmanager
    def served(self) -> Iterator[subprocess.Popen[bytes]]:
        """Run `serve run` behind HAProxy; at the end nothing of it is left."""
        name, _, value = MARK.partition("=")
        environment = {
            **os.environ,
            name: value,
            "RAY_TMPDIR": str(SCRATCH / "own"),
            "RAY_SERVE_ENABLE_HA_PROXY": "1",
            "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        }
        log = self.folder / "printed.txt"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [str(BIN / "serve"), "run", "serve_app:app", f"config={self.folder / 'app.yaml'}"],
                cwd=ROOT,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            until(self.is_ready, lambda: f"the application: {log.read_text()[-4_000:]}")
            yield process
        finally:
            kill_all()
            process.wait()

    def is_ready(self) -> bool:
        with contextlib.suppress(httpx.HTTPError):
            return httpx.get(f"{self.url}/v2/health/ready", timeout=5).status_code == 200
        return False


def kill_all() -> None:
    """SIGKILL for every process of the server, Ray's own included, until none is left."""
    deadline_s = time.monotonic() + PATIENCE_S
    while alive := started_processes(MARK):
        assert time.monotonic() < deadline_s, f"processes survive: {alive}"
        for pid in alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def until(condition: Callable[[], bool], what: str | Callable[[], str]) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > deadline_s:
            pytest.fail(f"waited {PATIENCE_S} s for {what if isinstance(what, str) else what()}")
        time.sleep(0.05)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("survival")
    fixed = {"min_replicas": 2, "max_replicas": 2}
    config = settings(
        store={"url": str(folder / "store")},
        model={"widths": [64, 128], "image_size": 32},
        feedback={"audit_share": 1.0, "flush_interval_s": 0.2},
        rollout={
            "margin": 0.1,
            "min_labelled_pairs": 30,
            "steps": STEPS,
            "lease_s": 2,
            "heartbeat_timeout_s": 2,
            "max_error_share": 0.5,  # a killed slot fails what it had begun
        },
        serving={
            "port": free_port(),
            "front": fixed,
            "slot": {"min_replicas": 1, "max_replicas": 1},
            "poll_interval_s": 0.1,
            "slot_timeout_s": 1,
            "max_queue": MAX_QUEUE,
            "max_batch": 2,
        },
    )
    store = open_store(config.store)
    train_base(store, config)
    add_version(store, "v1.1")
    add_version(store, "v1.2")
    (folder / "app.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    rng = np.random.default_rng(3)
    images = {name: encode_png(make_image(name, rng)) for name in CLASSES}
    return World(config, store, folder, images)


# -- overload --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """What came back; status 0 where the connection broke."""

    status: int
    headers: dict[str, str]
    body: bytes


def burst(world: World, names: Sequence[str], *, timeout_ms: float | None = None) -> list[Answer]:
    """Send one request per name, all at once, each on a connection of its own."""

    async def ask(name: str, connected: asyncio.Barrier) -> Answer:
        reader, writer = await asyncio.open_connection("127.0.0.1", world.config.serving.port)
        image = world.images[name]
        head = f"POST /predict HTTP/1.1\r\nhost: here\r\ncontent-length: {len(image)}\r\n"
        head += "content-type: image/png\r\nconnection: close\r\n"
        if timeout_ms is not None:
            head += f"x-timeout-ms: {timeout_ms:g}\r\n"
        await connected.wait()
        try:
            writer.write(head.encode() + b"\r\n" + image)
            received = await reader.read()
        except OSError:
            received = b""
        finally:
            writer.close()
        lines, _, body = received.partition(b"\r\n\r\n")
        if not body:
            return Answer(0, {}, received)
        first, *rest = lines.decode("latin-1").split("\r\n")
        headers = {k.strip().lower(): v.strip() for k, _, v in (one.partition(":") for one in rest)}
        return Answer(int(first.split()[1]), headers, body)

    async def all_of_them() -> list[Answer]:
        connected = asyncio.Barrier(len(names))
        return await asyncio.gather(*(ask(name, connected) for name in names))

    return asyncio.run(all_of_them())


def model_cpu_s() -> float:
    """Processor time that the model processes have taken."""
    ticks = 0
    for pid, command in started_processes(MARK).items():
        if "on_ray.model_process" in command:
            times = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(times[11]) + int(times[12])
    return ticks / os.sysconf("SC_CLK_TCK")


@pytest.fixture(scope="module")
def first_life(world: World) -> Iterator[World]:
    """The application until the test kills its cluster."""
    with world.served():
        yield world


def repeated(number: int) -> list[str]:
    return list(itertools.islice(itertools.cycle(CLASSES), number))


def test_a_burst_beyond_the_queue_is_answered_right_or_told_to_come_back(first_life: World) -> None:
    names = repeated(600)

    answers = burst(first_life, names)
    after = burst(first_life, repeated(12))

    statuses = Counter(answer.status for answer in answers)
    assert set(statuses) == {200, 429}
    for name, answer in zip(names, answers, strict=True):
        if answer.status == 200:
            assert json.loads(answer.body)["class"] == name
        else:
            assert answer.headers["retry-after"] == "1"
            assert json.loads(answer.body)["error"]["code"] == "overloaded"
    assert [answer.status for answer in after] == [200] * 12


def test_the_model_spends_no_time_on_those_who_do_not_wait_any_more(first_life: World) -> None:
    def cost_of(timeout_ms: float) -> tuple[Counter[int], float]:
        began_s = model_cpu_s()
        statuses: Counter[int] = Counter()
        for _ in range(12):
            statuses.update(
                a.status for a in burst(first_life, repeated(24), timeout_ms=timeout_ms)
            )
        return statuses, model_cpu_s() - began_s

    patient, spent_s = cost_of(20_000)
    hasty, spent_in_vain_s = cost_of(5)

    assert patient == {200: 12 * 24}
    assert set(hasty) <= {200, 408}
    assert hasty[408] > 12 * 12
    # Those under way when their time was up are answered for nobody: a batch of two per front.
    assert spent_in_vain_s < 0.5 * spent_s


# -- the death of everything, and of parts ---------------------------------------------------------


@dataclass
class Users:
    """Users on several connections who correct every answer, and go on when one fails."""

    world: World
    stopped: threading.Event = field(default_factory=threading.Event)
    versions: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)

    def __enter__(self) -> Users:
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
        with LifelongClient(self.world.url, timeout_s=10) as client:
            while not self.stopped.is_set():
                name = rng.choice(CLASSES)
                try:
                    answer = client.predict(self.world.images[name])
                    self.versions[answer.model_version] += 1
                    if answer.class_name != name:
                        self.wrong.append(answer.request_id)
                    client.feedback(answer.request_id, name)
                except ApiError as error:
                    self.failures[f"{error.status} {error.code}"] += 1
                except ServingError:
                    self.failures["no answer"] += 1
                time.sleep(0.01)


def versions_by_session(world: World) -> dict[str, str]:
    with LifelongClient(world.url) as client:
        return {
            name: client.predict(world.images["low"], session_id=name).model_version
            for name in SESSIONS
        }


def progress(document: ReleaseDocument) -> tuple[object, ...]:
    """What a rollout has come to."""
    rollout = document.rollout
    assert rollout is not None
    return rollout.id, rollout.step_index, rollout.weight, rollout.salt, rollout.started_at_s


def is_at_canary(world: World) -> bool:
    rollout = world.document().rollout
    return rollout is not None and rollout.step_index == 1


def pairs_seen(world: World) -> int:
    with world.operator() as operator:
        pairs = operator.status()["controller"]["pairs"]
    return int(pairs["better"] + pairs["same"] + pairs["worse"])


@dataclass(frozen=True)
class Died:
    """What was known when every process was killed at once."""

    document: ReleaseDocument
    pairs: int
    versions: dict[str, str]


@pytest.fixture(scope="module")
def died(first_life: World) -> Died:
    with first_life.operator() as operator, Users(first_life):
        operator.start_rollout("v1.1", reason="the same weights")
        until(lambda: is_at_canary(first_life), "the canary step")
        until(lambda: pairs_seen(first_life) > 20, "evidence")
    time.sleep(1)  # Predictions of the last moments may be lost; their labels are not.
    seen = Died(first_life.document(), pairs_seen(first_life), versions_by_session(first_life))
    kill_all()
    return seen


@pytest.fixture(scope="module")
def second_life(world: World, died: Died) -> Iterator[World]:
    """The same application on the same store, in a new Ray."""
    with world.served():
        yield world


def test_a_rollout_goes_on_where_the_cluster_died(died: Died, second_life: World) -> None:
    def is_read_again() -> bool:
        return pairs_seen(second_life) >= died.pairs

    with second_life.operator() as operator:
        until(is_read_again, "the evidence")
        until(
            lambda: (
                operator.predict(second_life.images["low"], canary="always").variant == "candidate"
            ),
            "the candidate in the slot",
        )
        again = versions_by_session(second_life)
        found = second_life.document()
        with Users(second_life) as users:
            until(lambda: second_life.document().stable == "v1.1", "the promotion")

    assert progress(found) == progress(died.document)
    assert set(died.versions.values()) == {"v1", "v1.1"}
    assert again == died.versions
    assert users.failures == {}
    assert users.wrong == []
    events = ReleaseDesk(second_life.store, time.time).audit_trail()
    assert [event.what for event in events if event.what != "paused"].count("started") == 1
    assert [event.number for event in events] == list(range(1, len(events) + 1))
    assert sum(event.what == "stepped" for event in events) == len(STEPS)
    assert events[-1].what == "promoted"


VICTIMS = {
    "the model process of a front or slot": "on_ray.model_process",
    "a front": "ServeReplica:default:front",
    "the slot": "ServeReplica:default:slot",
    "the rollout's controller": "ServeReplica:default:rollout",
    "the controller of Serve": "ray::ServeController",
}


def test_a_rollout_ends_although_its_processes_die_one_by_one(second_life: World) -> None:
    rng = random.Random(0)
    killed = []
    with second_life.operator() as operator, Users(second_life) as users:
        until(lambda: second_life.document().stable == "v1.1", "the rollout before")
        operator.start_rollout("v1.2", reason="the same weights")
        until(lambda: second_life.document().rollout is not None, "the start")
        for victim, title in rng.sample(sorted(VICTIMS.items()), len(VICTIMS)):
            time.sleep(rng.uniform(0.5, 3))
            processes = started_processes(MARK).items()
            os.kill(rng.choice([p for p, command in processes if title in command]), signal.SIGKILL)
            killed.append(victim)
        until(
            lambda: second_life.document().rollout is None,
            lambda: f"the end of the rollout; {second_life.document()}",
        )
        until(second_life.is_ready, "fronts")
    registry = Registry(second_life.store)

    assert len(killed) == len(VICTIMS)
    assert second_life.document().stable == "v1.2"
    assert registry.versions() == ["v1", "v1.1", "v1.2"]
    assert all(registry.load(version) for version in registry.versions())
    assert users.wrong == []
    assert set(users.versions) == {"v1.1", "v1.2"}
    # Where a front or its models died, and while the other one was not there either.
    assert set(users.failures) <= {"no answer", "503 loading"}
    assert [one.status for one in burst(second_life, repeated(12))] == [200] * 12

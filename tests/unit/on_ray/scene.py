"""A started front with fakes around it, for the tests of what it does."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from lifelong_ray.config import Config
from lifelong_ray.feedback import (
    CleanImage,
    Secrets,
    SentImage,
    read_comparisons,
    read_predictions,
    take_snapshot,
)
from lifelong_ray.on_ray.front import Front
from lifelong_ray.on_ray.models import Models, ModelThread, VersionAnswer
from lifelong_ray.release import Arm, Experiment, Registry, ReleaseDesk, Rollout
from lifelong_ray.types import StorageFullError
from tests.fakes import MemoryStore
from tests.unit.on_ray.world import (
    CLASSES,
    FakeSlot,
    ReportBook,
    make_image,
    move,
    rotated,
    settings,
    until,
)

SECRETS = Secrets(b"k" * 32, "token")
RNG = np.random.default_rng(7)
IMAGES = {name: make_image(name, RNG) for name in CLASSES}
WRONG = dict(zip(CLASSES, rotated(CLASSES), strict=True))


@dataclass
class Scene:
    """A started front with what is around it."""

    front: Front
    desk: ReleaseDesk
    store: MemoryStore
    slot: FakeSlot
    book: ReportBook

    async def change(self, **changes: object) -> None:
        """Change the document and wait until the front follows it."""
        seq = move(self.desk, **changes).seq
        await until(lambda: self.book.last.doc_seq >= seq)

    async def load(self, *versions: str) -> None:
        """Wait until the versions are warm."""
        await until(lambda: set(versions) <= set(self.book.last.warm_versions))

    async def answer(self, name: str = "top", key: str = "anybody", **options: Any) -> Any:
        return await self.front.answer(SentImage.of(IMAGES[name]), key=key, **options)

    async def logged(self, num_comparisons: int) -> Any:
        """The comparisons, once that many are durable."""

        def compared() -> Any:
            self.front.log.flush()
            return read_comparisons(self.store, take_snapshot(self.store, 0.0)).rows

        await until(lambda: len(compared()) >= num_comparisons)
        return compared()

    async def assigned(self) -> Any:
        """Requests by arm, as the next heartbeat tells them."""
        num_heard = len(self.book.reports)
        await until(lambda: len(self.book.reports) > num_heard + 1)
        return self.book.last.assigned

    async def counted(self, version: str) -> tuple[int, int] | None:
        """Requests and errors of a version, as the next heartbeat tells them."""
        num_heard = len(self.book.reports)
        await until(lambda: len(self.book.reports) > num_heard + 1)
        counter = self.book.last.counters.get(version)
        return None if counter is None else (counter.requests, counter.errors)


@asynccontextmanager
async def running(
    store: MemoryStore,
    config: Config | None = None,
    slot: FakeSlot | None = None,
    book: ReportBook | None = None,
) -> AsyncIterator[Scene]:
    """Start a front with fakes around it, and stop it in the end."""
    config, slot = config or settings(), slot or FakeSlot(candidates_answer)
    book = book or ReportBook()
    front = Front(
        config,
        store,
        SECRETS,
        ModelThread(Models(Registry(store), config.serving)),
        slot,
        book,
        now_s=time.time,
        rng=random.Random(0),
    )
    await front.start()
    try:
        yield Scene(front, ReleaseDesk(store, time.time), store, slot, book)
    finally:
        front.close()


def run(
    play: Callable[[Scene], Awaitable[None]],
    store: MemoryStore,
    config: Config | None = None,
    slot: FakeSlot | None = None,
    book: ReportBook | None = None,
) -> None:
    """Play one scene from start to end."""

    async def start() -> None:
        async with running(store, config, slot, book) as scene:
            await play(scene)

    asyncio.run(start())


def rollout_of(candidate: str, *, weight: int = 0, shadow: float = 0.0) -> Rollout:
    """A rollout at its first step, or at its second with a weight above 20."""
    return Rollout(
        id=f"{candidate}-trial",
        candidate=candidate,
        steps=({"setWeight": 20}, {"setWeight": 50}),
        step_index=1 if weight > 20 else 0,
        weight=weight,
        shadow=shadow,
        salt="salt",
        started_at_s=0.0,
        step_started_at_s=0.0,
    )


def experiment_of(*versions: str, began: bool = True) -> Experiment:
    """An experiment whose arms are as likely as another."""
    weight = 100 // len(versions)
    return Experiment(
        id="e1",
        arms=tuple(Arm(version=version, weight=weight) for version in versions),
        salt="salt",
        metric="accuracy",
        adaptive=False,
        started_by="ann",
        reason="",
        started_at_s=0.0,
        end_s=1e12,
        began_s=1.0 if began else None,
    )


def candidates_answer(version: str, image: CleanImage) -> VersionAnswer:
    """A slot that always says the first class."""
    return VersionAnswer(version, CLASSES, (0.8, 0.1, 0.1), 1.0)


def predictions_in(store: MemoryStore) -> Any:
    """The rows of the log."""
    return read_predictions(store, take_snapshot(store, 0.0)).rows


class WatchedStore(MemoryStore):
    """Counts reads of version files, may hold them up, and may have a full disk."""

    def __init__(self, objects: dict[str, bytes]) -> None:
        super().__init__()
        self.objects.update(objects)
        self.version_reads: list[str] = []
        self.may_read = threading.Event()
        self.may_read.set()
        self.is_full = False

    def read(self, key: str) -> bytes:
        if key.startswith("versions/") and key.endswith("model.safetensors"):
            self.may_read.wait(20)
            self.version_reads.append(key.split("/")[1])
        return super().read(key)

    def put_new(self, key: str, data: bytes) -> None:
        if self.is_full and key.startswith("log/"):
            raise StorageFullError("no space left")
        super().put_new(key, data)

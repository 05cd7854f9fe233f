"""How a version becomes something that answers: precision, warm-up, and what it falls back to."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from lifelong_ray.config import Config, Precision
from lifelong_ray.feedback import SentImage
from lifelong_ray.on_ray import models
from lifelong_ray.on_ray.models import Loaded, Models, ModelThread, VersionAnswer
from lifelong_ray.on_ray.warm import WarmVersions
from lifelong_ray.release import Registry
from lifelong_ray.types import LearningError, ModelHostGoneError, OverloadedError
from tests.fakes import MemoryStore
from tests.unit.on_ray.world import settings, train_base, until

SERVING: dict[str, object] = {"max_batch": 7, "front": {"precision": "bf16"}}


@pytest.fixture(scope="module")
def proven() -> tuple[MemoryStore, Config]:
    """A store whose v1 was judged in bf16, too."""
    config = settings(serving=SERVING)
    store = MemoryStore()
    train_base(store, config)
    return store, config


def held(
    store: MemoryStore, config: Config, precision: Precision, versions: Sequence[str] = ("v1",)
) -> WarmVersions:
    async def load() -> WarmVersions:
        host = ModelThread(Models(Registry(store), config.serving, precision))
        warmed = WarmVersions(host, config.serving, now_s=lambda: 0.0)
        warmed.hold(versions)
        await warmed.settled()
        return warmed

    warmed = asyncio.run(load())
    assert not warmed.failures
    return warmed


def test_a_version_answers_in_the_precision_it_passed_the_gate_in(
    proven: tuple[MemoryStore, Config],
) -> None:
    assert (held(*proven, "bf16")).precisions == {"v1": "bf16"}
    assert (held(*proven, "fp32")).precisions == {"v1": "fp32"}


def test_a_version_that_was_not_judged_in_a_precision_answers_in_fp32(
    proven: tuple[MemoryStore, Config], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        precisions = (held(*proven, "int8")).precisions

    assert precisions == {"v1": "fp32"}
    assert "v1 answers in fp32: v1 was not judged in int8; train with" in caplog.text


def test_a_version_that_the_gate_refused_in_a_precision_answers_in_fp32(
    proven: tuple[MemoryStore, Config], caplog: pytest.LogCaptureFixture
) -> None:
    store, config = proven
    registry = Registry(store)
    manifest, files = registry.load("v1")
    refused = manifest.gate_at["bf16"].model_copy(update={"passed": False})
    registry.register(
        manifest.model_copy(update={"version": "v2", "files": {}, "gate_at": {"bf16": refused}}),
        files,
    )

    with caplog.at_level(logging.WARNING):
        precisions = (held(store, config, "bf16", ("v1", "v2"))).precisions

    assert precisions == {"v1": "bf16", "v2": "fp32"}
    assert "v2 answers in fp32: the gate refused v2 in bf16" in caplog.text


def test_a_version_that_cannot_answer_in_a_precision_here_answers_in_fp32(
    proven: tuple[MemoryStore, Config],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Unable(models.Predictor):
        def __init__(self, source, device, precision="fp32"):
            if precision == "bf16":
                raise LearningError("not on this machine")
            super().__init__(source, device, precision)

    monkeypatch.setattr(models, "Predictor", Unable)

    with caplog.at_level(logging.WARNING):
        precisions = held(*proven, "bf16").precisions

    assert precisions == {"v1": "fp32"}
    assert "v1 answers in fp32: not on this machine" in caplog.text


def test_a_version_warms_up_with_what_it_remembers_alone_and_in_a_full_batch(
    proven: tuple[MemoryStore, Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    class Watched(models.Predictor):
        def predict(self, images):
            asked.append((len(images), int(images.max())))
            return super().predict(images)

    monkeypatch.setattr(models, "Predictor", Watched)

    held(*proven, "fp32")

    assert [size for size, _ in asked] == [1, 7]
    assert all(brightest > 100 for _, brightest in asked)


class FakeHost:
    """Answers with whatever is held; may lose everything, as a process does that dies."""

    def __init__(self) -> None:
        self.held: set[str] = set()
        self.dies_at: set[str] = set()
        self.loads: list[str] = []
        self.may_answer = threading.Event()
        self.may_answer.set()

    def load(self, version: str) -> Loaded:
        self.loads.append(version)
        if version in self.dies_at:
            self.held.clear()
            raise ModelHostGoneError("killed")
        self.held.add(version)
        return Loaded(("a", "b"), 8, 1, "fp32")

    def forget(self, version: str) -> None:
        self.held.discard(version)

    async def answer(
        self, version: str, images: list[SentImage]
    ) -> list[VersionAnswer | Exception]:
        await asyncio.to_thread(self.may_answer.wait, 10)
        if version not in self.held:
            raise ModelHostGoneError(f"{version} is not held")
        return [VersionAnswer(version, ("a", "b"), (0.25, 0.75), 1.0) for _ in images]

    def close(self) -> None:
        self.held.clear()


IMAGE = SentImage.of(np.zeros((8, 8, 1), np.uint8))


def versions_of(
    host: FakeHost, *, now_s: Callable[[], float] = lambda: 0.0, linger_s: float = 0.01
) -> WarmVersions:
    return WarmVersions(host, settings().serving, now_s=now_s, linger_s=linger_s)


def test_what_users_see_is_loaded_before_the_rest() -> None:
    host = FakeHost()

    async def play() -> None:
        warmed = versions_of(host)
        warmed.hold(["v2", "v1", "v3"])
        await warmed.settled()

    asyncio.run(play())

    assert host.loads == ["v2", "v1", "v3"]


def test_a_version_that_is_let_go_still_answers_who_has_chosen_it() -> None:
    host = FakeHost()

    async def play() -> list[VersionAnswer]:
        warmed = versions_of(host)
        warmed.hold({"v1"})
        await warmed.settled()
        host.may_answer.clear()
        asked = [asyncio.create_task(warmed.get("v1").answer(IMAGE)) for _ in range(50)]
        await asyncio.sleep(0.02)
        warmed.hold(())
        await asyncio.sleep(0.05)
        host.may_answer.set()
        answers = await asyncio.gather(*asked)
        await until(lambda: not host.held)
        return answers

    assert len(asyncio.run(play())) == 50


def test_a_large_image_is_still_answered_by_a_version_that_goes_while_it_is_decoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    host, may_decode = FakeHost(), threading.Event()
    large = SentImage(b"x" * 1_000_000, None, settings().images)
    monkeypatch.setattr(SentImage, "model_input", lambda *_: may_decode.wait(10))

    async def play() -> VersionAnswer:
        warmed = versions_of(host)
        warmed.hold({"v1"})
        await warmed.settled()
        asked = asyncio.create_task(warmed.get("v1").answer(large))
        await asyncio.sleep(0.02)
        warmed.hold(())
        await asyncio.sleep(0.1)
        may_decode.set()
        return await asked

    assert asyncio.run(play()).version == "v1"


def test_large_images_wait_in_a_bounded_queue_too(monkeypatch: pytest.MonkeyPatch) -> None:
    may_decode = threading.Event()
    large = SentImage(b"x" * 1_000_000, None, settings().images)
    monkeypatch.setattr(SentImage, "model_input", lambda *_: may_decode.wait(10))

    async def play() -> list[object]:
        warmed = WarmVersions(
            FakeHost(), settings(serving={"max_queue": 5}).serving, now_s=lambda: 0.0
        )
        warmed.hold({"v1"})
        await warmed.settled()
        asked = [asyncio.create_task(warmed.get("v1").answer(large)) for _ in range(8)]
        await asyncio.sleep(0.02)
        refused = [task for task in asked if task.done()]
        may_decode.set()
        await asyncio.gather(*asked, return_exceptions=True)
        return [task.exception() for task in refused]

    assert [type(error) for error in asyncio.run(play())] == [OverloadedError] * 3


def test_a_version_that_comes_and_goes_quickly_is_forgotten_once_nobody_wants_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    host = FakeHost()

    async def play() -> None:
        warmed = versions_of(host, linger_s=0.05)
        for _ in range(3):
            warmed.hold({"v1"})
            await warmed.settled()
            warmed.hold(())
            await asyncio.sleep(0.02)
        still_chosen = host.held.copy()
        await until(lambda: not host.held)
        assert still_chosen == {"v1"}
        gc.collect()

    asyncio.run(play())

    assert not caplog.records


def test_a_version_that_is_wanted_again_while_it_is_forgotten_answers() -> None:
    host = FakeHost()

    async def play() -> VersionAnswer:
        warmed = versions_of(host, linger_s=0.0)
        warmed.hold({"v1", "v2"})
        await warmed.settled()
        # A long batch of another version is under way.
        host.may_answer.clear()
        busy = asyncio.create_task(warmed.get("v2").answer(IMAGE))
        await asyncio.sleep(0.02)
        warmed.hold({"v2"})
        await asyncio.sleep(0.02)
        warmed.hold({"v1", "v2"})
        await warmed.settled()
        host.may_answer.set()
        await busy
        return await warmed.get("v1").answer(IMAGE)

    assert asyncio.run(play()).version == "v1"


def test_when_a_load_kills_the_host_what_was_held_is_loaded_again() -> None:
    host = FakeHost()

    async def play() -> VersionAnswer:
        warmed = versions_of(host)
        warmed.hold({"v1"})
        await warmed.settled()
        host.dies_at = {"v2"}
        for _ in range(2):
            warmed.hold({"v1", "v2"})
            await warmed.settled()
        return await warmed.get("v1").answer(IMAGE)

    assert asyncio.run(play()).version == "v1"


def test_a_version_whose_load_kills_the_host_is_tried_less_and_less_often() -> None:
    host = FakeHost()
    host.dies_at = {"v2"}
    tried_at_s = []

    async def play() -> None:
        now_s = 0
        warmed = versions_of(host, now_s=lambda: now_s)
        for now_s in range(200):
            before = host.loads.count("v2")
            warmed.hold({"v1", "v2"})
            await warmed.settled()
            if host.loads.count("v2") > before:
                tried_at_s.append(now_s)

    asyncio.run(play())

    assert tried_at_s == [0, 5, 15, 35, 75, 135, 195]


def test_a_host_that_does_not_hold_a_version_says_that_it_lost_it(
    proven: tuple[MemoryStore, Config],
) -> None:
    store, config = proven

    with pytest.raises(ModelHostGoneError, match="v1 is not held"):
        Models(Registry(store), config.serving).answer("v1", [IMAGE])

"""Versions come and go, and the document changes, while a front goes on answering."""

from __future__ import annotations

import asyncio
import hashlib
import time
from typing import Any

import pytest

from lifelong_ray.on_ray.front import NoVersionError
from lifelong_ray.release import ReleaseDesk
from tests.fakes import MemoryStore
from tests.unit.on_ray.scene import WRONG, Scene, WatchedStore, rollout_of, run
from tests.unit.on_ray.world import ReportBook, add_version, move, until


def test_no_request_waits_while_a_version_loads_beside_the_running_one(
    store: MemoryStore,
) -> None:
    add_version(store, wrong=True)
    slow = WatchedStore(store.objects)

    async def play(scene: Scene) -> None:
        slow.may_read.clear()
        seq = move(scene.desk, stable="v1.1", previous="v1").seq
        for _ in range(20):
            served = await asyncio.wait_for(scene.answer("low"), timeout=2.0)
            assert served.answer.version == "v1"
            await asyncio.sleep(0.01)
        assert scene.book.last.doc_seq < seq
        assert scene.book.last.warm_versions == ("v1",)
        slow.may_read.set()
        await until(lambda: scene.book.last.doc_seq == seq)
        served = await scene.answer("low")
        assert (served.answer.version, served.answer.class_name) == ("v1.1", WRONG["low"])
        assert scene.book.last.warm_versions == ("v1", "v1.1")

    run(play, slow)


def test_a_rollback_loads_nothing(store: MemoryStore) -> None:
    add_version(store)
    watched = WatchedStore(store.objects)

    async def play(scene: Scene) -> None:
        await scene.change(stable="v1.1", previous="v1")
        assert sorted(watched.version_reads) == ["v1", "v1.1"]
        await scene.change(stable="v1", previous="v1.1")
        assert (await scene.answer()).answer.version == "v1"
        await scene.change(stable="v1.1", previous="v1")
        assert (await scene.answer()).answer.version == "v1.1"
        assert len(watched.version_reads) == 2

    run(play, watched)


def test_a_new_front_holds_the_previous_version_too(store: MemoryStore) -> None:
    add_version(store)
    move(ReleaseDesk(store, time.time), stable="v1.1", previous="v1")

    async def play(scene: Scene) -> None:
        assert scene.book.last.warm_versions == ("v1", "v1.1")
        assert (await scene.answer()).answer.version == "v1.1"

    run(play, store)


def test_a_version_nobody_needs_any_more_is_let_go(store: MemoryStore) -> None:
    add_version(store)

    async def play(scene: Scene) -> None:
        await scene.change(rollout=rollout_of("v1.1", weight=50))
        await scene.load("v1.1")
        await scene.change(rollout=None)
        await until(lambda: scene.book.last.warm_versions == ("v1",))

    run(play, store)


# -- what goes wrong -----------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["bit flip", "missing", "not a model"])
def test_a_damaged_version_leaves_the_old_one_serving(store: MemoryStore, damage: str) -> None:
    add_version(store)
    key = "versions/v1.1/model.safetensors"
    if damage == "missing":
        del store.objects[key]
    elif damage == "bit flip":
        data = bytearray(store.objects[key])
        data[-1] ^= 1
        store.objects[key] = bytes(data)
    else:
        manifest = store.objects["versions/v1.1/manifest.json"]
        model, learner = (
            store.objects[f"versions/v1.1/{n}.safetensors"] for n in ("model", "learner")
        )
        sums = [hashlib.sha256(data).hexdigest().encode() for data in (model, learner)]
        store.objects["versions/v1.1/manifest.json"] = manifest.replace(*sums)
        store.objects[key] = learner

    async def play(scene: Scene) -> None:
        seq = move(scene.desk, stable="v1.1", previous="v1").seq
        await until(lambda: "v1.1" in scene.front.status()["failed_versions"])
        served = await scene.answer("low")
        assert (served.answer.version, served.answer.class_name) == ("v1", "low")
        assert scene.book.last.doc_seq < seq
        assert scene.book.last.warm_versions == ("v1",)

    run(play, store)


def test_a_new_front_that_finds_only_a_damaged_version_says_which(store: MemoryStore) -> None:
    store.objects["versions/v1/model.safetensors"] = b"damaged"

    async def play(scene: Scene) -> None:
        with pytest.raises(NoVersionError, match=r"v1/model\.safetensors has SHA-256"):
            await scene.answer()

    run(play, store)


def test_a_front_goes_on_while_the_document_cannot_be_read(store: MemoryStore) -> None:
    async def play(scene: Scene) -> None:
        good = store.objects["current.json"]
        store.objects["current.json"] = b"half a docu"
        await asyncio.sleep(0.05)
        assert (await scene.answer("low")).answer.class_name == "low"
        store.objects["current.json"] = good
        add_version(store)
        await scene.change(stable="v1.1", previous="v1")
        assert (await scene.answer("low")).answer.version == "v1.1"

    run(play, store)


def test_a_front_goes_on_following_after_a_heartbeat_failed(store: MemoryStore) -> None:
    class Flaky(ReportBook):
        def report(self, report: Any) -> None:
            super().report(report)
            if 3 <= len(self.reports) <= 5:
                raise RuntimeError("the controller's actor died")

    async def play(scene: Scene) -> None:
        await until(lambda: len(scene.book.reports) > 10)

    run(play, store, book=Flaky())

"""When the other version answers too, after the user has the answer, and what that may cost."""

from __future__ import annotations

import asyncio
import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lifelong_ray.feedback import CleanImage, read_comparisons, read_images, take_snapshot
from lifelong_ray.on_ray.models import VersionAnswer
from lifelong_ray.types import OverloadedError
from tests.fakes import MemoryStore
from tests.unit.on_ray.scene import Scene, candidates_answer, predictions_in, rollout_of, run
from tests.unit.on_ray.world import CLASSES, FakeSlot, add_version, settings, until


def test_a_shadow_answers_after_the_user_has_the_answer(store: MemoryStore) -> None:
    add_version(store)

    async def play(scene: Scene) -> None:
        scene.slot.open.clear()
        await scene.change(rollout=rollout_of("v1.1", shadow=1.0))
        served = await asyncio.wait_for(scene.answer("low"), timeout=1.0)
        assert served.variant == "stable"
        scene.slot.open.set()
        [row] = await scene.logged(1)
        assert (row.request_id, row.rollout_id) == (served.request_id, "v1.1-trial")
        assert (row.stable_version, row.stable_class) == ("v1", "low")
        assert (row.candidate_version, row.candidate_class) == ("v1.1", CLASSES[0])
        assert not row.audit

    run(play, store)


def test_an_audited_answer_is_compared_whoever_gave_it(store: MemoryStore) -> None:
    add_version(store)

    async def play(scene: Scene) -> None:
        await scene.change(rollout=rollout_of("v1.1", weight=20))
        asked = {}
        for wish in ("always", "never"):
            served = await scene.answer("top", override=wish)
            assert served.audit
            asked[served.request_id] = served.variant
        rows = await scene.logged(2)
        assert {row.request_id for row in rows} == asked.keys()
        for row in rows:
            assert (row.stable_class, row.candidate_class) == ("top", CLASSES[0])
            assert row.audit

    run(play, store, settings(feedback={"audit_share": 1.0}))


def test_a_candidate_without_an_answer_is_compared_as_wrong(store: MemoryStore) -> None:
    add_version(store)

    async def play(scene: Scene) -> None:
        await scene.change(rollout=rollout_of("v1.1", shadow=1.0))
        await scene.answer("low")
        [row] = await scene.logged(1)
        assert (row.stable_class, row.candidate_class) == ("low", "")

    run(play, store, slot=FakeSlot(RuntimeError("gone")))


def test_a_candidate_that_is_still_loading_is_not_compared(store: MemoryStore) -> None:
    add_version(store)

    async def play(scene: Scene) -> None:
        await scene.change(rollout=rollout_of("v1.1"))
        await scene.answer("low", override="always")
        await asyncio.sleep(0.05)
        assert scene.slot.num_asked == 0

    run(play, store, settings(feedback={"audit_share": 1.0}))


def test_without_a_rollout_nothing_is_compared(store: MemoryStore) -> None:
    async def play(scene: Scene) -> None:
        await scene.answer("low")
        await asyncio.sleep(0.05)
        assert scene.slot.num_asked == 0

    run(play, store, settings(feedback={"audit_share": 1.0}))

    assert not read_comparisons(store, take_snapshot(store, 0.0)).rows


# -- what is dropped -----------------------------------------------------------------------


def test_a_jpeg_is_copied_and_logged_as_the_jpeg_that_came(store: MemoryStore) -> None:
    add_version(store)
    copies: list[CleanImage] = []

    def noting(version: str, image: CleanImage) -> VersionAnswer:
        copies.append(image)
        return candidates_answer(version, image)

    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, "JPEG")
    jpeg = file.getvalue()

    async def play(scene: Scene) -> None:
        await scene.change(rollout=rollout_of("v1.1", shadow=1.0))
        await scene.front.answer(scene.front.sent(jpeg + b"home", "image/jpeg"), key="k")
        await scene.logged(1)

    run(play, store, slot=FakeSlot(noting))

    assert [copy.jpeg for copy in copies] == [jpeg]
    name = copies[0].content_hash
    assert [row.content_hash for row in predictions_in(store)] == [name]
    stored = b"".join(store.read(key) for key in store.list("log/images/"))
    assert jpeg in stored
    assert b"home" not in stored
    assert (read_images(store, take_snapshot(store, 0.0), [name])[name] == copies[0].pixels).all()


@pytest.mark.parametrize(
    "bound",
    [
        pytest.param({"serving": {"shadow_queue": 3}}, id="number"),
        pytest.param({"feedback": {"max_queue_bytes": 3 * 12 * 12 + 50}}, id="bytes"),
    ],
)
def test_waiting_comparisons_are_bounded_and_what_is_dropped_is_counted(
    store: MemoryStore, bound: dict[str, Any]
) -> None:
    add_version(store)

    async def play(scene: Scene) -> None:
        scene.slot.open.clear()
        await scene.change(rollout=rollout_of("v1.1", shadow=1.0))
        for _ in range(10):
            await scene.answer("low")
        assert scene.front.dropped_comparisons == 7
        await until(lambda: scene.slot.num_asked == 3)
        scene.slot.open.set()
        await until(lambda: not scene.front._comparing)
        await scene.answer("low")
        assert scene.front.dropped_comparisons == 7
        await until(lambda: scene.slot.num_asked == 4)

    run(play, store, settings(**bound))


def test_an_overloaded_slot_is_no_evidence_against_its_version(store: MemoryStore) -> None:
    add_version(store)

    async def play(scene: Scene) -> None:
        await scene.change(rollout=rollout_of("v1.1", shadow=1.0))
        await scene.answer("low")
        await until(lambda: scene.front.dropped_comparisons == 1)

    run(play, store, slot=FakeSlot(OverloadedError("full")))

    assert not read_comparisons(store, take_snapshot(store, 0.0)).rows


def test_a_slot_that_stalls_is_asked_once_at_a_time_until_it_answers_again(
    store: MemoryStore,
) -> None:
    add_version(store)
    config = settings(serving={"slot_timeout_s": 0.1, "shadow_queue": 8})

    async def play(scene: Scene) -> None:
        async def calls_for_copies() -> int:
            before = scene.slot.num_calls
            for key in range(30):
                await scene.answer("low", key=str(key))
                await asyncio.sleep(0.01)
            return scene.slot.num_calls - before

        await scene.change(rollout=rollout_of("v1.1", shadow=1.0))
        assert 5 <= await calls_for_copies() <= 25  # of 30 copies
        assert scene.front.dropped_comparisons == 0
        scene.slot.open.clear()

        assert 1 <= await calls_for_copies() <= 6  # one in each 0.1 s of some 0.4

        assert scene.front.dropped_comparisons >= 1
        scene.slot.open.set()
        await until(lambda: not scene.front._comparing)
        dropped = scene.front.dropped_comparisons
        await calls_for_copies()
        assert scene.front.dropped_comparisons == dropped

    run(play, store, config)

"""What a front does with a request: one version answers, and is named, whatever happens."""

from __future__ import annotations

import asyncio
import random
import threading
from collections import Counter
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lifelong_ray.feedback import (
    CleanImage,
    RequestIds,
    SentImage,
    content_hash,
    encode_png,
    read_images,
    read_predictions,
    take_snapshot,
)
from lifelong_ray.on_ray.front import NoVersionError, each
from lifelong_ray.on_ray.models import VersionAnswer
from lifelong_ray.types import BadImageError, OverloadedError
from tests.fakes import MemoryStore
from tests.unit.on_ray.scene import (
    IMAGES,
    SECRETS,
    WRONG,
    Scene,
    candidates_answer,
    predictions_in,
    rollout_of,
    run,
)
from tests.unit.on_ray.world import CLASSES, FakeSlot, add_version, settings, until


def test_an_answer_carries_its_version_in_the_id_and_in_the_log(store: MemoryStore) -> None:
    async def play(scene: Scene) -> None:
        for name in CLASSES:
            served = await scene.answer(name, user="ada")
            proof = RequestIds(SECRETS.signing_key).verify(served.request_id)
            assert (proof.version, proof.variant, proof.class_name) == ("v1", "stable", name)

    run(play, store)

    rows = predictions_in(store)
    assert [row.class_name for row in rows] == list(CLASSES)
    assert {row.version for row in rows} == {"v1"}
    assert len({row.user for row in rows} - {"", "ada"}) == 1
    images = read_images(store, take_snapshot(store, 0.0), [row.content_hash for row in rows])
    for row, name in zip(rows, CLASSES, strict=True):
        assert (images[row.content_hash] == IMAGES[name]).all()


def test_every_answer_is_one_versions_while_versions_change(store: MemoryStore) -> None:
    add_version(store, wrong=True)
    served = []

    async def play(scene: Scene) -> None:
        await scene.change(previous="v1.1")
        await scene.load("v1", "v1.1")
        done = asyncio.Event()

        async def keep_asking(seed: int) -> None:
            rng = random.Random(seed)
            while not done.is_set():
                name = rng.choice(CLASSES)
                served.append((name, await scene.answer(name)))

        asking = [asyncio.create_task(keep_asking(seed)) for seed in range(8)]
        for stable, previous in [("v1.1", "v1"), ("v1", "v1.1")] * 6:
            await scene.change(stable=stable, previous=previous)
            await asyncio.sleep(0.02)
        done.set()
        await asyncio.gather(*asking)

    run(play, store)

    assert Counter(s.answer.version for _, s in served).keys() == {"v1", "v1.1"}
    for name, one in served:
        said = name if one.answer.version == "v1" else WRONG[name]
        assert one.answer.class_name == said
        proof = RequestIds(SECRETS.signing_key).verify(one.request_id)
        assert (proof.version, proof.class_name) == (one.answer.version, said)
    logged = {row.request_id: row.version for row in predictions_in(store)}
    assert logged == {one.request_id: one.answer.version for _, one in served}


def test_several_images_of_one_request_get_one_version(store: MemoryStore) -> None:
    add_version(store, wrong=True)

    def only_the_first(version: str, image: CleanImage) -> VersionAnswer:
        if image.pixels is IMAGES["top"]:
            return candidates_answer(version, image)
        raise RuntimeError("the slot is gone")

    async def play(scene: Scene) -> None:
        await scene.change(rollout=rollout_of("v1.1", weight=20))
        images = [SentImage.of(IMAGES[name]) for name in CLASSES]
        together = await scene.front.answer_together(images, key="x", override="always")
        assert [s.variant for s in together] == ["stable"] * 3
        assert [s.answer.class_name for s in together] == list(CLASSES)
        [alone] = await scene.front.answer_together(
            [SentImage.of(IMAGES["top"])], key="x", override="always"
        )
        assert (alone.variant, alone.answer.version) == ("candidate", "v1.1")

    run(play, store, slot=FakeSlot(only_the_first))


def test_a_front_without_any_version_says_so_and_serves_the_first_that_comes(
    store: MemoryStore,
) -> None:
    document = store.objects.pop("current.json")

    async def play(scene: Scene) -> None:
        assert scene.front.stable is None
        with pytest.raises(NoVersionError, match="no version is released yet"):
            await scene.answer()

        store.objects["current.json"] = document
        await until(lambda: scene.front.stable is not None)

        assert (await scene.answer("low")).answer.class_name == "low"

    run(play, store)


def test_an_answer_tells_whether_it_shares_its_arm_with_others(store: MemoryStore) -> None:
    async def play(scene: Scene) -> None:
        alone = await scene.answer("top")
        of_ada = await scene.answer("top", key="ada", user="ada")
        images = [SentImage.of(image) for image in IMAGES.values()]
        [first, *_] = await scene.front.answer_together(images, key="x")
        verify = RequestIds(SECRETS.signing_key).verify
        sticky = [verify(one.request_id).sticky for one in (alone, of_ada, first)]
        assert sticky == [False, True, True]

    run(play, store)


def test_a_front_tells_what_each_version_answers_in(store: MemoryStore) -> None:
    async def play(scene: Scene) -> None:
        assert scene.front.status()["precisions"] == {"v1": "fp32"}

    run(play, store, settings(serving={"front": {"precision": "bf16"}}))


# -- too many images, and bad ones ---------------------------------------------------------


def test_more_images_than_may_wait_are_refused_and_the_rest_answered(store: MemoryStore) -> None:
    async def play(scene: Scene) -> None:
        asked = [scene.answer("low", key=str(k)) for k in range(12)]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        refused = [a for a in answers if isinstance(a, OverloadedError)]
        assert len(refused) == 8
        assert {a.answer.class_name for a in answers if a not in refused} == {"low"}
        assert scene.front.log.stats.dropped_predictions == 0
        assert await scene.counted("v1") == (4, 0)

    run(play, store, settings(serving={"max_queue": 4}))


def test_where_one_of_several_fails_the_others_are_dropped() -> None:
    given_up = []

    async def slow(number: int) -> int:
        try:
            await asyncio.sleep(10)
        except asyncio.CancelledError:
            given_up.append(number)
            raise
        return number

    async def full() -> int:
        raise OverloadedError("full")

    async def play() -> None:
        with pytest.raises(OverloadedError):
            await each([slow(1), full(), slow(2)])
        await asyncio.sleep(0)

    asyncio.run(play())

    assert given_up == [1, 2]


def test_bytes_are_decoded_within_the_configured_limits_off_the_event_loop(
    store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: set[int] = set()
    opened = Image.open

    def watched(*args: Any, **options: Any) -> Any:
        threads.add(threading.get_ident())
        return opened(*args, **options)

    monkeypatch.setattr(Image, "open", watched)
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 1), dtype=np.uint8)
    names = {encode_png(pixels): content_hash(pixels) for pixels in (IMAGES["low"], noise)}
    small, large = names
    assert len(large) > 32_768 > len(small)

    async def play(scene: Scene) -> None:
        for png, name in names.items():
            sent = scene.front.sent(png, "image/png")
            assert (await scene.front.answer(sent, key="k")).answer.version == "v1"
            assert sent.clean().content_hash == name
        for bad, code in ((b"no image", "not_an_image"), (large[:5_000], "truncated_image")):
            with pytest.raises(BadImageError) as raised:
                await scene.front.answer(scene.front.sent(bad, None), key="k")
            assert raised.value.code == code
        assert await scene.counted("v1") == (2, 0)

    run(play, store)
    assert threads
    assert threading.get_ident() not in threads


def test_a_bad_image_in_a_batch_harms_no_other(store: MemoryStore) -> None:
    async def play(scene: Scene) -> None:
        good = [scene.answer(name) for name in CLASSES]
        bad = scene.front.answer(scene.front.sent(b"no image", None), key="k")
        answers = await asyncio.gather(*good, bad, return_exceptions=True)
        assert [a.answer.class_name for a in answers[:3]] == list(CLASSES)
        assert isinstance(answers[3], BadImageError)
        assert await scene.counted("v1") == (3, 0)

    run(play, store)


# -- the cache -----------------------------------------------------------------------------

WITH_CACHE = settings(serving={"cache_bytes": 100_000})


def test_the_same_pixels_are_answered_from_memory_and_logged_all_the_same(
    store: MemoryStore,
) -> None:
    async def play(scene: Scene) -> None:
        first, again = await scene.answer("low"), await scene.answer("low")
        other = await scene.answer("top")

        assert [one.answer.cached for one in (first, again, other)] == [False, True, False]
        assert again.answer.probabilities == first.answer.probabilities
        assert again.request_id != first.request_id
        assert await scene.counted("v1") == (3, 0)
        scene.front.log.flush()

    run(play, store, WITH_CACHE)
    assert len(read_predictions(store, take_snapshot(store, 0.0)).rows) == 3


def test_an_answer_is_never_taken_from_another_version(store: MemoryStore) -> None:
    add_version(store, wrong=True)

    async def play(scene: Scene) -> None:
        assert (await scene.answer("low")).answer.class_name == "low"
        await scene.change(stable="v1.1", previous="v1")

        answer = (await scene.answer("low")).answer

        assert (answer.cached, answer.version, answer.class_name) == (False, "v1.1", WRONG["low"])
        await scene.change(stable="v1", previous="v1.1")
        answer = (await scene.answer("low")).answer
        assert (answer.cached, answer.version, answer.class_name) == (True, "v1", "low")

    run(play, store, WITH_CACHE)


def test_answers_from_memory_say_nothing_about_the_models_latency(store: MemoryStore) -> None:
    async def play(scene: Scene) -> None:
        for _ in range(5):
            await scene.answer("low")
        await until(lambda: "v1" in scene.book.last.counters)
        await until(lambda: scene.book.last.counters["v1"].requests == 5)
        assert sum(scene.book.last.counters["v1"].latency_counts) == 1

    run(play, store, WITH_CACHE)

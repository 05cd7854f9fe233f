"""What a front writes down: answers, labels and examples, and what it does when it cannot."""

from __future__ import annotations

import pytest

from lifelong_ray.feedback import (
    RequestIds,
    SentImage,
    read_feedback,
    read_images,
    take_snapshot,
)
from lifelong_ray.on_ray.front import clean_label, clean_reason
from lifelong_ray.types import BadRequestIdError, StorageFullError
from tests.fakes import MemoryStore
from tests.unit.on_ray.scene import IMAGES, Scene, WatchedStore, predictions_in, run
from tests.unit.on_ray.world import CLASSES, add_light_version, settings, until


def test_feedback_is_in_the_log_when_it_is_acknowledged(store: MemoryStore) -> None:
    async def play(scene: Scene) -> None:
        served = await scene.answer("low")
        await scene.front.record_feedback(served.request_id, "middle", "ada")
        [row] = read_feedback(store, take_snapshot(store, 0.0)).rows
        assert (row.kind, row.label, row.request_id) == ("feedback", "middle", served.request_id)
        assert row.audit
        assert row.user not in {"", "ada"}

    store.objects = {k: v for k, v in store.objects.items() if not k.startswith("log/")}
    run(play, store, settings(feedback={"audit_share": 1.0}))


def test_feedback_on_an_answer_of_another_system_is_refused(store: MemoryStore) -> None:
    foreign = RequestIds(b"another key of another system").issue(0.0, "v1", "stable", "top", True)

    async def play(scene: Scene) -> None:
        with pytest.raises(BadRequestIdError):
            await scene.front.record_feedback(foreign, "top", "")

    run(play, store)


def test_an_example_is_in_the_log_with_its_image_when_it_is_acknowledged(
    store: MemoryStore,
) -> None:
    async def play(scene: Scene) -> None:
        image = await scene.front.record_example(SentImage.of(IMAGES["low"]), "boot", "operator")
        snapshot = take_snapshot(store, 0.0)
        row = read_feedback(store, snapshot).rows[-1]
        assert (row.kind, row.label, row.content_hash) == ("example", "boot", image)
        assert (read_images(store, snapshot, [image])[image] == IMAGES["low"]).all()

    run(play, store)


def test_an_answer_of_a_light_model_says_so_and_is_logged_as_any_other(store: MemoryStore) -> None:
    async def play(scene: Scene) -> None:
        assert not (await scene.answer("low")).answer.light
        await scene.change(stable="v2")

        first, again = [(await scene.answer("low")).answer for _ in range(2)]

        assert (first.version, first.light, first.cached) == ("v2", True, False)
        assert (again.version, again.light, again.cached) == ("v2", True, True)

    add_light_version(store)
    run(play, store, settings(serving={"cache_bytes": 100_000}))

    rows = predictions_in(store)
    assert [row.version for row in rows] == ["v1", "v2", "v2"]
    assert all(sum(row.scores) == pytest.approx(1) for row in rows)


# -- a disk or a queue that is full --------------------------------------------------------


def test_a_full_disk_stops_labels_but_no_answers_and_loses_nothing(store: MemoryStore) -> None:
    disk = WatchedStore(store.objects)
    ids = []

    async def play(scene: Scene) -> None:
        disk.is_full = True
        for name in CLASSES * 3:
            served = await scene.answer(name)
            assert served.answer.class_name == name
            ids.append(served.request_id)
        await until(lambda: scene.front.log.stats.failed_flushes > 0)
        with pytest.raises(StorageFullError):
            await scene.front.record_feedback(ids[0], "top", "")
        assert (await scene.answer("low")).answer.class_name == "low"
        disk.is_full = False
        await scene.front.record_feedback(ids[0], "top", "")

    run(play, disk)

    assert {row.request_id for row in predictions_in(disk)} >= set(ids)
    labels = read_feedback(disk, take_snapshot(disk, 0.0)).rows
    assert [row.label for row in labels if row.kind == "feedback"] == ["top"]


def test_a_full_queue_drops_predictions_but_no_answers(store: MemoryStore) -> None:
    disk = WatchedStore(store.objects)

    async def play(scene: Scene) -> None:
        disk.is_full = True
        for _ in range(20):
            assert (await scene.answer("low")).answer.class_name == "low"
        status = scene.front.status()
        assert status["dropped_predictions"] > 0
        assert status["queued_log_bytes"] <= 2_000

    run(play, disk, settings(feedback={"max_queue_bytes": 2_000}))


# -- labels and reasons --------------------------------------------------------------------


@pytest.mark.parametrize(
    "label",
    [None, 7, "", "   ", "x" * 201, "two\nlines", "\x00", "\ud800", "b\ufffdt", ["boot"]],
    ids=repr,
)
def test_a_label_that_nobody_could_read_is_refused(label: object) -> None:
    with pytest.raises(ValueError, match="label must be a printable string"):
        clean_label(label)


def test_a_label_is_taken_without_the_blanks_around_it() -> None:
    assert clean_label(" Schöner Schuh ") == "Schöner Schuh"


@pytest.mark.parametrize("reason", [None, 7, ["why"], "x" * 501, "a\ud800"], ids=repr)
def test_a_reason_that_the_audit_cannot_keep_is_refused(reason: object) -> None:
    with pytest.raises(ValueError, match="reason must be a string of at most 500"):
        clean_reason(reason)


@pytest.mark.parametrize(
    "reason", ["", "x" * 500, "zu spät 🙂\nsiehe oben"], ids=["none", "long", "text"]
)
def test_other_reasons_are_kept_as_they_are(reason: str) -> None:
    assert clean_reason(reason) == reason

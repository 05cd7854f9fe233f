"""What a front does with a request, whatever happens around it."""

from __future__ import annotations

import asyncio
import hashlib
import random
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from lifelong_ray.config import Config
from lifelong_ray.feedback import (
    CleanImage,
    RequestIds,
    Secrets,
    SentImage,
    content_hash,
    decode_image,
    decode_png,
    encode_png,
    read_comparisons,
    read_feedback,
    read_images,
    read_predictions,
    take_snapshot,
)
from lifelong_ray.on_ray import models
from lifelong_ray.on_ray.front import (
    Front,
    NoVersionError,
    clean_label,
    clean_reason,
    each,
)
from lifelong_ray.on_ray.models import Models, ModelThread, VersionAnswer
from lifelong_ray.release import Arm, Experiment, Registry, ReleaseDesk, Rollout
from lifelong_ray.types import (
    BadImageError,
    BadRequestIdError,
    ModelHostGoneError,
    OverloadedError,
    StorageFullError,
)
from tests.fakes import MemoryStore
from tests.unit.on_ray.world import (
    CLASSES,
    FakeSlot,
    ReportBook,
    add_light_version,
    add_version,
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


def rollout_of(candidate: str, *, weight: int = 0, shadow: float = 0.0) -> Rollout:
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


def candidates_answer(version: str, image: CleanImage) -> VersionAnswer:
    """A slot that always says the first class."""
    return VersionAnswer(version, CLASSES, (0.8, 0.1, 0.1), 1.0)


@asynccontextmanager
async def running(
    store: MemoryStore,
    config: Config | None = None,
    slot: FakeSlot | None = None,
) -> AsyncIterator[Scene]:
    slot = slot or FakeSlot(candidates_answer)
    book = ReportBook()
    front = Front(
        config or settings(),
        store,
        SECRETS,
        ModelThread(Models(Registry(store), (config or settings()).serving)),
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
) -> None:
    async def start() -> None:
        async with running(store, config, slot) as scene:
            await play(scene)

    asyncio.run(start())


def predictions_in(store: MemoryStore) -> Any:
    return read_predictions(store, take_snapshot(store, 0.0)).rows


# -- one version answers, and is named -----------------------------------------------------


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


# -- the candidate in a slot --------------------------------------------------------------


@pytest.mark.parametrize("slot_timeout_s", [0.02, 5.0], ids=["slow", "failing"])
def test_a_slot_that_gives_no_answer_costs_no_user_one(
    store: MemoryStore, slot_timeout_s: float
) -> None:
    add_version(store)
    config = settings(serving={"slot_timeout_s": slot_timeout_s})

    async def play(scene: Scene) -> None:
        if slot_timeout_s < 1:
            scene.slot.open.clear()
        await scene.change(rollout=rollout_of("v1.1", weight=20))
        answers = await asyncio.gather(*(scene.answer("low", key=str(k)) for k in range(200)))
        assert {a.answer.version for a in answers} == {"v1"}
        assert {a.variant for a in answers} == {"stable"}
        assert {a.answer.class_name for a in answers} == {"low"}
        assert 20 <= scene.slot.num_asked <= 60
        assert await scene.counted("v1.1") == (scene.slot.num_asked, scene.slot.num_asked)
        assert await scene.counted("v1") == (200, 0)

    run(play, store, config, FakeSlot(RuntimeError("out of memory")))


def test_an_overloaded_slot_is_not_an_error_of_its_version(store: MemoryStore) -> None:
    add_version(store)

    async def play(scene: Scene) -> None:
        await scene.change(rollout=rollout_of("v1.1", weight=20))
        assert (await scene.answer(override="always")).variant == "stable"
        assert await scene.counted("v1.1") is None

    run(play, store, slot=FakeSlot(OverloadedError("full")))


def test_a_slot_that_is_still_loading_is_no_error_of_its_version(store: MemoryStore) -> None:
    add_version(store)

    async def play(scene: Scene) -> None:
        await scene.change(rollout=rollout_of("v1.1", weight=20))
        assert (await scene.answer(override="always")).variant == "stable"
        assert await scene.counted("v1.1") is None

    run(play, store, slot=FakeSlot(ModelHostGoneError("v1.1 is not loaded here")))


def test_the_override_asks_for_a_variant(store: MemoryStore) -> None:
    add_version(store)

    async def play(scene: Scene) -> None:
        await scene.change(rollout=rollout_of("v1.1", weight=20))
        wished = {
            wish: {(await scene.answer(key=str(k), override=wish)).variant for k in range(40)}
            for wish in ("always", "never")
        }
        assert wished == {"always": {"candidate"}, "never": {"stable"}}

    run(play, store)


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


# -- the candidate in the front -------------------------------------------------------------


class Breakable(models.Predictor):
    """A model that can be made to fail."""

    broken: bool = False

    def predict(self, images: Any) -> Any:
        if Breakable.broken and self.class_names != CLASSES:
            raise RuntimeError("device lost")
        return super().predict(images)


def test_a_candidate_that_fails_in_process_costs_no_answer_and_counts_once(
    store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_version(store, wrong=True)
    monkeypatch.setattr(models, "Predictor", Breakable)
    monkeypatch.setattr(Breakable, "broken", False)

    async def play(scene: Scene) -> None:
        await scene.change(rollout=rollout_of("v1.1", weight=50))
        await scene.load("v1.1")
        good = await scene.answer("low", override="always")
        assert (good.variant, good.answer.class_name) == ("candidate", WRONG["low"])
        monkeypatch.setattr(Breakable, "broken", True)
        for _ in range(5):
            served = await scene.answer("low", override="always")
            assert (served.variant, served.answer.class_name) == ("stable", "low")
        assert await scene.counted("v1.1") == (6, 5)
        assert scene.slot.num_asked == 0

    run(play, store)


# -- who was assigned -----------------------------------------------------------------------


def test_only_requests_that_chance_assigns_are_counted_by_arm(store: MemoryStore) -> None:
    add_version(store)
    rollout = rollout_of("v1.1", weight=20)

    async def play(scene: Scene) -> None:
        await scene.change(rollout=rollout)
        served = [await scene.answer(key=f"request-{n}") for n in range(60)]
        for n in range(5):
            await scene.answer(key="ada", user="ada")
            await scene.answer(key=f"forced-{n}", override="always")
        told = await scene.assigned()

        arms = Counter(one.variant for one in served)
        assert told == {rollout.split: (arms["stable"], arms["candidate"])}
        assert arms["candidate"] > 0

    run(play, store)


def test_a_request_counts_for_its_arm_although_another_answers(store: MemoryStore) -> None:
    add_version(store)
    rollout = rollout_of("v1.1", weight=20)

    async def play(scene: Scene) -> None:
        await scene.change(rollout=rollout)
        served = [await scene.answer(key=f"request-{n}") for n in range(60)]
        assert {one.variant for one in served} == {"stable"}
        [(stable, candidate)] = (await scene.assigned()).values()
        assert stable + candidate == 60
        assert candidate > 0

    run(play, store, slot=FakeSlot(RuntimeError("gone")))


def test_counts_of_an_ended_rollout_are_forgotten(store: MemoryStore) -> None:
    add_version(store)

    async def play(scene: Scene) -> None:
        await scene.change(rollout=rollout_of("v1.1", weight=20))
        await scene.answer()
        assert await scene.assigned()
        await scene.change(rollout=None)
        await scene.answer()
        assert await scene.assigned() == {}

    run(play, store)


# -- experiments ----------------------------------------------------------------------------


def experiment_of(*versions: str, began: bool = True) -> Experiment:
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


def test_arms_answer_in_process_and_are_named_in_the_id_and_in_the_log(store: MemoryStore) -> None:
    for version in ("v1.1", "v1.2"):
        add_version(store, version, wrong=True)

    async def play(scene: Scene) -> None:
        await scene.change(experiment=experiment_of("v1", "v1.1", "v1.2", began=False))
        await scene.load("v1", "v1.1", "v1.2")
        assert (await scene.answer(key="before")).variant == "stable"
        experiment = experiment_of("v1", "v1.1", "v1.2")
        experiment = experiment.model_copy(
            update={"arms": (*experiment.arms[:2], Arm(version="v1.2", weight=34))}
        )
        await scene.change(experiment=experiment)
        served = [await scene.answer("top", key=f"request-{n}") for n in range(90)]
        chosen = await scene.answer("top", key="ada", override="v1.2")

        assert {one.variant for one in served} == {"stable", "v1.1", "v1.2"}
        for one in (*served, chosen):
            version = "v1" if one.variant == "stable" else one.variant
            assert one.answer.version == version
            assert one.answer.class_name == ("top" if version == "v1" else WRONG["top"])
            proof = RequestIds(SECRETS.signing_key).verify(one.request_id)
            assert (proof.version, proof.variant) == (version, one.variant)
            assert proof.chosen == (one is chosen)
        arms = Counter(one.variant for one in served)
        counts = tuple(arms[name] for name in ("stable", "v1.1", "v1.2"))
        assert await scene.assigned() == {experiment.split: counts}
        assert scene.book.last.requests_by_arm == {"e1": counts}
        assert scene.slot.num_asked == 0
        assert (await scene.answer(key="sticky", user="ada")).answer.version == (
            (await scene.answer(key="sticky", user="ada")).answer.version
        )
        await until(lambda: sum(scene.book.last.requests_by_arm["e1"]) == 92)
        assert await scene.assigned() == {experiment.split: counts}  # sessions are no chance
        together = [SentImage.of(IMAGES["top"])] * 3
        await scene.front.answer_together(together, key="many")
        await until(lambda: sum(scene.book.last.requests_by_arm["e1"]) == 95)
        assert sum((await scene.assigned())[experiment.split]) == 91  # chance tossed once

    run(play, store)

    assert {row.variant for row in predictions_in(store)} == {"stable", "v1.1", "v1.2"}


def test_an_arm_that_is_not_loaded_fails_no_request(store: MemoryStore) -> None:
    async def play(scene: Scene) -> None:
        await scene.change(experiment=experiment_of("v1", "v9"))
        served = [await scene.answer(key=f"request-{n}") for n in range(40)]

        assert {(one.variant, one.answer.version) for one in served} == {("stable", "v1")}
        [(stable, missing)] = (await scene.assigned()).values()
        assert stable + missing == 40
        assert missing > 0

    run(play, store)


# -- comparisons ----------------------------------------------------------------------------


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


def test_a_candidate_that_is_still_loading_is_not_compared(store: MemoryStore) -> None:
    add_version(store)

    async def play(scene: Scene) -> None:
        await scene.change(rollout=rollout_of("v1.1"))
        await scene.answer("low", override="always")
        await asyncio.sleep(0.05)
        assert scene.slot.num_asked == 0

    run(play, store, settings(feedback={"audit_share": 1.0}))


def test_an_overloaded_slot_is_no_evidence_against_its_version(store: MemoryStore) -> None:
    add_version(store)

    async def play(scene: Scene) -> None:
        await scene.change(rollout=rollout_of("v1.1", shadow=1.0))
        await scene.answer("low")
        await until(lambda: scene.front.dropped_comparisons == 1)

    run(play, store, slot=FakeSlot(OverloadedError("full")))

    assert not read_comparisons(store, take_snapshot(store, 0.0)).rows


def test_without_a_rollout_nothing_is_compared(store: MemoryStore) -> None:
    async def play(scene: Scene) -> None:
        await scene.answer("low")
        await asyncio.sleep(0.05)
        assert scene.slot.num_asked == 0

    run(play, store, settings(feedback={"audit_share": 1.0}))

    assert not read_comparisons(store, take_snapshot(store, 0.0)).rows


# -- versions come and go --------------------------------------------------------------------


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

    async def play() -> None:
        book = Flaky()
        slot = FakeSlot(candidates_answer)
        front = Front(
            settings(),
            store,
            SECRETS,
            ModelThread(Models(Registry(store), settings().serving)),
            slot,
            book,
            now_s=time.time,
            rng=random.Random(0),
        )
        await front.start()
        try:
            await until(lambda: len(book.reports) > 10)
        finally:
            front.close()

    asyncio.run(play())


# -- the log -----------------------------------------------------------------------------------


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


def test_a_front_tells_what_each_version_answers_in(store: MemoryStore) -> None:
    async def play(scene: Scene) -> None:
        assert scene.front.status()["precisions"] == {"v1": "fp32"}

    run(play, store, settings(serving={"front": {"precision": "bf16"}}))


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


def test_feedback_on_an_answer_of_another_system_is_refused(store: MemoryStore) -> None:
    foreign = RequestIds(b"another key of another system").issue(0.0, "v1", "stable", "top", True)

    async def play(scene: Scene) -> None:
        with pytest.raises(BadRequestIdError):
            await scene.front.record_feedback(foreign, "top", "")

    run(play, store)


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


def test_bytes_are_decoded_within_the_configured_limits_off_the_event_loop(
    store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: set[int] = set()

    def watched(*args: Any) -> Any:
        threads.add(threading.get_ident())
        return decode_image(*args)

    monkeypatch.setattr("lifelong_ray.feedback.images.decode_image", watched)
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 1), dtype=np.uint8)
    large, small = encode_png(noise), encode_png(IMAGES["low"])
    assert len(large) > 32_768 > len(small)

    async def play(scene: Scene) -> None:
        for png in (small, large):
            sent = scene.front.sent(png, "image/png")
            assert (await scene.front.answer(sent, key="k")).answer.version == "v1"
            assert sent.clean().content_hash == content_hash(decode_png(png))
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


def test_a_bad_image_is_no_error_of_the_candidate(store: MemoryStore) -> None:
    add_version(store)

    async def play(scene: Scene) -> None:
        await scene.change(rollout=rollout_of("v1.1", weight=20))
        with pytest.raises(BadImageError):
            await scene.front.answer(scene.front.sent(b"no", None), key="k", override="always")
        assert await scene.counted("v1.1") is None

    run(play, store)


# -- the cache --------------------------------------------------------------------------------

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


# -- labels -----------------------------------------------------------------------------------


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


# -- reasons ----------------------------------------------------------------------------------


@pytest.mark.parametrize("reason", [None, 7, ["why"], "x" * 501, "a\ud800"], ids=repr)
def test_a_reason_that_the_audit_cannot_keep_is_refused(reason: object) -> None:
    with pytest.raises(ValueError, match="reason must be a string of at most 500"):
        clean_reason(reason)


@pytest.mark.parametrize(
    "reason", ["", "x" * 500, "zu spät 🙂\nsiehe oben"], ids=["none", "long", "text"]
)
def test_other_reasons_are_kept_as_they_are(reason: str) -> None:
    assert clean_reason(reason) == reason


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


def test_an_answer_tells_whether_it_shares_its_arm_with_others(store: MemoryStore) -> None:
    async def play() -> list[bool]:
        async with running(store) as scene:
            alone = await scene.answer("top")
            of_ada = await scene.answer("top", key="ada", user="ada")
            images = [SentImage.of(image) for image in IMAGES.values()]
            [first, *_] = await scene.front.answer_together(images, key="x")
        verify = RequestIds(SECRETS.signing_key).verify
        return [verify(one.request_id).sticky for one in (alone, of_ada, first)]

    assert asyncio.run(play()) == [False, True, True]

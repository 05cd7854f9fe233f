"""Who answers while a rollout or an experiment is under way, and what is counted of it."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import pytest

from lifelong_ray.feedback import RequestIds, SentImage
from lifelong_ray.on_ray import models
from lifelong_ray.release import Arm
from lifelong_ray.types import BadImageError, ModelHostGoneError, OverloadedError
from tests.fakes import MemoryStore
from tests.unit.on_ray.scene import (
    IMAGES,
    SECRETS,
    WRONG,
    Scene,
    experiment_of,
    predictions_in,
    rollout_of,
    run,
)
from tests.unit.on_ray.world import CLASSES, FakeSlot, add_version, settings, until

# -- the candidate in a slot ---------------------------------------------------------------


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


def test_a_bad_image_is_no_error_of_the_candidate(store: MemoryStore) -> None:
    add_version(store)

    async def play(scene: Scene) -> None:
        await scene.change(rollout=rollout_of("v1.1", weight=20))
        with pytest.raises(BadImageError):
            await scene.front.answer(scene.front.sent(b"no", None), key="k", override="always")
        assert await scene.counted("v1.1") is None

    run(play, store)


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


# -- the candidate in the front ------------------------------------------------------------


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


# -- who was assigned ----------------------------------------------------------------------


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


# -- experiments ---------------------------------------------------------------------------


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

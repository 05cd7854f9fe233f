"""A slot that is not there says nothing about the version it should have held."""

from __future__ import annotations

import pytest

from lifelong_ray.feedback import read_comparisons, take_snapshot
from lifelong_ray.types import ModelHostGoneError
from tests.fakes import MemoryStore
from tests.unit.on_ray.scene import Scene, rollout_of, run
from tests.unit.on_ray.world import FakeSlot, add_version, settings, until


def silent_slot(*, alive: bool) -> FakeSlot:
    slot = FakeSlot(RuntimeError("is never raised"))
    slot.open.clear()
    slot.alive = alive
    return slot


@pytest.mark.parametrize(("alive", "counted"), [(True, (1, 1)), (False, None)])
def test_an_answer_that_does_not_come_counts_only_if_a_slot_was_there(
    store: MemoryStore, alive: bool, counted: tuple[int, int] | None
) -> None:
    add_version(store)

    async def play(scene: Scene) -> None:
        await scene.change(rollout=rollout_of("v1.1", weight=20))
        assert (await scene.answer(override="always")).variant == "stable"
        assert await scene.counted("v1.1") == counted

    run(play, store, settings(serving={"slot_timeout_s": 0.05}), silent_slot(alive=alive))


@pytest.mark.parametrize(
    "slot",
    [silent_slot(alive=False), FakeSlot(ModelHostGoneError("v1.1 is not loaded here"))],
    ids=["dead", "loading"],
)
def test_a_copy_that_no_slot_took_is_no_evidence_against_the_version(
    store: MemoryStore, slot: FakeSlot
) -> None:
    add_version(store)

    async def play(scene: Scene) -> None:
        await scene.change(rollout=rollout_of("v1.1", shadow=1.0))
        await scene.answer("low")
        await until(lambda: scene.front.dropped_comparisons == 1)
        assert await scene.counted("v1.1") is None

    run(play, store, settings(serving={"slot_timeout_s": 0.05}), slot)

    assert not read_comparisons(store, take_snapshot(store, 0.0)).rows

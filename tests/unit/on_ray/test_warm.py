"""How a version becomes something that answers: precision, warm-up, and what it falls back to."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

import pytest

from lifelong_ray.config import Config, Precision
from lifelong_ray.on_ray import models
from lifelong_ray.on_ray.models import Models
from lifelong_ray.on_ray.warm import WarmVersions
from lifelong_ray.release import Registry
from lifelong_ray.types import LearningError
from tests.fakes import MemoryStore
from tests.unit.on_ray.world import settings, train_base

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
        host = Models(Registry(store), config.serving, precision)
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

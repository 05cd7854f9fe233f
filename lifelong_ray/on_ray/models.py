"""Models loaded into this process, and the batches of images that they answer.

Knows how a version of the registry becomes something that answers. Does not know which one
should, nor who asks.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from time import perf_counter
from typing import Protocol

import numpy as np
import torch

from lifelong_ray.config import Precision, ServingConfig
from lifelong_ray.feedback import PreparedImage, SentImage
from lifelong_ray.learning import (
    Answerer,
    Learner,
    Light,
    Predictor,
    remembered_images,
    with_light,
)
from lifelong_ray.on_ray.cache import AnswerCache
from lifelong_ray.release import Manifest, Registry
from lifelong_ray.types import LearningError, ModelHostGoneError

logger = logging.getLogger(__name__)

_DECODING = min(4, os.cpu_count() or 1)  # Images of a batch decoded at a time.


@dataclass(frozen=True)
class VersionAnswer:
    """What one version says about one image.

    Attributes:
        version: Who answered.
        class_names: Its classes.
        probabilities: One per class.
        model_ms: Time of the batch inside the model, milliseconds; 0 where it was not asked.
        cached: Whether it said so earlier, about the same pixels.
        light: Whether its light model said so.
    """

    version: str
    class_names: tuple[str, ...]
    probabilities: tuple[float, ...]
    model_ms: float
    cached: bool = False
    light: bool = False

    @cached_property
    def best(self) -> int:
        """Index of the most probable class."""
        return self.probabilities.index(max(self.probabilities))

    @property
    def class_name(self) -> str:
        """The most probable class."""
        return self.class_names[self.best]

    @property
    def confidence(self) -> float:
        """Its probability."""
        return self.probabilities[self.best]


@dataclass(frozen=True)
class Loaded:
    """What is known of a version once it can answer.

    Attributes:
        class_names: Its classes, in the order of its probabilities.
        image_size: Height and width of its input, pixels.
        channels: Channels of its input.
        precision: What it answers in.
    """

    class_names: tuple[str, ...]
    image_size: int
    channels: int
    precision: Precision


class ModelHost(Protocol):
    """Loads versions and answers with them; every method but `answer` blocks."""

    def load(self, version: str) -> Loaded:
        """Load a version and warm it up."""

    def forget(self, version: str) -> None:
        """Let go of a version."""

    async def answer(
        self, version: str, images: list[SentImage]
    ) -> list[VersionAnswer | Exception]:
        """Answer a batch with a loaded version, or say what is wrong with an image."""

    def close(self) -> None:
        """Let go of everything."""


class ModelThread:
    """A `ModelHost` in this process: one thread answers, and who loads lends another."""

    def __init__(self, models: Models) -> None:
        self.load = models.load
        self.forget = models.forget
        self._models = models
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="inference")

    async def answer(
        self, version: str, images: list[SentImage]
    ) -> list[VersionAnswer | Exception]:
        """Answer a batch, after those that were asked for before."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._models.answer, version, images)

    def close(self) -> None:
        """Let go of everything."""
        self._models.close()


class Models:
    """Loaded versions that answer; every method blocks.

    Each version answers in the wanted precision if it passed the gate in it, else in fp32.
    One thread may answer while another loads.
    """

    def __init__(
        self, registry: Registry, config: ServingConfig, precision: Precision = "fp32"
    ) -> None:
        self._registry = registry
        self._config = config
        self._precision = precision
        self._held: dict[str, tuple[Answerer, Loaded]] = {}
        self._cache: AnswerCache[VersionAnswer] = AnswerCache(config.cache_bytes)
        self._decoding = ThreadPoolExecutor(_DECODING, thread_name_prefix="decode")
        torch.set_num_threads(config.model_threads)

    def load(self, version: str) -> Loaded:
        """Load a version and warm it up with images that it remembers."""
        manifest, files = self._registry.load(version)
        learner = Learner.from_files(files)
        predictor = with_light(self._predictor(manifest, learner), Light.from_files(files))
        most = self._config.max_batch
        predictor.warm_up((1, most), remembered_images(learner, most))
        model = learner.model_config
        loaded = Loaded(learner.class_names, model.image_size, model.channels, predictor.precision)
        self._held[version] = predictor, loaded
        return loaded

    def forget(self, version: str) -> None:
        """Let go of a version; a batch under way is still answered."""
        self._held.pop(version, None)

    def close(self) -> None:
        """Let go of everything."""
        self._held.clear()

    def answer(
        self, version: str, images: Sequence[SentImage | PreparedImage]
    ) -> list[VersionAnswer | Exception]:
        """Answer a batch.

        What little there is to decode is decoded here too: with every trip to a thread a request
        waits for the interpreter, so that it makes one.

        Raises:
            ModelHostGoneError: If the version is not held, as in a process that was started anew.
        """
        if version not in self._held:
            raise ModelHostGoneError(f"version {version} is not held here; it is loaded again")
        predictor, loaded = self._held[version]
        self._decode(
            [i for i in images if isinstance(i, SentImage) and i.is_worth_a_thread], loaded
        )
        found = [self._known(version, loaded, image) for image in images]
        unknown = [one for one in found if isinstance(one, PreparedImage)]
        made: Iterator[VersionAnswer | Exception]
        try:
            made = iter(self._asked(version, predictor, loaded, unknown) if unknown else [])
        except Exception as error:  # noqa: BLE001 - the others know their answer all the same
            made = iter([error] * len(unknown))
        return [next(made) if isinstance(one, PreparedImage) else one for one in found]

    def _decode(self, images: list[SentImage], loaded: Loaded) -> None:
        """Decode on every core; what is wrong with an image shows when it is asked for again."""

        def decode(some: list[SentImage]) -> None:
            for image in some:
                with suppress(Exception):
                    image.model_input(loaded.image_size, loaded.channels)

        # A part for each, since every image that changes hands waits for the interpreter.
        first, *others = (images[part::_DECODING] for part in range(_DECODING))
        waiting = [self._decoding.submit(decode, some) for some in others if some]
        decode(first)
        wait(waiting)

    def _known(
        self, version: str, loaded: Loaded, image: SentImage | PreparedImage
    ) -> VersionAnswer | Exception | PreparedImage:
        try:
            name = image.content_hash
            return self._cache.get(version, name) or PreparedImage(
                name, image.model_input(loaded.image_size, loaded.channels)
            )
        except Exception as error:  # noqa: BLE001 - belongs to who sent it
            return error

    def _asked(
        self, version: str, predictor: Answerer, loaded: Loaded, images: list[PreparedImage]
    ) -> list[VersionAnswer | Exception]:
        batch = np.stack([image.prepared for image in images])
        started = perf_counter()
        answers = predictor.predict(batch)
        model_ms = (perf_counter() - started) * 1_000
        made: list[VersionAnswer | Exception] = []
        rows = zip(images, answers.probabilities.tolist(), answers.light.tolist(), strict=True)
        for image, probabilities, light in rows:
            names = loaded.class_names
            answer = VersionAnswer(version, names, tuple(probabilities), model_ms, light=light)
            again = replace(answer, model_ms=0.0, cached=True)
            self._cache.put(version, image.content_hash, again, num_values=len(probabilities))
            made.append(answer)
        return made

    def _predictor(self, manifest: Manifest, learner: Learner) -> Predictor:
        # Ray shows a replica the GPU it reserved, and no other.
        device = "cuda" if torch.cuda.is_available() else "cpu"
        why_not = manifest.why_not_at(self._precision)
        if not why_not:
            try:
                return Predictor(learner, device, self._precision)
            except LearningError as error:  # Judged on a device that could.
                why_not = str(error)
        logger.warning("%s answers in fp32: %s", manifest.version, why_not)
        return Predictor(learner, device)

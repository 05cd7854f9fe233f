"""Model versions held in memory, each warmed up before it may answer.

Knows how a version becomes something that answers images. Does not know which
version should answer: the front and the slots say what to hold.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from time import perf_counter

import numpy as np
import torch

from lifelong_ray.config import ModelConfig, Precision, ServingConfig
from lifelong_ray.feedback import CleanImage, SentImage, to_model_input
from lifelong_ray.learning import (
    Answerer,
    Learner,
    Light,
    Predictor,
    remembered_images,
    with_light,
)
from lifelong_ray.on_ray.batching import Batcher
from lifelong_ray.on_ray.cache import AnswerCache
from lifelong_ray.release import Manifest, Registry
from lifelong_ray.types import LearningError, VersionError

logger = logging.getLogger(__name__)

_RETRY_AFTER_S = 5.0


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
class WarmVersion:
    """A loaded, warmed-up version.

    Attributes:
        version: Its name.
        class_names: Its classes, in the order of its probabilities.
        image_size: Height and width of its input, pixels.
        channels: Channels of its input.
        precision: What it answers in.
    """

    version: str
    class_names: tuple[str, ...]
    image_size: int
    channels: int
    precision: Precision
    batcher: Batcher[SentImage, VersionAnswer]

    async def answer(self, image: SentImage) -> VersionAnswer:
        """Answer one image of any size.

        Raises:
            BadImageError: If it is not an acceptable image.
            OverloadedError: If too many are waiting.
        """
        return await self.batcher.answer(image)


class _Desk:
    """Answers batches of images with one version, on the thread of the models.

    What little there is to decode is decoded here too: with every trip to a thread a request
    waits for the interpreter, so that it makes one.
    """

    def __init__(
        self,
        version: str,
        predictor: Answerer,
        model: ModelConfig,
        cache: AnswerCache[VersionAnswer],
    ) -> None:
        self._version = version
        self._predictor = predictor
        self._model = model
        self._cache = cache

    def __call__(self, images: list[SentImage]) -> list[VersionAnswer | Exception]:
        found: list[VersionAnswer | Exception | CleanImage] = [self._known(i) for i in images]
        unknown = [image for image in found if isinstance(image, CleanImage)]
        made = iter(self._asked(unknown) if unknown else ())
        return [next(made) if isinstance(answer, CleanImage) else answer for answer in found]

    def _known(self, image: SentImage) -> VersionAnswer | Exception | CleanImage:
        try:
            clean = image.clean()
        except Exception as error:  # noqa: BLE001 - belongs to who sent it
            return error
        return self._cache.get(self._version, clean.content_hash) or clean

    def _asked(self, images: list[CleanImage]) -> Iterator[VersionAnswer]:
        size, channels = self._model.image_size, self._model.channels
        batch = np.stack([to_model_input(image.pixels, size, channels) for image in images])
        started = perf_counter()
        answers = self._predictor.predict(batch)
        model_ms = (perf_counter() - started) * 1_000
        rows = zip(images, answers.probabilities.tolist(), answers.light.tolist(), strict=True)
        for image, probabilities, light in rows:
            answer = VersionAnswer(
                self._version, answers.class_names, tuple(probabilities), model_ms, light=light
            )
            again = replace(answer, model_ms=0.0, cached=True)
            self._cache.put(self._version, image.content_hash, again, num_values=len(probabilities))
            yield answer


class WarmVersions:
    """Keeps the wanted versions in memory; loads in the background, one at a time.

    Each answers in the wanted precision if it passed the gate in it, else in fp32.
    """

    def __init__(
        self,
        registry: Registry,
        config: ServingConfig,
        *,
        now_s: Callable[[], float],
        precision: Precision = "fp32",
    ) -> None:
        self._registry = registry
        self._config = config
        self._precision = precision
        self._now_s = now_s
        self._held: dict[str, WarmVersion] = {}
        self._cache: AnswerCache[VersionAnswer] = AnswerCache(config.cache_bytes)
        self._loading: dict[str, asyncio.Task[None]] = {}
        self._failed_at_s: dict[str, float] = {}
        self.failures: dict[str, str] = {}
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="load-version")
        self._inference = ThreadPoolExecutor(1, thread_name_prefix="inference")
        torch.set_num_threads(config.model_threads)

    @property
    def names(self) -> tuple[str, ...]:
        """The versions that can answer now."""
        return tuple(sorted(self._held))

    @property
    def precisions(self) -> dict[str, Precision]:
        """What each of them answers in."""
        return {version: self._held[version].precision for version in self.names}

    def get(self, version: str) -> WarmVersion:
        """Return a held version.

        Raises:
            VersionError: If it is not in memory.
        """
        try:
            return self._held[version]
        except KeyError:
            raise VersionError(f"version {version} is not warm here; held: {self.names}") from None

    def hold(self, wanted: Collection[str]) -> None:
        """Load what is wanted and missing, in the background; let go of the rest.

        A request that already holds a `WarmVersion` keeps it until it is answered.
        """
        for version in set(self._held) - set(wanted):
            del self._held[version]
        for version in set(wanted) - set(self._held) - set(self._loading):
            failed_at_s = self._failed_at_s.get(version)
            if failed_at_s is None or self._now_s() - failed_at_s > _RETRY_AFTER_S:
                self._loading[version] = asyncio.create_task(self._load(version))

    async def settled(self) -> None:
        """Wait until nothing is loading any more."""
        await asyncio.gather(*self._loading.values())

    async def _load(self, version: str) -> None:
        loop = asyncio.get_running_loop()
        try:
            self._held[version] = await loop.run_in_executor(self._loader, self._build, version)
            self.failures.pop(version, None)
        except Exception as error:  # noqa: BLE001 - whatever is wrong with it, the others go on
            self._failed_at_s[version] = self._now_s()
            self.failures[version] = str(error) or repr(error)
            logger.error("version %s cannot be served: %s", version, error)
        finally:
            del self._loading[version]

    def _build(self, version: str) -> WarmVersion:
        manifest, files = self._registry.load(version)
        learner = Learner.from_files(files)
        predictor = with_light(self._predictor(manifest, learner), Light.from_files(files))
        most = self._config.max_batch
        predictor.warm_up((1, most), remembered_images(learner, most))

        return WarmVersion(
            version=version,
            class_names=learner.class_names,
            image_size=learner.model_config.image_size,
            channels=learner.model_config.channels,
            precision=predictor.precision,
            batcher=Batcher(
                _Desk(version, predictor, learner.model_config, self._cache),
                self._inference,
                max_batch=most,
                wait_s=self._config.batch_wait_s,
                max_queue=self._config.max_queue,
            ),
        )

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

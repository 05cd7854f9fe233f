"""Model versions held in memory, each warmed up before it may answer.

Knows how a version becomes something that answers images. Does not know which
version should answer: the front and the slots say what to hold.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from lifelong_ray.config import Precision, ServingConfig
from lifelong_ray.feedback import to_model_input
from lifelong_ray.learning import Learner, Light, Predictor, remembered_images, with_light
from lifelong_ray.on_ray.batching import Answer, Batcher, Flags, Probabilities
from lifelong_ray.release import Manifest, Registry
from lifelong_ray.types import LearningError, Pixels, VersionError

logger = logging.getLogger(__name__)

_RETRY_AFTER_S = 5.0


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
    batcher: Batcher

    async def answer(self, pixels: Pixels) -> Answer:
        """Answer one clean image of any size."""
        return await self.batcher.answer(to_model_input(pixels, self.image_size, self.channels))


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

        def run(images: NDArray[np.uint8]) -> tuple[Probabilities, Flags]:
            answers = predictor.predict(images)
            return answers.probabilities, answers.light

        return WarmVersion(
            version=version,
            class_names=learner.class_names,
            image_size=learner.model_config.image_size,
            channels=learner.model_config.channels,
            precision=predictor.precision,
            batcher=Batcher(
                run,
                self._inference,
                max_batch=self._config.max_batch,
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

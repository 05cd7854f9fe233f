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

import torch

from lifelong_ray.config import ServingConfig
from lifelong_ray.feedback import to_model_input
from lifelong_ray.learning import Learner, Predictor
from lifelong_ray.on_ray.batching import Answer, Batcher
from lifelong_ray.release import Registry
from lifelong_ray.types import Pixels, VersionError

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
    """

    version: str
    class_names: tuple[str, ...]
    image_size: int
    channels: int
    batcher: Batcher

    async def answer(self, pixels: Pixels) -> Answer:
        """Answer one clean image of any size."""
        return await self.batcher.answer(to_model_input(pixels, self.image_size, self.channels))


class WarmVersions:
    """Keeps the wanted versions in memory; loads in the background, one at a time."""

    def __init__(
        self, registry: Registry, config: ServingConfig, *, now_s: Callable[[], float]
    ) -> None:
        self._registry = registry
        self._config = config
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
        _, files = self._registry.load(version)
        learner = Learner.from_files(files)
        # Ray shows a replica the GPU it reserved, and no other.
        predictor = Predictor(learner, "cuda" if torch.cuda.is_available() else "cpu")
        predictor.warm_up()
        return WarmVersion(
            version=version,
            class_names=learner.class_names,
            image_size=learner.model_config.image_size,
            channels=learner.model_config.channels,
            batcher=Batcher(
                lambda images: predictor.predict(images).probabilities,
                self._inference,
                max_batch=self._config.max_batch,
                wait_s=self._config.batch_wait_s,
                max_queue=self._config.max_queue,
            ),
        )

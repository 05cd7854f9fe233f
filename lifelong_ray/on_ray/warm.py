"""Versions held ready to answer, each warmed up before it may.

Does not know which version should answer: the front and the slots say what to hold. Does not
know where models live either: a `ModelHost` does.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Collection
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

from lifelong_ray.config import Precision, ServingConfig
from lifelong_ray.feedback import SentImage
from lifelong_ray.on_ray.batching import Batcher
from lifelong_ray.on_ray.models import Loaded, ModelHost, VersionAnswer
from lifelong_ray.types import ModelHostGoneError, OverloadedError

logger = logging.getLogger(__name__)

_PREPARING = 4  # Large images decoded at a time.
_RETRY_AFTER_S = 5.0
_LONGEST_WAIT_S = 60.0
_LOOK_EVERY_S = 0.05


@dataclass(frozen=True)
class WarmVersion:
    """A loaded, warmed-up version.

    Attributes:
        version: Its name.
        model: What it takes and gives.
        batcher: Where its images wait.
        preparing: Where large ones are made ready for that.
        max_waiting: Beyond so many images a large one is refused.
        waiting: One object for each answer that somebody waits for.
    """

    version: str
    model: Loaded
    batcher: Batcher[SentImage, VersionAnswer]
    preparing: Executor
    max_waiting: int
    waiting: set[object] = field(default_factory=set)

    async def answer(self, image: SentImage) -> VersionAnswer:
        """Answer one image of any size.

        Raises:
            BadImageError: If it is not an acceptable image.
            OverloadedError: If too many are waiting.
        """
        me = object()
        self.waiting.add(me)
        try:
            return await self._answer(image)
        finally:
            self.waiting.discard(me)

    async def idle(self) -> None:
        """Wait until nobody waits for an answer and none is worked on."""
        while self.waiting:
            await asyncio.sleep(_LOOK_EVERY_S)
        await self.batcher.idle()

    async def _answer(self, image: SentImage) -> VersionAnswer:
        if not image.is_quick:
            if len(self.waiting) > self.max_waiting:
                raise OverloadedError(
                    f"{self.max_waiting} images are waiting; try again in a second"
                )
            # Not in its batch, which others share.
            await asyncio.get_running_loop().run_in_executor(
                self.preparing, image.model_input, self.model.image_size, self.model.channels
            )
        return await self.batcher.answer(image)


class WarmVersions:
    """Keeps the wanted versions in memory; loads in the background, one at a time."""

    def __init__(
        self,
        host: ModelHost,
        config: ServingConfig,
        *,
        now_s: Callable[[], float],
        linger_s: float = 2.0,
    ) -> None:
        """Take the host of the models.

        A version that is not wanted any more stays for `linger_s` seconds, for requests that have
        chosen it already.
        """
        self._linger_s = linger_s
        self._host = host
        self._config = config
        self._now_s = now_s
        self._held: dict[str, WarmVersion] = {}
        self._host_gone = False
        self._leaving: set[asyncio.Task[None]] = set()
        self._num_leaving: Counter[str] = Counter()  # one version may be let go twice in a row
        self._loading: dict[str, asyncio.Task[None]] = {}
        self._retry_at_s: dict[str, float] = {}
        self._num_deaths: Counter[str] = Counter()  # of the host while it loaded a version
        self.failures: dict[str, str] = {}
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="load-version")
        self._preparing = ThreadPoolExecutor(_PREPARING, thread_name_prefix="prepare")

    @property
    def names(self) -> tuple[str, ...]:
        """The versions that can answer now."""
        return tuple(sorted(self._held))

    @property
    def precisions(self) -> dict[str, Precision]:
        """What each of them answers in."""
        return {version: self._held[version].model.precision for version in self.names}

    def get(self, version: str) -> WarmVersion:
        """Return a held version.

        Raises:
            ModelHostGoneError: If it is not in memory, not yet or not any more, which says
                nothing about the version.
        """
        try:
            return self._held[version]
        except KeyError:
            raise ModelHostGoneError(
                f"version {version} is not loaded here; held: {', '.join(self.names) or 'none'}"
            ) from None

    def hold(self, wanted: Collection[str]) -> None:
        """Load what is wanted and missing, in that order in the background; let go of the rest.

        A request that was taken for a version is answered before the version goes.
        """
        if self._host_gone:
            self._host_gone = False
            self._held.clear()
        for version in set(self._held) - set(wanted):
            leaving = asyncio.create_task(self._let_go(self._held.pop(version)))
            self._leaving.add(leaving)
            leaving.add_done_callback(self._leaving.discard)
        for version in wanted:
            is_there = version in self._held or version in self._loading
            if not is_there and self._now_s() >= self._retry_at_s.get(version, 0.0):
                self._loading[version] = asyncio.create_task(self._load(version))

    async def _let_go(self, warm: WarmVersion) -> None:
        version = warm.version
        self._num_leaving[version] += 1
        await asyncio.sleep(self._linger_s)
        await warm.idle()
        self._num_leaving[version] -= 1
        if self._num_leaving[version] or version in self._held or version in self._loading:
            return
        loop = asyncio.get_running_loop()
        # Where it would be loaded, so that a load that is asked for now comes after.
        with suppress(ModelHostGoneError):  # which forgot everything
            await loop.run_in_executor(self._loader, self._host.forget, version)

    async def settled(self) -> None:
        """Wait until nothing is loading any more."""
        await asyncio.gather(*self._loading.values())

    def close(self) -> None:
        """Let go of everything."""
        for task in self._leaving:
            task.cancel()
        self._host.close()

    async def _load(self, version: str) -> None:
        loop = asyncio.get_running_loop()
        try:
            loaded = await loop.run_in_executor(self._loader, self._host.load, version)
            self._held[version] = WarmVersion(
                version,
                loaded,
                Batcher(
                    partial(self._answer, version),
                    max_batch=self._config.max_batch,
                    wait_s=self._config.batch_wait_s,
                    max_queue=self._config.max_queue,
                ),
                self._preparing,
                self._config.max_queue,
            )
            self.failures.pop(version, None)
            self._num_deaths.pop(version, None)
        except Exception as error:  # noqa: BLE001 - whatever is wrong with it, the others go on
            # What was held is gone with the host, whether or not anybody asks for it.
            self._host_gone |= isinstance(error, ModelHostGoneError)
            self._retry_at_s[version] = self._now_s() + self._wait_s(version, error)
            self.failures[version] = str(error) or repr(error)
            logger.error("version %s cannot be served: %s", version, error)
        finally:
            del self._loading[version]

    def _wait_s(self, version: str, error: Exception) -> float:
        """Seconds until a version is tried again; more for one that takes the others with it."""
        if not isinstance(error, ModelHostGoneError):
            return _RETRY_AFTER_S
        self._num_deaths[version] += 1
        return min(_RETRY_AFTER_S * 2.0 ** (self._num_deaths[version] - 1), _LONGEST_WAIT_S)

    async def _answer(
        self, version: str, images: list[SentImage]
    ) -> list[VersionAnswer | Exception]:
        try:
            return await self._host.answer(version, images)
        except ModelHostGoneError:
            if version in self._held:  # else it was let go, and the others are still there
                self._host_gone = True  # and `hold` loads again what is wanted
            raise

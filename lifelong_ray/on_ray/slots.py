"""A candidate's slot, as a front asks it: in time, and about many copies at once.

Knows nothing of documents or comparisons, and reaches the deployment through a small protocol.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Sequence
from typing import Protocol, TypeVar

from lifelong_ray.feedback import CleanImage
from lifelong_ray.on_ray.batching import tell
from lifelong_ray.on_ray.models import VersionAnswer
from lifelong_ray.types import ModelHostGoneError

logger = logging.getLogger(__name__)

T = TypeVar("T")
_GATHERING_S = 0.025


class CandidateSlot(Protocol):
    """The deployment that holds a candidate by itself."""

    async def ask(self, version: str, image: CleanImage) -> VersionAnswer:
        """Answer with `version`; any exception means that it did not answer."""

    async def ask_together(
        self, version: str, images: Sequence[CleanImage]
    ) -> list[VersionAnswer | Exception]:
        """Answer several images, or say for each why not; an exception means that for all."""

    def was_there(self, within_s: float) -> bool:
        """Whether any slot gave a sign of life in the last `within_s` seconds."""


class SlotInTime:
    """Asks a slot, and waits no longer than `timeout_s`."""

    def __init__(self, slot: CandidateSlot, timeout_s: float) -> None:
        self._slot = slot
        self._timeout_s = timeout_s

    async def ask(self, version: str, image: CleanImage) -> VersionAnswer:
        """Answer with `version`.

        Raises:
            TimeoutError: If the slot was there and did not answer.
            ModelHostGoneError: If no slot was there, which says nothing about the version.
        """
        return await self._in_time(self._slot.ask(version, image))

    async def ask_together(
        self, version: str, images: Sequence[CleanImage]
    ) -> list[VersionAnswer | Exception]:
        """Answer several images, or say for each why not; raises as `ask` does."""
        return await self._in_time(self._slot.ask_together(version, images))

    async def _in_time(self, asked: Awaitable[T]) -> T:
        try:
            return await asyncio.wait_for(asked, self._timeout_s)
        except TimeoutError:
            if self._slot.was_there(self._timeout_s):
                raise
            # Serve lets a request wait for the slot that it starts where one died.
            raise ModelHostGoneError(
                f"no slot was there within {self._timeout_s:g} s; another one is started"
            ) from None


class Copies:
    """Asks a slot about many copies of requests in one call at a time.

    A call to another deployment costs milliseconds of processor time, whatever it carries, and
    nobody waits for what becomes of a copy: copies wait for one another, and share a call. A slot
    that stalls has one call to time out; whoever hands copies over bounds how many wait meanwhile.
    """

    def __init__(self, slot: SlotInTime, *, most: int) -> None:
        """Take the slot; a call carries at most so many images."""
        self._slot = slot
        self._most = most
        self._waiting: list[tuple[str, CleanImage, asyncio.Future[VersionAnswer]]] = []
        self._caller: asyncio.Task[None] | None = None

    async def ask(self, version: str, image: CleanImage) -> VersionAnswer:
        """Answer one copy, in its turn.

        Raises:
            Exception: Whatever came in place of an answer; as `SlotInTime.ask`.
        """
        future: asyncio.Future[VersionAnswer] = asyncio.get_running_loop().create_future()
        self._waiting.append((version, image, future))
        if self._caller is None or self._caller.done():
            self._caller = asyncio.create_task(self._call_until_none_waits())
        return await future

    async def _call_until_none_waits(self) -> None:
        while self._waiting:
            await asyncio.sleep(_GATHERING_S)
            version, taken = self._take()
            answers = await self._call(version, [image for image, _ in taken])
            tell([future for _, future in taken], answers)

    def _take(self) -> tuple[str, list[tuple[CleanImage, asyncio.Future[VersionAnswer]]]]:
        """Take as many as a call carries, all for one version, from those that wait."""
        version = self._waiting[0][0]
        taken: list[tuple[CleanImage, asyncio.Future[VersionAnswer]]] = []
        left: list[tuple[str, CleanImage, asyncio.Future[VersionAnswer]]] = []
        for one in self._waiting:
            if one[0] == version and len(taken) < self._most:
                taken.append(one[1:])
            else:
                left.append(one)
        self._waiting = left
        return version, taken

    async def _call(
        self, version: str, images: list[CleanImage]
    ) -> Sequence[VersionAnswer | Exception]:
        answers: Sequence[VersionAnswer | Exception]
        try:
            answers = await self._slot.ask_together(version, images)
        except Exception as error:  # noqa: BLE001 - belongs to those who handed copies over
            answers = [error] * len(images)
        if failed := [answer for answer in answers if isinstance(answer, Exception)]:
            logger.warning(
                "%d of %d copies got no answer from %s: %r",
                len(failed),
                len(images),
                version,
                failed[0],
            )
        return answers

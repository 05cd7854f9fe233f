"""Copies of requests for a slot, sent together.

A call to another deployment costs milliseconds of processor time, whatever it carries. Nobody
waits for what becomes of a copy, so that copies wait for one another and share a call. Knows
nothing of documents or comparisons.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Protocol

from lifelong_ray.feedback import CleanImage
from lifelong_ray.on_ray.models import VersionAnswer

logger = logging.getLogger(__name__)

_GATHERING_S = 0.025


class Slot(Protocol):
    """Answers for a candidate."""

    async def ask_together(
        self, version: str, images: Sequence[CleanImage]
    ) -> list[VersionAnswer | Exception]:
        """Answer several images; any exception means that it answered none."""


class Copies:
    """Asks a slot about many images in one call at a time.

    A slot that stalls is thus asked once in `timeout_s`; whoever hands copies over bounds how
    many wait meanwhile.
    """

    def __init__(self, slot: Slot, *, most: int, timeout_s: float) -> None:
        """Take the slot; a call carries `most` images and is given up after `timeout_s`."""
        self._slot = slot
        self._most = most
        self._timeout_s = timeout_s
        self._waiting: list[tuple[str, CleanImage, asyncio.Future[VersionAnswer]]] = []
        self._caller: asyncio.Task[None] | None = None

    async def ask(self, version: str, image: CleanImage) -> VersionAnswer:
        """Answer one copy, in its turn.

        Raises:
            Exception: Whatever came in place of an answer.
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
            for answer, (_, future) in zip(answers, taken, strict=True):
                if future.done():
                    continue
                if isinstance(answer, Exception):
                    future.set_exception(answer)
                else:
                    future.set_result(answer)

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
            call = self._slot.ask_together(version, images)
            answers = await asyncio.wait_for(call, self._timeout_s)
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

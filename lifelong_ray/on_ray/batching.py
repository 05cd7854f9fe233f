"""Single requests in, batches through a function on a thread, single answers out.

Knows nothing of HTTP, images, versions or Ray. The event loop keeps taking requests meanwhile.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from time import perf_counter
from typing import Generic, TypeVar

from lifelong_ray.types import OverloadedError

Q = TypeVar("Q")
A = TypeVar("A")

_WAITING_SHARE = 0.03
_LEAST_WAIT_S = 0.0005  # A shorter sleep is a long one: the event loop's clock ticks in ms.


class Batcher(Generic[Q, A]):
    """Collects what is asked until a batch is full or the first has waited long enough.

    While a batch is worked on the next one gathers. The first of a batch waits for others as
    well, but 3 % of the time that the batch before took at most: those who got their
    answers together tend to ask again together, and one batch of all costs less than two.
    """

    def __init__(
        self,
        run: Callable[[list[Q]], Sequence[A | Exception]],
        executor: Executor,
        *,
        max_batch: int,
        wait_s: float,
        max_queue: int,
    ) -> None:
        """Take `run`, which answers every question of a batch, in order, or says what is wrong."""
        self._run = run
        self._executor = executor
        self._max_batch = max_batch
        self._wait_s = wait_s
        self._max_queue = max_queue
        self._last_s = 0.0
        self._waiting: list[tuple[Q, asyncio.Future[A]]] = []
        self._worker: asyncio.Task[None] | None = None

    async def answer(self, question: Q) -> A:
        """Return the answer to one question, or raise what is wrong with it.

        Raises:
            OverloadedError: If the queue is full; nothing was queued.
        """
        if len(self._waiting) >= self._max_queue:
            self._drop_given_up()
        if len(self._waiting) >= self._max_queue:
            raise OverloadedError(f"{self._max_queue} images are waiting; try again in a second")
        loop = asyncio.get_running_loop()
        if self._worker is None or self._worker.done():
            self._worker = loop.create_task(self._work(loop))
        future: asyncio.Future[A] = loop.create_future()
        self._waiting.append((question, future))
        return await future

    async def idle(self) -> None:
        """Wait until nothing is waiting or worked on."""
        if self._worker is not None:
            await asyncio.wait([self._worker])

    async def _work(self, loop: asyncio.AbstractEventLoop) -> None:
        while self._waiting:
            wait_s = min(self._wait_s, _WAITING_SHARE * self._last_s)
            if len(self._waiting) < self._max_batch and wait_s >= _LEAST_WAIT_S:
                await asyncio.sleep(wait_s)
            self._drop_given_up()
            batch = self._waiting[: self._max_batch]
            del self._waiting[: self._max_batch]
            if batch:
                began_s = perf_counter()
                await self._answer_batch(loop, batch)
                self._last_s = perf_counter() - began_s

    def _drop_given_up(self) -> None:
        """Give the places of those who do not wait any more to those who do."""
        self._waiting = [entry for entry in self._waiting if not entry[1].done()]

    async def _answer_batch(
        self, loop: asyncio.AbstractEventLoop, batch: list[tuple[Q, asyncio.Future[A]]]
    ) -> None:
        try:
            answers = await loop.run_in_executor(
                self._executor, self._run, [question for question, _ in batch]
            )
        except Exception as error:  # noqa: BLE001 - belongs to those who wait for the answer
            answers = [error] * len(batch)
        for answer, (_, future) in zip(answers, batch, strict=True):
            if future.done():
                continue
            if isinstance(answer, Exception):
                future.set_exception(answer)
            else:
                future.set_result(answer)

"""Single requests in, batches through a function, single answers out.

Knows nothing of HTTP, images, versions or Ray. The event loop keeps taking requests meanwhile.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from time import perf_counter
from typing import Generic, TypeVar

from lifelong_ray.types import OverloadedError

Q = TypeVar("Q")
A = TypeVar("A")

_WAITING_SHARE = 0.03
_LEAST_WAIT_S = 0.0005  # A shorter sleep is a long one: the event loop's clock ticks in ms.
_LONGEST_AHEAD_S = 0.02


class Batcher(Generic[Q, A]):
    """Collects what is asked until a batch is full or the first has waited long enough.

    While a batch is worked on the next one gathers. The first of a batch waits for others as
    well, but 3 % of the time that the batch before took at most: those who got their
    answers together tend to ask again together, and one batch of all costs less than two.

    Where a batch takes no longer than what else a request costs, the worker would idle between
    two of them. So a second one is handed over ahead as soon as it is as large as the one that
    is worked on. A batch that takes longer loses more by being cut in two.
    """

    def __init__(
        self,
        run: Callable[[list[Q]], Awaitable[Sequence[A | Exception]]],
        *,
        max_batch: int,
        wait_s: float,
        max_queue: int,
    ) -> None:
        """Take `run`, which answers every question of a batch, in order, or says what is wrong.

        It is asked for a second batch before it has answered the first, never for a third.
        """
        self._run = run
        self._max_batch = max_batch
        self._wait_s = wait_s
        self._max_queue = max_queue
        self._last_s = 0.0  # that the batch before took
        self._ended_s = 0.0  # when it was done
        self._waiting: list[tuple[Q, asyncio.Future[A]]] = []
        self._gathering: asyncio.Task[None] | None = None
        self._under_way: dict[asyncio.Task[None], int] = {}  # with the number of questions

    async def answer(self, question: Q) -> A:
        """Return the answer to one question, or raise what is wrong with it.

        Raises:
            OverloadedError: If the queue is full; nothing was queued.
        """
        if len(self._waiting) >= self._max_queue:
            self._drop_given_up()
        if len(self._waiting) >= self._max_queue:
            raise OverloadedError(f"{self._max_queue} images are waiting; try again in a second")
        future: asyncio.Future[A] = asyncio.get_running_loop().create_future()
        self._waiting.append((question, future))
        self._go_on()
        return await future

    async def idle(self) -> None:
        """Wait until nothing is waiting or worked on."""
        while tasks := [*self._under_way, *filter(None, [self._gathering])]:
            await asyncio.wait(tasks)

    def _go_on(self, *, others_may_come: bool = True) -> None:
        """Begin with what is waiting, if it is time."""
        if not self._waiting or self._gathering is not None:
            return
        if not self._under_way:
            if others_may_come or self._wait_for_others_s():
                self._gathering = asyncio.create_task(self._gather())
            else:
                self._begin()
        elif len(self._under_way) == 1 and self._last_s <= _LONGEST_AHEAD_S:
            [size] = self._under_way.values()
            if len(self._waiting) >= size:
                self._begin()

    def _wait_for_others_s(self) -> float:
        wait_s = min(self._wait_s, _WAITING_SHARE * self._last_s)
        is_full = len(self._waiting) >= self._max_batch
        return 0.0 if is_full or wait_s < _LEAST_WAIT_S else wait_s

    async def _gather(self) -> None:
        if wait_s := self._wait_for_others_s():
            await asyncio.sleep(wait_s)
        self._gathering = None
        self._begin()

    def _begin(self) -> None:
        self._drop_given_up()
        batch = self._waiting[: self._max_batch]
        del self._waiting[: self._max_batch]
        if batch:
            task = asyncio.create_task(self._answer_batch(batch))
            self._under_way[task] = len(batch)
            task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._under_way.pop(task, None)

    def _drop_given_up(self) -> None:
        """Give the places of those who do not wait any more to those who do."""
        self._waiting = [entry for entry in self._waiting if not entry[1].done()]

    async def _answer_batch(self, batch: list[tuple[Q, asyncio.Future[A]]]) -> None:
        began_s = perf_counter()
        answers: Sequence[A | Exception]
        try:
            answers = await self._run([question for question, _ in batch])
        except Exception as error:  # noqa: BLE001 - belongs to those who wait for the answer
            answers = [error] * len(batch)
        now_s = perf_counter()
        self._last_s = now_s - max(began_s, self._ended_s)
        self._ended_s = now_s
        if (me := asyncio.current_task()) is not None:
            self._done(me)
        # Before those are told whose answers are here: their work would hold up the next batch.
        self._go_on(others_may_come=False)
        tell([future for _, future in batch], answers)


def tell(futures: Sequence[asyncio.Future[A]], answers: Sequence[A | Exception]) -> None:
    """Give everyone who still waits the answer, or what came in place of it."""
    for future, answer in zip(futures, answers, strict=True):
        if future.done():
            continue
        if isinstance(answer, Exception):
            future.set_exception(answer)
        else:
            future.set_result(answer)

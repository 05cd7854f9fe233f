"""Single requests in, batches through a function on a thread, single answers out.

Knows nothing of HTTP, versions or Ray. The event loop keeps taking requests meanwhile.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from time import perf_counter
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from lifelong_ray.types import OverloadedError

Probabilities = NDArray[np.float32]
Flags = NDArray[np.bool_]
I = TypeVar("I")  # noqa: E741 - what goes in
O = TypeVar("O")  # noqa: E741 - and what comes out


@dataclass(frozen=True)
class Answer:
    """One model answer.

    Attributes:
        probabilities: Shape (classes,), summing to one.
        model_ms: Time of the batch inside the model, milliseconds.
        light: Whether a light model gave it.
    """

    probabilities: Probabilities
    model_ms: float
    light: bool = False


class Batcher:
    """Collects images until a batch is full or the first has waited long enough."""

    def __init__(
        self,
        run: Callable[[NDArray[np.uint8]], tuple[Probabilities, Flags]],
        executor: Executor,
        *,
        max_batch: int,
        wait_s: float,
        max_queue: int,
    ) -> None:
        """Take `run`, which maps (N, C, H, W) uint8 to (N, classes) probabilities.

        It says with them, (N,), which of them a light model gave.
        """
        self._run = run
        self._executor = executor
        self._max_batch = max_batch
        self._wait_s = wait_s
        self._max_queue = max_queue
        self._waiting: list[tuple[NDArray[np.uint8], asyncio.Future[Answer]]] = []
        self._worker: asyncio.Task[None] | None = None

    async def answer(self, image: NDArray[np.uint8]) -> Answer:
        """Return the answer for one (C, H, W) image.

        Raises:
            OverloadedError: If the queue is full; nothing was queued.
        """
        if len(self._waiting) >= self._max_queue:
            raise OverloadedError(f"{self._max_queue} images are waiting; try again in a second")
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting.append((image, future))
        return await future

    async def _work(self) -> None:
        while self._waiting:
            if len(self._waiting) < self._max_batch and self._wait_s > 0:
                await asyncio.sleep(self._wait_s)
            batch = self._waiting[: self._max_batch]
            del self._waiting[: self._max_batch]
            await self._answer_batch([entry for entry in batch if not entry[1].cancelled()])

    async def _answer_batch(
        self, batch: list[tuple[NDArray[np.uint8], asyncio.Future[Answer]]]
    ) -> None:
        if not batch:
            return
        try:
            images = np.stack([image for image, _ in batch])
            probabilities, light, model_ms = await asyncio.get_running_loop().run_in_executor(
                self._executor, self._timed, images
            )
        except Exception as error:  # noqa: BLE001 - belongs to those who wait for the answer
            for _, future in batch:
                if not future.done():
                    future.set_exception(error)
            return
        for row, is_light, (_, future) in zip(probabilities, light.tolist(), batch, strict=True):
            if not future.done():
                future.set_result(Answer(row, model_ms, is_light))

    def _timed(self, images: NDArray[np.uint8]) -> tuple[Probabilities, Flags, float]:
        started = perf_counter()
        probabilities, light = self._run(images)
        return probabilities, light, (perf_counter() - started) * 1_000


class Together(Generic[I, O]):
    """Runs a function for all that is asked for in the same turn of the event loop, on a thread.

    A trip to a thread and back costs as much as decoding a small image; with many requests at a
    time they share it, and nobody waits for anybody who has not asked yet.
    """

    def __init__(self, run: Callable[[I], O], executor: Executor, *, most: int = 16) -> None:
        """Take `run`, and how many calls of it one trip makes at most."""
        self._run = run
        self._executor = executor
        self._most = most
        self._waiting: list[tuple[I, asyncio.Future[O]]] = []

    async def __call__(self, item: I) -> O:
        """Return what the function makes of `item`, or raise what it raises."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[O] = loop.create_future()
        self._waiting.append((item, future))
        if len(self._waiting) == 1:
            loop.call_soon(self._start, loop)
        return await future

    def _start(self, loop: asyncio.AbstractEventLoop) -> None:
        waiting, self._waiting = self._waiting, []
        for first in range(0, len(waiting), self._most):
            group = [entry for entry in waiting[first : first + self._most] if not entry[1].done()]
            if group:
                self._executor.submit(self._work, loop, group)

    def _work(
        self, loop: asyncio.AbstractEventLoop, group: list[tuple[I, asyncio.Future[O]]]
    ) -> None:
        made: list[tuple[O | None, BaseException | None]] = []
        for item, _ in group:
            try:
                made.append((self._run(item), None))
            except BaseException as error:  # noqa: BLE001 - belongs to who asked
                made.append((None, error))
        try:
            loop.call_soon_threadsafe(self._tell, group, made)
        except RuntimeError:
            return  # The loop is closed, and nobody waits any more.

    @staticmethod
    def _tell(
        group: list[tuple[I, asyncio.Future[O]]],
        made: list[tuple[O | None, BaseException | None]],
    ) -> None:
        for (_, future), (value, error) in zip(group, made, strict=True):
            if future.done():
                continue
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(value)  # type: ignore[arg-type]  # None only beside an error

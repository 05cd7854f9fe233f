"""Single requests in, batches through the model, single answers out.

Knows nothing of HTTP, versions or Ray. One batcher belongs to one model; its work
runs on a thread, so that the event loop keeps taking requests meanwhile.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from lifelong_ray.types import OverloadedError

Probabilities = NDArray[np.float32]


@dataclass(frozen=True)
class Answer:
    """One model answer.

    Attributes:
        probabilities: Shape (classes,), summing to one.
        model_ms: Time of the batch inside the model, milliseconds.
    """

    probabilities: Probabilities
    model_ms: float


class Batcher:
    """Collects images until a batch is full or the first has waited long enough."""

    def __init__(
        self,
        run: Callable[[NDArray[np.uint8]], Probabilities],
        executor: Executor,
        *,
        max_batch: int,
        wait_s: float,
        max_queue: int,
    ) -> None:
        """Take `run`, which maps (N, C, H, W) uint8 to (N, classes) probabilities."""
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
            probabilities, model_ms = await asyncio.get_running_loop().run_in_executor(
                self._executor, self._timed, images
            )
        except Exception as error:  # noqa: BLE001 - belongs to those who wait for the answer
            for _, future in batch:
                if not future.done():
                    future.set_exception(error)
            return
        for row, (_, future) in zip(probabilities, batch, strict=True):
            if not future.done():
                future.set_result(Answer(row, model_ms))

    def _timed(self, images: NDArray[np.uint8]) -> tuple[Probabilities, float]:
        started = perf_counter()
        probabilities = self._run(images)
        return probabilities, (perf_counter() - started) * 1_000

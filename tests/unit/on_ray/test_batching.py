"""Single requests become batches and come back as single answers."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from lifelong_ray.on_ray.batching import Batcher
from lifelong_ray.types import OverloadedError


@pytest.fixture
def executor() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


class Model:
    """Answers a number with itself; remembers the sizes of its batches."""

    def __init__(self) -> None:
        self.batch_sizes: list[int] = []
        self.may_answer = threading.Event()
        self.may_answer.set()

    def __call__(self, numbers: list[int]) -> list[int | Exception]:
        self.may_answer.wait(10)
        self.batch_sizes.append(len(numbers))
        if 255 in numbers:
            raise RuntimeError("the model cannot take 255")
        return [ValueError(f"{number} is negative") if number < 0 else number for number in numbers]


async def ask_all(
    batcher: Batcher[int, int], numbers: range | list[int]
) -> list[int | BaseException]:
    return await asyncio.gather(*map(batcher.answer, numbers), return_exceptions=True)


def values_of(answers: list[int | BaseException]) -> list[int]:
    return [answer if isinstance(answer, int) else -1 for answer in answers]


def in_thread(
    run: Callable[[list[int]], Any], executor: ThreadPoolExecutor
) -> Callable[[list[int]], Awaitable[Any]]:
    async def asked(numbers: list[int]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(executor, run, numbers)

    return asked


def make(
    executor: ThreadPoolExecutor,
    run: Callable[[list[int]], Any],
    *,
    wait_s: float = 0.01,
    queue: int = 99,
) -> Batcher[int, int]:
    return Batcher(in_thread(run, executor), max_batch=8, wait_s=wait_s, max_queue=queue)


def test_requests_that_arrive_together_share_batches_and_keep_their_order(
    executor: ThreadPoolExecutor,
) -> None:
    model = Model()

    answers = asyncio.run(ask_all(make(executor, model), range(20)))

    assert values_of(answers) == list(range(20))
    assert model.batch_sizes == [8, 8, 4]


def test_a_lone_request_is_answered_without_company(executor: ThreadPoolExecutor) -> None:
    model = Model()
    batcher = make(executor, model, wait_s=0)

    async def one_after_the_other() -> list[int]:
        return [values_of(await ask_all(batcher, [v]))[0] for v in (3, 4)]

    assert asyncio.run(one_after_the_other()) == [3, 4]
    assert model.batch_sizes == [1, 1]


def test_a_full_queue_refuses_what_comes_next_and_answers_what_it_has(
    executor: ThreadPoolExecutor,
) -> None:
    model = Model()
    batcher = make(executor, model, queue=5)

    answers = asyncio.run(ask_all(batcher, range(7)))

    assert values_of(answers) == [0, 1, 2, 3, 4, -1, -1]
    assert all(isinstance(a, OverloadedError) for a in answers[5:])


def test_a_failing_batch_fails_only_its_own_requests(executor: ThreadPoolExecutor) -> None:
    batcher = make(executor, Model())

    answers = asyncio.run(ask_all(batcher, [*range(8), 255, *range(9, 12), *range(20, 24), 30]))

    assert values_of(answers) == [*range(8), *[-1] * 8, 30]
    assert {str(a) for a in answers[8:16]} == {"the model cannot take 255"}


def test_what_is_wrong_with_one_question_is_told_to_its_own_asker(
    executor: ThreadPoolExecutor,
) -> None:
    first, second, third = asyncio.run(ask_all(make(executor, Model()), [1, -5, 3]))

    assert (first, third) == (1, 3)
    assert isinstance(second, ValueError)
    assert str(second) == "-5 is negative"


def test_a_request_that_was_given_up_takes_no_place_in_a_batch(
    executor: ThreadPoolExecutor,
) -> None:
    model = Model()
    batcher = make(executor, model)

    async def give_one_up() -> list[int | BaseException]:
        given_up = asyncio.create_task(batcher.answer(1))
        await asyncio.sleep(0)
        given_up.cancel()
        return await ask_all(batcher, [2, 3])

    assert values_of(asyncio.run(give_one_up())) == [2, 3]
    assert model.batch_sizes == [2]


def test_requests_that_were_given_up_keep_no_place_in_the_queue_nor_in_a_batch(
    executor: ThreadPoolExecutor,
) -> None:
    model = Model()
    model.may_answer.clear()
    batcher = make(executor, model, wait_s=0, queue=16)

    async def give_many_up() -> list[int | BaseException]:
        first = asyncio.create_task(batcher.answer(1))
        await asyncio.sleep(0.01)
        given_up = [asyncio.create_task(batcher.answer(2)) for _ in range(16)]
        await asyncio.sleep(0.01)
        for task in given_up:
            task.cancel()
        await asyncio.sleep(0)
        others = [asyncio.create_task(batcher.answer(number)) for number in range(3, 11)]
        await asyncio.sleep(0)
        model.may_answer.set()
        return await asyncio.gather(first, *others, return_exceptions=True)

    assert values_of(asyncio.run(give_many_up())) == [1, *range(3, 11)]
    assert model.batch_sizes == [1, 1, 8]  # the one in the middle was begun before it was given up


def test_the_event_loop_goes_on_while_the_model_works(executor: ThreadPoolExecutor) -> None:
    model = Model()
    model.may_answer.clear()

    async def ask_and_look_around() -> int:
        asked = asyncio.create_task(make(executor, model).answer(5))
        for _ in range(5):
            await asyncio.sleep(0.005)
        assert not asked.done()
        model.may_answer.set()
        return await asked

    assert asyncio.run(ask_and_look_around()) == 5


def test_a_batcher_that_is_let_go_leaves_no_task_behind(
    executor: ThreadPoolExecutor, caplog: pytest.LogCaptureFixture
) -> None:
    async def use_and_forget() -> int:
        await ask_all(make(executor, Model()), range(3))
        await asyncio.sleep(0)
        gc.collect()
        return len(asyncio.all_tasks())

    with caplog.at_level(logging.ERROR, "asyncio"):
        num_tasks = asyncio.run(use_and_forget())

    assert num_tasks == 1
    assert not caplog.records


@pytest.mark.parametrize(("model_s", "sizes"), [(0.2, [1, 2]), (0.0, [1, 1, 1])])
def test_a_batch_waits_for_others_by_what_the_model_takes(
    executor: ThreadPoolExecutor, model_s: float, sizes: list[int]
) -> None:
    model = Model()

    def slow(numbers: list[int]) -> list[int | Exception]:
        time.sleep(model_s)
        return model(numbers)

    async def ask_again_one_after_the_other() -> None:
        batcher = make(executor, slow, wait_s=1.0)
        await batcher.answer(1)
        first = asyncio.create_task(batcher.answer(2))
        await asyncio.sleep(0.0025)  # within the 6 ms that a batch of 200 ms is worth
        await asyncio.gather(first, batcher.answer(3))

    asyncio.run(ask_again_one_after_the_other())
    assert model.batch_sizes == sizes


class Worker:
    """Answers a batch when it is told to; remembers what it was asked, in order."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []
        self._answered: list[asyncio.Future[list[int]]] = []

    async def __call__(self, numbers: list[int]) -> list[int]:
        self.asked.append(numbers)
        self._answered.append(asyncio.get_running_loop().create_future())
        return await self._answered[-1]

    async def finish(self, batch: int) -> None:
        self._answered[batch].set_result(self.asked[batch])
        for _ in range(5):
            await asyncio.sleep(0)


async def put(batcher: Batcher[int, int], *numbers: int) -> list[asyncio.Task[int]]:
    tasks = [asyncio.create_task(batcher.answer(number)) for number in numbers]
    for _ in range(5):
        await asyncio.sleep(0)
    return tasks


def test_a_second_batch_is_handed_over_ahead_once_it_is_as_large_as_the_first() -> None:
    async def play() -> list[list[int]]:
        worker = Worker()
        batcher = Batcher(worker, max_batch=8, wait_s=0, max_queue=99)
        tasks = await put(batcher, 1, 2)
        tasks += await put(batcher, 3)
        assert worker.asked == [[1, 2]]
        tasks += await put(batcher, 4)
        assert worker.asked == [[1, 2], [3, 4]]
        tasks += await put(batcher, 5, 6, 7)
        assert worker.asked == [[1, 2], [3, 4]]  # never a third
        await worker.finish(0)
        assert worker.asked == [[1, 2], [3, 4], [5, 6, 7]]
        await worker.finish(1)
        await worker.finish(2)
        assert await asyncio.gather(*tasks) == [1, 2, 3, 4, 5, 6, 7]
        return worker.asked

    asyncio.run(play())


def test_batches_that_take_long_are_not_cut_in_two_by_going_ahead() -> None:
    async def play() -> None:
        worker = Worker()
        batcher = Batcher(worker, max_batch=8, wait_s=0, max_queue=99)
        tasks = await put(batcher, 1)
        await asyncio.sleep(0.05)
        await worker.finish(0)
        tasks += await put(batcher, 2)
        tasks += await put(batcher, 3, 4, 5)
        assert worker.asked == [[1], [2]]
        await worker.finish(1)
        assert worker.asked == [[1], [2], [3, 4, 5]]
        await worker.finish(2)
        await asyncio.gather(*tasks)

    asyncio.run(play())

"""Single requests become batches and come back as single answers."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from lifelong_ray.on_ray.batching import Answer, Batcher, Together
from lifelong_ray.types import OverloadedError


@pytest.fixture
def executor() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


class Model:
    """Answers an image with its own value; remembers the sizes of its batches."""

    def __init__(self) -> None:
        self.batch_sizes: list[int] = []
        self.may_answer = threading.Event()
        self.may_answer.set()

    def __call__(self, images: Any) -> Any:
        self.may_answer.wait(10)
        self.batch_sizes.append(len(images))
        if (images == 255).any():
            raise RuntimeError("the model cannot take 255")
        return images.reshape(len(images), -1)[:, :1].astype(np.float32)


def image(value: int) -> Any:
    return np.full((1, 2, 2), value, np.uint8)


async def ask_all(batcher: Batcher, values: range | list[int]) -> list[Answer | BaseException]:
    return await asyncio.gather(*(batcher.answer(image(v)) for v in values), return_exceptions=True)


def values_of(answers: list[Answer | BaseException]) -> list[int]:
    return [int(a.probabilities[0]) if isinstance(a, Answer) else -1 for a in answers]


def make(
    executor: ThreadPoolExecutor,
    run: Callable[[Any], Any],
    *,
    wait_s: float = 0.01,
    queue: int = 99,
) -> Batcher:
    def flagged(images: Any) -> tuple[Any, Any]:
        return run(images), images.reshape(len(images), -1)[:, 0] % 2 == 1

    return Batcher(flagged, executor, max_batch=8, wait_s=wait_s, max_queue=queue)


def test_each_answer_says_whether_a_light_model_gave_it(executor: ThreadPoolExecutor) -> None:
    answers = asyncio.run(ask_all(make(executor, Model()), range(4)))

    assert [a.light for a in answers if isinstance(a, Answer)] == [False, True, False, True]


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


def test_images_that_do_not_stack_fail_their_batch_and_nobody_else(
    executor: ThreadPoolExecutor,
) -> None:
    batcher = make(executor, Model())

    async def mixed() -> list[Answer | BaseException]:
        odd = np.zeros((1, 3, 3), np.uint8)
        first = await asyncio.gather(
            batcher.answer(odd), batcher.answer(image(1)), return_exceptions=True
        )
        return [*first, *await ask_all(batcher, [2])]

    first, second, third = asyncio.run(mixed())

    assert isinstance(first, ValueError)
    assert isinstance(second, ValueError)
    assert values_of([third]) == [2]


def test_a_request_that_was_given_up_takes_no_place_in_a_batch(
    executor: ThreadPoolExecutor,
) -> None:
    model = Model()
    batcher = make(executor, model)

    async def give_one_up() -> list[Answer | BaseException]:
        given_up = asyncio.create_task(batcher.answer(image(1)))
        await asyncio.sleep(0)
        given_up.cancel()
        return await ask_all(batcher, [2, 3])

    assert values_of(asyncio.run(give_one_up())) == [2, 3]
    assert model.batch_sizes == [2]


def test_the_event_loop_goes_on_while_the_model_works(executor: ThreadPoolExecutor) -> None:
    model = Model()
    model.may_answer.clear()

    async def ask_and_look_around() -> int:
        asked = asyncio.create_task(make(executor, model).answer(image(5)))
        for _ in range(5):
            await asyncio.sleep(0.005)
        assert not asked.done()
        model.may_answer.set()
        return int((await asked).probabilities[0])

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


# -- together ---------------------------------------------------------------------------------


def test_what_is_asked_in_one_turn_shares_a_trip_to_a_thread() -> None:
    trips: list[int] = []

    def doubled(value: int) -> int:
        trips.append(threading.get_ident())
        return 2 * value

    class Counting(ThreadPoolExecutor):
        submitted = 0

        def submit(self, *args: Any, **kwargs: Any) -> Any:
            self.submitted += 1
            return super().submit(*args, **kwargs)

    async def ask() -> list[int]:
        together = Together(doubled, pool, most=4)
        return await asyncio.gather(*(together(value) for value in range(10)))

    with Counting(2) as pool:
        assert asyncio.run(ask()) == [2 * value for value in range(10)]
        assert pool.submitted == 3
    assert threading.get_ident() not in trips


def test_a_failure_belongs_to_the_one_who_asked(executor: ThreadPoolExecutor) -> None:
    def picky(value: int) -> int:
        if value == 1:
            raise ValueError("not one")
        return value

    async def ask() -> list[Any]:
        together = Together(picky, executor)
        return await asyncio.gather(*(together(v) for v in range(3)), return_exceptions=True)

    zero, error, two = asyncio.run(ask())
    assert (zero, two) == (0, 2)
    assert isinstance(error, ValueError)


def test_what_nobody_waits_for_any_more_is_not_done(executor: ThreadPoolExecutor) -> None:
    done: list[int] = []

    async def ask() -> None:
        together = Together(done.append, executor)
        given_up = asyncio.ensure_future(together(1))
        kept = asyncio.ensure_future(together(2))
        await asyncio.sleep(0)
        given_up.cancel()
        await kept

    asyncio.run(ask())
    assert done == [2]

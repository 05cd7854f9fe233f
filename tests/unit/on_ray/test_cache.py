from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lifelong_ray.on_ray.cache import AnswerCache

ROOM_FOR_TWO = 2 * (400 + 32 * 10)


def cache(max_bytes: int = ROOM_FOR_TWO) -> AnswerCache[str]:
    return AnswerCache(max_bytes)


def put(cache: AnswerCache[str], version: str, image: str, num_values: int = 10) -> None:
    cache.put(version, image, f"{version} says {image}", num_values=num_values)


def test_what_was_put_is_given_back_for_its_version_and_image_alone() -> None:
    answers = cache()
    put(answers, "v1", "a")

    assert answers.get("v1", "a") == "v1 says a"
    assert answers.get("v2", "a") is None
    assert answers.get("v1", "b") is None


def test_what_was_not_asked_for_the_longest_goes_first() -> None:
    answers = cache()
    put(answers, "v1", "a")
    put(answers, "v1", "b")
    answers.get("v1", "a")

    put(answers, "v1", "c")

    assert answers.get("v1", "a") == "v1 says a"
    assert answers.get("v1", "b") is None
    assert answers.get("v1", "c") == "v1 says c"


def test_an_answer_larger_than_the_room_is_not_kept_and_drives_nothing_out() -> None:
    answers = cache()
    put(answers, "v1", "a")

    put(answers, "v1", "b", num_values=100)

    assert answers.get("v1", "a") == "v1 says a"
    assert answers.get("v1", "b") is None


def test_no_room_keeps_nothing() -> None:
    answers = cache(0)
    put(answers, "v1", "a", num_values=0)

    assert answers.get("v1", "a") is None


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(0, 40)), max_size=60))
def test_the_room_is_never_exceeded(puts: list[tuple[str, int]]) -> None:
    answers = cache(3_000)
    sizes: dict[str, int] = {}
    for image, num_values in puts:
        if answers.get("v1", image) is None:
            sizes[image] = 400 + 32 * num_values
        put(answers, "v1", image, num_values)

    assert sum(sizes[i] for i in sizes if answers.get("v1", i) is not None) <= 3_000

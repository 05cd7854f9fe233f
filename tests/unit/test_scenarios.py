"""Every example in its experience, under its label, and what is said about impossible cuts."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lifelong_ray.config import DataConfig
from lifelong_ray.datasets import (
    DataSource,
    LabelledImages,
    SourceArrays,
    class_order,
    comes_in_parts,
    load_source,
)
from lifelong_ray.scenarios import (
    Kind,
    Scenario,
    from_continuum,
    grow,
    load_scenario,
    split,
)
from lifelong_ray.types import DataError


def numbered(labels: np.ndarray, first: int = 0) -> np.ndarray:
    """Images that tell which they are: (N, 1, 2, 1) uint8."""
    numbers = np.arange(first, first + len(labels))
    return np.stack([numbers // 256, numbers % 256], 1).astype(np.uint8)[:, None, :, None]


def number_of(images: np.ndarray) -> np.ndarray:
    return images[:, 0, 0, 0].astype(int) * 256 + images[:, 0, 1, 0]


def make_source(num_classes: int, num_each: int = 3, seed: int = 0) -> SourceArrays:
    rng = np.random.default_rng(seed)
    train = rng.permutation(np.repeat(np.arange(num_classes), num_each))
    test = rng.permutation(np.repeat(np.arange(num_classes), 2))
    return SourceArrays(
        numbered(train), train, numbered(test, 10_000), test, tuple(map(str, range(num_classes)))
    )


def parts_of(source: SourceArrays, scenario: Scenario) -> Iterator[tuple[Any, ...]]:
    """The whole part, and images and labels of every experience."""
    for part in ("train", "test"):
        whole = getattr(source, f"{part}_images"), getattr(source, f"{part}_labels")
        yield (
            *whole,
            [(getattr(e, f"{part}_images"), getattr(e, f"{part}_labels"), e)
             for e in scenario.experiences],
        )  # fmt: skip


# ---------------------------------------------------------------- split


@given(
    num_classes=st.integers(2, 12),
    num_experiences=st.integers(1, 12),
    kind=st.sampled_from(["class", "domain", "task"]),
    order=st.none() | st.integers(0, 100),
    seed=st.integers(0, 5),
)
def test_every_example_appears_once_and_keeps_its_class(
    num_classes: int, num_experiences: int, kind: Kind, order: int | None, seed: int
) -> None:
    num_experiences = min(num_experiences, num_classes)
    if kind == "domain":
        num_experiences = max(n for n in range(1, num_experiences + 1) if num_classes % n == 0)
    source = make_source(num_classes, seed=seed)

    scenario = split(source, kind, num_experiences, order=order)

    assert len(scenario.experiences) == num_experiences
    for images, labels, parts in parts_of(source, scenario):
        found = np.concatenate([number_of(i) for i, _, _ in parts])
        assert sorted(found) == sorted(number_of(images))
        class_of = dict(zip(number_of(images), labels, strict=True))
        for part_images, part_labels, experience in parts:
            names = experience.classes if kind == "domain" else scenario.class_names
            assert [names[label] for label in part_labels] == [
                source.class_names[class_of[n]] for n in number_of(part_images)
            ]


@given(num_classes=st.integers(2, 30), num_experiences=st.integers(1, 30))
def test_uneven_groups_differ_by_at_most_one_class(num_classes: int, num_experiences: int) -> None:
    num_experiences = min(num_experiences, num_classes)

    scenario = split(make_source(num_classes, num_each=1), "class", num_experiences)

    sizes = [len(e.classes) for e in scenario.experiences]
    assert max(sizes) - min(sizes) <= 1
    assert sum(sizes) == num_classes


def test_ten_classes_in_five_domains_have_two_labels() -> None:
    scenario = split(make_source(10), "domain", 5)

    assert scenario.class_names == ("0", "1")
    assert [e.classes for e in scenario.experiences][:2] == [("0", "1"), ("2", "3")]
    assert all(set(e.train_labels) == {0, 1} for e in scenario.experiences)


def test_tasks_know_the_task_of_every_class_and_classes_do_not() -> None:
    source = make_source(5)

    task, plain = split(source, "task", 2), split(source, "class", 2)

    assert task.task_of_class == (0, 0, 0, 1, 1)
    assert plain.task_of_class == ()
    for one, other in zip(task.experiences, plain.experiences, strict=True):
        np.testing.assert_array_equal(one.train_labels, other.train_labels)
        np.testing.assert_array_equal(one.train_images, other.train_images)


def test_labels_are_numbered_as_classes_arrive() -> None:
    scenario = split(make_source(4), "class", 2, order=("3", "0", "2", "1"))

    assert scenario.class_names == ("3", "0", "2", "1")
    assert [e.classes for e in scenario.experiences] == [("3", "0"), ("2", "1")]
    assert set(scenario.experiences[0].train_labels) == {0, 1}


def test_a_seed_gives_the_order_of_the_literature() -> None:
    scenario = split(make_source(100, num_each=1), "class", 10, order=1993)

    first = ("68", "56", "78", "8", "23", "84", "90", "65", "74", "76")
    assert scenario.experiences[0].classes == first
    assert scenario.class_names == tuple(map(str, class_order(100, 1993)))


def test_domains_that_do_not_divide_evenly_are_refused() -> None:
    with pytest.raises(DataError, match="10 classes do not divide evenly into 3 experiences; in"):
        split(make_source(10), "domain", 3)


@pytest.mark.parametrize("num_experiences", [-1, 0, 5])
def test_more_experiences_than_classes_are_refused(num_experiences: int) -> None:
    with pytest.raises(DataError, match=rf"4 classes cannot be cut into {num_experiences}"):
        split(make_source(4), "class", num_experiences)


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (("0", "1"), r"order leaves out the classes \['2'\]"),
        (("0", "1", "1"), "order names a class twice"),
        (("0", "1", "cat"), "names the class 'cat', which the source does not have; it has"),
        ((0, 1, 3), "names the class 3, which"),
        ((0, 1, -1), "names the class -1, which"),
    ],
)
def test_an_order_names_every_class_once(order: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        split(make_source(3), "class", 3, order=order)


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="kind is 'classes'; class, domain and task are known"):
        split(make_source(3), "classes", 3)  # type: ignore[arg-type]  # the mistake itself


def test_classes_without_test_images_are_refused() -> None:
    source = make_source(4)
    known = source.test_labels < 2
    thin = SourceArrays(
        source.train_images, source.train_labels,
        source.test_images[known], source.test_labels[known], source.class_names,
    )  # fmt: skip

    with pytest.raises(DataError, match=r"\['2', '3'\] have 6 train and 0 test images"):
        split(thin, "class", 2)


def test_what_an_experience_holds_is_its_own() -> None:
    source = make_source(2)
    before = source.train_images.copy()

    experience = split(source, "class", 1).experiences[0]
    experience.train_images[:] = 0

    np.testing.assert_array_equal(source.train_images, before)


# ---------------------------------------------------------------- grow


@pytest.mark.parametrize("new", [("8", "9"), (8, 9), (np.int64(8), "9")])
def test_new_classes_arrive_after_all_others(new: Any) -> None:
    scenario = grow(make_source(10), new_classes=new)

    assert [len(e.classes) for e in scenario.experiences] == [8, 2]
    assert scenario.class_names == tuple("0123456789")
    assert set(scenario.experiences[1].train_labels) == {8, 9}


def test_new_classes_come_last_whatever_their_place_was() -> None:
    scenario = grow(make_source(4), new_classes=("2", "0"))

    assert scenario.class_names == ("1", "3", "2", "0")
    assert scenario.experiences[1].classes == ("2", "0")
    assert set(scenario.experiences[1].train_labels) == {2, 3}


def test_a_labelled_source_grows_by_names() -> None:
    images = LabelledImages.from_array(numbered(np.zeros(6)), ("cat", "dog", "ape") * 2)

    scenario = grow(DataSource(images, images), ("cat",))

    assert scenario.class_names == ("ape", "dog", "cat")
    np.testing.assert_array_equal(number_of(scenario.experiences[1].train_images), [0, 3])


def test_old_classes_can_arrive_in_several_experiences() -> None:
    scenario = split(make_source(5), "class", 3, order=(4, 3, 2, 1, 0), new_classes=("3",))

    assert [e.classes for e in scenario.experiences] == [("4", "2"), ("1", "0"), ("3",)]


@pytest.mark.parametrize(
    ("new", "message"),
    [
        ((), "new_classes is empty; name at least one"),
        (("x",), "new_classes names the class 'x'"),
        (("0", "1", "2"), "0 classes cannot be cut into 1 experiences before the new classes"),
    ],
)
def test_growth_that_is_none_is_refused(new: tuple[str, ...], message: str) -> None:
    with pytest.raises(DataError, match=message):
        grow(make_source(3), new)


def test_one_text_is_not_taken_for_its_letters() -> None:
    with pytest.raises(ValueError, match="give a sequence of classes"):
        grow(make_source(10), "89")


# ---------------------------------------------------------------- from the configuration


def test_a_configured_split_gives_one_experience_per_part() -> None:
    scenario = load_scenario(DataConfig(source="digits", split=(6, 4), split_seed=3), seed=0)

    order = class_order(10, 3)
    assert [set(e.classes) for e in scenario.experiences] == [
        set(map(str, order[:6])), set(map(str, order[6:])),
    ]  # fmt: skip
    assert set(scenario.experiences[1].train_labels) == {6, 7, 8, 9}
    assert sum(len(e.train_labels) + len(e.test_labels) for e in scenario.experiences) == 1_797


# ---------------------------------------------------------------- continuum


class TaskType(Enum):
    """As the library names what its task sets hold."""

    IMAGE_ARRAY = 1
    IMAGE_PATH = 2
    TEXT = 3


class TaskSet:
    """What the library's task sets offer of use here."""

    bounding_boxes = None
    target_trsf: Any = None

    def __init__(self, x: np.ndarray, y: np.ndarray, data_type: Enum = TaskType.IMAGE_ARRAY):
        self._x, self._y, self._t = x, y, np.zeros(len(y))
        self.data_type = data_type

    def get_raw_samples(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self._x, self._y, self._t

    def get_task_target_trsf(self, t: int) -> Any:
        return self.target_trsf

    def __len__(self) -> int:
        return len(self._y)

    def __getitem__(self, i: int) -> tuple[Any, ...]:
        return 255 - self._x[i], self._y[i], self._t[i]


def tasks(*labels: list[int]) -> list[TaskSet]:
    return [TaskSet(numbered(np.array(y), 100 * i), np.array(y)) for i, y in enumerate(labels)]


def test_task_sets_become_experiences() -> None:
    train, test = tasks([0, 1, 0], [3, 2]), tasks([1, 0], [2, 3])

    first, second = from_continuum(train, test)

    np.testing.assert_array_equal(number_of(first.train_images), [0, 1, 2])
    np.testing.assert_array_equal(first.train_labels, [0, 1, 0])
    np.testing.assert_array_equal(number_of(second.test_images), [100, 101])
    np.testing.assert_array_equal(second.test_labels, [2, 3])
    assert (first.classes, second.classes) == (("0", "1"), ("2", "3"))


def test_classes_are_numbered_as_they_arrive_and_may_come_again() -> None:
    both = tasks([7, 5], [5, 3])

    first, second = from_continuum(both, both)

    np.testing.assert_array_equal(first.train_labels, [1, 0])
    np.testing.assert_array_equal(second.train_labels, [0, 2])
    assert second.classes == ("5", "3")


def test_without_a_test_scenario_a_fifth_is_held_out() -> None:
    labels = [0, 1] * 10

    experiences = from_continuum(tasks(labels, labels))

    assert [(len(e.train_labels), len(e.test_labels)) for e in experiences] == [(16, 4)] * 2
    held = [number_of(e.test_images) % 100 for e in experiences]
    np.testing.assert_array_equal(*held)
    first = experiences[0]
    found = np.concatenate([number_of(first.train_images), number_of(first.test_images)])
    assert sorted(found) == list(range(20))


def test_paths_are_read_in_colour_as_text_or_bytes(tmp_path: Path) -> None:
    files = []
    for i, image in enumerate([Image.new("L", (4, 3), 9), Image.new("RGB", (4, 3), (1, 2, 3))]):
        files.append(str(tmp_path / f"{i}.png"))
        image.save(files[i])
    labels = np.array([0, 1])
    as_text = TaskSet(np.array(files), labels, TaskType.IMAGE_PATH)
    as_bytes = TaskSet(np.array(files, "S"), labels, TaskType.IMAGE_PATH)

    (experience,) = from_continuum([as_text], [as_bytes])

    assert experience.train_images.shape == (2, 3, 4, 3)
    assert experience.train_images[1, 0, 0].tolist() == [1, 2, 3]
    np.testing.assert_array_equal(experience.train_images, experience.test_images)


@pytest.mark.parametrize("mark", ["inc_trsf", "trsf"])
def test_transformations_that_make_the_scenario_are_carried_out(mark: str) -> None:
    class Scenario(list[TaskSet]):
        pass

    scenario = Scenario(tasks([0, 1]))
    setattr(scenario, mark, [])

    (experience,) = from_continuum(scenario, scenario)

    np.testing.assert_array_equal(experience.train_images, 255 - numbered(np.zeros(2)))


def test_transformed_labels_are_the_labels() -> None:
    (task,) = tasks([0, 1, 2, 3])
    task.target_trsf = lambda label: label // 2

    (experience,) = from_continuum([task], [task])

    np.testing.assert_array_equal(experience.train_labels, [0, 0, 1, 1])


def strange(**changed: Any) -> TaskSet:
    (task,) = tasks([0, 1])
    for name, value in changed.items():
        setattr(task, name, value)
    return task


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (strange(data_type=TaskType.TEXT), "task 0 of the train scenario holds data of type TEXT"),
        (strange(bounding_boxes=np.zeros((2, 4))), "has bounding boxes; crop"),
        (strange(_y=np.array([0, 1, 2])), r"has 2 images and labels of shape \(3,\)"),
        (strange(_y=np.zeros((2, 2))), r"labels of shape \(2, 2\)"),
        (strange(_x=np.full((2, 4, 4), np.nan)), "not finite"),
        (strange(_x=np.zeros((2, 5))), r"has shape \(2, 5\)"),
        (SimpleNamespace(), "a SimpleNamespace without get_raw_samples; give a scenario"),
    ],
)
def test_task_sets_that_hold_something_else_are_refused(task: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        from_continuum([task])


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ([], None, "no tasks"),
        (tasks([0, 1]), tasks([0], [1]), "has 1 tasks and the test scenario 2; make both with"),
        (tasks([0, 1]), tasks([0, 2]), r"labels \['2'\] are outside the classes \['0', '1'\]"),
        (
            tasks([0, 1]),
            [TaskSet(np.zeros((2, 4, 4), np.uint8), np.array([0, 1]))],
            "images of the shapes .* bring them to one size",
        ),
    ],
    ids=["none", "fewer", "class", "size"],
)
def test_scenarios_that_do_not_match_are_refused(train: Any, test: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        from_continuum(train, test)


def test_a_fraction_of_every_class_of_every_task_is_kept() -> None:
    labels = [0, 1] * 10

    experiences = from_continuum(tasks(labels, labels), tasks(labels, labels), fraction=0.2)

    for experience in experiences:
        assert np.bincount(experience.train_labels).tolist() == [2, 2]
        assert np.bincount(experience.test_labels).tolist() == [2, 2]
    first, second = (number_of(e.train_images) % 100 for e in experiences)
    np.testing.assert_array_equal(first, second)


@pytest.fixture
def user_module(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A module of the user's, whose functions are set by the tests."""
    module = SimpleNamespace()
    monkeypatch.setitem(sys.modules, "my_scenarios", module)
    return module


@pytest.mark.parametrize(
    ("kind", "labels", "tasks_of_class"),
    [
        ("class", ([1, 0, 1, 0], [2, 2, 0, 0]), ()),
        ("task", ([1, 0, 1, 0], [2, 2, 3, 3]), (0, 0, 1, 1)),
        ("domain", ([1, 0, 1, 0], [0, 0, 1, 1]), ()),
    ],
)
def test_a_function_may_return_a_scenario_of_continuum(
    user_module: SimpleNamespace, kind: Kind, labels: Any, tasks_of_class: tuple[int, ...]
) -> None:
    user_module.mine = lambda: (tasks(*labels), tasks(*labels))

    scenario = load_scenario(DataConfig(source="continuum:my_scenarios:mine"), 0, kind)

    assert (scenario.kind, scenario.task_of_class) == (kind, tasks_of_class)
    assert scenario.class_names[:2] == ("0", "1")
    for experience, wanted in zip(scenario.experiences, labels, strict=True):
        assert [scenario.class_names[i] for i in experience.train_labels] == list(map(str, wanted))


def test_a_scenario_without_a_test_part_gives_a_fifth_to_it(user_module: SimpleNamespace) -> None:
    user_module.mine = lambda: tasks([0, 1] * 10)

    scenario = load_scenario(DataConfig(source="continuum:my_scenarios:mine"), 0)

    assert len(scenario.experiences[0].test_labels) == 4


@pytest.mark.parametrize(
    ("kind", "message"),
    [("task", "have a class in common"), ("domain", "do not all have the same classes")],
)
def test_experiences_of_another_kind_are_refused(
    user_module: SimpleNamespace, kind: Kind, message: str
) -> None:
    user_module.mine = lambda: tasks([0, 1, 0, 1], [1, 2, 1, 2])

    with pytest.raises(DataError, match=message):
        load_scenario(DataConfig(source="continuum:my_scenarios:mine"), 0, kind)


def test_a_scenario_says_itself_which_classes_arrive(user_module: SimpleNamespace) -> None:
    config = DataConfig(source="continuum:my_scenarios:mine", split=(1, 1))

    with pytest.raises(DataError, match=r"leave data\.classes and data\.split empty"):
        load_scenario(config, 0)


def test_a_function_that_returns_too_much_is_refused(user_module: SimpleNamespace) -> None:
    user_module.mine = lambda: (1, 2, 3)

    with pytest.raises(DataError, match=r"returned 3 things; return a scenario or \(train, test\)"):
        load_scenario(DataConfig(source="continuum:my_scenarios:mine"), 0)


def test_a_training_does_not_take_a_scenario() -> None:
    with pytest.raises(DataError, match=r"is a scenario, .* benchmarks/continual\.py takes it"):
        load_source(DataConfig(source="continuum:my_scenarios:mine"), 0)


def test_parts_of_classes_are_no_domains() -> None:
    with pytest.raises(DataError, match="do not all have the same classes"):
        load_scenario(DataConfig(source="digits", split=(6, 4)), 0, "domain")


@pytest.mark.parametrize(
    ("config", "in_parts"),
    [
        (DataConfig(source="digits"), False),
        (DataConfig(source="digits", split=(6, 4)), True),
        (DataConfig(source="cifar100-50+50"), True),
        (DataConfig(source="continuum:a:b"), True),
        (DataConfig(source="torchvision:CIFAR100"), False),
    ],
)
def test_a_configuration_tells_whether_classes_come_in_parts(
    config: DataConfig, in_parts: bool
) -> None:
    assert comes_in_parts(config) is in_parts

"""A source of labelled images, cut into experiences that arrive one after the other.

The three scenarios of continual learning (van de Ven and Tolias 2019, arXiv:1904.07734), the
growth of a classifier by new classes, and scenarios of the continuum library. Plain numpy; who
learns from the experiences, and how, is not known here.

Axes: N images, H height, W width, C channels.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, SupportsIndex

import numpy as np
from numpy.typing import NDArray

from lifelong_ray.config import DataConfig
from lifelong_ray.datasets import (
    DataSource,
    LabelledImages,
    SourceArrays,
    as_arrays,
    as_source_arrays,
    class_order,
    clean_images,
    clean_labels,
    continuum_function,
    from_torch_dataset,
    hold_out,
    image_file,
    load_parts,
    one_label_each,
    returned_by,
    thinned,
)
from lifelong_ray.types import DataError, Pixels

Images = NDArray[np.uint8]
Labels = NDArray[np.int64]
Kind = Literal["class", "domain", "task"]
Class = str | SupportsIndex
"""A class by its name or by its position in the source's class names."""


@dataclass(frozen=True, eq=False)
class Experience:
    """What arrives at one time. The arrays are its own, and may be written to.

    Attributes:
        train_images: (N, H, W, C) uint8.
        train_labels: (N,) int64, positions in the scenario's class list.
        test_images: As `train_images`.
        test_labels: As `train_labels`.
        classes: Names of the source's classes that it shows, in the order of their labels.
    """

    train_images: Images
    train_labels: Labels
    test_images: Images
    test_labels: Labels
    classes: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Scenario:
    """Experiences in the order in which they arrive.

    Attributes:
        kind: ``class``: each brings classes of its own, and all compete; ``task``: the same, but
            which experience an image is from is known; ``domain``: each brings other images of
            the same few labels.
        class_names: What each label means, in the order in which classes arrive; where `split`
            made a ``domain`` scenario the position within the experience, as text.
        experiences: What arrives, one after the other.
        task_of_class: For ``task`` the experience of every label, else empty.
    """

    kind: Kind
    class_names: tuple[str, ...]
    experiences: tuple[Experience, ...]
    task_of_class: tuple[int, ...] = ()


def split(
    source: DataSource | SourceArrays,
    kind: Kind,
    num_experiences: int,
    *,
    order: int | Sequence[Class] | None = None,
    new_classes: Sequence[Class] | None = None,
) -> Scenario:
    """Cut the classes of `source` into groups that arrive one after the other.

    Args:
        source: Where images and classes come from.
        kind: See `Scenario`.
        num_experiences: How many groups. They are equally large, or for ``class`` and ``task``
            differ by one class, the larger ones first.
        order: In which order classes arrive: None is the source's, a number is the seed of
            `class_order`, a sequence names every class.
        new_classes: Classes that arrive last, together; the others share the experiences
            before.

    Raises:
        DataError: If the classes cannot be cut in this way.
    """
    if kind not in ("class", "domain", "task"):
        raise ValueError(f"kind is {kind!r}; class, domain and task are known")
    arrays = source if isinstance(source, SourceArrays) else as_source_arrays(source)
    classes = _ordered(arrays.class_names, order)
    last = _positions(() if new_classes is None else new_classes, arrays.class_names, "new_classes")
    classes = [c for c in classes if c not in last]
    num_groups = num_experiences - bool(last)
    if not 1 <= num_groups <= len(classes):
        raise DataError(
            f"{len(classes)} classes cannot be cut into {num_groups} experiences"
            f"{' before the new classes' if last else ''}; each needs at least one"
        )
    groups = [part.tolist() for part in np.array_split(np.array(classes), num_groups)]
    groups += [last] if last else []
    if kind == "domain" and len({len(group) for group in groups}) > 1:
        raise DataError(
            f"the {len(arrays.class_names)} classes do not divide evenly into {num_experiences} "
            "experiences; in a domain scenario each has the same labels, so choose a number of "
            "experiences that divides the classes, or fewer classes with data.classes"
        )
    return _scenario(arrays, kind, groups)


def grow(source: DataSource | SourceArrays, new_classes: Sequence[Class]) -> Scenario:
    """Two experiences: all other classes, then `new_classes`; labels in that order.

    Raises:
        DataError: If a new class is not in the source, or no other class is left.
    """
    if not len(new_classes):
        raise DataError("new_classes is empty; name at least one class that is to arrive later")
    return split(source, "class", 2, new_classes=new_classes)


def load_scenario(config: DataConfig, seed: int, kind: Kind = "class") -> Scenario:
    """The scenario that a configuration itself describes.

    That is ``data.split`` of ``data.source``, or what the function of
    ``continuum:package.module:function`` returns: a scenario of the continuum library, or a
    tuple of two, train and test. Within a part of a split, classes are in the order of their
    names.

    Args:
        config: What to load, and which fraction of it.
        seed: Decides which images a fraction and a missing test part take.
        kind: See `Scenario`. ``task`` needs experiences without a class in common, ``domain``
            such that have all of them in common; ``class`` takes both.

    Raises:
        DataError: As `load_parts` and `from_continuum`, if the images differ in size, or if the
            experiences are not of that kind.
    """
    function = continuum_function(config.source)
    if function is not None:
        if config.classes or config.split:
            raise DataError(
                f"data.source {config.source} says which classes arrive when; leave data.classes "
                "and data.split empty"
            )
        returned = returned_by(function)
        both = returned if isinstance(returned, tuple) else (returned, None)
        if len(both) != 2:
            raise DataError(
                f"{function} returned {len(both)} things; return a scenario or (train, test) "
                "scenarios"
            )
        experiences = from_continuum(*both, seed=seed, fraction=config.fraction)
        class_names = tuple(dict.fromkeys(name for e in experiences for name in e.classes))
    else:
        parts = load_parts(config, seed)
        class_names = tuple(name for part in parts for name in part.train.class_names)
        experiences = tuple(_experience(part, class_names) for part in parts)
    return _of_kind(kind, class_names, experiences)


def _of_kind(
    kind: Kind, class_names: tuple[str, ...], experiences: tuple[Experience, ...]
) -> Scenario:
    """The scenario of these experiences, if they are of that kind."""
    shown = [set(e.classes) for e in experiences]
    if kind == "task":
        if sum(map(len, shown)) > len(class_names):
            raise DataError(
                "experiences have a class in common, so that it is of no one task; choose the "
                "scenario class"
            )
        task = {name: number for number, names in enumerate(shown) for name in names}
        tasks = tuple(task[name] for name in class_names)
        return Scenario(kind, class_names, experiences, tasks)
    if kind == "domain" and any(names != shown[0] for names in shown):
        raise DataError(
            "the experiences do not all have the same classes; choose the scenario class"
        )
    return Scenario(kind, class_names, experiences)


def _experience(part: DataSource, class_names: tuple[str, ...]) -> Experience:
    train, test = as_arrays(part.train, class_names), as_arrays(part.test, class_names)
    shown = set(part.train.labels)
    return Experience(
        _own(train.images),
        train.labels,
        _own(test.images),
        test.labels,
        tuple(name for name in class_names if name in shown),
    )


def _own(images: Images) -> Images:
    """The array itself if nobody else holds it, or a copy that may be written to."""
    return images if images.flags.writeable else images.copy()


def _ordered(names: tuple[str, ...], order: int | Sequence[Class] | None) -> list[int]:
    if order is None:
        return list(range(len(names)))
    if isinstance(order, (int, np.integer)):
        return list(class_order(len(names), int(order)))
    positions = _positions(order, names, "order")
    missing = [name for i, name in enumerate(names) if i not in positions]
    if missing:
        raise DataError(f"order leaves out the classes {missing[:10]}; name every class once")
    return positions


def _positions(classes: Sequence[Class], names: tuple[str, ...], what: str) -> list[int]:
    """Positions in `names` of classes given by name or position, each once."""
    if isinstance(classes, str):
        raise ValueError(
            f"{what} is {classes!r}; give a sequence of classes, such as ({classes!r},)"
        )
    positions = []
    for wanted in classes:
        if isinstance(wanted, str):
            position = names.index(wanted) if wanted in names else -1
        else:
            position = operator.index(wanted)
        if not 0 <= position < len(names):
            raise DataError(
                f"{what} names the class {wanted!r}, which the source does not have; it has "
                f"{list(names)[:20]}"
            )
        positions.append(position)
    if len(set(positions)) < len(positions):
        raise DataError(f"{what} names a class twice: {list(classes)[:20]}; name each once")
    return positions


def _scenario(arrays: SourceArrays, kind: Kind, groups: list[list[int]]) -> Scenario:
    label_of_class = np.zeros(len(arrays.class_names), np.int64)
    if kind == "domain":
        for group in groups:
            label_of_class[group] = np.arange(len(group))
        class_names = tuple(str(i) for i in range(len(groups[0])))
    else:
        arrival = [c for group in groups for c in group]
        label_of_class[arrival] = np.arange(len(arrival))
        class_names = tuple(arrays.class_names[c] for c in arrival)
    experiences = []
    for group in groups:
        train = np.flatnonzero(np.isin(arrays.train_labels, group))
        test = np.flatnonzero(np.isin(arrays.test_labels, group))
        names = tuple(arrays.class_names[c] for c in group)
        if not len(train) or not len(test):
            raise DataError(
                f"the classes {list(names)[:10]} have {len(train)} train and {len(test)} test "
                "images; an experience needs some of both"
            )
        experiences.append(
            Experience(
                arrays.train_images[train],
                label_of_class[arrays.train_labels[train]],
                arrays.test_images[test],
                label_of_class[arrays.test_labels[test]],
                names,
            )
        )
    tasks = tuple(task for task, group in enumerate(groups) for _ in group)
    return Scenario(kind, class_names, tuple(experiences), tasks if kind == "task" else ())


# -- scenarios of the continuum library ----------------------------------------------------


def from_continuum(
    train_scenario: Iterable[Any],
    test_scenario: Iterable[Any] | None = None,
    *,
    seed: int = 0,
    fraction: float = 1.0,
) -> tuple[Experience, ...]:
    """The experiences of a scenario of the continuum library.

    The library itself is not needed: known is only what its task sets offer. Source: Douillard
    and Lesort 2021, arXiv:2102.06253.

    Images are taken as they are, before the scenario's transformations, except where these
    make the scenario (rotations, permutations, a list of them per task). Labels are positions
    in the list of all classes, in the order in which they arrive.

    Args:
        train_scenario: Yields task sets of image arrays or image paths.
        test_scenario: The same tasks with test images; None takes a fifth of every class of
            each task.
        seed: Decides that fifth and the fraction.
        fraction: Share of the images of each class of each task that is kept.

    Raises:
        DataError: If the task sets hold no images of one size, or train and test do not match.
    """
    train = _task_images(train_scenario, "train")
    if not train:
        raise DataError("the train scenario has no tasks; give one with at least one")
    if test_scenario is None:
        # Drawn anew for each, so that tasks that show the same images hold out the same ones.
        parts = [hold_out(images, np.random.default_rng(seed)) for images in train]
    else:
        test = _task_images(test_scenario, "test")
        if len(test) != len(train):
            raise DataError(
                f"the train scenario has {len(train)} tasks and the test scenario {len(test)}; "
                "make both with the same settings"
            )
        parts = [DataSource(*pair) for pair in zip(train, test, strict=True)]
    if fraction < 1:
        # Drawn anew for each part of each task, for the same reason.
        parts = [
            DataSource(
                *(
                    thinned(images, fraction, np.random.default_rng(seed))
                    for images in (part.train, part.test)
                )
            )
            for part in parts
        ]
    names = tuple(dict.fromkeys(name for images in train for name in images.class_names))
    experiences = tuple(_experience(part, names) for part in parts)
    shapes = {images.shape[1:] for e in experiences for images in (e.train_images, e.test_images)}
    if len(shapes) > 1:
        raise DataError(
            f"the tasks have images of the shapes {sorted(shapes)} (height, width, channels); "
            "bring them to one size before they enter the scenario"
        )
    return experiences


def _task_images(scenario: Iterable[Any], part: str) -> list[LabelledImages]:
    shaped = hasattr(scenario, "inc_trsf") or isinstance(getattr(scenario, "trsf", None), list)
    return [
        from_torch_dataset(task_set, (), name=f"task {i} of the {part} scenario")
        if shaped
        else _raw_images(task_set, f"task {i} of the {part} scenario")
        for i, task_set in enumerate(scenario)
    ]


def _raw_images(task_set: Any, where: str) -> LabelledImages:
    if not hasattr(task_set, "get_raw_samples"):
        raise DataError(
            f"{where} is a {type(task_set).__name__} without get_raw_samples; give a scenario of "
            "the continuum library, which yields task sets"
        )
    data_type = getattr(getattr(task_set, "data_type", None), "name", "IMAGE_ARRAY")
    if data_type not in ("IMAGE_ARRAY", "IMAGE_PATH"):
        raise DataError(
            f"{where} holds data of type {data_type}; image arrays and image paths can be taken"
        )
    if getattr(task_set, "bounding_boxes", None) is not None:
        raise DataError(f"{where} has bounding boxes; crop the images before they enter it")
    raw_x, raw_y, raw_t = task_set.get_raw_samples()
    x = np.asarray(raw_x)
    y = one_label_each(np.asarray(raw_y), len(x), where)
    if getattr(task_set, "target_trsf", None) is not None:
        y = np.array(
            [task_set.get_task_target_trsf(t)(label) for label, t in zip(y, raw_t, strict=True)]
        )
    labels = clean_labels(y, where)
    if data_type == "IMAGE_ARRAY":
        return LabelledImages.from_array(clean_images(x, where), labels)
    return LabelledImages(tuple(_in_colour(image_file(Path(os.fsdecode(p)))) for p in x), labels)


def _in_colour(pixels: Pixels) -> Pixels:
    """With three channels, as the library itself opens files."""
    return np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels

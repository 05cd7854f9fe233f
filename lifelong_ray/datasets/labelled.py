"""Labelled images, one by one or as whole arrays.

Axes of whole arrays: N images, H height, W width, C channels (1 grey or 3 colour). Knows
nothing of files, configuration or random choices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lifelong_ray.types import DataError, Pixels

Labels = NDArray[np.int64]


class _Stack(NamedTuple):
    """The array that holds all images of a source, and which of its rows are meant."""

    array: NDArray[np.uint8]  # (N, H, W, C)
    rows: Labels | None  # None is all of them, so that the array itself can be handed out


@dataclass(frozen=True)
class LabelledImages:
    """Images with their class names.

    Attributes:
        images: One (height, width, channels) uint8 array per image; sizes may differ.
        labels: Class name of each image.
    """

    images: tuple[Pixels, ...]
    labels: tuple[str, ...]
    # Not of the constructor, so that `dataclasses.replace` cannot carry along a stale one.
    _stack: _Stack | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if len(self.images) != len(self.labels):
            raise DataError(
                f"there are {len(self.images)} images and {len(self.labels)} labels; "
                "give each image one label"
            )

    def __len__(self) -> int:
        return len(self.images)

    @classmethod
    def from_array(cls, images_NHWC: NDArray[np.uint8], labels: tuple[str, ...]) -> LabelledImages:
        """Images of one size, held as one array that `as_arrays` hands out as it is.

        The array is not copied, so leave it as it is; what is handed out is read-only.
        """
        shared_NHWC = images_NHWC.view()
        shared_NHWC.setflags(write=False)
        return cls(tuple(shared_NHWC), labels)._with(_Stack(shared_NHWC, None))

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes present, in natural order: ``2`` before ``10``."""
        return tuple(sorted(set(self.labels), key=natural_order))

    def of_classes(self, names: tuple[str, ...]) -> LabelledImages:
        """Only the images of `names`."""
        wanted = set(names)
        return self.take([i for i, label in enumerate(self.labels) if label in wanted])

    def take(self, indices: Sequence[int]) -> LabelledImages:
        """The images at `indices`, in that order; no pixels are copied."""
        taken = LabelledImages(
            tuple(self.images[i] for i in indices), tuple(self.labels[i] for i in indices)
        )
        return taken._with(self._rows(np.asarray(indices, np.int64)))

    def repeated(self, times: int) -> LabelledImages:
        """Every image `times` times; no pixels are copied."""
        repeated = LabelledImages(self.images * times, self.labels * times)
        return repeated._with(self._rows(np.tile(np.arange(len(self)), times)))

    def _with(self, stack: _Stack | None) -> LabelledImages:
        object.__setattr__(self, "_stack", stack)
        return self

    def _rows(self, indices: Labels) -> _Stack | None:
        if self._stack is None:
            return None
        array, rows = self._stack
        return _Stack(array, indices if rows is None else rows[indices])


@dataclass(frozen=True)
class DataSource:
    """A training part and an independent test part."""

    train: LabelledImages
    test: LabelledImages


class ImageArrays(NamedTuple):
    """Labelled images as whole arrays.

    Attributes:
        images: (N, H, W, C) uint8; read-only where it is the source's own array, of which
            ``torch.from_numpy`` wants a copy.
        labels: (N,) int64, positions in `class_names`.
        class_names: Name of every class.
    """

    images: NDArray[np.uint8]
    labels: Labels
    class_names: tuple[str, ...]


def as_arrays(images: LabelledImages, class_names: tuple[str, ...] | None = None) -> ImageArrays:
    """Labelled images as whole arrays.

    Pixels are copied only where the images are a selection or were never held as one array.

    Args:
        images: At least one image; all of one size and with as many channels.
        class_names: Which class each label number means; None takes those present, in
            natural order.

    Raises:
        DataError: If there are no images, they differ in size, or a class is not listed.

    >>> ramp = np.arange(8, dtype=np.uint8).reshape(2, 2, 2, 1)
    >>> as_arrays(LabelledImages.from_array(ramp, ("dog", "cat"))).labels
    array([1, 0])
    """
    if not len(images):
        raise DataError("there are no images to make an array of; load some first")
    names = images.class_names if class_names is None else tuple(class_names)
    unknown = set(images.labels) - set(names)
    if unknown:
        raise DataError(
            f"labels {sorted(unknown, key=natural_order)[:5]} are outside the classes "
            f"{list(names)[:10]}; list them as classes, or leave their images out with of_classes"
        )
    return ImageArrays(_whole_array(images), as_positions(images.labels, names), names)


def as_positions(labels: tuple[str, ...], class_names: tuple[str, ...]) -> Labels:
    """Position in `class_names` of every label; all must be listed."""
    position = {name: i for i, name in enumerate(class_names)}
    return np.fromiter(map(position.__getitem__, labels), np.int64, len(labels))


def _whole_array(images: LabelledImages) -> NDArray[np.uint8]:
    if images._stack is not None:
        array, rows = images._stack
        return array if rows is None else array[rows]
    shapes = sorted({image.shape for image in images.images})
    if len(shapes) > 1:
        raise DataError(
            f"the images have {len(shapes)} different shapes, such as {shapes[0]} and {shapes[-1]} "
            "(height, width, channels); bring them to one with feedback.to_model_input first"
        )
    return np.stack(images.images)


@dataclass(frozen=True, eq=False)
class SourceArrays:
    """Both parts of a source as whole arrays; checked when made.

    Attributes:
        train_images: (N, H, W, C) uint8.
        train_labels: (N,) int64, positions in `class_names`.
        test_images: As `train_images`, of the same height, width and channels.
        test_labels: As `train_labels`.
        class_names: Name of every class.

    Raises:
        DataError: If the arrays do not fit each other or the classes.
    """

    train_images: NDArray[np.uint8]
    train_labels: Labels
    test_images: NDArray[np.uint8]
    test_labels: Labels
    class_names: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(set(self.class_names)) < 2 or len(set(self.class_names)) < len(self.class_names):
            raise DataError(
                f"the classes are {list(self.class_names)}; give at least two different names"
            )
        for part, images, labels in (
            ("train", self.train_images, self.train_labels),
            ("test", self.test_images, self.test_labels),
        ):
            _check_part(part, images, labels, len(self.class_names))
        if self.train_images.shape[1:] != self.test_images.shape[1:]:
            raise _different_size(self.train_images.shape[1:], self.test_images.shape[1:])


def _check_part(part: str, images: NDArray[np.uint8], labels: Labels, num_classes: int) -> None:
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
        raise DataError(
            f"the {part} images are {images.dtype} of shape {images.shape}; "
            "give uint8 of shape (N, height, width, 1 or 3)"
        )
    if labels.dtype.kind not in "iu" or labels.shape != (len(images),):
        raise DataError(
            f"the {part} part has {len(images)} images and {labels.dtype} labels of shape "
            f"{labels.shape}; give each image one whole number, in an array of shape (N,)"
        )
    if not len(images):
        raise DataError(f"the {part} part holds no images; give it some of every class")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise DataError(
            f"the {part} labels lie in {labels.min()} to {labels.max()}, outside the "
            f"{num_classes} classes; they are positions in class_names, 0 to {num_classes - 1}"
        )


def as_source_arrays(source: DataSource) -> SourceArrays:
    """Both parts of `source` as whole arrays; label numbers follow the natural order of names.

    Raises:
        DataError: If a part is empty, the images differ in size, or there is but one class.
    """
    names = source.train.class_names
    train, test = as_arrays(source.train, names), as_arrays(source.test, names)
    return SourceArrays(train.images, train.labels, test.images, test.labels, names)


def check_same_size(source: DataSource, where: str) -> None:
    """Where both parts are of one image size each, it must be the same.

    Raises:
        DataError: If it is not.
    """
    stacks = source.train._stack, source.test._stack
    if stacks[0] is not None and stacks[1] is not None:
        sizes = [stack.array.shape[1:] for stack in stacks if stack is not None]
        if sizes[0] != sizes[1]:
            raise DataError(f"{where}: {_different_size(*sizes)}")


def _different_size(train: tuple[int, ...], test: tuple[int, ...]) -> DataError:
    return DataError(
        f"the train images are {train} and the test images {test} (height, width, channels); "
        "save both at one size"
    )


def natural_order(name: str) -> tuple[int, int, str]:
    """Sort key that puts ``2`` before ``10``."""
    return (0, int(name), name) if name.isdecimal() else (1, 0, name)

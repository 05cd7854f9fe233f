"""From anybody's arrays to clean pixels and class names, or to an error that says why not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lifelong_ray.types import DataError

_IMAGES_AT_ONCE = 4_096


def clean_images(x: NDArray[Any], where: str) -> NDArray[np.uint8]:
    """Images as uint8 of shape (N, height, width, channels); uint8 is not copied.

    Args:
        x: (N, H, W) or (N, H, W, 1 or 3); numbers from 0 to 255, or from 0 to 1.
        where: What errors call the array.

    Raises:
        DataError: If `x` holds something else.
    """
    if x.ndim == 3:
        x = x[:, :, :, None]
    if x.ndim != 4 or x.shape[3] not in (1, 3):
        raise DataError(f"{where} has shape {x.shape}; expected (N, H, W) or (N, H, W, 1 or 3)")
    if len(x) == 0:
        raise DataError(f"{where} holds no images; give it at least one of every class")
    if x.dtype == np.uint8:
        return x
    to_255 = _scale([x], where)
    clean = np.empty(x.shape, np.uint8)
    # In parts, since a whole data set as float64 takes eight times its pixels.
    for first in range(0, len(x), _IMAGES_AT_ONCE):
        part = slice(first, first + _IMAGES_AT_ONCE)
        clean[part] = _rounded(x[part], to_255)
    return clean


def clean_each(images: Sequence[NDArray[Any]], where: str) -> list[NDArray[np.uint8]]:
    """The same for images whose sizes may differ: each (H, W, C), numbers of any one scale."""
    numbers = [image for image in images if image.dtype != np.uint8]
    to_255 = _scale(numbers, where) if numbers else 1
    return [i if i.dtype == np.uint8 else _rounded(i, to_255) for i in images]


def _scale(arrays: Sequence[NDArray[Any]], where: str) -> int:
    """What takes the numbers to 0..255; decided by all, since a dark image may stay below 1."""
    for array in arrays:
        if array.dtype.kind not in "biuf":
            raise DataError(f"{where} has images of {array.dtype}; expected numbers")
        if not np.isfinite(array).all():
            raise DataError(
                f"{where} holds values that are not finite (NaN or infinity); "
                "repair these images or leave them out"
            )
    low = min(float(array.min()) for array in arrays)
    high = max(float(array.max()) for array in arrays)
    if low < 0 or high > 255:
        raise DataError(
            f"{where} lies in [{low}, {high}]; expected 0 to 255 or 0 to 1, so give the images "
            "before they are normalised"
        )
    return 255 if high <= 1 else 1


def _rounded(x: NDArray[Any], to_255: int) -> NDArray[np.uint8]:
    # Rounded, since k / 255 * 255 may come out just below k.
    return np.rint(x.astype(np.float64) * to_255).astype(np.uint8)


def clean_labels(y: NDArray[Any], where: str) -> tuple[str, ...]:
    """Labels as text; numbers must be whole, text must not be empty.

    Raises:
        DataError: If they are not.
    """
    if y.dtype.kind not in "biufSU":
        raise DataError(f"{where} has labels of {y.dtype}; expected whole numbers or text")
    if y.dtype.kind == "S":
        y = np.char.decode(y, "utf-8")
    elif y.dtype.kind == "f":
        if not np.isfinite(y).all() or (y != np.rint(y)).any():
            raise DataError(f"{where} has labels that are not whole numbers; give each its class")
        y = y.astype(np.int64)
    names = tuple(map(str, y.tolist()))
    if not all(name.strip() for name in set(names)):
        raise DataError(f"{where} has an empty label; give each image its class")
    return names


def check_lengths(x: NDArray[Any], y: NDArray[Any], where: str) -> None:
    """One label per image.

    Raises:
        DataError: If there are more or fewer.
    """
    if y.ndim != 1 or len(x) != len(y):
        raise DataError(
            f"{where} has {len(x)} images and labels of shape {y.shape}; give each image one label"
        )

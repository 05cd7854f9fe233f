"""From anybody's arrays to clean pixels and class names, or to an error that says why not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lifelong_ray.types import DataError

_IMAGES_AT_ONCE = 4_096


def clean_images(x: NDArray[Any], where: str) -> NDArray[np.uint8]:
    """Images as uint8 of shape (N, height, width, channels).

    One rule for numbers of every type, uint8 and bool too: where all of the array lie within 0
    to 1, 1 means white and comes out as 255; else they lie within 0 to 255 and stay as they
    are. An array of uint8 that stays as it is is not copied.

    Args:
        x: (N, H, W) or (N, H, W, 1 or 3).
        where: What errors call the array.

    Raises:
        DataError: If `x` holds something else.
    """
    if x.ndim == 3:
        x = x[:, :, :, None]
    if x.ndim != 4 or x.shape[3] not in (1, 3):
        raise DataError(
            f"{where} has shape {x.shape}; expected (N, H, W) or (N, H, W, 1 or 3), so "
            "reshape flattened images and move the channels to the end"
        )
    if len(x) == 0:
        raise DataError(f"{where} holds no images; give it at least one of every class")
    to_255 = _scale([x], where)
    if x.dtype == np.uint8 and to_255 == 1:
        return x
    clean = np.empty(x.shape, np.uint8)
    # In parts, since a whole data set as float64 takes eight times its pixels.
    for first in range(0, len(x), _IMAGES_AT_ONCE):
        part = slice(first, first + _IMAGES_AT_ONCE)
        clean[part] = _rounded(x[part], to_255)
    return clean


def clean_each(images: Sequence[NDArray[Any]], where: str) -> list[NDArray[np.uint8]]:
    """The same for images whose sizes may differ, each (H, W, C).

    Those that are uint8 have one scale, all others together another.
    """
    is_bytes = [image.dtype == np.uint8 for image in images]
    to_255 = {
        kind: _scale([i for i, of in zip(images, is_bytes, strict=True) if of == kind], where)
        for kind in set(is_bytes)
    }
    return [
        i if of and to_255[of] == 1 else _rounded(i, to_255[of])
        for i, of in zip(images, is_bytes, strict=True)
    ]


def _scale(arrays: Sequence[NDArray[Any]], where: str) -> int:
    """What takes the numbers to 0..255; decided by all, since a dark image may stay below 1."""
    for array in arrays:
        if array.dtype.kind not in "biuf":
            raise DataError(f"{where} has images of {array.dtype}; expected numbers")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
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


def one_label_each(y: NDArray[Any], num_images: int, where: str) -> NDArray[Any]:
    """Labels as (N,), one per image; a column (N, 1) of them is flattened.

    Raises:
        DataError: If there are more or fewer.
    """
    if y.shape == (num_images, 1):
        y = y[:, 0]
    if y.shape != (num_images,):
        how = ""
        if y.ndim == 2 and len(y) == num_images:
            how = ", such as the column of the largest number where rows are one-hot (y.argmax(1))"
        raise DataError(
            f"{where} has {num_images} images and labels of shape {y.shape}; give each image one "
            f"label{how}"
        )
    return y

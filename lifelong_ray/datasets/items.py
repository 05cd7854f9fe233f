"""Any map-style PyTorch ``Dataset`` of images and labels, taken item by item.

Tensors are known by what they can do, so that this module needs no torch.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lifelong_ray.datasets.cleaning import clean_each
from lifelong_ray.datasets.labelled import DataSource, LabelledImages
from lifelong_ray.types import DataError

_GREY_MODES = ("1", "L")
_COLOUR_MODES = ("RGB", "P", "CMYK", "YCbCr", "HSV", "LAB")
_MODES_WITH_ALPHA = ("RGBA", "LA", "PA", "RGBa", "La")


def from_torch_dataset(
    dataset: Any,
    class_names: Sequence[str] | None = None,
    *,
    name: str = "",
) -> LabelledImages:
    """The (image, label) items of a data set, as plain arrays.

    Args:
        dataset: Has a length and items. An item's image is a PIL image, an array (H, W) or
            (H, W, C), or a tensor (H, W) or (C, H, W), with 1 or 3 channels; numbers are 0 to
            255, or 0 to 1 where none is larger. Its label is a whole number or a class name;
            what follows it is ignored.
        class_names: What the label numbers mean; None takes the data set's own ``classes``,
            or where it has none the numbers as names.
        name: What errors call the data set; empty means its type's name.

    Raises:
        DataError: If there are no items, or one is not such a pair.
    """
    where = name or type(dataset).__name__
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise DataError(
            f"{where} has no length or no items; give a map-style Dataset, with __len__ and "
            "__getitem__"
        )
    if len(dataset) == 0:
        raise DataError(f"{where} holds no items; give it at least one of every class")
    names = _names(_own_classes(dataset) if class_names is None else class_names)
    images: list[NDArray[Any]] = []
    labels: list[str] = []
    for i in range(len(dataset)):
        item, which = dataset[i], f"item {i} of {where}"
        if not isinstance(item, (tuple, list)) or len(item) < 2:
            raise DataError(
                f"{which} is a {type(item).__name__} without a label; items are (image, label)"
            )
        images.append(_pixels(item[0], which))
        labels.append(_label(item[1], names, which))
        if images[i].shape[2] != images[0].shape[2]:
            raise DataError(
                f"{which} has {images[i].shape[2]} channel(s) and item 0 has "
                f"{images[0].shape[2]}; convert all images to grey or all to RGB"
            )
    clean = clean_each(images, where)
    if len({image.shape for image in clean}) == 1:
        return LabelledImages.from_array(np.stack(clean), tuple(labels))
    return LabelledImages(tuple(clean), tuple(labels))


def from_function(source: str) -> DataSource | LabelledImages:
    """What a function of the user's, ``package.module:function``, returns.

    It is called without arguments, and returns a tuple of two data sets, train and test, or
    one data set.

    Raises:
        DataError: If it cannot be imported, fails, or returns something else.
    """
    returned = returned_by(source)
    if not isinstance(returned, tuple):
        return from_torch_dataset(returned, name=source)
    if len(returned) != 2:
        raise DataError(
            f"{source} returned {len(returned)} things; return (train, test) or one data set"
        )
    train, test = returned
    return DataSource(
        from_torch_dataset(train, name=f"{source}:train"),
        from_torch_dataset(test, name=f"{source}:test"),
    )


def returned_by(source: str) -> Any:
    """What a function of the user's, ``package.module:function``, returns without arguments.

    Raises:
        DataError: If it cannot be imported or fails.
    """
    function = _imported(source)
    try:
        return function()
    except Exception as error:
        raise DataError(f"data.source {source} failed when it was called: {error!r}") from error


def _imported(source: str) -> Callable[[], Any]:
    module_name, _, name = source.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise DataError(
            f"data.source {source} names a module that cannot be imported: {error!r}; is its "
            "folder on PYTHONPATH?"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise DataError(
            f"{module_name} has no function {name}; data.source {source} is to name one that "
            "takes no arguments and returns (train, test) data sets or scenarios"
        )
    return cast(Callable[[], Any], function)


def _own_classes(dataset: Any) -> Sequence[str] | None:
    """What torchvision calls the classes; a ``Subset`` keeps its whole under ``dataset``."""
    whole = getattr(dataset, "dataset", dataset)
    return cast(Sequence[str] | None, getattr(whole, "classes", None))


def _names(class_names: Sequence[str] | None) -> tuple[str, ...]:
    names = tuple(str(name) for name in class_names or ())
    if len(set(names)) < len(names) or not all(name.strip() for name in names):
        raise DataError(
            f"the class names are {list(names)[:10]}; give each class a name of its own"
        )
    return names


def _label(label: Any, names: tuple[str, ...], which: str) -> str:
    """The class name of one label."""
    if isinstance(label, str):
        if names and label not in names:
            raise DataError(
                f"{which} has the label {label!r}, which is outside the classes "
                f"{list(names)[:10]}; add it to class_names or leave the item out"
            )
        if not label.strip():
            raise DataError(f"{which} has an empty label; give each image its class")
        return label
    number = _array(label, which)
    is_number = number.size == 1 and number.dtype.kind in "biuf" and np.isfinite(number).all()
    if not is_number or number.item() != np.rint(number.item()):
        raise DataError(
            f"{which} has a label of {number.dtype} and shape {number.shape}; give one whole "
            "number or a class name"
        )
    index = int(number.item())
    if not names:
        return str(index)
    if not 0 <= index < len(names):
        raise DataError(
            f"{which} has the label {index}, which is outside the {len(names)} classes; labels "
            f"are positions in class_names, 0 to {len(names) - 1}"
        )
    return names[index]


def _pixels(image: Any, which: str) -> NDArray[Any]:
    """One image as (height, width, 1 or 3), numbers as they are."""
    if isinstance(image, Image.Image):
        return _from_pillow(image, which)
    array = _array(image, which)
    if array.ndim == 2:
        array = array[:, :, None]
    elif array.ndim == 3 and _is_tensor(image):
        array = array.transpose(1, 2, 0)
    if array.ndim != 3 or array.shape[2] not in (1, 3) or not array.size:
        layout = "(H, W) or (1 or 3, H, W)" if _is_tensor(image) else "(H, W) or (H, W, 1 or 3)"
        raise DataError(
            f"{which} has an image of type {type(image).__name__} and shape "
            f"{np.shape(array) if not _is_tensor(image) else tuple(image.shape)}; "
            f"expected {layout} or a PIL image"
        )
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise DataError(
            f"{which} has pixels that are not finite (NaN or infinity); repair the image or "
            "leave it out"
        )
    return array


def _is_tensor(value: Any) -> bool:
    return hasattr(value, "detach")


def _array(value: Any, which: str) -> NDArray[Any]:
    try:
        return np.asarray(value.detach().cpu() if _is_tensor(value) else value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{which} has a {type(value).__name__} that is no array of numbers: {error}; give "
            "PIL images, uint8 or float32 arrays, and whole numbers as labels"
        ) from None


def _from_pillow(image: Image.Image, which: str) -> NDArray[Any]:
    if image.mode in _GREY_MODES:
        return np.asarray(image.convert("L"))[:, :, None]
    if image.mode in _MODES_WITH_ALPHA or "transparency" in image.info:
        # As serving does: transparent parts are laid on white.
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return np.asarray(Image.alpha_composite(white, image).convert("RGB"))
    if image.mode in _COLOUR_MODES:
        return np.asarray(image.convert("RGB"))
    raise DataError(
        f"{which} is a PIL image of mode {image.mode}; convert it to L (grey) or RGB first"
    )

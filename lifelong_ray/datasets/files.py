"""The sources that lie in files: scikit-learn's digits, .npz, folders, torchvision's sets."""

from __future__ import annotations

import inspect
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lifelong_ray.config import ImageConfig
from lifelong_ray.datasets.cleaning import clean_images, clean_labels, one_label_each
from lifelong_ray.datasets.items import from_torch_dataset
from lifelong_ray.datasets.labelled import DataSource, LabelledImages
from lifelong_ray.feedback import decode_image
from lifelong_ray.types import BadImageError, DataError, Pixels

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_DIGITS_UPSCALED_PX = 16
# No stranger's files: how large they are is their owner's affair.
_OWN_FILES = ImageConfig(max_bytes=1 << 30, max_pixels=1 << 28)


def digits() -> LabelledImages:
    """The 1,797 handwritten digits of scikit-learn (UCI), 8x8, upscaled to 16x16."""
    from sklearn.datasets import load_digits  # noqa: PLC0415 - a second to import, for one source

    bunch: Any = load_digits()
    images = []
    for image in np.asarray(bunch.images):
        small = Image.fromarray((image * (255 / 16)).astype(np.uint8))
        size = (_DIGITS_UPSCALED_PX, _DIGITS_UPSCALED_PX)
        images.append(np.asarray(small.resize(size, Image.Resampling.BILINEAR))[:, :, None])
    return LabelledImages.from_array(np.stack(images), tuple(str(t) for t in bunch.target))


def npz(path: Path) -> DataSource:
    """An .npz with x_train, y_train, x_test and y_test."""
    if not path.exists():
        raise DataError(f"data file {path} does not exist; data.source takes a path to an .npz")
    try:
        # Opened here, since numpy leaves a file open that turns out not to be a zip.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            missing = {"x_train", "y_train", "x_test", "y_test"} - set(arrays.files)
            if missing:
                raise DataError(
                    f"{path} lacks {sorted(missing)}; it holds {arrays.files}, and needs "
                    "x_train, y_train, x_test and y_test"
                )
            parts = []
            for part in ("train", "test"):
                x, y, where = arrays[f"x_{part}"], arrays[f"y_{part}"], f"{path}:{part}"
                images = clean_images(x, where)
                labels = clean_labels(one_label_each(y, len(images), where), where)
                parts.append(LabelledImages.from_array(images, labels))
    except (zipfile.BadZipFile, zlib.error, ValueError, TypeError, OSError, EOFError) as error:
        raise DataError(
            f"{path} is not a readable .npz of plain arrays: {error}; write it with numpy.savez"
        ) from None
    return DataSource(*parts)


def folder(path: Path) -> LabelledImages:
    """A folder with one folder of images per class."""
    if not path.is_dir():
        raise DataError(
            f"data folder {path} does not exist; data.source is digits, torchvision:NAME, "
            "cifar100-50+50, an .npz file, a folder with one folder of images per class, or "
            "package.module:function"
        )
    images: list[Pixels] = []
    labels: list[str] = []
    for class_folder in sorted(p for p in path.iterdir() if p.is_dir()):
        if class_folder.name.startswith("."):
            continue  # an editor's or a notebook's
        for file in sorted(class_folder.iterdir()):
            if file.suffix.lower() in IMAGE_SUFFIXES:
                images.append(image_file(file))
                labels.append(class_folder.name)
    if not images:
        raise DataError(
            f"data folder {path} holds no images; expected one folder per class with files "
            f"ending in {', '.join(IMAGE_SUFFIXES)}"
        )
    return LabelledImages(tuple(images), tuple(labels))


def image_file(file: Path) -> Pixels:
    """The image in a file of one's own, decoded as serving decodes what users send.

    Raises:
        DataError: If the file cannot be read as an image.
    """
    try:
        return decode_image(file.read_bytes(), None, _OWN_FILES)
    except BadImageError as error:
        raise DataError(f"{file} cannot be read as an image: {error}") from None
    except OSError as error:
        raise DataError(f"image file {file} cannot be read: {error.strerror}") from None


def torchvision(name: str, folder: Path) -> DataSource:
    """A torchvision data set that lies under `folder` already."""
    from torchvision import datasets  # noqa: PLC0415 - imports torch, which most callers have not

    factory = getattr(datasets, name, None)
    if not isinstance(factory, type):  # A name in lower case is a module.
        raise DataError(
            f"torchvision has no data set {name}; try MNIST, FashionMNIST, CIFAR10 or CIFAR100"
        )
    settings = inspect.signature(factory).parameters
    choices: tuple[dict[str, Any], ...]
    if "train" in settings:
        choices = ({"train": True}, {"train": False})
    else:
        choices = ({"split": "train"}, {"split": "test"})
    parts = []
    for choice in choices:
        try:
            data = factory(root=str(folder), download=False, **choice)
        except (RuntimeError, FileNotFoundError) as error:
            raise DataError(
                f"torchvision:{name} is not under {folder} (data.folder): {error}; "
                "put its files there first, nothing is downloaded"
            ) from None
        except (TypeError, ValueError):
            raise DataError(
                f"torchvision:{name} has no train and test part to load; wrap it in a function "
                "of yours and give data.source as package.module:function"
            ) from None
        parts.append(
            _whole(data, f"torchvision:{name}")
            or from_torch_dataset(data, name=f"torchvision:{name}")
        )
    return DataSource(*parts)


def _whole(data: Any, where: str) -> LabelledImages | None:
    """The array inside a torchvision set that has one, instead of image after image."""
    x = np.asarray(getattr(data, "data", None))
    y = np.asarray(getattr(data, "targets", None))
    is_grey, is_colour = x.ndim == 3, x.ndim == 4 and x.shape[3:] == (3,)
    if x.dtype != np.uint8 or not (is_grey or is_colour) or y.shape != (len(x),):
        return None
    names = getattr(data, "classes", None)
    labels = tuple(str(names[target] if names else target) for target in y.tolist())
    return LabelledImages.from_array(clean_images(x, where), labels)

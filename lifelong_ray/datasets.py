"""Labelled images from wherever a team keeps them, as plain arrays.

Knows the four kinds of source that ``data.source`` may name. Does not know what
the images are used for. Nothing is ever downloaded.
"""

from __future__ import annotations

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lifelong_ray.config import DataConfig, ImageConfig
from lifelong_ray.feedback import decode_image
from lifelong_ray.types import BadImageError, DataError, Pixels

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_DIGITS_UPSCALED_PX = 16
# No stranger's files: how large they are is their owner's affair.
_OWN_FILES = ImageConfig(max_bytes=1 << 30, max_pixels=1 << 28)


@dataclass(frozen=True)
class LabelledImages:
    """Images with their class names.

    Attributes:
        images: One (height, width, channels) uint8 array per image; sizes may differ.
        labels: Class name of each image.
    """

    images: tuple[Pixels, ...]
    labels: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.images)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes present, in natural order: ``2`` before ``10``."""
        return tuple(sorted(set(self.labels), key=natural_order))

    def of_classes(self, names: tuple[str, ...]) -> LabelledImages:
        """Only the images of `names`."""
        return self.take([i for i, label in enumerate(self.labels) if label in names])

    def take(self, indices: list[int]) -> LabelledImages:
        """The images at `indices`, in that order."""
        return LabelledImages(
            tuple(self.images[i] for i in indices), tuple(self.labels[i] for i in indices)
        )

    def repeated(self, times: int) -> LabelledImages:
        """Every image `times` times."""
        return LabelledImages(self.images * times, self.labels * times)


@dataclass(frozen=True)
class DataSource:
    """A training part and an independent test part."""

    train: LabelledImages
    test: LabelledImages


def load_source(config: DataConfig, seed: int) -> DataSource:
    """Load the source a configuration names.

    A source without a test part of its own gives a fifth of every class to it.
    `config.fraction` thins out both parts, class by class.

    Raises:
        DataError: If the source does not exist, is empty or is malformed.
    """
    rng = np.random.default_rng(seed)
    name = config.source
    if name == "digits":
        source = _split(_digits(), rng)
    elif name.startswith("torchvision:"):
        source = _torchvision(name.removeprefix("torchvision:"), Path(config.folder))
    elif name.endswith(".npz"):
        source = _npz(Path(name))
    else:
        source = _split(_folder(Path(name)), rng)
    if config.classes:
        unknown = set(config.classes) - set(source.train.class_names)
        if unknown:
            raise DataError(
                f"data.classes names {sorted(unknown)}, which {name} does not have; "
                f"it has {list(source.train.class_names)}"
            )
        source = DataSource(
            source.train.of_classes(config.classes), source.test.of_classes(config.classes)
        )
    if config.fraction < 1:
        source = DataSource(
            _thin(source.train, config.fraction, rng), _thin(source.test, config.fraction, rng)
        )
    if len(source.train.class_names) < 2:
        raise DataError(
            f"{name} has {len(source.train.class_names)} class(es); a classifier needs at least two"
        )
    return source


def _digits() -> LabelledImages:
    """The 1,797 handwritten digits of scikit-learn (UCI), 8x8, upscaled to 16x16."""
    from sklearn.datasets import load_digits  # noqa: PLC0415 - a second to import, for one source

    bunch: Any = load_digits()
    images = []
    for image in np.asarray(bunch.images):
        small = Image.fromarray((image * (255 / 16)).astype(np.uint8))
        size = (_DIGITS_UPSCALED_PX, _DIGITS_UPSCALED_PX)
        images.append(np.asarray(small.resize(size, Image.Resampling.BILINEAR))[:, :, None])
    return LabelledImages(tuple(images), tuple(str(t) for t in bunch.target))


def _npz(path: Path) -> DataSource:
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
            parts = [
                _from_arrays(arrays[f"x_{part}"], arrays[f"y_{part}"], f"{path}:{part}")
                for part in ("train", "test")
            ]
    except (zipfile.BadZipFile, zlib.error, ValueError, TypeError, OSError, EOFError) as error:
        raise DataError(f"{path} is not a readable .npz of plain arrays: {error}") from None
    return DataSource(*parts)


def _from_arrays(x: NDArray[Any], y: NDArray[Any], where: str) -> LabelledImages:
    if x.ndim == 3:
        x = x[:, :, :, None]
    if x.ndim != 4 or x.shape[3] not in (1, 3):
        raise DataError(f"{where} has shape {x.shape}; expected (N, H, W) or (N, H, W, 1 or 3)")
    if len(x) != len(y) or y.ndim != 1:
        raise DataError(f"{where} has {len(x)} images and labels of shape {y.shape}")
    if len(x) == 0:
        raise DataError(f"{where} holds no images")
    if x.dtype.kind not in "biuf":
        raise DataError(f"{where} has images of {x.dtype}; expected numbers")
    if x.dtype != np.uint8:
        x = np.asarray(x, dtype=np.float64)
        if not np.isfinite(x).all():
            raise DataError(f"{where} holds values that are not finite")
        if x.min() < 0 or x.max() > 255:
            raise DataError(f"{where} lies in [{x.min()}, {x.max()}]; expected 0 to 255 or 0 to 1")
        # Rounded, since k / 255 * 255 may come out just below k.
        x = np.rint(x * 255 if x.max() <= 1 else x).astype(np.uint8)
    return LabelledImages(tuple(x), _class_names(y, where))


def _class_names(y: NDArray[Any], where: str) -> tuple[str, ...]:
    """Labels as text; numbers must be whole, text must not be empty."""
    if y.dtype.kind not in "biufSU":
        raise DataError(f"{where} has labels of {y.dtype}; expected whole numbers or text")
    if y.dtype.kind == "S":
        y = np.char.decode(y, "utf-8")
    elif y.dtype.kind == "f":
        if not np.isfinite(y).all() or (y != np.rint(y)).any():
            raise DataError(f"{where} has labels that are not whole numbers; give each its class")
        y = y.astype(np.int64)
    names = tuple(str(label) for label in y.tolist())
    if not all(name.strip() for name in names):
        raise DataError(f"{where} has an empty label; give each image its class")
    return names


def _folder(path: Path) -> LabelledImages:
    if not path.is_dir():
        raise DataError(
            f"data folder {path} does not exist; data.source is digits, torchvision:NAME, "
            "an .npz file, or a folder with one folder of images per class"
        )
    images: list[Pixels] = []
    labels: list[str] = []
    for class_folder in sorted(p for p in path.iterdir() if p.is_dir()):
        if class_folder.name.startswith("."):
            continue  # an editor's or a notebook's
        for file in sorted(class_folder.iterdir()):
            if file.suffix.lower() in IMAGE_SUFFIXES:
                try:
                    # As serving decodes what users send: upright, grey where it is grey.
                    pixels = decode_image(file.read_bytes(), None, _OWN_FILES)
                except BadImageError as error:
                    raise DataError(f"{file} cannot be read as an image: {error}") from None
                images.append(pixels)
                labels.append(class_folder.name)
    if not images:
        raise DataError(
            f"data folder {path} holds no images; expected one folder per class with files "
            f"ending in {', '.join(IMAGE_SUFFIXES)}"
        )
    return LabelledImages(tuple(images), tuple(labels))


def _torchvision(name: str, folder: Path) -> DataSource:
    from torchvision import datasets  # noqa: PLC0415 - imports torch, which most callers have not

    factory = getattr(datasets, name, None)
    if factory is None:
        raise DataError(f"torchvision has no data set {name}; try MNIST, FashionMNIST or CIFAR10")
    parts = []
    for is_train in (True, False):
        try:
            data = factory(root=str(folder), train=is_train, download=False)
        except (RuntimeError, FileNotFoundError) as error:
            raise DataError(
                f"torchvision:{name} is not under {folder} (data.folder): {error}; "
                "put its files there first, nothing is downloaded"
            ) from None
        except TypeError:
            raise DataError(f"torchvision:{name} has no train and test part to load") from None
        names = getattr(data, "classes", None)
        images, labels = [], []
        for image, target in data:
            pixels = np.asarray(image)
            images.append(pixels[:, :, None] if pixels.ndim == 2 else pixels)
            labels.append(str(names[target]) if names else str(target))
        parts.append(LabelledImages(tuple(images), tuple(labels)))
    return DataSource(*parts)


def _split(images: LabelledImages, rng: np.random.Generator) -> DataSource:
    """Give a fifth of every class, at least one image, to the test part."""
    train: list[int] = []
    test: list[int] = []
    for name in images.class_names:
        members = rng.permutation([i for i, label in enumerate(images.labels) if label == name])
        num_test = max(1, len(members) // 5) if len(members) > 1 else 0
        test.extend(members[:num_test].tolist())
        train.extend(members[num_test:].tolist())
    return DataSource(images.take(sorted(train)), images.take(sorted(test)))


def _thin(images: LabelledImages, fraction: float, rng: np.random.Generator) -> LabelledImages:
    """Keep `fraction` of every class, at least two images."""
    kept: list[int] = []
    for name in images.class_names:
        members = rng.permutation([i for i, label in enumerate(images.labels) if label == name])
        kept.extend(members[: max(2, round(fraction * len(members)))].tolist())
    return images.take(sorted(kept))


def natural_order(name: str) -> tuple[int, int, str]:
    """Sort key that puts ``2`` before ``10``."""
    return (0, int(name), name) if name.isdecimal() else (1, 0, name)

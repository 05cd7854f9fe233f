"""The world of the demo: which images exist, and how they come to look different.

Every image has one purpose: base training, traffic, an operator's example, or the
test that the system never sees. After the change an image is seen several times,
each time turned and lit differently. Decided by the seed alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from lifelong_ray.datasets import DataSource, LabelledImages
from lifelong_ray.types import DataError, Pixels

_MIN_CLASSES = 4
_MIN_PER_CLASS = 20
_MAX_TRAIN = 4_000
_MAX_TEST = 600
_TURN_DEGREES = (0.0, 60.0)
_DARKEST = 0.4
_LOOKS_IN_TRAFFIC = 4
_LOOKS_IN_TEST = 3
_OLD_SHARES = {"base": 0.5, "calm": 0.0625, "changed": 0.3125, "later": 0.125}
_NEW_SHARES = {"changed": 0.75, "later": 0.25}


@dataclass(frozen=True)
class World:
    """Images by purpose.

    Attributes:
        old_classes: Known from the beginning.
        new_classes: Appear with the change.
        base: Old classes as they used to look, for base training.
        calm_traffic: Old classes as they used to look.
        changed_traffic: All classes after the change, until the update.
        later_traffic: Other images of all classes after the change, from the update on.
        operator: New classes after the change, to be labelled by an operator.
        test_old: Old classes as they used to look; never sent.
        test_drifted: Old classes after the change; never sent.
        test_new: New classes after the change; never sent.
    """

    old_classes: tuple[str, ...]
    new_classes: tuple[str, ...]
    base: LabelledImages
    calm_traffic: LabelledImages
    changed_traffic: LabelledImages
    later_traffic: LabelledImages
    operator: LabelledImages
    test_old: LabelledImages
    test_drifted: LabelledImages
    test_new: LabelledImages


def make_world(source: DataSource, seed: int, *, num_operator: int) -> World:
    """Split a source into the images of the demo.

    The last fifth of the classes (at least one) is unseen at first. Half of the
    training part of the old classes is for base training; the rest is traffic, before
    the update and after it with other images.

    Args:
        source: Any labelled images of at least four classes.
        seed: Decides every split and every change.
        num_operator: Images of the new classes that the operator labels, in all.

    Raises:
        DataError: If there are too few classes or images.
    """
    rng = np.random.default_rng(seed)
    names = source.train.class_names
    if len(names) < _MIN_CLASSES:
        raise DataError(f"the demo needs at least {_MIN_CLASSES} classes, got {list(names)}")
    num_new = max(1, len(names) // 5)
    old, new = names[:-num_new], names[-num_new:]
    train = _sample(source.train, _MAX_TRAIN, rng)
    test = _sample(source.test, _MAX_TEST, rng)
    parts: dict[str, list[int]] = {part: [] for part in (*_OLD_SHARES, "operator")}
    for name in names:
        members = [i for i, label in enumerate(train.labels) if label == name]
        if len(members) < _MIN_PER_CLASS:
            raise DataError(
                f"class {name} has {len(members)} images; the demo needs {_MIN_PER_CLASS}"
            )
        members = rng.permutation(members).tolist()
        shares = _OLD_SHARES
        if name in new:
            num_labelled = min(max(8, num_operator // num_new), len(members) // 2)
            parts["operator"] += members[:num_labelled]
            members, shares = members[num_labelled:], _NEW_SHARES
        bounds = np.cumsum([0.0, *shares.values()]) * len(members)
        for part, first, last in zip(shares, bounds.round(), bounds.round()[1:], strict=False):
            parts[part] += members[int(first) : int(last)]
    return World(
        old_classes=old,
        new_classes=new,
        base=train.take(parts["base"]),
        calm_traffic=train.take(parts["calm"]),
        changed_traffic=_changed(train.take(parts["changed"]), _LOOKS_IN_TRAFFIC, rng),
        later_traffic=_changed(train.take(parts["later"]), 2 * _LOOKS_IN_TRAFFIC, rng),
        operator=_changed(train.take(parts["operator"]), 1, rng),
        test_old=test.of_classes(old),
        test_drifted=_changed(test.of_classes(old), _LOOKS_IN_TEST, rng),
        test_new=_changed(test.of_classes(new), _LOOKS_IN_TEST, rng),
    )


def _changed(images: LabelledImages, looks: int, rng: np.random.Generator) -> LabelledImages:
    return change(images.repeated(looks), rng)


def change(images: LabelledImages, rng: np.random.Generator) -> LabelledImages:
    """Let every image look as it does after the change."""
    return LabelledImages(tuple(change_image(image, rng) for image in images.images), images.labels)


def change_image(pixels: Pixels, rng: np.random.Generator) -> Pixels:
    """Turn an image by up to 60 degrees, light it from one side, and negate every other one.

    No linear reading of features learned before can follow all three at once, so that
    the backbone itself has to adapt.
    """
    height, width, channels = pixels.shape
    image = Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels)
    turned = image.rotate(float(rng.uniform(*_TURN_DEGREES)), Image.Resampling.BILINEAR)
    values = np.asarray(turned, dtype=np.float32).reshape(height, width, channels)
    if rng.random() < 0.5:
        values = 255 - values
    angle = rng.uniform(0, 2 * np.pi)
    rows, columns = np.meshgrid(
        np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij"
    )
    light = 0.5 + 0.5 * (np.cos(angle) * columns + np.sin(angle) * rows) / np.sqrt(2)
    lit = values * (_DARKEST + (1 - _DARKEST) * light)[:, :, None]
    clipped: Pixels = np.clip(lit, 0, 255).astype(np.uint8)
    return clipped


def _sample(images: LabelledImages, most: int, rng: np.random.Generator) -> LabelledImages:
    """Keep at most `most` images, about equally many of every class."""
    quota = max(1, most // len(images.class_names))
    kept: list[int] = []
    for name in images.class_names:
        members = [i for i, label in enumerate(images.labels) if label == name]
        kept += rng.permutation(members)[:quota].tolist()
    return images.take(sorted(kept))

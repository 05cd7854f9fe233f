"""Which images go where: hold-outs, thinning and the order in which classes arrive."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lifelong_ray.datasets.labelled import DataSource, LabelledImages, as_positions


def hold_out(images: LabelledImages, rng: np.random.Generator) -> DataSource:
    """Give a fifth of every class to the test part; at least one image where it has two."""
    train: list[int] = []
    test: list[int] = []
    for members in _members(images):
        drawn = rng.permutation(members)
        num_test = max(1, len(drawn) // 5) if len(drawn) > 1 else 0
        test.extend(drawn[:num_test].tolist())
        train.extend(drawn[num_test:].tolist())
    return DataSource(images.take(sorted(train)), images.take(sorted(test)))


def thinned(images: LabelledImages, fraction: float, rng: np.random.Generator) -> LabelledImages:
    """Keep `fraction` of every class, at least two images where it has them."""
    kept: list[int] = []
    for members in _members(images):
        drawn = rng.permutation(members)
        kept.extend(drawn[: max(2, round(fraction * len(drawn)))].tolist())
    return images.take(sorted(kept))


def _members(images: LabelledImages) -> list[NDArray[np.int64]]:
    """Positions of the images of every class, classes in natural order."""
    labels = as_positions(images.labels, images.class_names)
    by_class = np.argsort(labels, kind="stable")
    return np.split(by_class, np.cumsum(np.bincount(labels))[:-1]) if len(labels) else []


def class_order(num_classes: int, seed: int) -> tuple[int, ...]:
    """The order in which classes arrive, as the class-incremental literature draws it.

    ``class_order(100, 1993)`` is the order in which most published results on CIFAR-100
    were measured, from iCaRL on (Rebuffi et al. 2017, arXiv:1611.07725).

    >>> class_order(100, 1993)[:5]
    (68, 56, 78, 8, 23)
    """
    # NumPy's old generator, whose stream is frozen: the published order is its.
    return tuple(np.random.RandomState(seed).permutation(num_classes).tolist())

"""What ``data`` of the configuration names, and the parts in which its classes arrive."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lifelong_ray.config import DataConfig
from lifelong_ray.datasets import files
from lifelong_ray.datasets.items import from_function
from lifelong_ray.datasets.labelled import (
    DataSource,
    LabelledImages,
    check_same_size,
    natural_order,
)
from lifelong_ray.datasets.parts import class_order, hold_out, thinned
from lifelong_ray.types import DataError

_log = logging.getLogger(__name__)
_FUNCTION = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
_CIFAR100_IN_PARTS = re.compile(r"cifar100-\d+(\+\d+)+")
_CONTINUUM = "continuum:"
# Class orders are drawn as in the literature, so that results can be laid side by side.
_LITERATURE_SEED = 1993


def load_source(config: DataConfig, seed: int) -> DataSource:
    """Load what a base training starts from.

    That is the whole source, or where it is split by classes its first part. A source without
    a test part of its own gives a fifth of every class to it. `config.fraction` thins out both
    parts, class by class.

    Raises:
        DataError: If the source does not exist, is empty or is malformed.
    """
    return load_parts(config, seed)[0]


def load_parts(config: DataConfig, seed: int) -> tuple[DataSource, ...]:
    """Load the parts in which the classes arrive: the base, then one per update.

    Without a split that is one part, with all classes. ``cifar100-50+50`` is torchvision's
    CIFAR-100 under `config.folder`, split so, in the literature's order of classes.

    Raises:
        DataError: If the source does not exist, is empty or is malformed, or if the split does
            not fit its classes.
    """
    name, sizes, order_seed = config.source, config.split, config.split_seed
    if _CIFAR100_IN_PARTS.fullmatch(name):
        if sizes:
            raise DataError(
                f"data.source {name} says how its classes are split, and data.split is "
                f"{list(sizes)}; leave one out"
            )
        name, _, parts = name.partition("-")
        name, sizes = "torchvision:CIFAR100", tuple(int(size) for size in parts.split("+"))
        order_seed = order_seed or _LITERATURE_SEED
    elif order_seed and not sizes:
        _log.warning("data.split_seed has no effect, since data.split is empty")
    whole = _whole(name, config, seed)
    if not sizes:
        return (whole,)
    names = whole.train.class_names
    if sum(sizes) != len(names) or min(sizes) < 1:
        raise DataError(
            f"the split {list(sizes)} is of {sum(sizes)} classes, and {name} has {len(names)}; "
            "let the numbers of classes add up, or choose classes with data.classes"
        )
    if order_seed:
        names = tuple(names[i] for i in class_order(len(names), order_seed))
    groups = _cut(names, sizes)
    return tuple(
        DataSource(whole.train.of_classes(group), whole.test.of_classes(group)) for group in groups
    )


def comes_in_parts(config: DataConfig) -> bool:
    """Whether the configuration itself says in which parts the classes arrive."""
    return bool(
        config.split
        or _CIFAR100_IN_PARTS.fullmatch(config.source)
        or continuum_function(config.source)
    )


def continuum_function(source: str) -> str | None:
    """The function of ``continuum:package.module:function``; None for any other source."""
    return source.removeprefix(_CONTINUUM) if source.startswith(_CONTINUUM) else None


def _cut(names: tuple[str, ...], sizes: Sequence[int]) -> list[tuple[str, ...]]:
    ends = np.cumsum(sizes).tolist()
    return [names[end - size : end] for size, end in zip(sizes, ends, strict=True)]


def _whole(name: str, config: DataConfig, seed: int) -> DataSource:
    """The source with the classes and the share of images that are wanted."""
    rng = np.random.default_rng(seed)
    read = _read(name, Path(config.folder))
    source = read if isinstance(read, DataSource) else hold_out(read, rng)
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
    names = source.train.class_names
    if len(names) < 2:
        raise DataError(
            f"{name} has {len(names)} class(es); a classifier needs at least two, so add images "
            "of another"
        )
    strange = set(source.test.class_names) - set(names)
    if strange:
        raise DataError(
            f"the test part of {name} has labels outside the classes of its train part: "
            f"{sorted(strange, key=natural_order)[:5]}; add training images of them, or choose "
            "the others with data.classes"
        )
    check_same_size(source, name)
    if config.fraction < 1:
        source = DataSource(
            thinned(source.train, config.fraction, rng), thinned(source.test, config.fraction, rng)
        )
    return source


def _read(name: str, folder: Path) -> DataSource | LabelledImages:
    if continuum_function(name):
        raise DataError(
            f"data.source {name} is a scenario, whose experiences arrive one after the other; "
            "benchmarks/continual.py takes it, and a training takes a function that returns "
            "(train, test) data sets as package.module:function"
        )
    if name == "digits":
        return files.digits()
    if name.startswith("torchvision:"):
        return files.torchvision(name.removeprefix("torchvision:"), folder)
    if name.endswith(".npz"):
        return files.npz(Path(name))
    if _FUNCTION.fullmatch(name) and not Path(name).exists():
        return from_function(name)
    return files.folder(Path(name))

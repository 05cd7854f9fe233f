"""What every way to a new version takes and gives, and what none of them accepts.

Values and checks only. Axes: N examples, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from lifelong_ray.config import ModelConfig
from lifelong_ray.learning.checks import check_all_finite, check_images, check_labels
from lifelong_ray.learning.collective import Alone, Collective
from lifelong_ray.learning.fisher import fit_to_model
from lifelong_ray.learning.learner import Learner
from lifelong_ray.learning.trainer import Clock, EpochReport, OnEpoch
from lifelong_ray.learning.wide import Inputs
from lifelong_ray.types import LearningError

Path = Literal["base", "full", "fast", "slow"]
Labelled = tuple[Tensor, Tensor]
"""uint8 images (N, channels, height, width) and int64 labels (N,)."""

_DAMAGED = "go on from a version whose numbers are whole, or train a base version anew"


@dataclass(frozen=True)
class Run:
    """How a training is carried out; none of it changes what is learned.

    Attributes:
        clock: Gives seconds.
        collective: The workers, all called with the same arguments.
        resume: A checkpoint of this very training; None starts it.
        on_epoch: See `OnEpoch`.
        device: Where the gradients are computed; the result is on the CPU.
    """

    clock: Clock
    collective: Collective = field(default_factory=Alone)
    resume: bytes | None = None
    on_epoch: OnEpoch | None = None
    device: str = "cpu"


@dataclass(frozen=True)
class FitReport:
    """What a path did and what it cost.

    Attributes:
        path: Which one.
        samples_seen: Examples shown in gradient steps, plus one pass over those that the
            analytic sums were taken of.
        train_seconds: Gradient steps (slow, base), or the new examples' sums (fast).
        extra_seconds: All else: Fisher, sums, choice of head, calibration, memory.
        epochs: One report per pass of gradient training; empty for the fast path.
        validation_accuracy: Of the result; None without validation data.
        choices: What was decided on the way, by name: head, ridge, frozen stages and such.
    """

    path: Path
    samples_seen: int
    train_seconds: float
    extra_seconds: float
    epochs: tuple[EpochReport, ...]
    validation_accuracy: float | None
    choices: dict[str, str | float] = field(default_factory=dict)


@dataclass(frozen=True)
class Fit:
    """A new learner and how it came about.

    Attributes:
        learner: The result.
        report: What was done.
        right: Which validation examples it answers rightly, bool (N,); None without any.
        entering: Of the fast path: the new examples where they enter the stages that the slow
            path trains, which need not be computed again; None where nobody needs them.
    """

    learner: Learner
    report: FitReport
    right: Tensor | None = None
    entering: Inputs | None = None


class Stopwatch:
    """Seconds since the last look."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._last_s = clock()

    def lap(self) -> float:
        """Return the seconds since the last call, or since the start."""
        before, self._last_s = self._last_s, self._clock()
        return self._last_s - before


def check_base(
    training: Labelled,
    validation: Labelled | None,
    class_names: Sequence[str],
    config: ModelConfig,
) -> tuple[str, ...]:
    """Return the class names, or refuse examples that cannot give a classifier.

    Raises:
        LearningError: If so.
    """
    names = tuple(class_names)
    _check(training, names, config, "training")
    if validation is not None:
        _check(validation, names, config, "validation")
    if len(names) < 2:
        raise LearningError(
            f"a classifier needs at least two classes, and only {list(names)} are given; "
            "add examples of another class"
        )
    _need_examples(training[1], names, range(len(names)))
    return names


def check_update(
    parent: Learner, training: Labelled, validation: Labelled | None, class_names: Sequence[str]
) -> tuple[str, ...]:
    """Return the class names, or refuse examples that do not fit the parent.

    Raises:
        LearningError: If so.
    """
    names, known = tuple(class_names), parent.class_names
    _check_parent(parent)
    if names[: len(known)] != known:
        raise LearningError(
            f"the update's classes {list(names)} do not start with the parent's {list(known)}; "
            "keep those in order and put new ones at the end"
        )
    _check(training, names, parent.model_config, "new")
    if validation is not None:
        _check(validation, names, parent.model_config, "validation")
    _need_examples(training[1], names, range(len(known), len(names)))
    return names


def check_known(learner: Learner, examples: Labelled) -> None:
    """Refuse examples that the learner cannot have learned.

    Raises:
        LearningError: If so.
    """
    remedy = "only examples of the learner's own classes can be meant"
    _check(examples, learner.class_names, learner.model_config, "learned", remedy)


def _check(
    examples: Labelled,
    names: tuple[str, ...],
    config: ModelConfig,
    what: str,
    remedy: str = "give its class a name first",
) -> None:
    """Refuse examples that cannot be what the caller means."""
    images, labels = examples
    if len(set(names)) != len(names):
        raise LearningError(f"the class names {list(names)} are not distinct; name each class once")
    check_images(images, config, f"{what} images")
    check_labels(labels, len(images), names, f"{what} label", remedy)
    if not len(images):
        raise LearningError(f"there are no {what} examples; at least one is needed")


def _check_parent(parent: Learner) -> None:
    """Refuse a learner whose parts are not of one model, or hold NaN in place of numbers.

    A penalty of NaN would otherwise be noticed only in the middle of the training, or, on the
    fast path, by the version after next.
    """
    model = parent.model
    parts = {
        "class names": len(parent.class_names),
        "analytic sums": parent.sums.num_classes,
        "memory": parent.memory.num_classes,
    }
    for what, num_classes in parts.items():
        if num_classes != model.num_classes:
            raise LearningError(
                f"the parent's {what} are of {num_classes} classes and its model of "
                f"{model.num_classes}; use what was saved with this model"
            )
    if parent.sums.num_features != model.num_random_features:
        raise LearningError(
            f"the parent's analytic sums are over {parent.sums.num_features} random features and "
            f"its model has {model.num_random_features}; use what was saved with this model"
        )
    if not 0 < parent.temperature < math.inf:
        raise LearningError(
            f"the parent's temperature is {parent.temperature}; it divides logits, so it must be "
            f"above 0 and finite: {_DAMAGED}"
        )
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    for what, values in (
        ("weights", weights),
        ("Fisher", fit_to_model(parent.fisher.values, model, "Fisher")),
        ("anchor", fit_to_model(parent.anchor, model, "anchor")),
    ):
        check_all_finite(values, f"parent's {what}", _DAMAGED)


def _need_examples(labels: Tensor, names: tuple[str, ...], classes: range) -> None:
    counts = torch.bincount(labels, minlength=len(names))
    without = [names[c] for c in classes if not counts[c]]
    if without:
        raise LearningError(
            f"there is no training example of class {without[0]}; add some or leave the class out"
        )

"""What a version must prove on the hold-out before it may become a candidate.

Pure numpy over scores: knows nothing of models, files or rollouts. A check without
enough hold-out images is *not judged*, which the report lists; it is never a silent pass,
and the checks that protect what users already have must be judged for a pass.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import BaseModel, ConfigDict

from lifelong_ray.config import GateConfig

_REQUIRED = frozenset(
    {
        "finite_scores",
        "accuracy",
        "classes_kept",
        "retention",
        "retention_within_old",
        "negative_flips",
    }
)


class Check(BaseModel):
    """One comparison of a value with its threshold.

    Attributes:
        name: What was checked.
        value: The measured value; None when there was nothing to measure.
        threshold: The bound it is held against.
        passed: None when there was not enough data to judge.
        reason: One readable sentence.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    value: float | None
    threshold: float
    passed: bool | None
    reason: str


class GateReport(BaseModel):
    """All checks of one version.

    Attributes:
        passed: No check failed, and every check that protects users was judged.
        checks: In the order they were made.
        num_examples: Hold-out images the checks rest on.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    passed: bool
    checks: tuple[Check, ...]
    num_examples: int

    @property
    def not_judged(self) -> tuple[str, ...]:
        """Names of the checks that lacked data."""
        return tuple(check.name for check in self.checks if check.passed is None)

    @property
    def reason(self) -> str:
        """Why it passed or not, in one line."""
        if self.passed:
            return "; ".join(
                ["passed"] + [check.reason for check in self.checks if check.passed is None]
            )
        return "; ".join(check.reason for check in self.checks if not _allows(check))


def refused(name: str, reason: str) -> GateReport:
    """The report on a version that could not even be asked.

    Args:
        name: What it lacks.
        reason: One readable sentence.
    """
    check = Check(name=name, value=0.0, threshold=1.0, passed=False, reason=reason)
    return GateReport(passed=False, checks=(check,), num_examples=0)


def judge_base(
    labels: ArrayLike, scores_NC: ArrayLike, classes: Sequence[str], config: GateConfig
) -> GateReport:
    """Judge a version that has no parent.

    Args:
        labels: Shape (N,): index into `classes` of each hold-out image's true class.
        scores_NC: Scores of each image, one column per class.
        classes: Names of the columns.
        config: Thresholds.

    Raises:
        ValueError: If the shapes or labels do not fit.
    """
    truth = _labels(labels, len(classes))
    scores = _scores(scores_NC, len(truth), classes, "candidate")
    right = _right(scores, truth)
    return _report(
        [
            _finite(scores),
            _accuracy("accuracy", right, config.min_base_accuracy, config),
            _floor(right, truth, classes, config),
        ],
        len(truth),
    )


def judge_update(
    labels: ArrayLike,
    parent_scores_NP: ArrayLike,
    candidate_scores_NC: ArrayLike,
    parent_classes: Sequence[str],
    candidate_classes: Sequence[str],
    config: GateConfig,
) -> GateReport:
    """Judge an update against what its parent knew, on the same hold-out images.

    Old classes are the parent's, new ones only the candidate's.

    Args:
        labels: Shape (N,): index into `candidate_classes` of each image's true class.
        parent_scores_NP: The parent's scores, one column per class of the parent.
        candidate_scores_NC: The candidate's scores of the same images.
        parent_classes: Names of the parent's columns.
        candidate_classes: Names of the candidate's columns.
        config: Thresholds.

    Raises:
        ValueError: If the shapes or labels do not fit.
    """
    truth = _labels(labels, len(candidate_classes))
    parent_scores = _scores(parent_scores_NP, len(truth), parent_classes, "parent")
    scores = _scores(candidate_scores_NC, len(truth), candidate_classes, "candidate")

    parent_column = {name: column for column, name in enumerate(parent_classes)}
    to_parent = np.array([parent_column.get(name, -1) for name in candidate_classes], dtype=int)
    is_old = to_parent[truth] >= 0
    old_truth = truth[is_old]
    right = _right(scores, truth)
    parent_right = _right(parent_scores[is_old], to_parent[old_truth])
    only_old = np.where(to_parent >= 0, scores[is_old], -np.inf)
    right_within_old = (only_old.argmax(axis=1) == old_truth) & _finite_rows(scores[is_old])

    checks = [
        _finite(scores),
        _classes_kept(parent_classes, candidate_classes),
        _retention("retention", right[is_old], parent_right, config.min_retention, config),
        _retention(
            "retention_within_old",
            right_within_old,
            parent_right,
            config.min_retention_within_old,
            config,
        ),
        _flips(parent_right & ~right[is_old], config),
        _floor(right, truth, candidate_classes, config),
    ]
    if (to_parent < 0).any():
        checks.append(_accuracy("new_accuracy", right[~is_old], config.min_new_accuracy, config))
    return _report(checks, len(truth))


def _labels(labels: ArrayLike, num_classes: int) -> NDArray[np.int64]:
    truth = np.asarray(labels)
    if truth.size == 0:
        return np.zeros(0, dtype=np.int64)
    if truth.ndim != 1 or not np.issubdtype(truth.dtype, np.integer):
        raise ValueError(
            f"labels have shape {truth.shape} and type {truth.dtype}; "
            "pass one integer class index per image"
        )
    if truth.min() < 0 or truth.max() >= num_classes:
        raise ValueError(
            f"labels run from {truth.min()} to {truth.max()} but there are {num_classes} classes; "
            "leave out images of classes that the candidate does not know"
        )
    return truth.astype(np.int64)


def _scores(
    scores: ArrayLike, num_images: int, classes: Sequence[str], whose: str
) -> NDArray[np.float64]:
    array = np.asarray(scores, dtype=np.float64)
    expected = (num_images, len(classes))
    if array.shape != expected:
        raise ValueError(
            f"{whose} scores have shape {array.shape} but {expected[0]} labels and "
            f"{expected[1]} classes need {expected}; score the same hold-out with that version"
        )
    if len(set(classes)) != len(classes) or not classes:
        raise ValueError(f"{whose} classes must be distinct names, at least one; got {classes}")
    return array


def _right(scores: NDArray[np.float64], truth: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether the best class is the true one; scores that are not finite are never right."""
    best = np.asarray(scores.argmax(axis=1), dtype=np.int64)
    return np.asarray((best == truth) & _finite_rows(scores), dtype=np.bool_)


def _finite_rows(scores: NDArray[np.float64]) -> NDArray[np.bool_]:
    return np.asarray(np.isfinite(scores).all(axis=1), dtype=np.bool_)


def _finite(scores: NDArray[np.float64]) -> Check:
    finite = _finite_rows(scores)
    return _at_least("finite_scores", float(finite.mean()) if len(finite) else 1.0, 1.0)


def _classes_kept(parent_classes: Sequence[str], candidate_classes: Sequence[str]) -> Check:
    lost = [name for name in parent_classes if name not in set(candidate_classes)]
    share = 1 - len(lost) / len(parent_classes)
    note = f": {', '.join(lost)} missing" if lost else ""
    return _at_least("classes_kept", share, 1.0, note)


def _accuracy(name: str, right: NDArray[np.bool_], threshold: float, config: GateConfig) -> Check:
    if len(right) < config.min_holdout_per_class:
        return _unjudged(name, threshold, len(right), config)
    return _at_least(name, float(right.mean()), threshold)


def _retention(
    name: str,
    right: NDArray[np.bool_],
    parent_right: NDArray[np.bool_],
    threshold: float,
    config: GateConfig,
) -> Check:
    if len(parent_right) < config.min_holdout_per_class:
        return _unjudged(name, threshold, len(parent_right), config)
    if not parent_right.any():
        return Check(
            name=name,
            value=None,
            threshold=threshold,
            passed=True,
            reason=f"{name}: nothing to lose, the parent has none of {len(parent_right)} right",
        )
    note = f": {right.sum()} right after, {parent_right.sum()} before, of {len(right)}"
    return _at_least(name, float(right.sum() / parent_right.sum()), threshold, note)


def _flips(flips: NDArray[np.bool_], config: GateConfig) -> Check:
    threshold = config.max_negative_flips
    if len(flips) < config.min_holdout_per_class:
        return _unjudged("negative_flips", threshold, len(flips), config)
    share = float(flips.mean())
    passed = share <= threshold
    return Check(
        name="negative_flips",
        value=share,
        threshold=threshold,
        passed=passed,
        reason=f"negative_flips {share:.3f} {'within' if passed else 'above'} {threshold:.3f}",
    )


def _floor(
    right: NDArray[np.bool_],
    truth: NDArray[np.int64],
    classes: Sequence[str],
    config: GateConfig,
) -> Check:
    """The worst class that has enough hold-out images, against the floor."""
    num_images = np.bincount(truth, minlength=len(classes))
    num_right = np.bincount(truth[right], minlength=len(classes))
    judged = num_images >= config.min_holdout_per_class
    thin = [name for name, enough in zip(classes, judged, strict=True) if not enough]
    if not judged.any():
        return _unjudged("class_floor", config.min_class_accuracy, int(num_images.max()), config)
    accuracy = np.where(judged, num_right / np.maximum(num_images, 1), np.inf)
    worst = int(accuracy.argmin())
    note = f" (class {classes[worst]})"
    if thin:
        note += f"; too few images to judge {', '.join(thin)}"
    return _at_least("class_floor", float(accuracy[worst]), config.min_class_accuracy, note)


def _at_least(name: str, value: float, threshold: float, note: str = "") -> Check:
    passed = value >= threshold
    return Check(
        name=name,
        value=value,
        threshold=threshold,
        passed=passed,
        reason=f"{name} {value:.3f} {'reaches' if passed else 'below'} {threshold:.3f}{note}",
    )


def _unjudged(name: str, threshold: float, num_images: int, config: GateConfig) -> Check:
    return Check(
        name=name,
        value=None,
        threshold=threshold,
        passed=None,
        reason=f"{name} not judged: {num_images} of {config.min_holdout_per_class} images",
    )


def _allows(check: Check) -> bool:
    return bool(check.passed) if check.name in _REQUIRED else check.passed is not False


def _report(checks: Sequence[Check], num_examples: int) -> GateReport:
    return GateReport(
        passed=all(_allows(check) for check in checks),
        checks=tuple(checks),
        num_examples=num_examples,
    )

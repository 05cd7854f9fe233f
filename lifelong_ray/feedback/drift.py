"""Whether the traffic has changed, from the model's own answers.

Two-sample tests on a classifier's outputs notice a shift earlier than tests on pixels do.
Knows scores only: no labels, no log, no clock.

Letters: N reference rows, M recent rows, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from lifelong_ray.config import DriftConfig

_MIN_ROWS = 10


@dataclass(frozen=True)
class DriftReport:
    """What the test says.

    Attributes:
        drifted: Significant and large enough to matter.
        p_value: Of the most changed class, times the number of classes, at most 1.
        effect: Largest Kolmogorov-Smirnov distance of any class, in [0, 1].
        worst_class: Column with that distance; -1 when nothing could be tested.
        num_reference: Reference rows used.
        num_recent: Recent rows used.
    """

    drifted: bool
    p_value: float
    effect: float
    worst_class: int
    num_reference: int
    num_recent: int


def detect_drift(
    reference_scores: NDArray[np.floating], recent_scores: NDArray[np.floating], config: DriftConfig
) -> DriftReport:
    """Compare every class's scores now with those of the reference period.

    Fewer than ten rows on either side cannot be tested, and are not drift. Only the latest
    `config.window_rows` of the recent rows are used.

    Args:
        reference_scores: Shape (N, C).
        recent_scores: Shape (M, C), oldest first, same classes in the same order.
        config: Window, false alarm share, and the least effect that counts.

    Source: Rabanser et al. 2019, arXiv:1810.11953 (univariate tests on softmax outputs with
    Bonferroni correction).
    """
    if reference_scores.ndim != 2 or recent_scores.ndim != 2:
        raise ValueError(
            f"scores have shapes {reference_scores.shape} and {recent_scores.shape}; "
            "(rows, classes) is wanted"
        )
    if reference_scores.shape[1] != recent_scores.shape[1]:
        raise ValueError(
            f"the reference has {reference_scores.shape[1]} classes, the recent rows "
            f"{recent_scores.shape[1]}; compare the scores of the same classes"
        )
    recent = recent_scores[-config.window_rows :]
    num_reference, num_recent = len(reference_scores), len(recent)
    num_classes = recent.shape[1]
    if min(num_reference, num_recent) < _MIN_ROWS or num_classes == 0:
        return DriftReport(False, 1.0, 0.0, -1, num_reference, num_recent)
    tests = [
        stats.ks_2samp(reference_scores[:, c], recent[:, c], method="asymp")
        for c in range(num_classes)
    ]
    worst = max(range(num_classes), key=lambda c: float(tests[c].statistic))
    effect = float(tests[worst].statistic)
    p_value = min(1.0, float(tests[worst].pvalue) * num_classes)
    drifted = p_value < config.alpha and effect >= config.min_effect
    return DriftReport(drifted, p_value, effect, worst, num_reference, num_recent)

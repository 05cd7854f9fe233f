"""The drift test: few false alarms, and it sees a shift."""

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from lifelong_ray.config import DriftConfig
from lifelong_ray.feedback import detect_drift

CONFIG = DriftConfig(window_rows=300, alpha=0.01, min_effect=0.1)


def scores(rng: np.random.Generator, rows: int, favour: float = 0.0) -> NDArray[np.float64]:
    logits = rng.normal(size=(rows, 4))
    logits[:, 2] += favour
    powers = np.exp(logits)
    shares: NDArray[np.float64] = powers / powers.sum(axis=1, keepdims=True)
    return shares


def test_a_shift_of_one_class_is_found_and_named() -> None:
    rng = np.random.default_rng(0)

    report = detect_drift(scores(rng, 1_000), scores(rng, 400, favour=1.5), CONFIG)

    assert report.drifted
    assert report.worst_class == 2
    assert report.p_value < 1e-6
    assert report.effect > 0.3
    assert (report.num_reference, report.num_recent) == (1_000, 300)


def test_false_alarms_stay_below_their_share() -> None:
    rng = np.random.default_rng(1)
    config = CONFIG.model_copy(update={"min_effect": 0.0, "alpha": 0.05})

    alarms = sum(
        detect_drift(scores(rng, 300), scores(rng, 300), config).drifted for _ in range(200)
    )

    assert alarms <= stats.binom.ppf(0.999, 200, 0.05)


def test_the_statistic_is_scipys_with_bonferroni() -> None:
    rng = np.random.default_rng(2)
    reference, recent = scores(rng, 200), scores(rng, 200, favour=0.4)

    report = detect_drift(reference, recent, CONFIG)

    tests = [stats.ks_2samp(reference[:, c], recent[:, c], method="asymp") for c in range(4)]
    assert report.effect == pytest.approx(max(t.statistic for t in tests))
    assert report.p_value == pytest.approx(min(1.0, 4 * min(t.pvalue for t in tests)))


def test_a_significant_but_tiny_shift_is_not_drift() -> None:
    rng = np.random.default_rng(3)
    config = CONFIG.model_copy(update={"window_rows": 20_000})

    report = detect_drift(scores(rng, 20_000), scores(rng, 20_000, favour=0.1), config)

    assert report.p_value < config.alpha
    assert not report.drifted


def test_too_few_rows_are_not_drift() -> None:
    rng = np.random.default_rng(4)

    report = detect_drift(scores(rng, 100), scores(rng, 9, favour=9.0), CONFIG)

    assert (report.drifted, report.p_value, report.worst_class) == (False, 1.0, -1)


def test_only_the_latest_rows_are_looked_at() -> None:
    rng = np.random.default_rng(5)
    old_shift = np.concatenate([scores(rng, 500, favour=3.0), scores(rng, 300)])

    assert not detect_drift(scores(rng, 1_000), old_shift, CONFIG).drifted


def test_scores_of_other_classes_are_refused() -> None:
    with pytest.raises(ValueError, match="3 classes, the recent rows 4"):
        detect_drift(np.zeros((20, 3)), np.zeros((20, 4)), CONFIG)
    with pytest.raises(ValueError, match=r"\(rows, classes\)"):
        detect_drift(np.zeros(20), np.zeros((20, 4)), CONFIG)

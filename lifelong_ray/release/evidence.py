"""How sure the audit labels make us that the candidate is not worse than stable.

Every labelled request of the audit share that both versions answered gives one paired
difference: +1 when only the candidate was right, -1 when only stable was, 0 otherwise.
Their mean is the candidate's gain in accuracy. This module turns the three counts into
bounds on that mean which hold at every look at once, however often one looks and
whenever one stops. Only the counts matter, so evidence merges over replicas in any order.

It knows nothing of traffic, errors or time, and takes no decision about a rollout.

The method is betting: whoever bets against a false hypothesis grows rich. With
X = (difference + 1) / 2 in [0, 1] and the hypothesis "the mean of X is at most m", a
gambler who stakes the share c of the fortune multiplies it by 1 + c (X / m - 1) each time.
While the hypothesis holds the fortune has no tendency to grow, nor has the mean over
gamblers with different c, so by Ville's inequality it ever reaches 1 / alpha with
probability at most alpha.

Source: Waudby-Smith and Ramdas 2023, "Estimating means of bounded random variables by
betting", arXiv:2010.09686, section 4. We mix over a fixed grid of stakes instead of
tuning one to the past, so that the order of the labels plays no part.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lifelong_ray.types import Comparison, Feedback

STAKES = np.geomspace(0.01, 0.95, 20)
"""Shares of the fortune that the gamblers stake: small ones detect small gains."""

_LEAST_MEAN = 1e-12  # The hypothesis "never right" would divide by zero.


@dataclass(frozen=True)
class Pairs:
    """Counts of paired differences.

    Attributes:
        better: Only the candidate was right.
        same: Both or neither was right.
        worse: Only stable was right.

    >>> Pairs(better=2, same=5) + Pairs(worse=1)
    Pairs(better=2, same=5, worse=1)
    """

    better: int = 0
    same: int = 0
    worse: int = 0

    def __post_init__(self) -> None:
        if min(self.better, self.same, self.worse) < 0:
            raise ValueError(f"counts of pairs cannot be negative; got {self}")

    def __add__(self, other: Pairs) -> Pairs:
        return Pairs(self.better + other.better, self.same + other.same, self.worse + other.worse)

    @property
    def total(self) -> int:
        """Labelled pairs seen."""
        return self.better + self.same + self.worse

    @property
    def difference(self) -> float:
        """Observed gain in accuracy of the candidate, in [-1, 1]; 0 without pairs."""
        return (self.better - self.worse) / self.total if self.total else 0.0


@dataclass(frozen=True)
class Interval:
    """Bounds on the candidate's true gain in accuracy, each in [-1, 1]."""

    low: float
    high: float


@dataclass(frozen=True)
class Verdict:
    """What the labels say about a candidate.

    Attributes:
        decision: ``not_inferior`` allows a promotion, ``inferior`` asks for an abort,
            ``undecided`` for more labels.
        reason: One readable sentence with the numbers.
        pairs: The counts it rests on.
        interval: Confidence sequence of the gain at this look.
        log_e_not_inferior: Log of the evidence against "worse by the margin or more".
        log_e_inferior: Log of the evidence against "at most the margin worse".
    """

    decision: Literal["not_inferior", "inferior", "undecided"]
    reason: str
    pairs: Pairs
    interval: Interval
    log_e_not_inferior: float
    log_e_inferior: float


def log_wealth(
    ups: ArrayLike, sames: ArrayLike, downs: ArrayLike, mean: float
) -> NDArray[np.float64]:
    """Log of the gamblers' mean fortune against "the mean of X is at most `mean`".

    Args:
        ups: Number of X = 1; counts may be arrays of one shape, one entry per look.
        sames: Number of X = 1/2.
        downs: Number of X = 0.
        mean: The hypothesis, in [0, 1].

    Returns:
        Shape of the counts. Falls as `mean` rises.
    """
    mean = max(mean, _LEAST_MEAN)
    exponents = (
        np.multiply.outer(np.asarray(ups, float), np.log1p(STAKES * (1 / mean - 1)))
        + np.multiply.outer(np.asarray(sames, float), np.log1p(STAKES * (0.5 / mean - 1)))
        + np.multiply.outer(np.asarray(downs, float), np.log1p(-STAKES))
    )
    largest = exponents.max(axis=-1)
    spread = np.exp(exponents - largest[..., None]).mean(axis=-1)
    result: NDArray[np.float64] = largest + np.log(spread)
    return result


def log_e_not_inferior(pairs: Pairs, margin: float) -> float:
    """Log evidence against "the candidate is worse by `margin` or more".

    At or above ``log(1 / alpha)``, at any look, it may be called not inferior; a
    candidate that is inferior ever gets there with probability at most alpha.
    """
    return float(log_wealth(pairs.better, pairs.same, pairs.worse, (1 - margin) / 2))


def log_e_inferior(pairs: Pairs, margin: float) -> float:
    """Log evidence against "the candidate is worse by at most `margin`"."""
    return float(log_wealth(pairs.worse, pairs.same, pairs.better, (1 + margin) / 2))


def e_not_inferior(pairs: Pairs, margin: float) -> float:
    """E-value of `log_e_not_inferior`: 1 without data, ``inf`` beyond a float's range.

    >>> e_not_inferior(Pairs(), margin=0.02)
    1.0
    """
    return _exp(log_e_not_inferior(pairs, margin))


def e_inferior(pairs: Pairs, margin: float) -> float:
    """E-value of `log_e_inferior`: 1 without data, ``inf`` beyond a float's range."""
    return _exp(log_e_inferior(pairs, margin))


def confidence_sequence(pairs: Pairs, alpha: float) -> Interval:
    """Bounds that contain the true gain at all looks together with probability 1 - alpha.

    >>> confidence_sequence(Pairs(), alpha=0.05)
    Interval(low=-1.0, high=1.0)
    """
    if not 0 < alpha < 1:
        raise ValueError(f"alpha is {alpha} but must lie between 0 and 1")
    low = _largest_rejected_mean(pairs.better, pairs.same, pairs.worse, alpha / 2)
    high = 1 - _largest_rejected_mean(pairs.worse, pairs.same, pairs.better, alpha / 2)
    return Interval(low=2 * low - 1, high=2 * high - 1)


def judge_evidence(
    pairs: Pairs, *, alpha: float, margin: float, min_labelled_pairs: int
) -> Verdict:
    """Say what the labels prove about the candidate, with the reason.

    Args:
        pairs: All labelled pairs of the rollout so far.
        alpha: Largest share of inferior candidates called not inferior, over all looks.
        margin: Accuracy the candidate may lose.
        min_labelled_pairs: Fewer pairs never allow a promotion.

    >>> judge_evidence(Pairs(1, 10, 1), alpha=0.05, margin=0.02, min_labelled_pairs=50).reason
    '12 of 50 labelled pairs seen'
    """
    needed = math.log(1 / alpha)
    log_promote = log_e_not_inferior(pairs, margin)
    log_abort = log_e_inferior(pairs, margin)
    interval = confidence_sequence(pairs, alpha)
    counts = (
        f"{pairs.total} labelled pairs ({pairs.better} better, {pairs.same} same, "
        f"{pairs.worse} worse), accuracy {_points(pairs.difference)} points, "
        f"{100 * (1 - alpha):g} % interval [{_points(interval.low)}, {_points(interval.high)}]"
    )
    decision: Literal["not_inferior", "inferior", "undecided"] = "undecided"
    if log_abort >= needed:
        decision = "inferior"
        reason = f"worse than stable by more than {100 * margin:g} points: {counts}"
    elif pairs.total < min_labelled_pairs:
        reason = f"{pairs.total} of {min_labelled_pairs} labelled pairs seen"
    elif log_promote >= needed:
        decision = "not_inferior"
        reason = f"not worse than stable by {100 * margin:g} points or more: {counts}"
    else:
        reason = (
            f"undecided within {100 * margin:g} points of stable: {counts}; "
            f"evidence {_exp(log_promote):.3g} of {1 / alpha:g} needed"
        )
    return Verdict(decision, reason, pairs, interval, log_promote, log_abort)


def count_pairs(
    comparisons: Iterable[Comparison], feedback: Iterable[Feedback], rollout_id: str
) -> Pairs:
    """Join both versions' answers with the labels of the audit share.

    The first label of a request counts and later ones never change it, so that a look
    back stays what it was. Duplicate rows count once. A candidate that gave no answer
    (class ``""``) was wrong.

    Args:
        comparisons: Rows of any rollouts; only audited ones of `rollout_id` count.
        feedback: Rows of any kind; only audited votes on requests count.
        rollout_id: The rollout in question.
    """
    labels: dict[str, str] = {}
    votes = (row for row in feedback if row.kind == "feedback" and row.audit)
    for vote in sorted(votes, key=lambda row: (row.at_s, row.feedback_id)):
        labels.setdefault(vote.request_id, vote.label)
    by_request = {
        row.request_id: row
        for row in comparisons
        if row.audit and row.rollout_id == rollout_id and row.request_id in labels
    }
    counts = {1: 0, 0: 0, -1: 0}
    for request_id, row in by_request.items():
        label = labels[request_id]
        counts[int(row.candidate_class == label) - int(row.stable_class == label)] += 1
    return Pairs(better=counts[1], same=counts[0], worse=counts[-1])


def _largest_rejected_mean(ups: int, sames: int, downs: int, alpha: float) -> float:
    """Largest m for which "the mean of X is at most m" is rejected; 0 when none is."""
    needed = math.log(1 / alpha)
    low, high = 0.0, 1.0
    if log_wealth(ups, sames, downs, low) < needed:
        return low
    for _ in range(40):
        middle = (low + high) / 2
        if log_wealth(ups, sames, downs, middle) >= needed:
            low = middle
        else:
            high = middle
    return low


def _exp(log_value: float) -> float:
    return math.exp(log_value) if log_value < 700 else math.inf


def _points(share: float) -> str:
    return f"{100 * share:+.1f}"

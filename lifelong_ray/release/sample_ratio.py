"""Whether requests were divided as the weights say; if not, nothing that was measured is sure.

A candidate that answers 40 of 1,000 requests where 50 were due is not unlucky: something between
the assignment and the count loses some of them, and what is lost is seldom lost at random.

The controller looks four times a second, so that a chi-square test, which holds at one look,
would sooner or later raise a false alarm. Here the bets of `evidence` are made on arms instead of
labels: the predictive probability of the arms that were seen, under a Dirichlet prior around the
weights, over their probability under the weights. By Ville's inequality requests that are split by
weight ever take it to 1 / alpha with probability at most alpha, over all looks together.

Source: Lindon and Malek 2022, "Anytime-valid inference for multinomial count data",
arXiv:2011.03567. We mix over a few concentrations of the prior, so that a large deviation shows
after few requests and a small one after many, and multiply over the weights of a rollout's steps.

Knows nothing of fronts or time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

CONCENTRATIONS = (10.0, 100.0, 1_000.0, 10_000.0)
"""Requests that the prior around the weights counts for: large ones look for small deviations."""

SplitCounts = Mapping[tuple[int, ...], tuple[int, ...]]
"""Requests by arm, for every set of weights in per cent by arm that was in force."""


@dataclass(frozen=True)
class SampleRatio:
    """How the requests were divided among the arms.

    Attributes:
        observed: Requests by arm, over all weights.
        expected: Those due by weight.
        log_e: Log of the evidence against "divided by weight".
    """

    observed: tuple[int, ...]
    expected: tuple[float, ...]
    log_e: float

    def is_off(self, alpha: float) -> bool:
        """Whether it is proven that they were not divided by weight.

        Args:
            alpha: Largest share of sound splits of which this is ever said, over all looks.
        """
        return self.log_e >= math.log(1 / alpha)


def sample_ratio(counts: SplitCounts) -> SampleRatio:
    """Compare requests by arm with the weights they were assigned under.

    Args:
        counts: Of requests that chance alone assigned, each for itself: no header named the
            arm, and no session brings many requests to one arm.

    >>> ratio = sample_ratio({(95, 5): (951, 49)})
    >>> ratio.expected, ratio.is_off(alpha=0.001)
    ((950.0, 50.0), False)
    >>> sample_ratio({(95, 5): (990, 10)}).is_off(alpha=0.001)
    True
    """
    num_arms = max(map(len, counts), default=0)
    observed, expected = [0] * num_arms, [0.0] * num_arms
    for weights, by_arm in counts.items():
        for arm, (weight, count) in enumerate(zip(weights, by_arm, strict=True)):
            observed[arm] += count
            expected[arm] += sum(by_arm) * weight / 100
    log_e = math.fsum(log_e_split(weights, by_arm) for weights, by_arm in counts.items())
    return SampleRatio(tuple(observed), tuple(expected), log_e)


def log_e_split(weights: Sequence[int], by_arm: Sequence[int]) -> float:
    """Log evidence against "every request went to an arm with the probability of its weight".

    Args:
        weights: Per cent by arm.
        by_arm: Requests by arm.

    >>> log_e_split((50, 50), (0, 0))
    0.0
    """
    shares = [weight / sum(weights) for weight in weights]
    if any(count and not share for share, count in zip(shares, by_arm, strict=True)):
        return math.inf  # an arm without weight was given requests
    arms = [(share, count) for share, count in zip(shares, by_arm, strict=True) if share]
    under_weights = sum(count * math.log(share) for share, count in arms)
    logs = [_log_predictive(arms, size) - under_weights for size in CONCENTRATIONS]
    largest = max(logs)
    return largest + math.log(sum(math.exp(value - largest) for value in logs) / len(logs))


def _log_predictive(arms: Sequence[tuple[float, int]], concentration: float) -> float:
    """Log probability of a sequence of arms under a Dirichlet prior of this mean and size."""
    total = sum(count for _, count in arms)
    whole = math.lgamma(concentration) - math.lgamma(concentration + total)
    return whole + sum(
        math.lgamma(concentration * share + count) - math.lgamma(concentration * share)
        for share, count in arms
    )

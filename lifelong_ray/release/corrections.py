"""What users' corrections say about a candidate, where nobody labels an audit share.

A correction belongs to the answer that it corrects, and so to the version that gave it. Of two
versions that are wrong equally often, one that answers the share w of the requests gets the share
w of the corrections, whatever part of the mistakes users bother to correct and however late they
do, as long as they do so alike for both. So every correction is one toss of a coin whose odds are
known under the hypothesis, and the betting of `evidence` applies: at every look at once.

Knows nothing of requests or time, and takes no decision about a rollout.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lifelong_ray.release.evidence import log_wealth


@dataclass(frozen=True)
class Corrections:
    """Corrected answers by version, for each weight that the candidate had.

    Attributes:
        by_weight: Weight in per cent, 1 to 99, to corrected answers of the candidate and of
            stable among the requests that were assigned under it.
    """

    by_weight: Mapping[int, tuple[int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for weight, counts in self.by_weight.items():
            if not 0 < weight < 100 or min(counts) < 0:
                raise ValueError(
                    f"{counts} corrections at a weight of {weight} %; weights lie between 0 and "
                    "100, and counts are not negative"
                )

    @property
    def total(self) -> int:
        """Corrections of either version."""
        return sum(map(sum, self.by_weight.values()))

    @property
    def ratio(self) -> float | None:
        """Corrections per request of the candidate over those of stable; None where unknown.

        Estimated as in stratified tables: weights count by the corrections made under them.

        Source: Mantel and Haenszel 1959.
        """
        above = sum(c * (100 - w) / (c + s) for w, (c, s) in self.by_weight.items() if c + s)
        below = sum(s * w / (c + s) for w, (c, s) in self.by_weight.items() if c + s)
        return above / below if below else None


def log_e_not_corrected_more(corrections: Corrections, limit: float) -> float:
    """Log evidence against "the candidate is corrected at least `limit` times as often".

    At or above ``log(1 / alpha)``, at any look, it may be called not inferior; a candidate that
    is corrected so often ever gets there with probability at most alpha.

    >>> log_e_not_corrected_more(Corrections(), limit=1.2)
    0.0
    """
    return sum(
        float(log_wealth(stable, 0, candidate, 1 - _share(weight, limit)))
        for weight, (candidate, stable) in corrections.by_weight.items()
    )


def log_e_corrected_more(corrections: Corrections, limit: float) -> float:
    """Log evidence against "the candidate is corrected at most `limit` times as often"."""
    return sum(
        float(log_wealth(candidate, 0, stable, _share(weight, limit)))
        for weight, (candidate, stable) in corrections.by_weight.items()
    )


def _share(weight: int, limit: float) -> float:
    """Share of corrections that are the candidate's, if it is corrected `limit` times as often."""
    return weight * limit / (weight * limit + 100 - weight)

"""What users' corrections say about a candidate, where nobody labels an audit share.

A correction belongs to the answer that it corrects, and so to the version that gave it. Of two
versions that are wrong equally often, one that answers the share w of the requests gets the share
w of the corrections, whatever part of the mistakes users bother to correct and however late they
do, as long as they do so alike for both. So every correction is one toss of a coin whose odds are
known under the hypothesis, and the betting of `evidence` applies: at every look at once.

Knows nothing of requests or time, and takes no decision about a rollout.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from lifelong_ray.release.evidence import log_wealth
from lifelong_ray.types import ServedRequest

_LEAST_RATIO = 1e-3  # Bounds beyond this and its inverse are none.


@dataclass(frozen=True)
class Corrections:
    """Corrected answers by version, for each weight that the candidate had.

    Attributes:
        by_weight: Weight in per cent, between 0 and 100, to corrected answers of the candidate
            and of stable among the requests that were assigned under it.
    """

    by_weight: Mapping[float, tuple[int, int]] = field(default_factory=dict)

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

    def __add__(self, other: Corrections) -> Corrections:
        together = dict(self.by_weight)
        for weight, (candidate, stable) in other.by_weight.items():
            mine = together.get(weight, (0, 0))
            together[weight] = mine[0] + candidate, mine[1] + stable
        return Corrections(together)


@dataclass(frozen=True)
class CorrectionVerdict:
    """What corrections say about a candidate.

    Attributes:
        decision: ``not_inferior`` allows a promotion, ``inferior`` asks for an abort,
            ``undecided`` for more corrections.
        reason: One readable sentence with the numbers.
        log_e_not_inferior: Log of the evidence against "corrected too often".
        log_e_inferior: Log of the evidence against "not corrected too often".
    """

    decision: Literal["not_inferior", "inferior", "undecided"]
    reason: str
    log_e_not_inferior: float
    log_e_inferior: float


def judge_corrections(
    corrections: Corrections, *, alpha: float, limit: float, least: int
) -> CorrectionVerdict:
    """Say what corrections prove about the candidate, with the reason.

    Args:
        corrections: All of the rollout so far.
        alpha: Largest share of candidates corrected too often that are called not inferior.
        limit: Corrections per request over stable's that are too many.
        least: Fewer corrections never allow a promotion.

    >>> judge_corrections(Corrections({50: (3, 4)}), alpha=0.05, limit=1.25, least=50).reason
    '7 of 50 corrections seen'
    """
    needed = math.log(1 / alpha)
    good = log_e_not_corrected_more(corrections, limit)
    bad = log_e_corrected_more(corrections, limit)
    ratio = corrections.ratio
    times = "?" if ratio is None else f"{ratio:.2f}"
    told = f"{corrections.total} corrections, {times} times as many per request as of stable"
    if bad >= needed:
        return CorrectionVerdict(
            "inferior", f"corrected more than {limit:g} times as often: {told}", good, bad
        )
    if corrections.total < least:
        return CorrectionVerdict(
            "undecided", f"{corrections.total} of {least} corrections seen", good, bad
        )
    if good >= needed:
        return CorrectionVerdict(
            "not_inferior", f"not corrected {limit:g} times as often or more: {told}", good, bad
        )
    reason = f"undecided about corrections: {told}; {limit:g} times would be too many"
    return CorrectionVerdict("undecided", reason, good, bad)


def count_corrections(
    corrected: Iterable[ServedRequest], weights: Sequence[tuple[float, int]]
) -> Corrections:
    """Sort corrected answers by the weight that the candidate had when they were given.

    Args:
        corrected: Answers that a label contradicts, each once. Those whose version a header chose
            do not count: their odds are not the weight's. Neither do those of sessions: one user
            who corrects twenty answers is one toss, not twenty.
        weights: Unix time from which the candidate had which weight, in order.
    """
    since = [at_s for at_s, _ in weights]
    counts: dict[int, list[int]] = {}
    for request in corrected:
        place = bisect_right(since, request.at_s) - 1
        weight = weights[place][1] if place >= 0 else 0
        if 0 < weight < 100 and not request.chosen and not request.sticky:
            of_candidate = request.variant == "candidate"
            counts.setdefault(weight, [0, 0])[0 if of_candidate else 1] += 1
    return Corrections({weight: (c, s) for weight, (c, s) in counts.items()})


def log_e_not_corrected_more(corrections: Corrections, limit: float) -> float:
    """Log evidence against "the candidate is corrected at least `limit` times as often".

    At or above ``log(1 / alpha)``, at any look, it may be called not inferior; a candidate that
    is corrected so often ever gets there with probability at most alpha.

    >>> log_e_not_corrected_more(Corrections(), limit=1.2)
    0.0
    """
    return math.fsum(
        float(log_wealth(stable, 0, candidate, 1 - _share(weight, limit)))
        for weight, (candidate, stable) in corrections.by_weight.items()
    )


def log_e_corrected_more(corrections: Corrections, limit: float) -> float:
    """Log evidence against "the candidate is corrected at most `limit` times as often"."""
    return math.fsum(
        float(log_wealth(candidate, 0, stable, _share(weight, limit)))
        for weight, (candidate, stable) in corrections.by_weight.items()
    )


def ratio_interval(corrections: Corrections, alpha: float) -> tuple[float, float]:
    """Bounds on corrections per request over stable's that hold at all looks together.

    They miss the truth with probability at most `alpha`. Without corrections: 0 and infinity.

    >>> ratio_interval(Corrections(), alpha=0.05)
    (0.0, inf)
    """
    needed = math.log(2 / alpha)
    low, high = 0.0, math.inf
    if log_e_corrected_more(corrections, _LEAST_RATIO) >= needed:
        low = _last_true(lambda limit: log_e_corrected_more(corrections, limit) >= needed, 1)
    if log_e_not_corrected_more(corrections, 1 / _LEAST_RATIO) >= needed:
        high = _last_true(lambda limit: log_e_not_corrected_more(corrections, limit) >= needed, -1)
    return low, high


def _last_true(holds: Callable[[float], bool], direction: int) -> float:
    """The last ratio, seen from the end where `holds` is true, at which it still is."""
    inside, outside = direction * math.log(_LEAST_RATIO), -direction * math.log(_LEAST_RATIO)
    for _ in range(40):
        middle = (inside + outside) / 2
        if holds(math.exp(middle)):
            inside = middle
        else:
            outside = middle
    return math.exp(inside)


def _share(weight: float, limit: float) -> float:
    """Share of corrections that are the candidate's, if it is corrected `limit` times as often."""
    return weight * limit / (weight * limit + 100 - weight)

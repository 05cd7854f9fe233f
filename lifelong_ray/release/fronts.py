"""What a front tells the controller: which document it follows, what it holds, its counts.

Knows the shape of a latency histogram; knows nothing of rollouts or of how a report travels.
Counts are cumulative since the front started, so a lost report costs nothing.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

LATENCY_BOUNDS_MS: tuple[float, ...] = tuple(0.05 * 1.25**k for k in range(64))
"""Upper bounds of the latency buckets, 0.05 ms to 64 s; one more bucket lies beyond."""

_NO_LATENCIES = (0,) * (len(LATENCY_BOUNDS_MS) + 1)


@dataclass(frozen=True)
class Counter:
    """Counts of one version on one front.

    Attributes:
        requests: Requests the version was asked, shadows included.
        errors: Those it gave no answer to.
        latency_counts: Time inside the model, one count per bucket of
            `LATENCY_BOUNDS_MS` and one beyond; empty means none measured.
    """

    requests: int = 0
    errors: int = 0
    latency_counts: tuple[int, ...] = ()

    def answered(self, model_ms: float) -> Counter:
        """Return the counts with one more answer, which took `model_ms` inside the model."""
        counts = list(self.latency_counts or _NO_LATENCIES)
        counts[bisect_left(LATENCY_BOUNDS_MS, model_ms)] += 1
        return Counter(self.requests + 1, self.errors, tuple(counts))

    def answered_as_before(self) -> Counter:
        """Return the counts with one more answer, which the model was not asked for again."""
        return Counter(self.requests + 1, self.errors, self.latency_counts)

    def failed(self) -> Counter:
        """Return the counts with one more request that got no answer.

        >>> counter = Counter().answered(1.0).failed()
        >>> counter.requests, counter.errors
        (2, 1)
        """
        return Counter(self.requests + 1, self.errors + 1, self.latency_counts)

    def __add__(self, other: Counter) -> Counter:
        return Counter(
            self.requests + other.requests,
            self.errors + other.errors,
            _summed(self.latency_counts, other.latency_counts),
        )


@dataclass(frozen=True)
class Split:
    """What divides requests among versions, and how.

    Attributes:
        trial: Id of the rollout or experiment.
        weights: Per cent of the requests by arm, stable first.
    """

    trial: str
    weights: tuple[int, ...]


@dataclass(frozen=True)
class FrontReport:
    """One heartbeat of one front process.

    Attributes:
        front_id: Unique per process start, so that counts never run backwards.
        at_s: Unix time of the report.
        doc_seq: `seq` of the release document the front follows.
        warm_versions: Versions it can answer with at once.
        counters: Counts by version, cumulative since the process started.
        assigned: Requests by arm that chance alone assigned, each for itself: without a session
            and without a header that names the arm. Counted when they are assigned, whoever
            answers them then; cumulative, for every split of the trial under way.
        requests_by_arm: Images by arm that no header assigned, sessions included; cumulative,
            by the id of the trial under way.
    """

    front_id: str
    at_s: float
    doc_seq: int
    warm_versions: tuple[str, ...]
    counters: Mapping[str, Counter] = field(default_factory=dict)
    assigned: Mapping[Split, tuple[int, ...]] = field(default_factory=dict)
    requests_by_arm: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


def total(reports: Sequence[FrontReport], version: str) -> Counter:
    """Sum one version's counts over fronts."""
    return sum((r.counters.get(version, Counter()) for r in reports), Counter())


def latency_quantile_ms(counts: Sequence[int], share: float) -> float | None:
    """Upper bound of the bucket below which `share` of the latencies lie; None without any.

    >>> counter = Counter().answered(1.0).answered(1.0).answered(40.0)
    >>> round(latency_quantile_ms(counter.latency_counts, 0.5), 2)
    1.14
    """
    needed = share * sum(counts)
    if not needed:
        return None
    seen = 0
    for bucket, count in enumerate(counts):
        seen += count
        if seen >= needed:
            return LATENCY_BOUNDS_MS[min(bucket, len(LATENCY_BOUNDS_MS) - 1)]
    return LATENCY_BOUNDS_MS[-1]


def _summed(first: tuple[int, ...], second: tuple[int, ...]) -> tuple[int, ...]:
    if not first or not second:
        return first or second
    return tuple(a + b for a, b in zip(first, second, strict=True))

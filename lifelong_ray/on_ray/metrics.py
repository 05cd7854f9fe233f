"""Prometheus metrics, through Ray: base units, ``_total`` suffixes, bounded labels."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter as Tally

from ray.util.metrics import Counter

_BOUNDARIES_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
_BUCKETS = (*(f"{bound:g}" for bound in _BOUNDARIES_S), "+Inf")


class FrontMetrics:
    """What one front replica exports.

    Counts here, and tells Ray every now and then: telling it takes longer than counting, and an
    answer should not wait for that. The histogram is one of counters, as Prometheus stores it.
    """

    def __init__(self) -> None:
        labels = ("version", "variant")
        self._requests = Counter(
            "lifelong_predictions_total", "Answered predictions.", tag_keys=(*labels, "cached")
        )
        self._light = Counter(
            "lifelong_light_answers_total",
            "Answers that a version's light model gave, remembered ones included.",
            tag_keys=labels,
        )
        self._buckets = Counter(
            "lifelong_model_duration_seconds_bucket",
            "Answers by time inside the model: those of at most `le` seconds.",
            tag_keys=(*labels, "le"),
        )
        self._seconds = Counter(
            "lifelong_model_duration_seconds_sum", "Time inside the model.", tag_keys=labels
        )
        self._count = Counter(
            "lifelong_model_duration_seconds_count",
            "Answers that the model was asked for.",
            tag_keys=labels,
        )
        self._answers: Tally[tuple[str, str, bool]] = Tally()
        self._light_answers: Tally[tuple[str, str]] = Tally()
        self._by_bucket: Tally[tuple[str, str, int]] = Tally()
        self._model_s: Tally[tuple[str, str]] = Tally()

    def answered(
        self, version: str, variant: str, model_ms: float, *, cached: bool, light: bool
    ) -> None:
        """Count one answer."""
        self._answers[version, variant, cached] += 1
        if light:
            self._light_answers[version, variant] += 1
        if not cached:
            seconds = model_ms / 1_000
            self._by_bucket[version, variant, bisect_left(_BOUNDARIES_S, seconds)] += 1
            self._model_s[version, variant] += seconds  # type: ignore[assignment]  # sums up

    def tell(self) -> None:
        """Give Ray what was counted since the last time."""
        answers, self._answers = self._answers, Tally()
        light_answers, self._light_answers = self._light_answers, Tally()
        by_bucket, self._by_bucket = self._by_bucket, Tally()
        model_s, self._model_s = self._model_s, Tally()
        for (version, variant, cached), number in answers.items():
            tags = {"version": version, "variant": variant, "cached": str(cached).lower()}
            self._requests.inc(number, tags=tags)
        for (version, variant), number in light_answers.items():
            self._light.inc(number, tags={"version": version, "variant": variant})
        for (version, variant), seconds in model_s.items():
            tags = {"version": version, "variant": variant}
            self._seconds.inc(seconds, tags=tags)
            so_far = 0
            for bucket, bound in enumerate(_BUCKETS):
                so_far += by_bucket[version, variant, bucket]
                if so_far:
                    self._buckets.inc(so_far, tags={**tags, "le": bound})
            self._count.inc(so_far, tags=tags)

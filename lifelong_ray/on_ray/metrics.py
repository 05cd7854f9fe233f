"""Prometheus metrics, through Ray: base units, ``_total`` suffixes, bounded labels."""

from __future__ import annotations

from ray.util.metrics import Counter, Histogram

_BOUNDARIES_S = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0]


class FrontMetrics:
    """What one front replica exports."""

    def __init__(self) -> None:
        labels = ("version", "variant")
        self._requests = Counter(
            "lifelong_predictions_total", "Answered predictions.", tag_keys=labels
        )
        self._model_seconds = Histogram(
            "lifelong_model_duration_seconds",
            "Time inside the model.",
            boundaries=_BOUNDARIES_S,
            tag_keys=labels,
        )

    def answered(self, version: str, variant: str, model_ms: float) -> None:
        """Count one answer."""
        tags = {"version": version, "variant": variant}
        self._requests.inc(tags=tags)
        self._model_seconds.observe(model_ms / 1_000, tags=tags)

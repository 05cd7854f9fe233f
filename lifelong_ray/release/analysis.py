"""Metrics of a rollout that are measured again and again, and what they come to.

In Argo Rollouts' words: a measurement is Successful, Failed or Inconclusive by its conditions;
a run of measurements comes to one of these once it has its `count`, or too many bad ones. Pure:
values and times come in, records go out. Where there is nothing to measure nothing is measured,
so that missing data decides nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from lifelong_ray.conditions import Condition
from lifelong_ray.config import Measured, MetricConfig
from lifelong_ray.release.records import Record

Outcome = Literal["Running", "Successful", "Failed", "Inconclusive"]
_KEPT = 20


class Measurement(Record):
    """One look at a metric.

    Attributes:
        at_s: Unix time.
        value: What was measured.
        phase: What it says.
    """

    at_s: float
    value: float
    phase: Outcome


class MetricRun(Record):
    """Looks at one metric so far.

    Attributes:
        successful: How many were good.
        failed: How many were bad.
        inconclusive: How many were neither.
        last: The latest of them, in order.
    """

    successful: int = 0
    failed: int = 0
    inconclusive: int = 0
    last: tuple[Measurement, ...] = ()

    def outcome(self, metric: MetricConfig) -> Outcome:
        """What the looks come to.

        >>> metric = MetricConfig(measure="error_share", successCondition="result < 0.1")
        >>> MetricRun(successful=1).outcome(metric)
        'Successful'
        """
        if self.failed > metric.failureLimit:
            return "Failed"
        if self.inconclusive > metric.inconclusiveLimit:
            return "Inconclusive"
        done = self.successful + self.failed + self.inconclusive >= metric.count
        return "Successful" if done else "Running"


def judged(metric: MetricConfig, value: float) -> Outcome:
    """What one value says.

    With one condition, what does not fulfil it is the opposite; with two, what fulfils neither
    is Inconclusive, and what fulfils both is Failed.
    """
    bad = _holds(metric.failureCondition, value)
    good = _holds(metric.successCondition, value)
    if bad:
        return "Failed"
    if good or good is None:
        return "Successful"
    return "Failed" if bad is None else "Inconclusive"


def measured(
    runs: Sequence[MetricRun],
    metrics: Sequence[MetricConfig],
    values: Mapping[Measured, float | None],
    *,
    began_s: float,
    now_s: float,
) -> tuple[MetricRun, ...]:
    """Return the runs after a look at those metrics that are due.

    Args:
        runs: One per metric; none before the first look. Runs of another number of metrics, as
            after a change of the settings, count for nothing.
        metrics: What is measured.
        values: What there is to measure now; None and missing where there is nothing yet.
        began_s: When the analysis began.
        now_s: Unix time.
    """
    return tuple(
        _looked(run, metric, values.get(metric.measure), began_s, now_s)
        for run, metric in _with_runs(metrics, runs)
    )


def outcome(runs: Sequence[MetricRun], metrics: Sequence[MetricConfig]) -> tuple[Outcome, str]:
    """What an analysis comes to, and why: the worst of its metrics; Running while one is."""
    found = [(run.outcome(metric), metric, run) for run, metric in _with_runs(metrics, runs)]
    for worst in ("Failed", "Inconclusive", "Running"):
        for phase, metric, run in found:
            if phase == worst:
                return phase, _told(phase, metric, run)
    return "Successful", f"{len(metrics)} metric{'s' * (len(metrics) != 1)} successful"


def _with_runs(
    metrics: Sequence[MetricConfig], runs: Sequence[MetricRun]
) -> list[tuple[MetricRun, MetricConfig]]:
    """Each metric with its looks; without any if the metrics are others than those looked at."""
    known = runs if len(runs) == len(metrics) else [MetricRun()] * len(metrics)
    return list(zip(known, metrics, strict=True))


def _looked(
    run: MetricRun, metric: MetricConfig, value: float | None, began_s: float, now_s: float
) -> MetricRun:
    due_s = began_s + metric.initialDelay
    if run.last:
        due_s = run.last[-1].at_s + metric.interval
    if value is None or now_s < due_s or run.outcome(metric) != "Running":
        return run
    phase = judged(metric, value)
    return MetricRun(
        successful=run.successful + (phase == "Successful"),
        failed=run.failed + (phase == "Failed"),
        inconclusive=run.inconclusive + (phase == "Inconclusive"),
        last=(*run.last, Measurement(at_s=now_s, value=value, phase=phase))[-_KEPT:],
    )


def _holds(condition: str, value: float) -> bool | None:
    """Whether a condition is true of a value; None where there is none."""
    return Condition.parse(condition).holds(value) if condition.strip() else None


def _told(phase: Outcome, metric: MetricConfig, run: MetricRun) -> str:
    looks = run.successful + run.failed + run.inconclusive
    if phase == "Running":
        return f"{metric.measure}: {looks} of {metric.count} measurements"
    latest = f"{run.last[-1].value:.4g}" if run.last else "nothing"
    number = run.failed if phase == "Failed" else run.inconclusive
    limit = metric.failureLimit if phase == "Failed" else metric.inconclusiveLimit
    wanted = metric.successCondition or f"not {metric.failureCondition}"
    return (
        f"{metric.measure} is {latest} where {wanted} is wanted: {number} of {looks} measurements "
        f"{phase.lower()}, {limit} allowed"
    )

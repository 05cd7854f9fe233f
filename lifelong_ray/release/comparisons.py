"""What pairs of answers say about two versions, in numbers that an operator reads.

Describes and decides nothing: a promotion rests on `evidence` alone. Knows nothing of files or
time; rows come in, one summary per rollout goes out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from lifelong_ray.types import Comparison, Feedback


@dataclass(frozen=True)
class LabelledPairs:
    """Compared requests with a label, by who was right."""

    both_right: int = 0
    only_candidate: int = 0
    only_stable: int = 0
    neither: int = 0


@dataclass(frozen=True)
class ModelLatency:
    """Time inside one model, milliseconds; None where it was never measured.

    Attributes:
        number: Answers that the model was asked for; those from memory took none.
        median_ms: Half were faster.
        p99_ms: 99 of 100 were faster.
    """

    number: int
    median_ms: float | None
    p99_ms: float | None


@dataclass(frozen=True)
class ComparisonSummary:
    """Both versions' answers to the same requests of one rollout.

    Attributes:
        rollout_id: The rollout.
        stable_version: The version that users saw.
        candidate_version: The version on trial.
        num_comparisons: Requests that both were asked.
        num_unanswered: Those to which the candidate gave no answer.
        agreement: Share of the requests with the same class from both.
        confidence_difference: Mean of the candidate's confidence less stable's, over the
            requests that both answered; None without any.
        confidence_difference_se: Its standard error; None with fewer than two.
        stable_latency: Time inside the stable model.
        candidate_latency: Time inside the candidate's.
        labelled: Requests with a label of any kind. Volunteered ones are mostly about
            mistakes of the version that answered, so that they favour the other.
        audited: Those of the audit share, which is drawn at random: no such bias.
    """

    rollout_id: str
    stable_version: str
    candidate_version: str
    num_comparisons: int
    num_unanswered: int
    agreement: float
    confidence_difference: float | None
    confidence_difference_se: float | None
    stable_latency: ModelLatency
    candidate_latency: ModelLatency
    labelled: LabelledPairs
    audited: LabelledPairs


def summarise_comparisons(
    comparisons: Iterable[Comparison], feedback: Iterable[Feedback]
) -> list[ComparisonSummary]:
    """Summarise pairs of answers, rollout by rollout in the order of their first request.

    Rows of one request count once, and so does the first label of a request.

    Args:
        comparisons: Rows of any rollouts.
        feedback: Rows of any kind; only labels of answered requests count.
    """
    labels: dict[str, str] = {}
    votes = (row for row in feedback if row.kind == "feedback")
    for vote in sorted(votes, key=lambda row: (row.at_s, row.feedback_id)):
        labels.setdefault(vote.request_id, vote.label)
    by_rollout: dict[str, dict[str, Comparison]] = {}
    for row in sorted(comparisons, key=lambda row: row.at_s):
        by_rollout.setdefault(row.rollout_id, {}).setdefault(row.request_id, row)
    return [_summary([*rows.values()], labels) for rows in by_rollout.values()]


def _summary(rows: Sequence[Comparison], labels: dict[str, str]) -> ComparisonSummary:
    answered = [row for row in rows if row.candidate_class]
    differences = np.array([row.candidate_confidence - row.stable_confidence for row in answered])
    number = len(differences)
    return ComparisonSummary(
        rollout_id=rows[0].rollout_id,
        stable_version=rows[0].stable_version,
        candidate_version=rows[0].candidate_version,
        num_comparisons=len(rows),
        num_unanswered=len(rows) - number,
        agreement=sum(row.stable_class == row.candidate_class for row in rows) / len(rows),
        confidence_difference=float(differences.mean()) if number else None,
        confidence_difference_se=(
            float(differences.std(ddof=1)) / math.sqrt(number) if number > 1 else None
        ),
        stable_latency=_latency([row.stable_ms for row in rows]),
        candidate_latency=_latency([row.candidate_ms for row in rows]),
        labelled=_by_who_was_right(rows, labels),
        audited=_by_who_was_right([row for row in rows if row.audit], labels),
    )


def _latency(times_ms: Sequence[float]) -> ModelLatency:
    measured = [time_ms for time_ms in times_ms if time_ms > 0]  # 0: the model was not asked
    if not measured:
        return ModelLatency(0, None, None)
    median_ms, p99_ms = (float(value) for value in np.quantile(measured, (0.5, 0.99)))
    return ModelLatency(len(measured), median_ms, p99_ms)


def _by_who_was_right(rows: Sequence[Comparison], labels: dict[str, str]) -> LabelledPairs:
    counts = {(candidate, stable): 0 for candidate in (False, True) for stable in (False, True)}
    for row in rows:
        label = labels.get(row.request_id)
        if label is not None:
            counts[row.candidate_class == label, row.stable_class == label] += 1
    return LabelledPairs(
        both_right=counts[True, True],
        only_candidate=counts[True, False],
        only_stable=counts[False, True],
        neither=counts[False, False],
    )

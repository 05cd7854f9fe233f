"""Several versions side by side: who gets which, what was seen, and what it comes to.

Records and statistics of an experiment; `experimenting` moves it through the release document.
An experiment measures and never decides: which version is stable is a rollout's business, with
its gate and its paired evidence.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Sequence
from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from lifelong_ray.release.corrections import Corrections, ratio_interval
from lifelong_ray.release.evidence import Interval, Pairs, confidence_sequence
from lifelong_ray.release.fronts import Split
from lifelong_ray.release.records import Record
from lifelong_ray.release.sample_ratio import SampleRatio

Metric = Literal["accuracy", "corrections"]
MAX_ARMS = 8  # A hash of 64 bytes has one word of eight for each.

_FLOOR = 1  # Per cent that an adaptive experiment leaves to every arm, or it would learn no more.
_NUM_DRAWS = 10_000


class Arm(Record):
    """One version of an experiment.

    Attributes:
        version: A registered version.
        weight: Per cent of the requests that it answers.
    """

    version: str
    weight: int = Field(ge=1, le=100)


class ExperimentPlan(Record):
    """What somebody wants to find out.

    Attributes:
        arms: The versions, stable among them, with weights that add up to 100.
        end_s: Unix time at which it ends by itself.
        metric: What an adaptive experiment goes by: accuracy on labels of the audit share, or
            corrections per request. Both are measured in any case.
        adaptive: Whether weights follow what was seen (Thompson sampling).
    """

    arms: tuple[Arm, ...] = Field(min_length=2, max_length=MAX_ARMS)
    end_s: float
    metric: Metric = "accuracy"
    adaptive: bool = False

    @model_validator(mode="after")
    def _is_a_split(self) -> ExperimentPlan:
        versions = [arm.version for arm in self.arms]
        twice = sorted({version for version in versions if versions.count(version) > 1})
        if twice:
            raise ValueError(f"arms name {', '.join(twice)} more than once")
        total = sum(arm.weight for arm in self.arms)
        if total != 100:
            raise ValueError(f"weights of the arms add up to {total}, not to 100")
        return self


class ArmTally(Record):
    """Labels of one arm's answers; the first label of an answer counts.

    Attributes:
        labelled: Answers of the audit share with a label.
        correct: Those that were right.
        corrected: Answers of any kind that their label contradicts.
    """

    labelled: int = Field(0, ge=0)
    correct: int = Field(0, ge=0)
    corrected: int = Field(0, ge=0)


class ArmResult(Record):
    """What was seen of one arm.

    Attributes:
        version: The version.
        requests: Images assigned to it, by session or by chance.
        labelled: Answers of the audit share with a label.
        correct: Those that were right.
        accuracy: Their share; None without any.
        accuracy_low: Bound that holds at every look, with probability 1 - alpha.
        accuracy_high: The upper one.
        corrections: Answers that a label contradicts, audited or not.
        corrections_per_request: Their share of the requests; None without any.
    """

    version: str
    requests: int
    labelled: int
    correct: int
    accuracy: float | None
    accuracy_low: float
    accuracy_high: float
    corrections: int
    corrections_per_request: float | None


class Difference(Record):
    """One arm against stable; each bound holds at every look, with probability 1 - alpha.

    Attributes:
        version: The arm.
        accuracy_difference: Its accuracy less stable's; None unless both have labels.
        accuracy_difference_low: Lower bound.
        accuracy_difference_high: Upper bound.
        correction_ratio: Corrections per request over stable's; None where unknown, and in
            adaptive experiments, whose weights do not stand still.
        correction_ratio_low: Lower bound.
        correction_ratio_high: Upper bound; None is none.
    """

    version: str
    accuracy_difference: float | None
    accuracy_difference_low: float
    accuracy_difference_high: float
    correction_ratio: float | None
    correction_ratio_low: float
    correction_ratio_high: float | None


class ExperimentResult(Record):
    """What an experiment comes to, so far or in the end.

    Attributes:
        at_s: Unix time.
        alpha: Every interval misses the truth, at any look, with at most this probability.
        arms: Each arm, stable first.
        against_stable: The other arms against stable.
        assigned: Requests by arm that chance alone assigned; empty in adaptive experiments.
        assigned_expected: Those due by weight.
        is_split_by_weight: False if the two are proven not to fit; nothing else is then sure.
    """

    at_s: float
    alpha: float
    arms: tuple[ArmResult, ...]
    against_stable: tuple[Difference, ...]
    assigned: tuple[int, ...]
    assigned_expected: tuple[float, ...]
    is_split_by_weight: bool


class Experiment(Record):
    """An experiment under way, or ended.

    Attributes:
        id: Unique; names its record.
        arms: Versions with their weights in force, stable first.
        salt: Decides, with the key, who gets which arm.
        metric: What weights go by if adaptive.
        adaptive: Whether weights follow what was seen.
        started_by: Who asked for it.
        reason: Why.
        started_at_s: Unix time of the start.
        end_s: Unix time of the planned end.
        began_s: Unix time at which the weights came into force; None while arms are loaded.
        requests: Requests by arm for every front that was heard of, as last kept.
        kept_at_s: Unix time at which they, and the result, were kept.
        result: What it comes to so far.
        ended_at_s: Unix time of its end.
        ended_by: Who or what ended it.
        ended_why: Why.
        ended_intent_id: The wish that ended it, or empty.
        message: What it is waiting for.
    """

    id: str
    arms: tuple[Arm, ...]
    salt: str
    metric: Metric
    adaptive: bool
    started_by: str
    reason: str
    started_at_s: float
    end_s: float
    began_s: float | None = None
    requests: dict[str, tuple[int, ...]] = Field(default_factory=dict)
    kept_at_s: float = 0.0
    result: ExperimentResult | None = None
    ended_at_s: float | None = None
    ended_by: str = ""
    ended_why: str = ""
    ended_intent_id: str = ""
    message: str = ""

    @property
    def weights(self) -> tuple[int, ...]:
        """Per cent by arm."""
        return tuple(arm.weight for arm in self.arms)

    @property
    def versions(self) -> tuple[str, ...]:
        """Version by arm."""
        return tuple(arm.version for arm in self.arms)

    @property
    def variants(self) -> tuple[str, ...]:
        """Name by arm: ``stable``, and the version of every other."""
        return ("stable", *self.versions[1:])

    @property
    def split(self) -> Split | None:
        """How requests are divided; None while that may change at any time."""
        return None if self.adaptive else Split(self.id, self.weights)


def choose_arm(salt: str, key: str, weights: Sequence[int]) -> int:
    """Return the arm that a key gets, with the probability of its weight.

    Every arm draws a waiting time from the key, the shorter the larger its weight; the first
    wins. When weights change, a key moves only to an arm whose weight rose relative to that of
    its own: no other way of dividing moves fewer.

    Args:
        salt: Of the experiment.
        key: Who asks.
        weights: By arm, each above 0; at most `MAX_ARMS`.

    Source: weighted rendezvous hashing; Thaler and Ravishankar 1998, with the logarithms of
    Schindelhauer and Schomaker 2005.
    """
    text = f"{salt}\0{key}".encode("utf-8", "surrogatepass")
    digest = hashlib.blake2b(text, digest_size=8 * len(weights), person=b"arm").digest()
    words = struct.unpack(f">{len(weights)}Q", digest)
    waits = [
        -math.log((word + 0.5) / 2**64) / weight
        for word, weight in zip(words, weights, strict=True)
    ]
    return waits.index(min(waits))


def thompson_weights(
    right: Sequence[int], wrong: Sequence[int], rng: np.random.Generator
) -> tuple[int, ...]:
    """Return weights in per cent by how probably each arm is the best.

    Every arm keeps at least 1 %, so that a bad start can be made good.

    Args:
        right: Successes by arm.
        wrong: Failures by arm.
        rng: Draws from the Beta posteriors under a uniform prior.

    Source: Thompson 1933; with weights for whole intervals as in Scott 2010, "A modern Bayesian
    look at the multi-armed bandit".
    """
    num_arms = len(right)
    shape = (_NUM_DRAWS, num_arms)
    draws = rng.beta(1 + np.asarray(right, float), 1 + np.asarray(wrong, float), shape)
    best = np.bincount(draws.argmax(axis=1), minlength=num_arms) / _NUM_DRAWS
    due = best * (100 - _FLOOR * num_arms)
    weights = due.astype(int)
    # Largest remainders: whole per cents that add up.
    missing = 100 - _FLOOR * num_arms - int(weights.sum())
    for arm in np.argsort(weights - due, kind="stable")[:missing]:
        weights[arm] += 1
    return tuple(int(weight) + _FLOOR for weight in weights)


def experiment_result(
    experiment: Experiment,
    tallies: Sequence[ArmTally],
    ratio: SampleRatio,
    *,
    at_s: float,
    alpha: float,
    ratio_alpha: float,
) -> ExperimentResult:
    """Sum up what was seen.

    Args:
        experiment: With the requests of every front.
        tallies: Labels by arm.
        ratio: Of the requests that chance assigned.
        at_s: Unix time.
        alpha: Of every interval.
        ratio_alpha: Of the check that requests are split by weight.
    """
    requests = requests_by_arm(experiment)
    arms = tuple(
        _arm_result(arm.version, number, tally, alpha)
        for arm, number, tally in zip(experiment.arms, requests, tallies, strict=True)
    )
    return ExperimentResult(
        at_s=at_s,
        alpha=alpha,
        arms=arms,
        against_stable=tuple(
            _difference(experiment, tallies, number, alpha) for number in range(1, len(arms))
        ),
        assigned=ratio.observed,
        assigned_expected=ratio.expected,
        is_split_by_weight=not ratio.is_off(ratio_alpha),
    )


def requests_by_arm(experiment: Experiment) -> tuple[int, ...]:
    """Requests assigned to every arm, over all fronts."""
    nothing = (0,) * len(experiment.arms)
    return tuple(map(sum, zip(nothing, *experiment.requests.values(), strict=True)))


def _arm_result(version: str, requests: int, tally: ArmTally, alpha: float) -> ArmResult:
    bounds = _accuracy_interval(tally, alpha)
    return ArmResult(
        version=version,
        requests=requests,
        labelled=tally.labelled,
        correct=tally.correct,
        accuracy=tally.correct / tally.labelled if tally.labelled else None,
        accuracy_low=bounds.low,
        accuracy_high=bounds.high,
        corrections=tally.corrected,
        corrections_per_request=tally.corrected / requests if requests else None,
    )


def _difference(
    experiment: Experiment, tallies: Sequence[ArmTally], number: int, alpha: float
) -> Difference:
    mine, stable = tallies[number], tallies[0]
    # Each side may miss half as often, so that the difference misses as often as asked.
    own, usual = (_accuracy_interval(tally, alpha / 2) for tally in (mine, stable))
    known = mine.labelled and stable.labelled
    corrections = Corrections()
    if not experiment.adaptive:
        weight, of_stable = experiment.arms[number].weight, experiment.arms[0].weight
        share = 100 * weight / (weight + of_stable)
        corrections = Corrections({share: (mine.corrected, stable.corrected)})
    ratio_low, ratio_high = ratio_interval(corrections, alpha)
    return Difference(
        version=experiment.arms[number].version,
        accuracy_difference=(
            mine.correct / mine.labelled - stable.correct / stable.labelled if known else None
        ),
        accuracy_difference_low=own.low - usual.high,
        accuracy_difference_high=own.high - usual.low,
        correction_ratio=corrections.ratio,
        correction_ratio_low=ratio_low,
        correction_ratio_high=ratio_high if math.isfinite(ratio_high) else None,
    )


def _accuracy_interval(tally: ArmTally, alpha: float) -> Interval:
    """Bounds on an arm's accuracy: a pair that is better or worse is an answer right or wrong."""
    pairs = Pairs(better=tally.correct, worse=tally.labelled - tally.correct)
    bounds = confidence_sequence(pairs, alpha)
    return Interval(low=(1 + bounds.low) / 2, high=(1 + bounds.high) / 2)

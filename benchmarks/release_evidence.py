"""How often the evidence of a rollout decides wrongly, and after how many labels it decides.

    python benchmarks/release_evidence.py --streams 2000 --labels 5000 \
        --out benchmarks/results/release_evidence.json

Simulated streams, judged after every label as `judge_evidence` and `judge_corrections` judge a
rollout at every look. A stream ends with its first decision, or undecided with its last label.
The right answer is a promotion while the candidate loses less than the margin.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from common import set_up, write
from numpy.typing import NDArray

from lifelong_ray.config import RolloutConfig
from lifelong_ray.release.evidence import log_wealth

_DISAGREEMENTS = (0.02, 0.05, 0.1, 0.3)
_WEIGHTS = (5, 20, 50)  # of the default steps, each for a third of the corrections


@dataclass(frozen=True)
class Outcomes:
    """What became of the streams of one kind.

    Attributes:
        evidence: ``audit`` labels or ``corrections``.
        truth: How the candidate really is.
        agreement: Share of the requests on which both versions are right or both wrong.
        promoted: Share of streams that promoted the candidate.
        aborted: Share that took it back.
        undecided: Share that came to no decision.
        is_false: Decisions that would be wrong: ``promoted`` or ``aborted``.
        median_labels: Labels, or corrections, after which half of the streams had decided;
            None if fewer did.
    """

    evidence: str
    truth: str
    agreement: float | None
    promoted: float
    aborted: float
    undecided: float
    is_false: str
    median_labels: float | None


def main(
    streams: Annotated[int, typer.Option(help="Of each kind.")] = 2_000,
    labels: Annotated[int, typer.Option(help="In each, at most.")] = 5_000,
    seed: Annotated[int, typer.Option(help="Decides every random choice.")] = 0,
    out: Annotated[Path | None, typer.Option(help="JSON to write.")] = None,
) -> None:
    """Simulate rollouts of known truth under the default settings."""
    config = RolloutConfig()
    found = [*simulate(config, streams=streams, labels=labels, seed=seed)]
    setup = set_up(
        num_streams=streams,
        max_labels=labels,
        seed=seed,
        alpha=config.alpha,
        margin=config.margin,
        min_labelled_pairs=config.min_labelled_pairs,
        max_correction_ratio=config.max_correction_ratio,
        min_corrections=config.min_corrections,
    )
    write(out, {"setup": setup, "outcomes": [asdict(one) for one in found]})
    print(_table(found, setup))


def simulate(config: RolloutConfig, *, streams: int, labels: int, seed: int) -> Iterator[Outcomes]:
    """Yield the outcomes of every kind of stream.

    Args:
        config: Thresholds.
        streams: How many of each kind.
        labels: How many labels or corrections in each.
        seed: Of the random numbers.
    """
    margin = config.margin
    truths = (
        ("equal", 0.0, "aborted"),
        ("better by the margin", margin, "aborted"),
        ("worse by the margin", -margin, "promoted"),
        ("worse by twice the margin", -2 * margin, "promoted"),
    )
    for truth, gain, is_false in truths:
        for differing in _DISAGREEMENTS:
            if differing < abs(gain):
                continue  # no two versions differ so much in accuracy and so little in answers
            rng = np.random.default_rng((seed, round(1_000 * (1 + gain)), round(1_000 * differing)))
            ends = [
                _audit_stream(config, (differing + gain) / 2, (differing - gain) / 2, labels, rng)
                for _ in range(streams)
            ]
            yield _outcomes("audit", truth, 1 - differing, is_false, ends)
    limit = config.max_correction_ratio
    ratios = (
        ("corrected equally often", 1.0, "aborted"),
        ("corrected 0.8 times as often", 0.8, "aborted"),
        (f"corrected {limit:g} times as often", limit, "promoted"),
        (f"corrected {limit**2:.3g} times as often", limit**2, "promoted"),
    )
    for truth, ratio, is_false in ratios:
        rng = np.random.default_rng((seed, round(1_000 * ratio)))
        ends = [_correction_stream(config, ratio, labels, rng) for _ in range(streams)]
        yield _outcomes("corrections", truth, None, is_false, ends)


def _audit_stream(
    config: RolloutConfig, p_better: float, p_worse: float, labels: int, rng: np.random.Generator
) -> tuple[str, float]:
    draw = rng.random(labels)
    better, worse = np.cumsum(draw < p_better), np.cumsum(draw >= 1 - p_worse)
    same = np.arange(1, labels + 1) - better - worse
    good = log_wealth(better, same, worse, (1 - config.margin) / 2)
    bad = log_wealth(worse, same, better, (1 + config.margin) / 2)
    return _first_decision(good, bad, config.alpha, config.min_labelled_pairs)


def _correction_stream(
    config: RolloutConfig, ratio: float, corrections: int, rng: np.random.Generator
) -> tuple[str, float]:
    good, bad = np.zeros(corrections), np.zeros(corrections)
    per_weight = math.ceil(corrections / len(_WEIGHTS))
    for number, weight in enumerate(_WEIGHTS):
        began = number * per_weight
        candidate = np.zeros(corrections, int)
        at = slice(began, min(began + per_weight, corrections))
        candidate[at] = rng.random(at.stop - at.start) < _share(weight, ratio)
        of_candidate = np.cumsum(candidate)
        seen = np.clip(np.arange(1, corrections + 1) - began, 0, at.stop - at.start)
        of_stable = seen - of_candidate
        share = _share(weight, config.max_correction_ratio)
        good += log_wealth(of_stable, 0 * seen, of_candidate, 1 - share)
        bad += log_wealth(of_candidate, 0 * seen, of_stable, share)
    return _first_decision(good, bad, config.alpha, config.min_corrections)


def _share(weight: int, ratio: float) -> float:
    return weight * ratio / (weight * ratio + 100 - weight)


def _first_decision(
    good: NDArray[np.float64], bad: NDArray[np.float64], alpha: float, least: int
) -> tuple[str, float]:
    """What a stream comes to, and after how many labels."""
    needed = math.log(1 / alpha)
    looks = np.arange(1, len(good) + 1)
    promotes = np.flatnonzero((good >= needed) & (looks >= least))
    aborts = np.flatnonzero(bad >= needed)
    promoted = promotes[0] + 1 if len(promotes) else math.inf
    aborted = aborts[0] + 1 if len(aborts) else math.inf
    if aborted <= promoted:
        return ("aborted" if math.isfinite(aborted) else "undecided"), float(aborted)
    return "promoted", float(promoted)


def _outcomes(
    evidence: str,
    truth: str,
    agreement: float | None,
    is_false: str,
    ends: list[tuple[str, float]],
) -> Outcomes:
    shares = {
        kind: sum(end == kind for end, _ in ends) / len(ends)
        for kind in ("promoted", "aborted", "undecided")
    }
    median = float(np.median([after for _, after in ends]))
    return Outcomes(
        evidence,
        truth,
        agreement,
        **shares,
        is_false=is_false,
        median_labels=median if math.isfinite(median) else None,
    )


def _table(found: list[Outcomes], setup: dict[str, Any]) -> str:
    lines = [
        f"Simulated {setup['date']}: {setup['num_streams']:,} streams of at most "
        f"{setup['max_labels']:,} labels each, a look after every label, alpha {setup['alpha']}:",
        "",
        "| evidence | candidate | agreement | promoted | aborted | undecided | median labels |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for one in found:
        agreement = "" if one.agreement is None else f"{one.agreement:.2f}"
        shares = {"promoted": f"{one.promoted:.3f}", "aborted": f"{one.aborted:.3f}"}
        shares[one.is_false] = f"**{shares[one.is_false]}**"
        median = "-" if one.median_labels is None else f"{one.median_labels:,.0f}"
        lines.append(
            f"| {one.evidence} | {one.truth} | {agreement} | {shares['promoted']} | "
            f"{shares['aborted']} | {one.undecided:.3f} | {median} |"
        )
    return "\n".join([*lines, "", "Bold: decisions that are false; each share at most alpha."])


if __name__ == "__main__":
    typer.run(main)

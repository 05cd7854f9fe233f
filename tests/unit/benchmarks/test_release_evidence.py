"""False decisions of the evidence stay within alpha however often one looks."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from lifelong_ray.config import RolloutConfig
from tests.unit.benchmarks.scripts import load

release_evidence = load("release_evidence")

ALPHA = RolloutConfig().alpha


def test_no_kind_of_stream_is_decided_falsely_more_often_than_alpha() -> None:
    found = [*release_evidence.simulate(RolloutConfig(), streams=30, labels=1_000, seed=0)]

    assert {one.truth for one in found} >= {"equal", "worse by the margin"}
    chance = 4 * math.sqrt(ALPHA * (1 - ALPHA) / 30)
    for one in found:
        assert getattr(one, one.is_false) <= ALPHA + chance, one
        assert one.promoted + one.aborted + one.undecided == pytest.approx(1)


def test_the_report_has_the_shares_and_the_median_labels(tmp_path: Path) -> None:
    out = tmp_path / "new" / "evidence.json"

    release_evidence.main(streams=5, labels=400, seed=1, out=out)

    report = json.loads(out.read_text())
    better = [one for one in report["outcomes"] if one["truth"] == "better by the margin"]
    assert report["setup"]["alpha"] == ALPHA
    assert better[0]["median_labels"] < 400
    assert all(one["is_false"] == "aborted" for one in better)


@pytest.mark.proof
def test_over_thousands_of_streams_false_decisions_stay_within_alpha() -> None:
    streams = 4_000

    for one in release_evidence.simulate(RolloutConfig(), streams=streams, labels=5_000, seed=7):
        print(one)
        chance = 3 * math.sqrt(ALPHA * (1 - ALPHA) / streams)
        assert getattr(one, one.is_false) <= ALPHA + chance, one

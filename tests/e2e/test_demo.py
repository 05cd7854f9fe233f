"""The whole loop from the outside, in its short form: less traffic, the same acts."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

LIFELONG = str(Path(sys.executable).parent / "lifelong")
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "out"
    log = out.parent / "printed.txt"
    with log.open("wb") as printed:
        process = subprocess.Popen(
            [LIFELONG, "demo", "--short", "--seed", "3", "--out", str(out)],
            stdout=printed,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    status = None
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = process.wait(timeout=540)
    finally:
        # Its Ray and its client too: a Ray left behind takes the jobs of the tests that follow.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert status == 0, log.read_text(encoding="utf-8", errors="replace")[-8_000:]
    return out


@pytest.fixture(scope="module")
def report(demo: Path) -> dict[str, Any]:
    figures: dict[str, Any] = json.loads((demo / "report.json").read_text(encoding="utf-8"))
    return figures


@pytest.mark.timeout(600)
def test_the_update_is_released_by_itself_and_keeps_what_was_known(report: dict[str, Any]) -> None:
    assert report["base_version"] == "v1"
    assert report["promoted_version"] == "v1.1"
    assert report["retention"] >= 0.95
    assert report["new_class_accuracy"] >= 0.7  # The short form has few examples.
    assert report["drifted_old_class_accuracy_after"] > report["drifted_old_class_accuracy_before"]


def test_no_request_fails_while_versions_change(report: dict[str, Any]) -> None:
    assert report["requests_total"] > 1_000
    assert report["requests_failed"] == 0, report["first_failures"]


def test_a_damaged_candidate_is_refused_by_the_gate_and_aborted_past_it(
    report: dict[str, Any],
) -> None:
    assert report["bad_candidate_gate"] == "refused"
    assert report["bad_candidate_outcome"] == "aborted"


def test_both_paths_and_the_yardstick_are_reported(report: dict[str, Any]) -> None:
    for path in ("fast_path", "slow_path"):
        assert report[path]["samples_seen"] > 0
        assert 0 < report[path]["validation_accuracy"] <= 1
    assert report["incremental_samples_seen"] < 0.3 * report["full_retrain_samples_seen"]
    assert report["incremental_seconds"] < report["full_retrain_seconds"]
    assert sum(report["path_seconds"].values()) == pytest.approx(report["incremental_seconds"])
    assert 0 < report["full_retrain_accuracy"] <= 1
    assert report["base_extra_seconds"] > 0
    assert report["rollback_seconds"] < 10


def test_the_story_is_left_as_pictures_and_audit_records(demo: Path) -> None:
    for name in ("accuracy_over_time.png", "traffic_share.png", "cost.png"):
        assert (demo / name).read_bytes().startswith(PNG)
    changes = [
        json.loads(path.read_text(encoding="utf-8"))["what"]
        for path in sorted((demo / "store" / "audit").iterdir())
    ]
    assert changes[0] == "created"
    assert changes.count("promoted") == 1
    assert changes.count("aborted") == 1
    assert changes.count("rolled_back") == 2

"""What the demo leaves behind, from a story that is made up."""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from lifelong_ray.demo.report import print_table, write_reports
from lifelong_ray.demo.story import Story, aims
from lifelong_ray.demo.traffic import SentRequest

PATH = {"samples_seen": 500}
FIGURES: dict[str, Any] = {
    "base_version": "v1",
    "promoted_version": "v1.1",
    "candidate_version": "v1.1",
    "update_path": "slow",
    "old_class_accuracy_before": 0.98,
    "old_class_accuracy_after": 0.97,
    "drifted_old_class_accuracy_before": 0.5,
    "drifted_old_class_accuracy_after": 0.9,
    "new_class_accuracy": 0.92,
    "all_accuracy_after": 0.93,
    "full_retrain_accuracy": 0.94,
    "full_retrain_seconds": 20.0,
    "full_retrain_seconds_to_update_accuracy": 9.0,
    "full_retrain_samples_seen": 20_000,
    "incremental_seconds": 2.0,
    "path_seconds": {"fast": 0.5, "slow": 1.5},
    "incremental_samples_seen": 1_000,
    "cost_share": 0.1,
    "cost_share_samples": 0.05,
    "retention": 0.99,
    "requests_total": 3_000,
    "requests_failed": 0,
    "bad_candidate_gate": "refused",
    "bad_candidate_outcome": "aborted",
    "rollback_seconds": 0.5,
    "wall_seconds": 150.0,
    "fast_path": PATH,
    "slow_path": PATH,
}


def request(number: int) -> SentRequest:
    late = number >= 100
    return SentRequest(
        at_s=1_700_000_000.0 + number / 10,
        changed=late,
        label="new" if late and number % 5 == 0 else "old",
        answer="old",
        version="v1.1" if late else "v1",
        variant="stable",
        latency_ms=5.0,
        audit=False,
        labelled=False,
        failure="",
    )


@pytest.fixture
def story() -> Story:
    requests = [request(number) for number in range(200)]
    marks = [
        (1_700_000_010.0, "the world changes"),
        (1_700_000_012.0, "a mark whose text is longer than forty characters: in short"),
    ]
    return Story(FIGURES, requests, marks, ("old",))


def assert_pictures(paths: list[Path]) -> None:
    assert [p.name for p in paths] == [
        "report.json",
        "accuracy_over_time.png",
        "traffic_share.png",
        "cost.png",
    ]
    for path in paths[1:]:
        with Image.open(path) as image:
            assert np.asarray(image.convert("L")).std() > 5


def test_a_story_becomes_a_file_of_figures_and_three_pictures(story: Story, tmp_path: Path) -> None:
    paths = write_reports(story, tmp_path)

    assert json.loads(paths[0].read_text()) == FIGURES
    assert_pictures(paths)


def test_a_story_without_a_slow_path_or_new_classes_is_drawn_too(
    story: Story, tmp_path: Path
) -> None:
    only_old = [replace(r, label="old") for r in story.requests]

    paths = write_reports(
        replace(story, figures={**FIGURES, "slow_path": None}, requests=only_old), tmp_path
    )

    assert_pictures(paths)


def test_requests_that_failed_have_no_version_and_are_drawn_too(
    story: Story, tmp_path: Path
) -> None:
    failed = [
        replace(r, version="", answer="", failure="predict 503") if 50 < i < 150 else r
        for i, r in enumerate(story.requests)
    ]

    assert_pictures(write_reports(replace(story, requests=failed), tmp_path))


def test_the_table_shows_each_figure_beside_its_aim() -> None:
    output = io.StringIO()

    print_table(FIGURES, Console(file=output, width=120))

    lines = output.getvalue().splitlines()
    retention = next(line for line in lines if "retention" in line)
    failed = next(line for line in lines if "failed requests" in line)
    assert "0.990" in retention
    assert "≥ 0.95" in retention
    assert "0 of 3,000" in failed
    assert all("✓" in line for line in (retention, failed))


def test_a_missed_aim_is_named() -> None:
    missed = [aim.figure for aim in aims({**FIGURES, "cost_share": 0.21, "requests_failed": 1})]
    met = [aim.met for aim in aims({**FIGURES, "cost_share": 0.21, "requests_failed": 1})]

    assert [f for f, ok in zip(missed, met, strict=True) if not ok] == [
        "cost_share",
        "requests_failed",
    ]

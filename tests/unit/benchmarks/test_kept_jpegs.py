"""Both ways of keeping an image are measured on the same images."""

from __future__ import annotations

import json
from pathlib import Path

from tests.unit.benchmarks.scripts import load

kept_jpegs = load("kept_jpegs")


def test_a_jpeg_takes_fewer_bytes_than_its_pixels_everywhere(tmp_path: Path) -> None:
    out = tmp_path / "out.json"

    kept_jpegs.main(images=6, side=64, quality=75, rounds=1, out=out)

    report = json.loads(out.read_text())
    assert report["setup"]["num_images"] == 6
    for what in ("between_processes_bytes", "log_bytes"):
        found = report["per_image"][what]
        assert 0 < found["jpeg"] < found["pixels"]


def test_no_two_photographs_are_the_same() -> None:
    assert len(set(kept_jpegs.photographs(20, 64, 75))) == 20

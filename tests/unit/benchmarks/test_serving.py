"""What the serving benchmark sends, and what its figures come to in the report."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.unit.benchmarks.scripts import BENCHMARKS, load

servers, serving, report = map(load, ("servers", "serving", "report"))


def figures(requests_per_s: float, p99_ms: float | None) -> dict[str, Any]:
    return {
        "requests_per_s": requests_per_s,
        "p50_ms": p99_ms,
        "p99_ms": p99_ms,
        "errors": 0,
        "error_kinds": [],
        "rounds_requests_per_s": [requests_per_s - 10, requests_per_s + 10],
        "rounds_p99_ms": [p99_ms, p99_ms],
    }


def at_16(requests_per_s: float, p99_ms: float | None, **more: int) -> dict[str, Any]:
    return {"connections": {"16": figures(requests_per_s, p99_ms)}, "repeated": 0, **more}


def case(**found: dict[str, Any]) -> dict[str, Any]:
    alone = {"images_per_s": 250.0, "rounds_images_per_s": [249.0, 251.0]}
    return {"torch": alone, "lifelong_ray": at_16(200, 20.0, not_logged=0), **found}


def write(path: Path, cases: dict[str, Any]) -> None:
    setup = {"date": "today", "cpus": 2, "torch": "2", "connections": [16], "rounds": 2}
    found = {name: serving.ratios(its) for name, its in cases.items()}
    path.write_text(json.dumps({"setup": setup, "cases": cases, "ratios": found}))


# ---------------------------------------------------------------- what is sent


@pytest.mark.parametrize("name", ["tiny-png", "tiny-jpeg"])
def test_no_image_is_sent_twice(name: str) -> None:
    kind = servers.CASES[name]

    sent = servers.bodies(kind, 40)

    opened = [Image.open(io.BytesIO(one)) for one in sent]
    assert len({image.tobytes() for image in opened}) == 40
    assert {(image.format, image.size) for image in opened} == {
        (kind.encoding, (kind.pixels, kind.pixels))
    }


def test_requests_beyond_those_that_were_made_are_counted_as_repeated() -> None:
    once = serving.Once([b"a", b"b"])

    given = [next(once) for _ in range(5)]

    assert given == [b"a", b"b", b"a", b"b", b"a"]
    assert once.num_repeated == 3


# ---------------------------------------------------------------- what it comes to


def test_ratios_are_ours_over_each_other_server() -> None:
    found = serving.ratios(
        case(
            ray=at_16(100, 40.0),
            litserve={"skipped": "no environment"},
            lifelong_ray_bare=at_16(250, 10.0),
        )
    )

    assert found == {
        "16": {
            "requests_over_ray": 2.0,
            "p99_over_ray": 0.5,
            "account_share": pytest.approx(0.2),
            "account_share_lowest": pytest.approx(1 - 210 / 260),
            "account_share_highest": pytest.approx(1 - 190 / 240),
            "share_of_torch": 0.8,
        }
    }


def test_a_server_that_answered_nothing_has_no_ratio() -> None:
    found = serving.ratios(case(ray=at_16(0, None)))

    assert found["16"]["requests_over_ray"] is None
    assert found["16"]["p99_over_ray"] is None


def test_the_report_says_which_aims_were_missed_and_draws_the_rest(tmp_path: Path) -> None:
    write(
        tmp_path / "serving.json",
        {
            "tiny-png": case(ray=at_16(100, 40.0), lifelong_ray_bare=at_16(250, 10.0)),
            "resnet18-png": case(
                lifelong_ray=at_16(200, 20.0, not_logged=7), bentoml={"skipped": "not installed"}
            ),
        },
    )

    report.main(results=tmp_path, docs=tmp_path)

    text = (tmp_path / "benchmarks.md").read_text()
    assert "| Ray Serve | 16 | 100 (90-110) | 40.0 | 40.0 (40.0-40.0) | 0 |" in text
    assert "| tiny-png | 16 | 2.00 / 0.50 | 20 (19 to 21) | - |" in text
    assert (
        "at most 10 % of the requests per second: missed in 1 of 1: tiny-png at 16 (20 %)" in text
    )
    assert "missed in 1 of 1: resnet18-png at 16 (80 %)" in text
    assert "no room for 7 predictions" in text
    assert "Skipped: BentoML: not installed." in text
    with Image.open(tmp_path / "images" / "serving.png") as picture:
        assert picture.size[0] > 1_000


def test_the_committed_results_all_have_their_section(tmp_path: Path) -> None:
    report.main(results=BENCHMARKS / "results", docs=tmp_path)

    text = (tmp_path / "benchmarks.md").read_text()
    for title in ("Releases under load", "Serving precision", "A light model", "Images in the log"):
        assert f"## {title}" in text


def test_every_way_to_keep_images_gives_them_back_and_is_measured(tmp_path: Path) -> None:
    image_log = load("image_log")
    out = tmp_path / "image_log.json"

    image_log.main(data=["digits"], num_images=20, rounds=2, out=out)

    ways = json.loads(out.read_text())["data"]["digits"]["ways"]
    assert set(ways) == {"rows", "png", "plain"}
    assert all(its["bytes_per_image"] > 0 for its in ways.values())

"""The client process of the demo: its log and its pools."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np

from lifelong_ray.datasets import LabelledImages
from lifelong_ray.demo.traffic import SentRequest, read_log, save_pools
from lifelong_ray.feedback import decode_png

SENT = SentRequest(
    at_s=1.0,
    changed=False,
    label="a",
    answer="b",
    version="v1",
    variant="stable",
    latency_ms=2.5,
    audit=True,
    labelled=True,
    failure="",
)


def test_a_half_written_line_is_left_out(tmp_path: Path) -> None:
    line = json.dumps(asdict(SENT))
    (tmp_path / "log").write_text(f"{line}\n{line}\n{line[: len(line) // 2]}")

    assert read_log(tmp_path / "log") == [SENT, SENT]


def test_an_empty_log_has_no_requests(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("")

    assert read_log(tmp_path / "log") == []


def test_pools_are_saved_with_their_labels(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 1), np.uint8)
    names = ("calm", "changed", "later")

    save_pools(
        tmp_path / "pools",
        *(LabelledImages((image,), (name,)) for image, name in zip(images, names, strict=True)),
    )

    pools = json.loads((tmp_path / "pools").read_text())
    assert {name: label for name, [(_, label)] in pools.items()} == {n: n for n in names}
    for name, expected in zip(names, images, strict=True):
        np.testing.assert_array_equal(decode_png(bytes.fromhex(pools[name][0][0])), expected)

"""Acknowledged feedback survives kill -9 and a full disk; damaged files cost only themselves.

SIGKILL is not a power cut: what the kernel holds survives it. The syncs that a power cut needs
are made, but not proven here.
"""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

import numpy as np

from lifelong_ray.feedback import read_feedback, read_images, read_predictions, take_snapshot
from lifelong_ray.storage import LocalStore

WRITER = """
import sys, threading, time
import numpy as np
from lifelong_ray.config import FeedbackConfig
from lifelong_ray.feedback import CleanImage, LogWriter
from lifelong_ray.storage import LocalStore
from lifelong_ray.types import Feedback, Prediction

folder, run = sys.argv[1], sys.argv[2]
config = FeedbackConfig(group_commit_s=0.001, flush_interval_s=0.01, flush_rows=20)
writer = LogWriter(LocalStore(folder), config, f"run-{run}")
writer.start()
lock = threading.Lock()

def work(thread):
    n = 0
    while True:
        n += 1
        name = f"{run}-{thread}-{n}"
        pixels = np.frombuffer(name.ljust(48).encode(), np.uint8).reshape(4, 4, 3)
        picture = CleanImage.of(pixels)
        image = picture.content_hash
        writer.log_prediction(
            Prediction(name, time.time(), image, "c", (1.0,), ("c",), "v1", "stable", "", 1.0,
                       False, 1.0), None)
        row = Feedback(name, time.time(), "example", "label", "", image, "", False)
        writer.record_feedback([row], [picture])
        with lock:
            sys.stdout.write(f"{name} {image}\\n")
            sys.stdout.flush()

for thread in range(3):
    threading.Thread(target=work, args=(thread,), daemon=True).start()
threading.Event().wait()
"""


def start_writer(folder: Path, run: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(folder), str(run)], stdout=subprocess.PIPE, text=True
    )


def stop(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=10)


def acknowledged_lines(pipe: IO[str]) -> list[tuple[str, str]]:
    """Whole lines only: a killed process may leave half of one."""
    lines = pipe.read().splitlines(keepends=True)
    pairs = [line.split() for line in lines if line.endswith("\n")]
    return [(name, image) for name, image in pairs]


def test_acknowledged_feedback_survives_kill_nine(tmp_path: Path) -> None:
    chance = random.Random(0)
    acknowledged: dict[str, str] = {}

    for run in range(10):
        process = start_writer(tmp_path, run)
        assert process.stdout is not None
        try:
            first = process.stdout.readline().split()
            time.sleep(chance.uniform(0.0, 0.15))
        finally:
            stop(process)
        acknowledged[first[0]] = first[1]
        acknowledged.update(acknowledged_lines(process.stdout))
        process.stdout.close()

    store = LocalStore(tmp_path)
    snapshot = take_snapshot(store, time.time())
    feedback = read_feedback(store, snapshot)
    images = read_images(store, snapshot, acknowledged.values())
    read_ids = [row.feedback_id for row in feedback.rows]
    assert len(acknowledged) > 50
    assert acknowledged.keys() <= set(read_ids)
    assert len(read_ids) == len(set(read_ids))
    assert feedback.skipped_files == read_predictions(store, snapshot).skipped_files == 0
    assert images.keys() == set(acknowledged.values())


def test_truncated_files_are_skipped_and_counted_and_the_rest_is_read(tmp_path: Path) -> None:
    process = start_writer(tmp_path, 0)
    assert process.stdout is not None
    try:
        names = [process.stdout.readline().split()[0] for _ in range(30)]
    finally:
        stop(process)
        process.stdout.close()
    store = LocalStore(tmp_path)
    keys = store.list("log/feedback/")
    whole = {row.feedback_id for row in read_feedback(store, take_snapshot(store, 0.0)).rows}
    assert set(names) <= whole

    chance = random.Random(1)
    for key in keys[::3]:
        path = tmp_path / key
        path.write_bytes(path.read_bytes()[: chance.randrange(path.stat().st_size)])
    rows = read_feedback(store, take_snapshot(store, 0.0))

    assert rows.skipped == tuple(keys[::3])
    assert 0 < len(rows.rows) < len(whole)
    assert {row.feedback_id for row in rows.rows} < whole


FULL_DISK = """
import json, resource, signal, sys
import numpy as np
from lifelong_ray.config import FeedbackConfig
from lifelong_ray.feedback import CleanImage, LogWriter
from lifelong_ray.storage import LocalStore
from lifelong_ray.types import Feedback, Prediction, StorageFullError

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
writer = LogWriter(LocalStore(sys.argv[1]), FeedbackConfig(group_commit_s=0.001), "w")
noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
picture = CleanImage.of(noise)
name = picture.content_hash
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

def example(n):
    return Feedback(f"f{n}", float(n), "example", "x", "", name, "", False)

resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, hard))
told = {}
try:
    writer.record_feedback([example(1)], [picture])
except StorageFullError as error:
    told["feedback"] = str(error)
logged = writer.log_prediction(
    Prediction("r1", 0.0, name, "c", (1.0,), ("c",), "v1", "stable", "", 1.0, False, 1.0),
    picture)
try:
    writer.flush()
except StorageFullError as error:
    told["prediction"] = str(error)
told["logged"], told["queued"] = logged, writer.stats.queued_rows
resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
writer.record_feedback([example(2)], [picture])
writer.close()
told["queued_at_end"], told["dropped"] = writer.stats.queued_rows, writer.stats.dropped_predictions
print(json.dumps(told))
"""


def test_a_full_disk_refuses_feedback_keeps_predictions_and_recovers(tmp_path: Path) -> None:
    process = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    told = json.loads(process.stdout)

    assert "no space for log/images" in told["feedback"]
    assert "no space for log/images" in told["prediction"]
    assert (told["logged"], told["queued"]) == (True, 1)
    assert (told["queued_at_end"], told["dropped"]) == (0, 0)
    store = LocalStore(tmp_path)
    snapshot = take_snapshot(store, 0.0)
    feedback = read_feedback(store, snapshot)
    assert [row.feedback_id for row in feedback.rows] == ["f2"]
    assert [row.request_id for row in read_predictions(store, snapshot).rows] == ["r1"]
    (pixels,) = read_images(store, snapshot, [feedback.rows[0].content_hash]).values()
    assert pixels.shape == (64, 64, 3)
    assert pixels.dtype == np.uint8
    assert list((tmp_path / ".store/temp").iterdir()) == []

"""The learning engine on Ray Train workers gives what it gives alone."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load

from lifelong_ray.config import Config, config_from
from lifelong_ray.examples import arrays_of
from lifelong_ray.feedback import content_hash
from lifelong_ray.fitting import FitJob, FitOutcome, fit_alone
from lifelong_ray.on_ray.training import fit_on_ray
from lifelong_ray.types import Example, LearningError
from tests.unit.on_ray.world import CLASSES, SMALL, make_images

# Ray Data 2.60 sets its own deprecated settings when Ray Train imports it.
pytestmark = pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\.data\.context")

LONG, CHECKPOINT_EVERY = 300, 25
"""Epochs of a training that lasts some seconds, and between its checkpoints."""


def make_job(folder: Path, run_id: str, *, num_workers: int = 1, epochs: int = 6) -> FitJob:
    base = {**SMALL["learning"]["base"], "epochs": epochs, "max_shift_px": 1}
    learning = {**SMALL["learning"], "base": base}
    config = config_from(
        {
            **SMALL,
            "learning": learning,
            "store": {"url": str(folder)},
            "training": {
                "num_workers": num_workers,
                "checkpoint_every_epochs": CHECKPOINT_EVERY,
                "max_failures": 1,
            },
        }
    )
    return FitJob(
        kind="base",
        run_id=run_id,
        class_names=CLASSES,
        training=arrays_of(examples(30, seed=0), CLASSES, config.model),
        validation=arrays_of(examples(5, seed=1), CLASSES, config.model),
        parent_files=None,
        config=config,
    )


def examples(num_per_class: int, seed: int) -> list[Example]:
    images = make_images(num_per_class, seed)
    return [
        Example(content_hash(pixels), label, pixels, "import", audit=False)
        for pixels, label in zip(images.images, images.labels, strict=True)
    ]


def assert_same_version(one: FitOutcome, other: FitOutcome) -> None:
    """Compare everything a version carries, up to rounding."""
    [mine], [theirs] = one.paths.values(), other.paths.values()
    assert mine.files.keys() == theirs.files.keys()
    for name in ("model.safetensors", "learner.safetensors"):
        tensors, expected = load(mine.files[name]), load(theirs.files[name])
        assert tensors.keys() == expected.keys()
        for key, values in tensors.items():
            np.testing.assert_allclose(
                values, expected[key], rtol=1e-3, atol=1e-4, err_msg=f"{name} {key}"
            )
    assert mine.files["memory.parquet"] == theirs.files["memory.parquet"]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_learn_what_one_process_alone_learns(
    ray_session: object, tmp_path: Path, num_workers: int
) -> None:
    job = make_job(tmp_path, f"run-{num_workers}", num_workers=num_workers)

    on_ray = fit_on_ray(job)

    assert_same_version(on_ray, fit_alone(job))


def test_a_worker_that_dies_costs_no_more_than_the_way_from_its_checkpoint(
    ray_session: object, tmp_path: Path
) -> None:
    job = make_job(tmp_path, "run-killed", epochs=LONG)
    killer = WorkerKiller(tmp_path / "train" / job.run_id, num_checkpoints=3)

    with killer:
        interrupted = fit_on_ray(job)

    assert len(killer.killed) == 1, "the training ended before its worker could be killed"
    # One more may have been on its way; starting anew would write all of them again.
    assert len(killer.checkpoints()) <= LONG // CHECKPOINT_EVERY
    assert_same_version(interrupted, fit_alone(job))


def test_a_training_that_fails_for_good_names_its_run(ray_session: object, tmp_path: Path) -> None:
    job = make_job(tmp_path, "run-hopeless")
    broken: Config = job.config.model_copy(
        update={"training": job.config.training.model_copy(update={"max_failures": 0})}
    )
    no_labels = job.training.__class__(job.training.images, job.training.labels + 7)

    with pytest.raises(LearningError, match="run-hopeless failed on its workers"):
        fit_on_ray(
            FitJob(
                kind="base",
                run_id=job.run_id,
                class_names=CLASSES,
                training=no_labels,
                validation=job.validation,
                parent_files=None,
                config=broken,
            )
        )


class WorkerKiller:
    """Sends SIGKILL to the one training worker, once it has left some checkpoints."""

    def __init__(self, folder: Path, num_checkpoints: int) -> None:
        self._folder = folder
        self._num_checkpoints = num_checkpoints
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self.killed: list[int] = []

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    def checkpoints(self) -> list[Path]:
        return sorted(self._folder.glob("checkpoint_*/state.safetensors"))

    def _watch(self) -> None:
        while not self._stopped.wait(0.05):
            if len(self.checkpoints()) >= self._num_checkpoints:
                time.sleep(0.1)  # somewhere between two checkpoints
                self.killed = training_workers()
                for pid in self.killed:
                    os.kill(pid, signal.SIGKILL)
                return


def training_workers() -> list[int]:
    """Training workers of this test run."""
    mark = f"LIFELONG_TEST_RUN={os.environ['LIFELONG_TEST_RUN']}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if (
                entry.name.isdigit()
                and b"RayTrainWorker" in (entry / "cmdline").read_bytes()
                and mark in (entry / "environ").read_bytes().split(b"\0")
            ):
                found.append(int(entry.name))
        except OSError:  # ended meanwhile
            continue
    return found

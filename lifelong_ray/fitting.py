"""One training as a value, and how to carry it out on one worker of however many.

Knows which learning paths a job takes and why. Does not know the log, the registry
or where workers come from: `fit_alone` trains right here, `on_ray.training` on a
cluster.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from lifelong_ray.config import Config
from lifelong_ray.learning import (
    Alone,
    Collective,
    EpochReport,
    Fit,
    Labelled,
    Learner,
    Light,
    Run,
    fit_base,
    fit_update,
    keep_freed_memory,
    teach_light,
)
from lifelong_ray.types import DataError, Json

Clock = Callable[[], float]


@dataclass(frozen=True)
class Arrays:
    """Model inputs with their class indices.

    Attributes:
        images: (N, C, H, W) uint8.
        labels: (N,) int64, indices into the job's class names.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class FitJob:
    """Everything a training needs, in one value that travels to a worker.

    Attributes:
        kind: ``base`` starts from nothing; ``update`` continues `parent_files`; ``full`` is
            the yardstick, a base training that measures both heads after every epoch.
        run_id: Names the run and its checkpoints.
        class_names: All classes; an update's begin with its parent's.
        training: What may be learned from.
        validation: What chooses and calibrates; never trained on.
        parent_files: The parent version, for an update.
        config: The whole tree.
    """

    kind: Literal["base", "update", "full"]
    run_id: str
    class_names: tuple[str, ...]
    training: Arrays
    validation: Arrays
    parent_files: Mapping[str, bytes] | None
    config: Config


@dataclass(frozen=True)
class FittedPath:
    """One trained candidate.

    Attributes:
        files: The version's files.
        report: Samples, seconds and accuracies, with the units in the key names.
    """

    files: Mapping[str, bytes]
    report: Json


@dataclass(frozen=True)
class FitOutcome:
    """What a training gave: one or more candidates by path, and why these paths."""

    paths: Mapping[str, FittedPath]
    reason: str


def _ignore(report: EpochReport, checkpoint: Callable[[], bytes]) -> None:
    """Take no notice of an epoch."""


@dataclass(frozen=True)
class Progress:
    """Hooks into a running training; the defaults do nothing.

    Attributes:
        resume: Checkpoint bytes to continue from.
        on_epoch: Told after every epoch, with a function that makes checkpoint bytes.
    """

    resume: bytes | None = None
    on_epoch: Callable[[EpochReport, Callable[[], bytes]], None] = _ignore


Trainer = Callable[[FitJob], FitOutcome]


def fit_alone(job: FitJob) -> FitOutcome:
    """Train in this process, without Ray."""
    return run_fit(job, Alone(), cost_clock(), Progress())


def cost_clock() -> Clock:
    """Seconds that a training is charged for, whatever else runs on the machine.

    On CPUs they are the process's own; those of a GPU only the wall clock knows.
    """
    return time.perf_counter if torch.cuda.is_available() else time.process_time


def run_fit(job: FitJob, collective: Collective, clock: Clock, progress: Progress) -> FitOutcome:
    """Train what the job asks for; the same on one worker or many.

    An update takes the paths that ``learning.update.paths`` names; by ``default`` the fast
    one, and the slow one where the fast one's validation accuracy falls short. Each result gets a
    light model where ``learning.cascade`` wants one.
    """
    keep_freed_memory()
    training = _tensors(job.training)
    validation = _tensors(job.validation) if len(job.validation) else None
    learning = job.config.learning

    def on_epoch(report: EpochReport, checkpoint: Callable[[], bytes]) -> bool:
        progress.on_epoch(report, checkpoint)
        return False  # never stop early

    run = Run(
        clock=clock,
        collective=collective,
        resume=progress.resume,
        on_epoch=on_epoch,
        device="cuda" if torch.cuda.is_available() else "cpu",
    )
    lit = partial(_with_light, job, training=training, validation=validation, run=run)
    if job.kind != "update":
        fit = fit_base(
            training,
            job.class_names,
            job.config.model,
            learning,
            run,
            validation=validation,
            yardstick=job.kind == "full",
        )
        return FitOutcome({job.kind: lit(fit)}, "a base training starts a family")
    if job.parent_files is None:
        raise DataError("an update needs its parent's files")
    parent = Learner.from_files(job.parent_files)
    update = fit_update(parent, training, job.class_names, learning, run, validation=validation)
    return FitOutcome({name: lit(fit) for name, fit in update.fits.items()}, update.reason)


def _tensors(arrays: Arrays) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(arrays.images), torch.from_numpy(arrays.labels)


def _with_light(
    job: FitJob, fit: Fit, *, training: Labelled, validation: Labelled | None, run: Run
) -> FittedPath:
    """A candidate's files and report, with its light model where one is wanted."""
    files, report = fit.learner.to_files(), json.loads(json.dumps(asdict(fit.report)))
    if not job.config.learning.cascade.enabled or job.kind == "full":
        return FittedPath(files, report)
    began_s = run.clock()
    light = teach_light(
        fit.learner,
        training,
        job.config.learning,
        run,
        parent=None if job.parent_files is None else Light.from_files(job.parent_files),
        validation=validation,
    )
    report["light_seconds"] = run.clock() - began_s
    return FittedPath({**files, **light.to_files()}, report)

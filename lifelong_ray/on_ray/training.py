"""The learning engine on Ray Train workers.

Knows how a job travels to workers, how they find one another, and how checkpoints
outlive them. What is learned is decided in `learning`; the same job gives the same
model on one worker or many.
"""

from __future__ import annotations

import logging
import os
import socket
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.train
import torch
from ray.train import Checkpoint, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from lifelong_ray.config import Config
from lifelong_ray.fitting import Arrays, FitJob, FitOutcome, Progress, cost_clock, run_fit
from lifelong_ray.learning import Alone, EpochReport, TorchDistributed
from lifelong_ray.types import LearningError, ServingError

logger = logging.getLogger(__name__)

_STATE = "state.safetensors"
_AGENT_LEAVES_S = 30.0
_AGENT_PORT = 52365  # Ray's default; `ray.init` has no way to choose another
_own_folders: list[tempfile.TemporaryDirectory[str]] = []


def ensure_ray(config: Config, *, own: bool = False) -> None:
    """Connect to the cluster of this job or machine; where there is none, start a local Ray.

    Args:
        config: Says how many CPUs training needs; serving gets at least one more.
        own: Start a Ray of one's own even where a cluster runs.
    """
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    options: dict[str, Any] = {
        "include_dashboard": True,
        "dashboard_host": "127.0.0.1",
        "log_to_driver": False,
    }
    needed = int(config.training.num_workers * config.training.cpus_per_worker) + 1
    if own:
        _require_agent_port()
        # A folder of its own: a job of a Ray that shares /tmp/ray with a later one is sent to
        # the later one. Short, since paths of Unix sockets may have 107 characters.
        _own_folders.append(tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True))
        ray.init(
            address="local",
            num_cpus=max(os.cpu_count() or 1, needed),
            _temp_dir=_own_folders[-1].name,
            **options,
        )
    elif os.environ.get("RAY_ADDRESS") or needed <= (os.cpu_count() or 1):
        ray.init(**options)
    else:
        try:
            ray.init(num_cpus=needed, **options)
        except ValueError:  # a cluster runs on this machine, and knows how many CPUs it has
            ray.init(**options)


def _require_agent_port() -> None:
    """Refuse to start a second Ray on one machine: its agent could not take jobs.

    The agent of a Ray that was just ended lets go of the port some seconds later.

    Raises:
        ServingError: If the port that every Ray's agent listens on stays taken.
    """
    deadline_s = time.monotonic() + _AGENT_LEAVES_S
    while not _is_free(_AGENT_PORT):
        if time.monotonic() > deadline_s:
            raise ServingError(
                f"port {_AGENT_PORT}, on which Ray takes jobs, is in use: another Ray runs on "
                "this machine; end it first (ray stop)"
            )
        time.sleep(0.5)


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("0.0.0.0", port))
        except OSError:
            return False
    return True


def fit_on_ray(job: FitJob) -> FitOutcome:
    """Run a job on Ray Train workers and return what they trained.

    A run with checkpoints under its id continues from the latest one.

    Raises:
        LearningError: If the training failed for good.
    """
    ensure_ray(job.config)
    # How often the controller looks at its workers; at Ray's two seconds a short training
    # would wait longer for its own end than it takes.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.25")
    training = job.config.training
    use_gpu = training.gpus_per_worker > 0
    resources = {"CPU": training.cpus_per_worker}
    if use_gpu:
        resources["GPU"] = training.gpus_per_worker
    trainer = TorchTrainer(
        _work,  # type: ignore[arg-type]  # Ray's stub knows no return value; it passes one on
        train_loop_config={"job": ray.put(job)},
        scaling_config=ScalingConfig(
            num_workers=training.num_workers, use_gpu=use_gpu, resources_per_worker=resources
        ),
        run_config=RunConfig(
            name=job.run_id,
            storage_path=storage_path(job.config),
            failure_config=FailureConfig(max_failures=training.max_failures),
        ),
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
    )
    try:
        result = trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise LearningError(f"run {job.run_id} failed on its workers: {error}") from error
    outcome = result.return_value  # type: ignore[attr-defined]  # of rank 0; stub lacks it
    assert isinstance(outcome, FitOutcome), "rank 0 returns the outcome"
    return outcome


def storage_path(config: Config) -> str:
    """Where Ray Train keeps checkpoints: beside the store."""
    url = config.store.url
    if url.startswith("s3://"):
        return f"{url.rstrip('/')}/train"
    return str(Path(url).expanduser().resolve() / "train")


def _work(loop_config: dict[str, Any]) -> FitOutcome | None:
    """Train on one worker; rank 0 returns the outcome."""
    job: FitJob = ray.get(loop_config["job"])
    training = job.config.training
    context = ray.train.get_context()
    alone = context.get_world_size() == 1
    if not torch.cuda.is_available():
        torch.set_num_threads(max(1, int(training.cpus_per_worker)))

    # Ray Train takes one report per look of its controller: were every epoch reported, a
    # training of many short epochs would mostly wait.
    def on_epoch(report: EpochReport, checkpoint: Callable[[], bytes]) -> None:
        if report.epoch % training.checkpoint_every_epochs or report.epoch == report.num_epochs:
            return
        metrics = {"epoch": report.epoch, **report.losses}
        if context.get_world_rank() != 0:
            ray.train.report(metrics)
            return
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / _STATE).write_bytes(checkpoint())
            ray.train.report(metrics, checkpoint=Checkpoint.from_directory(folder))

    resume: bytes | None = None
    latest = ray.train.get_checkpoint()
    if latest is not None:
        with latest.as_directory() as folder:
            resume = (Path(folder) / _STATE).read_bytes()
    _wake(job)
    collective = Alone() if alone else TorchDistributed()
    outcome = run_fit(job, collective, cost_clock(), Progress(resume, on_epoch))
    return outcome if context.get_world_rank() == 0 else None


def _wake(job: FitJob) -> None:
    """Go through the motions once, on noise, so that reports count learning and not first calls.

    A process's first pass loads libraries and compiles kernels: start-up, as Ray's own is.
    """
    learning, model = job.config.learning, job.config.model
    once = {"epochs": 1, "iterations": 1}
    config = job.config.model_copy(
        update={
            "learning": learning.model_copy(
                update={
                    "base": learning.base.model_copy(update=once),
                    "update": learning.update.model_copy(
                        update={
                            "paths": "both",
                            "trainer": learning.update.trainer.model_copy(update=once),
                        }
                    ),
                    "cascade": learning.cascade.model_copy(update={"enabled": False}),
                }
            )
        }
    )
    shape = (32, model.channels, model.image_size, model.image_size)
    noise = Arrays(np.random.default_rng(0).integers(0, 256, shape, np.uint8), np.arange(32) % 2)
    base = replace(
        job,
        kind="base",
        class_names=("0", "1"),
        training=noise,
        validation=noise,
        parent_files=None,
        config=config,
    )
    made = run_fit(base, Alone(), time.perf_counter, Progress())
    if job.kind != "update":
        return
    update = replace(base, kind="update", parent_files=made.paths["base"].files)
    run_fit(update, Alone(), time.perf_counter, Progress())


def stop_ray() -> None:
    """Disconnect, and stop a Ray that `ensure_ray` started."""
    ray.shutdown()
    while _own_folders:
        _own_folders.pop().cleanup()

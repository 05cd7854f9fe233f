"""Starts updates as Ray jobs.

Knows how a run is handed to the cluster: its configuration goes into the store under
its id, and the job is given the id alone.
"""

from __future__ import annotations

import json
import os
import sys
import time

import ray
from ray.job_submission import JobStatus, JobSubmissionClient

from lifelong_ray.config import Config
from lifelong_ray.cycle import new_run_id
from lifelong_ray.storage import open_store
from lifelong_ray.types import LearningError

_POLL_S = 0.2


def submit_update(config: Config) -> str:
    """Submit one update to the cluster of this process and return its run id.

    The job has the same id.
    """
    run_id = new_run_id(time.time())
    store = open_store(config.store)
    store.put_new(f"runs/{run_id}/config.json", json.dumps(config.model_dump(mode="json")).encode())
    environment = {
        "LIFELONG_STORE_URL": store.url,
        "LIFELONG_S3_ENDPOINT_URL": config.store.endpoint_url,
    }
    for name in ("LIFELONG_SIGNING_KEY", "LIFELONG_ADMIN_TOKEN"):
        if os.environ.get(name):
            environment[name] = os.environ[name]
    _client().submit_job(
        entrypoint=f"{sys.executable} -m train_job --run {run_id}",
        submission_id=run_id,
        runtime_env={"env_vars": {k: v for k, v in environment.items() if v}},
    )
    return run_id


def wait_for_job(run_id: str, timeout_s: float) -> str:
    """Wait until a job ends and return its log.

    Raises:
        LearningError: If it failed or did not end in time; the log's end is in the message.
    """
    client = _client()
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        status = client.get_job_status(run_id)
        if status.is_terminal():
            log = client.get_job_logs(run_id)
            if status != JobStatus.SUCCEEDED:
                raise LearningError(f"job {run_id} ended as {status}: {log[-2_000:]}")
            return log
        time.sleep(_POLL_S)
    raise LearningError(f"job {run_id} did not end within {timeout_s:.0f} s")


def _client() -> JobSubmissionClient:
    """The job API of the very cluster this process is part of; others may run beside it."""
    return JobSubmissionClient(ray.get_runtime_context().gcs_address)

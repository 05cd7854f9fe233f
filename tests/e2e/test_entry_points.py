"""The three scripts as a user calls them: in a shell, under Serve, as a Ray job.

One Ray, one store, and one story: a base of eight digits, served; two more digits that
operators label; a sweep; updates in every way an update can be started.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest
import yaml

from lifelong_ray.config import Config, DataConfig, StoreConfig, config_from, load_config
from lifelong_ray.datasets import LabelledImages, load_source
from lifelong_ray.feedback import encode_png, load_secrets, read_feedback, take_snapshot
from lifelong_ray.release import Registry
from lifelong_ray.storage import Store, open_store
from tests.conftest import RaySession, free_port

T = TypeVar("T")
ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
PATIENCE_S = 180
# Small, so that what takes time is starting processes.
SMALL = {
    "data": {"classes": list("01234567")},
    "model": {"widths": [16, 32]},
    "learning": {"analytic": {"num_features": 200}},
    "serving": {"front": {"max_replicas": 1}},
    "training": {"checkpoint_every_epochs": 2},
    "tuning": {"num_trials": 2, "min_retention": 0.5},
}


@dataclass(frozen=True)
class Started:
    """A command that runs, with what it has printed so far."""

    process: subprocess.Popen[bytes]
    log: Path

    @property
    def printed(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")[-8_000:]

    def end(self, how: signal.Signals) -> None:
        """Signal the whole process group and wait for its leader."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, how)
        self.process.wait(timeout=PATIENCE_S)

    def wait_for(self, what: Callable[[], T | None]) -> T:
        """Wait until `what` gives something, while the command runs."""
        deadline_s = time.monotonic() + PATIENCE_S
        while (found := what()) is None:
            assert self.process.poll() is None, self.printed
            assert time.monotonic() < deadline_s, self.printed
            time.sleep(0.1)
        return found


@dataclass(frozen=True)
class Shell:
    """Runs commands in the repository with a store and a configuration of its own."""

    folder: Path
    environment: dict[str, str]
    config: Path

    @property
    def store(self) -> Store:
        """The store the commands use."""
        return open_store(StoreConfig(url=self.environment["LIFELONG_STORE_URL"]))

    @contextlib.contextmanager
    def started(self, *command: str) -> Iterator[Started]:
        """Start a command in a process group of its own, and end the group at last."""
        log = self.folder / "printed.txt"
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=self.environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        started = Started(process, log)
        try:
            yield started
        finally:
            started.end(signal.SIGKILL)

    def run(self, *command: str, expect: int = 0) -> str:
        """Run a command to its end and return what it printed."""
        with self.started(*command) as started:
            status = started.process.wait(timeout=PATIENCE_S)
        assert status == expect, started.printed
        return started.printed

    def train(self, *arguments: str, config: Path | None = None) -> dict[str, Any]:
        """Run train_job.py and return its report."""
        out = self.folder / "report.json"
        self.run(
            *(sys.executable, "train_job.py", "--config", str(config or self.config)),
            *("--out", str(out)),
            *arguments,
        )
        report: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
        return report


def new_shell(folder: Path, ray_session: RaySession) -> Shell:
    # conf/local.yaml with a few values changed, as a user would edit a copy.
    tree = yaml.safe_load((ROOT / "conf" / "local.yaml").read_text(encoding="utf-8"))
    for section, values in {**SMALL, "serving": {**SMALL["serving"], "port": free_port()}}.items():
        merge(tree[section], values)
    config = folder / "local.yaml"
    config.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return Shell(
        folder,
        {
            **os.environ,
            "LIFELONG_STORE_URL": str(folder / "store"),
            "LIFELONG_CONFIG": str(config),
            "RAY_ADDRESS": ray_session.address,
        },
        config,
    )


def merge(tree: dict[str, Any], values: dict[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, dict):
            merge(tree.setdefault(key, {}), value)
        else:
            tree[key] = value


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory, ray_session: RaySession) -> Shell:
    return new_shell(tmp_path_factory.mktemp("shell"), ray_session)


@pytest.fixture(scope="module")
def base(shell: Shell) -> dict[str, Any]:
    return shell.train("--base", "--fraction", "0.5", "--set", "learning.base.epochs=3")


def test_a_base_training_in_a_shell_makes_v1(shell: Shell, base: dict[str, Any]) -> None:
    assert base["version"] == "v1"
    assert base["released"]
    assert base["class_names"] == list("01234567")
    assert 500 < base["num_training"] + base["num_validation"] + base["num_holdout"] < 620
    assert "v1" in shell.run(str(BIN / "lifelong"), "versions")


# ---------------------------------------------------------------- serving


@dataclass(frozen=True)
class Served:
    """What HTTP answered while the application ran."""

    answers: list[dict[str, Any]]
    labels: list[str]
    feedback_status: int
    example_statuses: list[int]
    exit_status: int


@pytest.fixture(scope="module")
def served(shell: Shell, base: dict[str, Any]) -> Served:
    """Serve with the configured port, ask, correct, teach two new digits, and stop."""
    config = load_config(shell.config)
    token = load_secrets(shell.store, {}).admin_token
    digits = load_source(DataConfig(), 0)
    url = f"http://127.0.0.1:{config.serving.port}"
    shown = part_of(digits.test, "01234567", 40)
    taught = part_of(digits.train, "89", 60)

    def is_ready() -> bool | None:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{url}/v2/health/ready", timeout=5).status_code == 200:
                return True
        return None

    with shell.started(str(BIN / "serve"), "run", "serve_app:app") as serve_run:
        serve_run.wait_for(is_ready)
        with httpx.Client(base_url=url, timeout=30) as http:
            answers = [predict(http, encode_png(image)) for image in shown.images]
            vote = {"request_id": answers[0]["request_id"], "label": shown.labels[0]}
            feedback = http.post("/feedback", json=vote)
            examples = [
                http.post(
                    "/examples",
                    params={"label": label},
                    content=encode_png(image),
                    headers={"content-type": "image/png", "authorization": f"Bearer {token}"},
                )
                for image, label in zip(taught.images, taught.labels, strict=True)
            ]
        serve_run.end(signal.SIGINT)
    return Served(
        answers,
        list(shown.labels),
        feedback.status_code,
        [answer.status_code for answer in examples],
        serve_run.process.returncode,
    )


def part_of(images: LabelledImages, names: str, count: int) -> LabelledImages:
    return images.of_classes(tuple(names)).take(list(range(count)))


def predict(http: httpx.Client, image: bytes) -> dict[str, Any]:
    answer = http.post("/predict", content=image, headers={"content-type": "image/png"})
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


def test_serve_run_listens_on_the_configured_port_and_answers(served: Served) -> None:
    right = sum(a["class"] == label for a, label in zip(served.answers, served.labels, strict=True))

    assert {answer["model_version"] for answer in served.answers} == {"v1"}
    assert right / len(served.labels) > 0.7
    assert served.exit_status == 0


def test_feedback_and_examples_are_in_the_log(shell: Shell, served: Served) -> None:
    rows = read_feedback(shell.store, take_snapshot(shell.store, time.time())).rows

    assert served.feedback_status == 202
    assert set(served.example_statuses) == {202}
    assert sum(row.kind == "feedback" for row in rows) == 1
    assert sum(row.kind == "example" for row in rows) == 60


def test_a_taken_port_is_refused_by_name(shell: Shell, served: Served) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]

        printed = shell.run(
            *(str(BIN / "serve"), "run", "serve_app:app"),
            *(f"config={shell.config}", f"serving.port={port}"),
            expect=1,
        )

    assert f"port {port} on 127.0.0.1 cannot be used" in printed


# ---------------------------------------------------------------- updates


@pytest.fixture(scope="module")
def best(shell: Shell, served: Served) -> Path:
    path = shell.folder / "new" / "best.yaml"
    shell.run(
        *(sys.executable, "tune_lambda.py", "--config", str(shell.config)),
        *("--best", str(path), "--out", str(shell.folder / "new" / "trials.json")),
        *("--set", "learning.update.trainer.epochs=2"),
    )
    return path


def test_a_sweep_writes_the_winner_into_a_configuration(shell: Shell, best: Path) -> None:
    trials = json.loads((best.parent / "trials.json").read_text(encoding="utf-8"))
    found = load_config(best)

    assert len(trials["trials"]) == 2
    assert found.learning.update.ewc.lambda_ewc == trials["best"]["lambda_ewc"]
    assert found.learning.update.trainer.learning_rate == trials["best"]["learning_rate"]
    assert found.learning.update.trainer.epochs == 2
    assert found.model.widths == (16, 32)
    assert Registry(shell.store).versions()[:1] == ["v1"]


def test_an_update_takes_the_sweep_s_configuration_and_bf16(shell: Shell, best: Path) -> None:
    report = shell.train(
        *("--precision", "bf16", "--set", "learning.update.paths=slow", "--no-release"),
        config=best,
    )

    trained = config_of(shell, report["version"])
    assert report["parent"] == "v1"
    assert report["class_names"] == list("0123456789")
    assert report["path"] == "slow"
    assert not report["released"]
    assert trained.learning.update.trainer.precision == "bf16"
    assert trained.learning.update.ewc == load_config(best).learning.update.ewc


def test_an_update_runs_as_a_ray_job(shell: Shell, served: Served, ray_session: RaySession) -> None:
    variables = {"LIFELONG_STORE_URL": shell.environment["LIFELONG_STORE_URL"]}
    before = Registry(shell.store).versions()

    printed = shell.run(
        *(str(BIN / "ray"), "job", "submit", "--address", ray_session.dashboard_url),
        *("--working-dir", ".", "--runtime-env-json", json.dumps({"env_vars": variables})),
        *("--", sys.executable, "train_job.py", "--config", "conf/local.yaml", "--no-release"),
        *("--set", "learning.update.paths=fast", "--fraction", "0.5"),
    )

    (version,) = set(Registry(shell.store).versions()) - set(before)
    manifest = Registry(shell.store).manifest(version)
    assert "succeeded" in printed
    assert f"update {version}" in printed
    assert (manifest.parent, manifest.path) == ("v1", "fast")
    assert manifest.class_names == tuple("0123456789")


def config_of(shell: Shell, version: str) -> Config:
    return config_from(Registry(shell.store).manifest(version).config)


# ---------------------------------------------------------------- interruption


def test_a_killed_training_is_taken_up_again_by_its_id(
    tmp_path: Path, ray_session: RaySession
) -> None:
    shell = new_shell(tmp_path, ray_session)
    epochs, every = 60, 2

    def checkpoints() -> int:
        return len([*(tmp_path / "store" / "train").glob("run-*/checkpoint_*")])

    with shell.started(
        *(sys.executable, "train_job.py", "--base", "--config", str(shell.config)),
        *("--fraction", "0.2", "--set", f"learning.base.epochs={epochs}", "--precision", "bf16"),
        *("--set", f"training.checkpoint_every_epochs={every}"),
    ) as training:
        training.wait_for(lambda: checkpoints() >= 6 or None)
        training.end(signal.SIGKILL)
    time.sleep(1)  # for Ray to end the workers, which may be in the middle of one more
    before_the_kill = checkpoints()
    run_id = training.printed.split("run ")[1].split(":")[0]
    assert Registry(shell.store).versions() == []

    report = shell.train("--resume", run_id)

    trained = config_of(shell, "v1")
    assert report["run_id"] == run_id
    assert report["kind"] == "base"
    assert report["released"]
    assert trained.data.fraction == 0.2
    assert trained.learning.base.epochs == 60
    assert trained.learning.base.precision == "bf16"
    # Had it begun again, it would have made all of them again.
    assert checkpoints() < before_the_kill + epochs // every - 1


def test_a_run_that_does_not_exist_cannot_be_continued(
    tmp_path: Path, ray_session: RaySession
) -> None:
    shell = new_shell(tmp_path, ray_session)

    printed = shell.run(sys.executable, "train_job.py", "--resume", "run-x", expect=1)

    assert "has no run run-x to continue" in printed
    assert "Traceback" not in printed

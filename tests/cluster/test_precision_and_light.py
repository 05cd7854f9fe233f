"""Versions that answer in fewer bits, and by a light model, on real Ray Serve and Ray Train.

One application and one story: bf16 in the fronts, int8 in the slot, a version that may not answer
in int8, and an update through Ray Train that brings a light model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
import pytest
import ray
from ray import serve

from lifelong_ray.client import LifelongClient
from lifelong_ray.config import Config
from lifelong_ray.cycle import CycleReport, run_base, run_update
from lifelong_ray.examples import arrays_of
from lifelong_ray.feedback import (
    CleanImage,
    LogWriter,
    Secrets,
    content_hash,
    encode_png,
    load_secrets,
    uuid7,
)
from lifelong_ray.fitting import fit_alone
from lifelong_ray.learning import Learner, Light, Predictor
from lifelong_ray.on_ray.serving import start_app, stop_app
from lifelong_ray.on_ray.training import fit_on_ray
from lifelong_ray.release import Registry, ReleaseDesk
from lifelong_ray.storage import Store, open_store
from lifelong_ray.types import Example, Feedback
from tests.conftest import free_port
from tests.unit.on_ray.world import CLASSES, make_images, settings

# Ray Data 2.60 sets its own deprecated settings when Ray Train imports it.
pytestmark = pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\.data\.context")

PNG = {"content-type": "image/png"}
UNSEEN = make_images(10, seed=77)


@dataclass(frozen=True)
class App:
    """The running application and what stands behind it."""

    url: str
    config: Config
    store: Store
    secrets: Secrets

    def operator(self) -> LifelongClient:
        return LifelongClient(self.url, admin_token=self.secrets.admin_token)


@pytest.fixture(scope="module")
def app(ray_session: object, tmp_path_factory: pytest.TempPathFactory) -> Iterator[App]:
    config = settings(
        store={"url": str(tmp_path_factory.mktemp("store"))},
        model={"name": "mlp", "widths": [32, 16]},
        feedback={"audit_share": 1.0, "flush_interval_s": 0.2, "holdout_share": 0.5},
        rollout={
            "margin": 0.1,
            "min_labelled_pairs": 20,
            "steps": [{"setWeight": 50, "min_requests": 20}],
        },
        serving={
            "port": free_port(),
            "poll_interval_s": 0.1,
            "front": {"max_replicas": 1, "precision": "bf16"},
            "slot": {"min_replicas": 1, "precision": "int8"},
        },
    )
    store = open_store(config.store)
    report = run_base(
        config, store, fit_alone, make_images(40, seed=0), run_id="base", now_s=time.time
    )
    assert {name: gate["passed"] for name, gate in report.gate_at.items()} == {
        "bf16": True,
        "int8": True,
    }
    url = start_app(config)
    try:
        yield App(url, config, store, load_secrets(store, {}))
    finally:
        stop_app()
        serve.shutdown()


def until(condition: Callable[[], bool], what: str, timeout_s: float = 60.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline_s:
            pytest.fail(f"{what} did not happen within {timeout_s} s")
        time.sleep(0.05)


def copy_of_v1(store: Store, version: str, **changes: object) -> None:
    """Register v1's files under another name."""
    registry = Registry(store)
    manifest, files = registry.load("v1")
    registry.register(
        manifest.model_copy(
            update={"version": version, "parent": "v1", "kind": "update", "files": {}, **changes}
        ),
        files,
    )


@contextmanager
def in_the_slot(app: App, version: str) -> Iterator[dict[str, Any]]:
    """Have a version answer whoever asks for it from the slot; gives what the slot reports."""

    def report() -> dict[str, Any] | None:
        slots: list[dict[str, Any]] = operator.status()["controller"]["slots"]
        return next((slot for slot in slots if version in slot["warm"]), None)

    def answers() -> bool:
        answer = operator.predict(encode_png(UNSEEN.images[0]), canary="always")
        return answer.model_version == version

    with app.operator() as operator:
        steps = [{"setWeight": 20, "min_requests": 1_000_000}]
        operator.start_rollout(version, steps=steps, reason="in fewer bits")
        until(answers, f"an answer of {version}")
        found = report()
        assert found is not None
        yield found
        operator.rollout("abort", reason="seen enough")
        until(lambda: operator.status()["document"]["rollout"] is None, "the abort")


def in_fp32(store: Store, version: str) -> np.ndarray[Any, Any]:
    """Probabilities of the unseen images as training left the model: shape (N, classes)."""
    learner = Learner.from_files(Registry(store).load(version)[1])
    examples = [
        Example(content_hash(pixels), label, pixels, "import", audit=False)
        for pixels, label in zip(UNSEEN.images, UNSEEN.labels, strict=True)
    ]
    images = arrays_of(examples, learner.class_names, learner.model_config).images
    return Predictor(learner).predict(images).probabilities


def served(app: App, version: str, canary: str) -> np.ndarray[Any, Any]:
    """The same over HTTP."""
    rows = []
    with httpx.Client(base_url=app.url, headers={**PNG, "x-canary": canary}, timeout=30.0) as http:
        for pixels in UNSEEN.images:
            answer = http.post("/predict", content=encode_png(pixels)).json()
            assert answer["model_version"] == version
            by_class = {entry["class"]: entry["confidence"] for entry in answer["top_k"]}
            rows.append([by_class[name] for name in CLASSES])
    return np.array(rows)


def test_fronts_answer_in_bf16_what_fp32_would(app: App) -> None:
    with app.operator() as operator:
        precisions = operator.status()["front"]["precisions"]
    answers, exact = served(app, "v1", "never"), in_fp32(app.store, "v1")

    assert precisions == {"v1": "bf16"}
    assert (answers.argmax(1) == exact.argmax(1)).all()
    assert 1e-5 < np.abs(answers - exact).max() < 0.02


def test_slots_answer_in_int8_what_fp32_would(app: App) -> None:
    copy_of_v1(app.store, "v1.1")

    with in_the_slot(app, "v1.1") as slot:
        answers = served(app, "v1.1", "always")

    exact = in_fp32(app.store, "v1.1")
    assert slot["precisions"] == {"v1.1": "int8"}
    assert slot["failures"] == {}
    assert (answers.argmax(1) == exact.argmax(1)).all()
    assert 1e-5 < np.abs(answers - exact).max() < 0.05


def test_a_version_refused_in_int8_answers_in_fp32_and_says_why(app: App) -> None:
    manifest = Registry(app.store).manifest("v1")
    assert manifest.gate is not None
    refused = manifest.gate.model_copy(update={"passed": False})
    copy_of_v1(app.store, "v1.2", gate_at={**manifest.gate_at, "int8": refused})

    with in_the_slot(app, "v1.2") as slot, app.operator() as operator:
        answers = served(app, "v1.2", "always")
        stable = served(app, "v1", "never")
        precisions = operator.status()["front"]["precisions"]

    exact = in_fp32(app.store, "v1")
    assert slot["precisions"] == {"v1.2": "fp32"}
    np.testing.assert_allclose(answers, exact, atol=2e-6)  # as many digits as an answer has
    assert precisions["v1"] == "bf16"
    assert (stable.argmax(1) == exact.argmax(1)).all()
    assert "the gate refused v1.2 in int8" in Registry(app.store).manifest("v1.2").why_not_at(
        "int8"
    )


# -- a light model ---------------------------------------------------------------------------------


def light_config(config: Config) -> Config:
    """Allow the light model what few hold-out images can prove."""
    cascade = config.learning.cascade.model_copy(
        update={"enabled": True, "widths": (8, 8), "max_accuracy_loss": 0.2}
    )
    learning = config.learning.model_copy(update={"cascade": cascade})
    return config.model_copy(update={"learning": learning})


def label_examples(app: App, num_per_class: int) -> None:
    """Write an operator's labelled images into the log."""
    log = LogWriter(app.store, app.config.feedback, "operator", time.time)
    log.start()
    rows, kept = [], []
    images = make_images(num_per_class, seed=5)
    for image, label in zip(images.images, images.labels, strict=True):
        kept.append(CleanImage.of(image))
        rows.append(example_row(kept[-1].content_hash, label))
    log.record_feedback(rows, kept)
    log.close()


def example_row(content: str, label: str) -> Feedback:
    return Feedback(
        feedback_id=str(uuid7(time.time())),
        at_s=time.time(),
        kind="example",
        label=label,
        request_id="",
        content_hash=content,
        user="",
        audit=False,
    )


@pytest.fixture(scope="module")
def updated(app: App) -> CycleReport:
    """An update through Ray Train, as train_job.py makes it, released on audit labels."""
    label_examples(app, 50)
    report = run_update(
        light_config(app.config), app.store, fit_on_ray, run_id="light", now_s=time.time
    )
    assert report.released, report.why_not_released
    with app.operator() as client:

        def is_stable() -> bool:
            for pixels, label in zip(UNSEEN.images[:6], UNSEEN.labels[:6], strict=True):
                answer = client.predict(encode_png(pixels))
                client.feedback(answer.request_id, label)
            return ReleaseDesk(app.store, time.time).read()[0].stable == report.version

        until(is_stable, "the promotion")
        until(
            lambda: client.predict(encode_png(UNSEEN.images[0])).model_version == report.version,
            "an answer of the new stable version",
        )
    return report


def test_an_update_through_ray_train_stores_its_light_model_and_threshold(
    app: App, updated: CycleReport
) -> None:
    manifest, files = Registry(app.store).load(updated.version)
    light = Light.from_files(files)

    assert {"light.safetensors", "cascade.json"} <= files.keys()
    assert light is not None
    assert light.calibration is not None
    assert updated.cascade is not None
    assert updated.cascade["threshold"] is not None, updated.cascade["reason"]
    assert light.calibration.threshold == updated.cascade["threshold"]
    assert manifest.metrics["cascade"] == updated.cascade
    assert all(gate["passed"] for gate in updated.gate_at.values())


def test_answers_say_who_was_light_and_the_share_is_counted(app: App, updated: CycleReport) -> None:
    def share() -> float | None:
        counted = metric_by_version()
        answered = counted.get(("lifelong_predictions_total", updated.version), 0.0)
        light = counted.get(("lifelong_light_answers_total", updated.version), 0.0)
        return light / answered if answered >= 60 else None

    said: list[str] = []
    with httpx.Client(base_url=app.url, timeout=30.0) as http:
        for pixels, label in zip(UNSEEN.images, UNSEEN.labels, strict=True):
            for _ in range(3):
                answer = http.post("/predict", content=encode_png(pixels), headers=PNG)
                said.append(answer.headers["x-answered-by"])
                assert answer.json()["class"] == label
    light_share = said.count("light") / len(said)
    until(lambda: share() is not None, "the counters at Ray's Prometheus port")

    assert updated.cascade is not None
    assert set(said) <= {"light", "full"}
    assert light_share == pytest.approx(updated.cascade["light_share"], abs=0.3)
    assert share() == pytest.approx(light_share, abs=0.25)  # over some more answers


def metric_by_version() -> dict[tuple[str, str], float]:
    """What Prometheus would read: the sum of each of this project's counters by version."""
    [node] = ray.nodes()
    text = httpx.get(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}").text
    found: dict[tuple[str, str], float] = {}
    for line in text.splitlines():
        name, _, rest = line.removeprefix("ray_").partition("{")
        if not name.startswith("lifelong_"):
            continue
        labels, _, value = rest.rpartition("}")
        version = labels.split('version="')[-1].split('"')[0]
        found[name, version] = found.get((name, version), 0.0) + float(value)
    return found

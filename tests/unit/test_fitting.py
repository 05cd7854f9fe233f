"""One training as a value: which paths it takes, and why."""

from collections.abc import Callable

import numpy as np
import pytest

from lifelong_ray.config import Config, config_from
from lifelong_ray.fitting import Arrays, FitJob, Progress, fit_alone, run_fit
from lifelong_ray.learning import Alone, EpochReport, Learner
from lifelong_ray.types import DataError

CONFIG = config_from(
    {
        "model": {"widths": [8, 16], "image_size": 8},
        "learning": {
            "base": {"epochs": 5, "batch_size": 16, "learning_rate": 0.01, "max_shift_px": 0},
            "analytic": {"num_features": 64},
        },
    }
)


def rows(num_classes: int, num_each: int, seed: int) -> Arrays:
    """Bright rows on noise; the class decides which."""
    rng = np.random.default_rng(seed)
    labels = np.tile(np.arange(num_classes), num_each)
    images = rng.integers(0, 90, (len(labels), 1, 8, 8), np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[0, 2 * label : 2 * label + 2] += 150
    return Arrays(images, labels)


def base_job(config: Config = CONFIG) -> FitJob:
    return FitJob("base", "run", ("a", "b"), rows(2, 20, 1), rows(2, 5, 2), None, config)


@pytest.fixture(scope="module")
def parent_files() -> dict[str, bytes]:
    return dict(fit_alone(base_job()).paths["base"].files)


@pytest.fixture
def update_job(parent_files: dict[str, bytes]) -> Callable[..., FitJob]:
    def make(**settings: object) -> FitJob:
        learning = CONFIG.learning.model_copy(
            update={"update": CONFIG.learning.update.model_copy(update=settings)}
        )
        return FitJob(
            "update",
            "run",
            ("a", "b", "c"),
            rows(3, 10, 3),
            rows(3, 5, 4),
            parent_files,
            CONFIG.model_copy(update={"learning": learning}),
        )

    return make


def test_a_base_training_gives_one_path_with_its_figures() -> None:
    outcome = fit_alone(base_job())

    fitted = outcome.paths["base"]
    assert list(outcome.paths) == ["base"]
    assert Learner.from_files(fitted.files).class_names == ("a", "b")
    assert fitted.report["samples_seen"] >= 40 * 5
    assert fitted.report["validation_accuracy"] == 1.0
    assert {"train_seconds", "extra_seconds"} <= fitted.report.keys()


@pytest.mark.parametrize(
    ("paths", "taken"), [("fast", ["fast"]), ("slow", ["slow"]), ("both", ["fast", "slow"])]
)
def test_an_update_takes_the_paths_it_is_told(
    update_job: Callable[..., FitJob], paths: str, taken: list[str]
) -> None:
    outcome = fit_alone(update_job(paths=paths))

    assert list(outcome.paths) == taken
    assert outcome.reason == f"learning.update.paths is {paths}"
    for fitted in outcome.paths.values():
        assert Learner.from_files(fitted.files).class_names == ("a", "b", "c")


def test_by_default_a_good_fast_path_is_enough(update_job: Callable[..., FitJob]) -> None:
    outcome = fit_alone(update_job(paths="default", good_enough_accuracy=0.0))

    assert list(outcome.paths) == ["fast"]
    assert outcome.reason.startswith("frozen features suffice")


def test_by_default_the_slow_path_runs_where_the_fast_one_falls_short(
    update_job: Callable[..., FitJob],
) -> None:
    job = update_job(paths="default", good_enough_accuracy=1.0)
    blurred = Arrays(job.validation.images, (job.validation.labels + 1) % 3)

    outcome = fit_alone(
        FitJob(
            job.kind,
            job.run_id,
            job.class_names,
            job.training,
            blurred,
            job.parent_files,
            job.config,
        )
    )

    assert list(outcome.paths) == ["fast", "slow"]
    assert outcome.reason.startswith("frozen features fall short")


def test_without_validation_the_fast_path_cannot_suffice(
    update_job: Callable[..., FitJob],
) -> None:
    job = update_job(paths="default", good_enough_accuracy=0.0)
    none = Arrays(np.zeros((0, 1, 8, 8), np.uint8), np.zeros(0, np.int64))

    outcome = fit_alone(
        FitJob(
            job.kind, job.run_id, job.class_names, job.training, none, job.parent_files, job.config
        )
    )

    assert list(outcome.paths) == ["fast", "slow"]
    assert "no known accuracy" in outcome.reason


def test_an_update_without_a_parent_is_refused() -> None:
    job = FitJob("update", "run", ("a", "b"), rows(2, 5, 1), rows(2, 5, 2), None, CONFIG)

    with pytest.raises(DataError, match="needs its parent's files"):
        fit_alone(job)


def test_a_training_resumed_from_a_checkpoint_gives_the_same_bytes() -> None:
    checkpoints: list[bytes] = []

    def keep(report: EpochReport, checkpoint: Callable[[], bytes]) -> None:
        if report.epoch == 2:
            checkpoints.append(checkpoint())

    whole = run_fit(base_job(), Alone(), lambda: 0.0, Progress(on_epoch=keep))

    resumed = run_fit(base_job(), Alone(), lambda: 0.0, Progress(resume=checkpoints[0]))

    assert resumed.paths["base"].files == whole.paths["base"].files

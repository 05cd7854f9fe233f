"""Before it learns, a training worker goes through the motions once: briefly, and on noise."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from lifelong_ray.config import Config, config_from
from lifelong_ray.fitting import Arrays, FitJob, FitOutcome, fit_alone, run_fit
from lifelong_ray.learning import Collective
from lifelong_ray.on_ray import training
from tests.unit.test_fitting import rows

LONG = {"epochs": 40, "iterations": 900, "batch_size": 16}


def settings() -> Config:
    return config_from(
        {
            "model": {"widths": [8, 16], "image_size": 8},
            "learning": {
                "base": LONG,
                "update": {"trainer": LONG, "paths": "default"},
                "analytic": {"num_features": 16},
            },
        }
    )


def job(kind: str) -> FitJob:
    nothing = None if kind != "update" else {"model.safetensors": b"the parent's"}
    return FitJob(kind, "run", ("a", "b", "c"), rows(3, 4, 1), rows(3, 2, 2), nothing, settings())


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[tuple[FitJob, FitOutcome]]:
    """What the worker trained, with what came of it."""
    trainings: list[tuple[FitJob, FitOutcome]] = []

    def watched(
        one: FitJob, collective: Collective, clock: Callable[[], float], progress: object
    ) -> FitOutcome:
        outcome = run_fit(one, collective, clock, progress)
        trainings.append((one, outcome))
        return outcome

    monkeypatch.setattr(training, "run_fit", watched)
    return trainings


def steps(outcome: FitOutcome, path: str, num_looked_at: int) -> float:
    """Gradient steps of a path, whose batches are of 16; sums look at every example once more."""
    seen = outcome.paths[path].report["samples_seen"]
    assert isinstance(seen, int)
    return (seen - num_looked_at) / 16


@pytest.mark.parametrize("kind", ["base", "full"])
def test_a_base_training_is_warmed_up_by_one_step_of_a_base_training(
    kind: str, done: list[tuple[FitJob, FitOutcome]]
) -> None:
    training._wake(job(kind))

    [(warmed, outcome)] = done
    assert warmed.kind == "base"
    assert steps(outcome, "base", 32) == 1


def test_an_update_is_warmed_up_by_one_step_of_each_way_after_a_base_of_its_own(
    done: list[tuple[FitJob, FitOutcome]],
) -> None:
    training._wake(job("update"))

    (base, made), (update, outcome) = done
    assert (base.kind, base.parent_files) == ("base", None)
    assert (update.kind, update.parent_files) == ("update", made.paths["base"].files)
    assert steps(made, "base", 32) == 1
    assert list(outcome.paths) == ["fast", "slow"]
    assert outcome.paths["slow"].report["samples_seen"] < 100


@pytest.mark.parametrize("kind", ["base", "update"])
def test_a_warm_up_looks_at_noise_and_at_none_of_the_jobs_images(
    kind: str, done: list[tuple[FitJob, FitOutcome]]
) -> None:
    given = job(kind)
    bytes_of = {image.tobytes() for image in given.training.images}

    training._wake(given)

    for warmed, _ in done:
        shown: list[Arrays] = [warmed.training, warmed.validation]
        assert not bytes_of & {image.tobytes() for part in shown for image in part.images}
        assert warmed.class_names == ("0", "1")


def test_a_warm_up_changes_nothing_of_what_the_job_gives() -> None:
    brief = job("base")
    learning = brief.config.learning
    short = learning.model_copy(update={"base": learning.base.model_copy(update={"iterations": 3})})
    brief = FitJob(
        "base",
        "run",
        brief.class_names,
        brief.training,
        brief.validation,
        None,
        brief.config.model_copy(update={"learning": short}),
    )
    cold = fit_alone(brief).paths["base"].files

    training._wake(brief)

    assert fit_alone(brief).paths["base"].files == cold

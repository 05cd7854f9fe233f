"""What a sweep makes of its trials; the trials themselves run in tests/e2e."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

import tune_lambda
from lifelong_ray.config import load_config
from lifelong_ray.cycle import Turn
from lifelong_ray.fitting import Arrays, FitJob
from lifelong_ray.learning import Learner
from lifelong_ray.on_ray import tuning
from lifelong_ray.on_ray.tuning import (
    Sweep,
    Trial,
    choose_best,
    draw,
    pareto_front,
    write_config,
)
from lifelong_ray.release import Registry
from lifelong_ray.types import LearningError
from tests.fakes import MemoryStore
from tests.unit.on_ray.world import settings

STRONG = Trial("exact", 100.0, 1e-3, retention=0.99, plasticity=0.70)
MIDDLE = Trial("exact", 10.0, 1e-3, retention=0.97, plasticity=0.90)
WEAK = Trial("exact", 1.0, 1e-3, retention=0.80, plasticity=0.95)
BEATEN = Trial("exact", 5.0, 9e-3, retention=0.79, plasticity=0.85)
FAILED = Trial("exact", 5.0, 9e-1, None, None, "the loss is nan; lower the learning rate")
ELSEWHERE = Trial("empirical", 900.0, 1e-3, retention=0.98, plasticity=0.93)
FOUND = Sweep((STRONG, MIDDLE, WEAK, BEATEN, FAILED, ELSEWHERE), MIDDLE, 0.95)

SAMPLED = {"lambda_ewc": 5.0, "learning_rate": 0.9}

points = st.tuples(st.integers(0, 5), st.integers(0, 5))


@pytest.fixture
def parent(store: MemoryStore) -> Learner:
    return Learner.from_files(Registry(store).load("v1")[1])


def made(plasticity: int, retention: int) -> Trial:
    return Trial("exact", 1.0, 1e-3, retention / 5, plasticity / 5)


def update_job() -> FitJob:
    nothing = Arrays(np.zeros((0, 1, 8, 8), np.uint8), np.zeros(0, np.int64))
    return FitJob("update", "run", ("a",), nothing, nothing, {}, settings())


# ---------------------------------------------------------------- the Pareto front


@given(st.lists(points, max_size=12))
def test_the_front_is_what_no_trial_beats(places: list[tuple[int, int]]):
    trials = [made(*place) for place in places]

    front = pareto_front(trials)

    unbeaten = {
        (x, y)
        for x, y in places
        if not any(a >= x and b >= y and (a, b) != (x, y) for a, b in places)
    }
    assert sorted(trial.point or () for trial in front) == sorted(
        made(*place).point or () for place in places if place in unbeaten
    )


def test_the_front_runs_from_keeping_to_learning():
    assert pareto_front(FOUND.trials) == (STRONG, ELSEWHERE, WEAK)


def test_a_trial_that_failed_is_not_on_the_front():
    assert pareto_front([FAILED]) == ()


# ---------------------------------------------------------------- who wins


def test_the_winner_learns_most_of_those_that_keep_enough():
    assert choose_best([STRONG, MIDDLE, WEAK, FAILED], 0.95) == MIDDLE


def test_when_none_keeps_enough_the_error_says_how_close_the_best_came():
    with pytest.raises(LearningError, match=r"none of 3 trials keeps 0\.95 .*, the best 0\.800"):
        choose_best([WEAK, BEATEN, FAILED], 0.95)


def test_when_all_fail_the_error_is_the_first_one_s():
    with pytest.raises(LearningError, match=r"none of 2 trials came to an end.*the loss is nan"):
        choose_best([FAILED, FAILED], 0.95)


def test_a_better_trial_of_another_estimator_is_named_but_does_not_win():
    assert FOUND.better_elsewhere == ELSEWHERE
    assert Sweep((STRONG, MIDDLE), MIDDLE, 0.95).better_elsewhere is None


def test_the_winner_is_written_with_its_estimator(tmp_path: Path):
    write_config(FOUND, tmp_path / "new" / "best.yaml", {"learning": {"seed": 3}})

    tree = yaml.safe_load((tmp_path / "new" / "best.yaml").read_text(encoding="utf-8"))
    assert tree["learning"] == {
        "seed": 3,
        "update": {
            "ewc": {"estimator": "exact", "lambda_ewc": 10.0},
            "trainer": {"learning_rate": 1e-3},
        },
    }


def test_the_overrides_of_the_winner_give_its_setting():
    update = load_config(None, FOUND.best_overrides()).learning.update

    assert (update.ewc.estimator, update.ewc.lambda_ewc) == ("exact", 10.0)
    assert update.trainer.learning_rate == 1e-3


# ---------------------------------------------------------------- estimators


def test_each_estimator_is_tried_once():
    assert tuning.estimators_to_try(("empirical", "exact", "empirical"), "exact") == (
        "empirical",
        "exact",
    )


def test_estimators_without_the_version_s_own_are_refused():
    with pytest.raises(LearningError, match=r"Fisher is 'exact', .* add exact"):
        tuning.estimators_to_try(("empirical",), "exact")


def test_the_version_s_own_fisher_is_taken_as_it_is(parent: Learner):
    files = tuning.parent_with(parent, "exact", settings())

    assert files == parent.to_files()


def test_another_estimator_is_estimated_on_what_is_remembered(parent: Learner):
    files = tuning.parent_with(parent, "empirical", settings())

    fisher, own = Learner.from_files(files).fisher, parent.fisher
    assert (fisher.estimator, fisher.num_examples) == ("empirical", len(parent.memory))
    assert fisher.values.keys() == own.values.keys()
    assert not torch.equal(fisher.values["head.weight"], own.values["head.weight"])


def test_another_estimator_needs_remembered_examples(parent: Learner):
    nothing = torch.zeros(len(parent.memory), dtype=torch.bool)
    memory = parent.memory
    empty = replace(
        memory,
        inputs=memory.inputs[nothing],
        labels=memory.labels[nothing],
        updates=memory.updates[nothing],
        logits=memory.logits[nothing],
        stands_for=None,
    )

    with pytest.raises(LearningError, match="'sampled', which needs remembered examples"):
        tuning.parent_with(replace(parent, memory=empty), "sampled", settings())


# ---------------------------------------------------------------- trials


def test_a_training_that_diverges_is_the_worst_trial_and_says_why(monkeypatch: pytest.MonkeyPatch):
    def diverge(job: object) -> object:
        raise LearningError("the loss is nan; lower the learning rate")

    monkeypatch.setattr(tuning, "fit_alone", diverge)
    turn = Turn(
        job=update_job(),
        parent=None,
        snapshot_id="",
        training=(),
        validation=(),
        holdout=(),
        dropped={},
        prepare_seconds=0.0,
    )

    measured = tuning.measure(turn, settings())

    assert measured["error"] == "the loss is nan; lower the learning rate"
    assert float(measured["objective"]) < 0.0 - 10 * 1.0


def test_a_trial_that_diverged_is_a_row_with_its_error():
    metrics = {"error": FAILED.error, "objective": -11.0}

    trial = tuning.trial_from("exact", SAMPLED, metrics, None)

    assert trial == FAILED


def test_a_trial_that_crashed_is_a_row_with_the_last_line_of_its_trace():
    crash = RuntimeError("Traceback (most recent call last):\n  ...\nValueError: odd\n")

    trial = tuning.trial_from("exact", SAMPLED, {}, crash)

    assert (trial.error, trial.retention) == ("ValueError: odd", None)


def test_a_trial_that_ended_is_a_row_with_its_figures():
    metrics = {"retention": 0.5, "plasticity": 0.25, "objective": -4.25}

    trial = tuning.trial_from("sampled", SAMPLED, metrics, None)

    assert trial == Trial("sampled", 5.0, 0.9, retention=0.5, plasticity=0.25)


# ---------------------------------------------------------------- what is shown


def test_the_json_marks_the_front_and_keeps_the_errors():
    found = json.loads(json.dumps(FOUND.to_json()))

    assert [row["on_front"] for row in found["trials"]] == [True, False, True, False, False, True]
    assert found["trials"][4]["error"] == FAILED.error
    assert found["best"] == found["trials"][1]
    assert found["trials"][5]["estimator"] == "empirical"


def test_the_table_has_the_winner_first_and_marks_the_front():
    console = Console(width=160, record=True, file=io.StringIO())

    console.print(tune_lambda.trial_table(FOUND))

    lines = [line for line in console.export_text().splitlines() if "│" in line]
    assert ["*" in line for line in lines] == [False, True, True, True, False, False]
    assert "0.97" in lines[0]
    assert FAILED.error in lines[-1]


def test_the_picture_is_a_png_with_failed_trials_left_out(tmp_path: Path):
    draw(FOUND, tmp_path / "new" / "trials.png")

    with Image.open(tmp_path / "new" / "trials.png") as picture:
        assert picture.format == "PNG"
        assert picture.size == (880, 550)

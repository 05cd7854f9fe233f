"""A light model is taught, trusted only where it may be, and answers with the heavy one as one."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from lifelong_ray.config import CascadeConfig, TrainerConfig
from lifelong_ray.learning import (
    Calibration,
    Cascade,
    Fit,
    Light,
    Predictor,
    Run,
    calibrate,
    fit_base,
    fit_fast,
    teach_light,
    with_light,
)
from lifelong_ray.learning.cascade import harm_bound, num_needed
from lifelong_ray.types import LearningError
from tests.unit.learning.world import CONFIG, MODEL, TickingClock, make_images

NAMES = ("a", "b", "c", "d")
TRAINING = make_images([0, 1, 2, 3] * 20, seed=1)
IMAGES, LABELS = make_images([0, 1, 2, 3] * 10, seed=5)
CASCADE = CascadeConfig(
    enabled=True,
    widths=(4, 4),
    trainer=TrainerConfig(epochs=12, batch_size=16, learning_rate=1e-2, max_shift_px=0),
)
LEARNING = CONFIG.model_copy(update={"cascade": CASCADE})
RUN = Run(clock=TickingClock())


@pytest.fixture(scope="module")
def base() -> Fit:
    return fit_base(TRAINING, NAMES, MODEL, LEARNING, RUN)


@pytest.fixture(scope="module")
def light(base: Fit) -> Light:
    return teach_light(base.learner, TRAINING, LEARNING, RUN)


def trusted(light: Light, threshold: float | None) -> Light:
    calibration = Calibration(threshold, "", 0.5, 0.0, 0.01, 300, 300)
    return replace(light, calibration=calibration)


# ---------------------------------------------------------------- teaching


def test_a_light_model_learns_what_the_version_knows(light: Light) -> None:
    answers = Predictor(light).predict(IMAGES.numpy())

    assert light.class_names == NAMES
    assert (answers.probabilities.argmax(1) == LABELS.numpy()).mean() > 0.9


def test_a_light_model_is_taught_the_same_way_every_time(base: Fit, light: Light) -> None:
    again = teach_light(base.learner, TRAINING, LEARNING, RUN)

    assert again.to_files() == light.to_files()


def test_an_update_goes_on_from_the_light_model_before_it(base: Fit, light: Light) -> None:
    new = make_images([4, 5] * 20, seed=2)
    fast = fit_fast(base.learner, new, (*NAMES, "e", "f"), LEARNING, RUN)

    later = teach_light(fast.learner, new, LEARNING, RUN, parent=light)

    images, labels = make_images([0, 1, 2, 3, 4, 5] * 10, seed=6)
    answers = Predictor(later).predict(images.numpy()).probabilities.argmax(1)
    assert later.model.shape.head_blocks == (4, 2)
    assert (answers == labels.numpy()).mean() > 0.8


def test_a_light_model_of_other_widths_begins_anew(base: Fit, light: Light) -> None:
    wider = LEARNING.model_copy(update={"cascade": CASCADE.model_copy(update={"widths": (8, 8)})})

    later = teach_light(base.learner, TRAINING, wider, RUN, parent=light)

    assert later.model.config.widths == (8, 8)


# ---------------------------------------------------------------- files


def test_a_light_model_comes_back_from_its_files(light: Light) -> None:
    kept = trusted(light, 0.75)

    back = Light.from_files({"model.safetensors": b"", **kept.to_files()})

    assert back is not None
    assert (back.class_names, back.temperature) == (kept.class_names, kept.temperature)
    assert back.calibration == kept.calibration
    batch = IMAGES.numpy()
    one, other = (Predictor(x).predict(batch).probabilities for x in (kept, back))
    assert np.array_equal(one, other)


def test_a_version_from_before_there_were_light_models_has_none(base: Fit) -> None:
    assert Light.from_files(base.learner.to_files()) is None


def test_a_light_model_without_its_settings_is_named(light: Light) -> None:
    files = light.to_files()
    del files["cascade.json"]

    with pytest.raises(LearningError, match=r"has light\.safetensors but lacks cascade\.json"):
        Light.from_files(files)


@pytest.mark.parametrize(
    "change", [{"format": 99}, {"class_names": ["a"]}, {"model": {}}, {"calibration": {"x": 1}}]
)
def test_damaged_settings_are_named(light: Light, change: dict[str, object]) -> None:
    files = light.to_files()
    settings = {**json.loads(files["cascade.json"]), **change}

    with pytest.raises(LearningError, match="light model is damaged"):
        Light.from_files({**files, "cascade.json": json.dumps(settings).encode()})


# ---------------------------------------------------------------- trusting


def hold_out(
    confidence_N: np.ndarray, is_wrong_N: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Light and heavy scores of images of class 0: the heavy model has all right."""
    light_NC = np.stack([confidence_N, 1 - confidence_N], 1).astype(np.float32)
    light_NC[is_wrong_N] = light_NC[is_wrong_N, ::-1]
    heavy_NC = np.tile(np.float32([1, 0]), (len(confidence_N), 1))
    return light_NC, heavy_NC, np.zeros(len(confidence_N), np.int64)


def halves(num: int) -> np.ndarray:
    return np.arange(num) % 2 == 0


def test_the_bound_of_a_share_that_was_never_seen_is_the_rule_of_three() -> None:
    assert harm_bound(0, 300) == pytest.approx(1 - 0.05 ** (1 / 300))
    assert harm_bound(5, 5) == 1
    assert harm_bound(0, num_needed(0.02)) <= 0.02 < harm_bound(0, num_needed(0.02) - 1)


def test_the_threshold_lies_above_the_confidence_of_the_mistakes() -> None:
    confidence_N = np.linspace(0.5, 0.999, 2_000)
    is_wrong_N = confidence_N < 0.7

    found = calibrate(*hold_out(confidence_N, is_wrong_N), halves(2_000), CASCADE)

    assert found.threshold == pytest.approx(0.7, abs=0.005)
    assert found.light_share == pytest.approx(0.6, abs=0.01)
    assert found.accuracy_loss is not None
    assert found.accuracy_loss <= CASCADE.max_accuracy_loss
    assert found.harm_bound is not None
    assert found.harm_bound <= CASCADE.max_accuracy_loss
    assert (found.num_choosing, found.num_measuring) == (1_000, 1_000)


def test_images_of_the_same_confidence_are_answered_together_or_not_at_all() -> None:
    confidence_N = np.repeat([0.99, 0.9], 1_000)
    is_wrong_N = (confidence_N < 0.95) & (np.arange(2_000) % 20 < 2)

    found = calibrate(*hold_out(confidence_N, is_wrong_N), halves(2_000), CASCADE)

    assert found.threshold == pytest.approx(0.99)


def test_a_light_model_that_errs_where_it_is_surest_gets_no_threshold() -> None:
    is_wrong_N = np.arange(1_000) % 10 < 2

    found = calibrate(*hold_out(np.full(1_000, 0.99), is_wrong_N), halves(1_000), CASCADE)

    assert found.threshold is None
    assert "where it is surest" in found.reason


def test_too_few_images_say_how_many_are_needed() -> None:
    found = calibrate(*hold_out(np.full(40, 0.9), np.zeros(40, bool)), halves(40), CASCADE)

    assert found.threshold is None
    assert "20 hold-out images chose and 20 measured" in found.reason
    assert "0.01 needs 299 of each" in found.reason


def test_a_light_model_that_would_answer_too_little_is_not_worth_asking() -> None:
    confidence_N = np.linspace(0.5, 0.999, 2_000)

    found = calibrate(*hold_out(confidence_N, confidence_N < 0.95), halves(2_000), CASCADE)

    assert found.threshold is None
    assert "below min_light_share 0.3" in found.reason


def test_a_loss_on_images_that_had_no_say_is_believed() -> None:
    confidence_N = np.full(2_000, 0.9)
    is_wrong_N = ~halves(2_000) & (np.arange(2_000) % 10 == 1)

    found = calibrate(*hold_out(confidence_N, is_wrong_N), halves(2_000), CASCADE)

    assert found.threshold is None
    assert "on images that had no say its answers lose 0.2000" in found.reason


def test_answers_that_are_better_than_the_heavy_models_are_a_gain() -> None:
    light_NC, heavy_NC, labels_N = hold_out(np.full(1_000, 0.9), np.zeros(1_000, bool))
    heavy_NC[::10] = [0, 1]

    found = calibrate(light_NC, heavy_NC, labels_N, np.arange(1_000) % 4 < 2, CASCADE)

    assert found.threshold is not None
    assert found.accuracy_loss == pytest.approx(-0.1)


def test_the_loss_is_beyond_the_limit_at_most_as_often_as_stated() -> None:
    """A light model whose mistakes grow with doubt; its true harm at a threshold is known."""
    rng = np.random.default_rng(0)
    limit, trials, beyond = 0.05, 400, 0
    config = CASCADE.model_copy(update={"max_accuracy_loss": limit, "min_light_share": 0.0})
    for _ in range(trials):
        doubt_N = rng.random(400)
        is_wrong_N = rng.random(400) < doubt_N
        found = calibrate(*hold_out(1 - doubt_N / 2, is_wrong_N), halves(400), config)
        if found.threshold is not None:
            most_doubt = 2 * (1 - found.threshold)
            beyond += most_doubt**2 / 2 > limit

    # Expected at most 20 of 400, with a standard deviation of 4.4.
    assert beyond <= 34


# ---------------------------------------------------------------- answering


def test_both_models_answer_as_one(base: Fit, light: Light) -> None:
    heavy = Predictor(base.learner)
    batch = IMAGES.numpy()
    theirs, own = (Predictor(light).predict(batch), heavy.predict(batch))
    confidence_N = theirs.probabilities.max(1)
    threshold = float(np.sort(confidence_N)[len(batch) // 2])

    answers = Cascade(trusted(light, threshold), heavy).predict(batch)

    sure_N = confidence_N >= threshold
    assert 0 < sure_N.sum() < len(batch)
    assert np.array_equal(answers.light, sure_N)
    expected = np.where(sure_N[:, None], theirs.probabilities, own.probabilities)
    np.testing.assert_allclose(answers.probabilities, expected, atol=1e-6)


@pytest.mark.parametrize(("threshold", "share"), [(0.0, 1.0), (1.1, 0.0)])
def test_one_model_may_answer_all(base: Fit, light: Light, threshold: float, share: float) -> None:
    cascade = Cascade(trusted(light, threshold), Predictor(base.learner))
    cascade.warm_up((1, 3))

    assert cascade.predict(IMAGES.numpy()).light.mean() == share
    assert cascade.predict(np.zeros((0, 1, 8, 8), np.uint8)).probabilities.shape == (0, 4)


def test_the_light_model_computes_in_fp32_beside_a_heavy_one_in_fewer_bits(
    base: Fit, light: Light
) -> None:
    cascade = Cascade(trusted(light, 0.0), Predictor(base.learner, precision="bf16"))

    answers = cascade.predict(IMAGES.numpy())

    assert cascade.precision == "bf16"
    expected = Predictor(light).predict(IMAGES.numpy()).probabilities
    assert np.array_equal(answers.probabilities, expected)


def test_a_light_model_without_a_threshold_is_never_asked(base: Fit, light: Light) -> None:
    heavy = Predictor(base.learner)

    assert with_light(heavy, None) is heavy
    assert with_light(heavy, light) is heavy
    assert with_light(heavy, trusted(light, None)) is heavy
    assert not heavy.predict(IMAGES.numpy()).light.any()
    with pytest.raises(ValueError, match="calibrate it beside it"):
        Cascade(light, heavy)


def test_teaching_leaves_the_teacher_as_it_is(base: Fit) -> None:
    before = {name: w.clone() for name, w in base.learner.model.state_dict().items()}

    teach_light(base.learner, TRAINING, LEARNING, RUN)

    after = base.learner.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not base.learner.model.training

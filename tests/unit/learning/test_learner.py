from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from lifelong_ray.learning import Learner, Predictor, Run, fit_slow
from lifelong_ray.types import LearningError
from tests.unit.learning.world import (
    CONFIG,
    TickingClock,
    assert_same_weights,
    make_images,
)

IMAGES, _ = make_images([0, 1, 2, 3], seed=11)


def test_a_learner_survives_its_files_to_the_bit(base):
    files = base.learner.to_files()

    again = Learner.from_files(files)

    assert_same_weights(again.model, base.learner.model)
    assert torch.equal(again.logits(IMAGES), base.learner.logits(IMAGES))
    assert torch.equal(again.memory.inputs, base.learner.memory.inputs)
    assert again.class_names == base.learner.class_names
    assert again.to_files() == files


def test_an_update_of_a_stored_learner_equals_one_of_the_learner_itself(base, new_examples):
    stored = Learner.from_files(base.learner.to_files())

    fits = [
        fit_slow(parent, new_examples, "abcdef", CONFIG, Run(TickingClock())).learner
        for parent in (base.learner, stored)
    ]

    assert fits[0].to_files() == fits[1].to_files()


@pytest.mark.parametrize(
    "name", ["model.safetensors", "learner.safetensors", "memory.parquet", "learner.json"]
)
def test_a_missing_or_damaged_file_is_a_learning_error(base, name):
    files = base.learner.to_files()

    with pytest.raises(LearningError, match=f"lacks {name}"):
        Learner.from_files({k: v for k, v in files.items() if k != name})
    for damaged in (b"", files[name][:-20], b"\x00" * 40):
        with pytest.raises(LearningError, match="damaged or do not fit"):
            Learner.from_files({**files, name: damaged})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("class_names", ["a", "b"]),
        ("shape", {}),
        ("active_head", "other"),
        ("model", {"name": "convnet", "widths": [8, 24], "image_size": 8}),
        ("temperature", None),
    ],
)
def test_files_that_do_not_fit_together_are_a_learning_error(base, key, value):
    files = base.learner.to_files()
    settings = json.loads(files["learner.json"]) | {key: value}

    with pytest.raises(LearningError, match="damaged or do not fit"):
        Learner.from_files({**files, "learner.json": json.dumps(settings).encode()})


def test_files_of_the_format_before_are_read_unless_their_head_looks_at_stages(base):
    files = base.learner.to_files()
    settings = json.loads(files["learner.json"]) | {"format": 2}

    older = Learner.from_files(files | {"learner.json": json.dumps(settings).encode()})

    assert torch.equal(older.logits(IMAGES), base.learner.logits(IMAGES))
    settings["shape"]["source"] = "stages"
    with pytest.raises(LearningError, match="train a new base version"):
        Learner.from_files(files | {"learner.json": json.dumps(settings).encode()})


def test_files_of_another_format_are_refused(base):
    files = base.learner.to_files()
    settings = json.loads(files["learner.json"]) | {"format": 99}

    with pytest.raises(LearningError, match="format 99"):
        Learner.from_files({**files, "learner.json": json.dumps(settings).encode()})


def test_predictor_answers_as_the_learner_does(base):
    predictor = Predictor(base.learner)
    predictor.warm_up()
    batch = IMAGES.numpy()
    batch.setflags(write=False)

    answers = predictor.predict(batch)

    expected = torch.softmax(base.learner.logits(IMAGES), 1).numpy()
    assert answers.probabilities.dtype == np.float32
    assert answers.class_names == ("a", "b", "c", "d")
    np.testing.assert_allclose(answers.probabilities, expected, atol=1e-6)
    np.testing.assert_allclose(answers.probabilities.sum(1), 1, atol=1e-6)


def test_faster_arithmetic_gives_the_same_classes(base):
    plain = Predictor(base.learner).predict(IMAGES.numpy())

    answers = Predictor(base.learner, precision="bf16").predict(IMAGES.numpy())

    assert (answers.probabilities.argmax(1) == plain.probabilities.argmax(1)).all()
    np.testing.assert_allclose(answers.probabilities, plain.probabilities, atol=0.1)


def test_predictor_refuses_what_the_model_does_not_take(base):
    predictor = Predictor(base.learner)

    with pytest.raises(ValueError, match=r"uint8 of shape \(N, 1, 8, 8\)"):
        predictor.predict(np.zeros((1, 1, 9, 8), np.uint8))
    with pytest.raises(ValueError, match="float64"):
        predictor.predict(np.zeros((1, 1, 8, 8)))
    assert predictor.predict(np.zeros((0, 1, 8, 8), np.uint8)).probabilities.shape == (0, 4)

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from lifelong_ray.learning import evaluate, fit_temperature


def test_evaluation_of_a_hand_computed_case():
    logits = torch.tensor([[3.0, 0, 0], [0, 1, 2], [0, 2, 1], [0, 0, 5]])
    labels = torch.tensor([0, 1, 1, 2])
    parent = torch.tensor([[1.0, 0], [0, 1], [1, 0], [1, 0]])

    result = evaluate(logits, labels, num_old_classes=2, parent_logits=parent)

    assert result.accuracy == 0.75
    assert result.per_class_accuracy == (1.0, 0.5, 1.0)
    assert result.old_accuracy == pytest.approx(2 / 3)
    assert result.within_old_accuracy == 1.0
    assert result.new_accuracy == 1.0
    assert result.negative_flip_share == 0.25


def test_a_class_without_examples_has_no_accuracy():
    result = evaluate(torch.zeros(1, 2), torch.tensor([0]))

    assert result.per_class_accuracy == (1.0, None)
    assert result.new_accuracy is None
    assert result.negative_flip_share is None


def test_calibration_error_is_the_gap_between_confidence_and_accuracy():
    logits = torch.tensor([[math.log(4.0), 0.0]] * 10)
    labels = torch.tensor([0] * 6 + [1] * 4)

    assert evaluate(logits, labels).calibration_error == pytest.approx(0.2)


def test_temperature_recovers_the_one_that_labels_were_drawn_with():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(20_000, 4, generator=generator)
    labels = torch.multinomial(F.softmax(logits, 1), 1, generator=generator)[:, 0]

    assert fit_temperature(logits * 5, labels) == pytest.approx(5, rel=0.05)
    assert fit_temperature(logits / 10, labels) == pytest.approx(0.1, rel=0.05)


def test_a_model_without_a_mistake_is_not_taken_to_be_infallible():
    logits = torch.tensor([[1.0, 0.0]] * 30)
    labels = torch.zeros(30, dtype=torch.int64)

    temperature = fit_temperature(logits, labels)

    assert float(F.softmax(logits / temperature, 1)[0, 0]) == pytest.approx(1 - 0.5 / 31, abs=0.02)


def test_nothing_to_judge_is_an_error():
    with pytest.raises(ValueError, match="no examples"):
        evaluate(torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64))

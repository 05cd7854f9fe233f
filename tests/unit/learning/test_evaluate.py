from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from lifelong_ray.learning.evaluate import (
    accuracy,
    allowed_classes,
    evaluate,
    fit_temperature,
    time_per_image,
)
from lifelong_ray.types import LearningError


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


def test_flips_are_counted_in_both_directions():
    logits = F.one_hot(torch.tensor([0, 1, 1, 0, 1])).float()
    parent = F.one_hot(torch.tensor([0, 0, 0, 1, 1])).float()
    labels = torch.tensor([0, 1, 1, 1, 1])

    result = evaluate(logits, labels, parent_logits=parent)

    assert result.negative_flip_share == pytest.approx(1 / 5)
    assert result.positive_flip_share == pytest.approx(2 / 5)
    gained = result.positive_flip_share - result.negative_flip_share
    assert result.accuracy - accuracy(parent, labels) == pytest.approx(gained)


def test_mean_class_accuracy_counts_a_rare_class_as_much_as_a_frequent_one():
    logits = torch.tensor([[1.0, 0.0, 0.0]] * 10)
    labels = torch.tensor([0] * 9 + [1])

    result = evaluate(logits, labels)

    assert result.accuracy == 0.9
    assert result.mean_class_accuracy == 0.5


def test_only_allowed_classes_compete_where_the_task_is_known():
    logits = torch.tensor([[1.0, 0.0, 5.0, 0.0], [0.0, 1.0, 5.0, 0.0], [9.0, 0.0, 1.0, 0.0]])
    parent = torch.tensor([[0.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    labels = torch.tensor([0, 1, 2])
    allowed = allowed_classes(torch.tensor([0, 0, 1]), [[0, 1], [2, 3]], 4)

    result = evaluate(logits, labels, parent_logits=parent, allowed_NC=allowed, num_old_classes=2)

    # Every row then chooses among two classes whose logits are one apart.
    doubt = math.log1p(math.exp(-1.0))
    assert evaluate(logits, labels).accuracy == 0
    assert result.accuracy == result.old_accuracy == result.new_accuracy == 1
    assert result.negative_log_likelihood == pytest.approx(doubt)
    assert result.calibration_error == pytest.approx(1 - math.exp(-doubt))
    assert result.positive_flip_share == pytest.approx(2 / 3)


def test_all_classes_allowed_is_the_same_as_none_said():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(20, 4, generator=generator)
    labels = torch.randint(0, 4, (20,), generator=generator)

    masked = evaluate(logits, labels, allowed_NC=torch.ones(20, 4, dtype=torch.bool))

    assert masked == evaluate(logits, labels)


def test_time_per_image_is_the_median_of_the_rounds_after_a_warm_up():
    ticks = iter([0.0, 0.1, 1.0, 1.5, 2.0, 2.2])
    calls: list[int] = []

    milliseconds = time_per_image(
        lambda images: calls.append(len(images)), torch.zeros(4, 1), lambda: next(ticks), rounds=3
    )

    assert milliseconds == pytest.approx(200 / 4)
    assert calls == [4] * 4


def test_nothing_to_time_is_an_error():
    with pytest.raises(LearningError, match="0 rounds over 4 images"):
        time_per_image(len, torch.zeros(4, 1), lambda: 0.0, rounds=0)


def test_nothing_to_judge_is_an_error():
    nothing = torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64)

    with pytest.raises(LearningError, match="no examples"):
        evaluate(*nothing)
    with pytest.raises(LearningError, match="no examples"):
        accuracy(*nothing)


def test_a_label_outside_the_classes_is_named():
    with pytest.raises(LearningError, match="a label is 2, outside the 2 classes"):
        evaluate(torch.zeros(2, 2), torch.tensor([0, 2]))
    with pytest.raises(LearningError, match="a label is -1, outside"):
        evaluate(torch.zeros(2, 2), torch.tensor([0, -1]))


def test_as_many_logits_as_labels_are_needed():
    with pytest.raises(LearningError, match="logits of 3 examples but 2 labels"):
        evaluate(torch.zeros(3, 2), torch.tensor([0, 1]))
    with pytest.raises(LearningError, match=r"parent has logits of shape \(1, 2\) but 2 examples"):
        evaluate(torch.zeros(2, 2), torch.tensor([0, 1]), parent_logits=torch.zeros(1, 2))


def test_a_label_that_is_not_allowed_is_named():
    allowed = torch.tensor([[True, True], [True, False]])

    with pytest.raises(LearningError, match="example 1 is of class 1"):
        evaluate(torch.zeros(2, 2), torch.tensor([0, 1]), allowed_NC=allowed)
    with pytest.raises(LearningError, match=r"allowed classes are torch.bool of shape \(1, 2\)"):
        evaluate(torch.zeros(2, 2), torch.tensor([0, 1]), allowed_NC=allowed[:1])


def test_tasks_and_their_classes_must_exist():
    with pytest.raises(LearningError, match="there are 1; list the classes"):
        allowed_classes(torch.tensor([0, 1]), [[0]], 2)
    with pytest.raises(LearningError, match="task 0 has class 5"):
        allowed_classes(torch.tensor([0]), [[0, 5]], 2)

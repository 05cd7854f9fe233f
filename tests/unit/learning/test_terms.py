from __future__ import annotations

import pytest
import torch

from lifelong_ray.learning import distillation_loss, ewc_penalty


def test_ewc_penalty_is_half_the_weighted_squared_distance():
    now = {"w": torch.tensor([1.0, 3.0]), "head.bias": torch.tensor([2.0, 9.0])}
    anchor = {"w": torch.tensor([0.0, 1.0]), "head.bias": torch.tensor([1.0])}
    fisher = {"w": torch.tensor([2.0, 0.5]), "head.bias": torch.tensor([3.0])}

    penalty = ewc_penalty(now, anchor, fisher)

    assert penalty.item() == 0.5 * (2 * 1 + 0.5 * 4 + 3 * 1)


def test_ewc_penalty_pulls_back_along_the_fisher():
    weight = torch.tensor([1.0, 3.0], requires_grad=True)

    ewc_penalty(
        {"w": weight}, {"w": torch.tensor([0.0, 1.0])}, {"w": torch.tensor([2.0, 0.5])}
    ).backward()

    assert weight.grad is not None
    assert weight.grad.tolist() == [2.0, 1.0]


def test_ewc_penalty_refuses_a_weight_that_changed_shape():
    with pytest.raises(ValueError, match=r"w has shape \(3,\) but its anchor has \(2,\)"):
        ewc_penalty({"w": torch.ones(3)}, {"w": torch.ones(2)}, {"w": torch.ones(2)})


def test_distillation_costs_nothing_when_the_known_classes_agree():
    teacher = torch.tensor([[2.0, -1.0]])
    student = torch.tensor([[2.5, -0.5, 7.0]])

    assert distillation_loss(student, teacher, 2.0).item() == pytest.approx(0, abs=1e-6)


def test_distillation_gradient_is_the_difference_of_the_answers():
    teacher = torch.tensor([[1.0, 0.0]])
    student = torch.tensor([[0.0, 0.5, 3.0]], requires_grad=True)

    distillation_loss(student, teacher, 2.0).sum().backward()

    softened = torch.softmax(student[:, :2] / 2, 1) - torch.softmax(teacher / 2, 1)
    assert student.grad is not None
    torch.testing.assert_close(student.grad[:, :2], 2 * softened.detach())
    assert student.grad[0, 2] == 0


def test_distillation_refuses_a_teacher_that_knows_more_classes():
    with pytest.raises(ValueError, match="grow the student"):
        distillation_loss(torch.zeros(1, 2), torch.zeros(1, 3), 1.0)

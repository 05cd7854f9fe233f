from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lifelong_ray.learning.penalties import EwcPenalty, dark_loss, ewc_penalty

Weights = dict[str, nn.Parameter]


def make_weights(seed: int, num_classes: int = 3) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "stages.0.weight": (4, 2, 3, 3),
        "stages.0.bias": (4,),
        "stages.1.weight": (300, 4, 8, 8),  # worked on in pieces
        "head.weight": (num_classes, 4),
        "head.bias": (num_classes,),
    }
    return {n: nn.Parameter(torch.randn(s, generator=generator)) for n, s in shapes.items()}


def make_penalty(factors: dict[str, float] | None = None) -> EwcPenalty:
    anchor = {name: weight.detach() for name, weight in make_weights(1).items()}
    fisher = {name: weight.detach().square() for name, weight in make_weights(2).items()}
    return EwcPenalty(anchor, fisher, factors)


def by_autograd(penalty: EwcPenalty, weights: Weights, scale: float) -> dict[str, torch.Tensor]:
    gradients = torch.autograd.grad(scale * penalty(weights), list(weights.values()))
    return dict(zip(weights, gradients, strict=True))


@pytest.mark.parametrize("num_classes", [3, 5])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_added_gradient_is_that_of_autograd(num_classes, layout):
    penalty, weights = make_penalty(), make_weights(0, num_classes)
    for name in ("stages.0.weight", "stages.1.weight"):
        weights[name].data = weights[name].data.contiguous(memory_format=layout)
    expected = by_autograd(penalty, weights, 7.0)
    for weight in weights.values():
        weight.grad = torch.ones_like(weight)
    weights["stages.1.weight"].grad = torch.ones(300, 4, 8, 8)  # whatever the weight's layout

    penalty.add_gradient(weights, 7.0)

    for name, weight in weights.items():
        assert weight.grad is not None
        torch.testing.assert_close(weight.grad, 1 + expected[name])


@pytest.mark.parametrize("scale", [0.1, 1.0, 1e5])
def test_added_gradient_is_exactly_nothing_at_the_anchor(scale):
    penalty, weights = make_penalty(), make_weights(1)

    penalty.add_gradient(weights, scale)

    assert not any(weight.grad.any() for weight in weights.values())


def test_added_gradient_follows_the_scale():
    penalty, weights = make_penalty(), make_weights(0)
    penalty.add_gradient(weights, 1.0)
    expected = by_autograd(penalty, weights, 3.0)

    penalty.add_gradient(weights, 2.0)

    for name, weight in weights.items():
        torch.testing.assert_close(weight.grad, expected[name])


def test_added_gradient_is_all_there_is_for_weights_without_one():
    penalty, weights = make_penalty(), make_weights(0)
    expected = by_autograd(penalty, weights, 2.0)

    penalty.add_gradient(weights, 2.0)

    for name, weight in weights.items():
        assert weight.grad is not None
        torch.testing.assert_close(weight.grad, expected[name])


def test_added_gradient_leaves_rows_of_later_classes_free():
    penalty, weights = make_penalty(), make_weights(0, num_classes=5)

    penalty.add_gradient(weights, 1.0)

    assert weights["head.weight"].grad is not None
    assert weights["head.weight"].grad[:3].all()
    assert not weights["head.weight"].grad[3:].any()


def test_added_gradient_follows_when_the_weights_are_replaced():
    penalty, first, second = make_penalty(), make_weights(0), make_weights(3, num_classes=4)
    penalty.add_gradient(first, 1.0)
    expected = by_autograd(penalty, second, 1.0)

    penalty.add_gradient(second, 1.0)

    for name, weight in second.items():
        torch.testing.assert_close(weight.grad, expected[name])


def test_added_gradient_refuses_a_weight_that_changed_shape():
    penalty, weights = make_penalty(), make_weights(0)
    weights["stages.0.bias"] = nn.Parameter(torch.zeros(5))

    with pytest.raises(ValueError, match=r"stages.0.bias has shape \(5,\) but its anchor has \(4,"):
        penalty.add_gradient(weights, 1.0)


def test_penalty_refuses_a_head_that_lost_rows():
    with pytest.raises(ValueError, match=r"head.weight has shape \(2, 4\) but its anchor has"):
        make_penalty()(make_weights(0, num_classes=2))


def test_factors_apply_by_the_longest_beginning_of_a_name_that_fits():
    factors = {"stages": 0.5, "stages.0.bias": 3.0}
    weights = make_weights(0)
    plain = by_autograd(make_penalty(), weights, 1.0)

    weighted = by_autograd(make_penalty(factors), weights, 1.0)

    expected = {"stages.0.weight": 0.5, "stages.0.bias": 3.0, "head.weight": 1, "head.bias": 1}
    for name, factor in expected.items():
        torch.testing.assert_close(weighted[name], factor * plain[name])


def test_a_factor_that_fits_no_weight_is_warned_about(caplog):
    make_penalty({"backbone": 2.0, "head": 1.0})

    assert "no weight that begins with backbone" in caplog.text
    assert "head" not in caplog.text.replace("that begins with backbone", "")


def test_value_is_the_penalty_as_a_number():
    penalty, weights = make_penalty(), make_weights(0)

    value = penalty.value(weights)

    assert value == pytest.approx(float(penalty(weights).detach()))


def test_value_of_a_penalty_too_heavy_for_the_learning_rate_becomes_infinite():
    penalty, weights = make_penalty(), make_weights(0)
    optimizer = torch.optim.SGD(weights.values(), lr=1.0)

    for _ in range(50):
        optimizer.zero_grad()
        penalty.add_gradient(weights, 1e6)
        optimizer.step()

    assert not math.isfinite(penalty.value(weights))


def test_penalty_keeps_the_anchor_when_the_weights_it_came_from_move():
    weights = make_weights(0)
    penalty = EwcPenalty(weights, {name: torch.ones_like(w) for name, w in weights.items()})

    with torch.no_grad():
        weights["head.bias"] += 2

    assert penalty.value(weights) == pytest.approx(0.5 * 3 * 4)


def test_penalty_of_cosine_scale_counts_too():
    now, anchor = {"head.scale": torch.tensor(3.0)}, {"head.scale": torch.tensor(1.0)}

    assert ewc_penalty(now, anchor, {"head.scale": torch.tensor(2.0)}).item() == 4


def test_dark_loss_is_the_mean_squared_distance_over_the_stored_classes():
    now = torch.tensor([[1.0, 2.0, 50.0], [0.0, 0.0, 50.0]])
    stored = torch.tensor([[0.0, 4.0], [0.0, 3.0]])

    assert dark_loss(now, stored).tolist() == [2.5, 4.5]


def test_dark_loss_leaves_out_classes_unknown_when_the_example_was_stored():
    now = torch.tensor([[1.0, 2.0], [1.0, 2.0]], requires_grad=True)
    stored = torch.tensor([[3.0, math.nan], [math.nan, math.nan]])

    losses = dark_loss(now, stored)
    losses.sum().backward()

    assert losses.tolist() == [4, 0]
    assert now.grad is not None
    assert now.grad.tolist() == [[-4, 0], [0, 0]]


def test_dark_loss_refuses_more_stored_classes_than_the_model_has():
    with pytest.raises(ValueError, match="grow the model first"):
        dark_loss(torch.zeros(1, 2), torch.zeros(1, 3))


def test_a_fisher_of_another_architecture_is_named():
    one = {"stages.0.weight": torch.ones(2)}
    penalty = EwcPenalty(one, one)

    with pytest.raises(ValueError, match=r"another architecture: it has stages\.0\.weight"):
        penalty({"head.weight": torch.ones(2)})
    with pytest.raises(ValueError, match="another architecture"):
        penalty.add_gradient({"head.weight": torch.nn.Parameter(torch.ones(2))}, 1.0)

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from lifelong_ray.config import ModelConfig
from lifelong_ray.learning import Classifier, Fisher, build_model, estimate_fisher
from lifelong_ray.types import LearningError
from tests.unit.learning.world import MODEL, make_images, on_workers


def reference(model: Classifier, images: torch.Tensor, labels: torch.Tensor, kind: str):
    """Batches of one, in float64, straight from the definition."""
    model = model.copy().double().eval()
    weights = dict(model.named_parameters())
    sums = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for image, label in zip(images, labels, strict=True):
        log_p = F.log_softmax(model.head(model.features(image[None].double() / 255)), dim=1)[0]
        if kind == "exact":
            rounds = [(c, float(log_p[c].detach().exp())) for c in range(len(log_p))]
        else:
            rounds = [(int(label), 1.0)]
        for c, weight in rounds:
            gradients = torch.autograd.grad(log_p[c], list(weights.values()), retain_graph=True)
            for name, gradient in zip(weights, gradients, strict=True):
                sums[name] += weight * gradient.square()
    return {name: value / len(images) for name, value in sums.items()}


@pytest.mark.parametrize("kind", ["exact", "empirical"])
@pytest.mark.parametrize("config", [MODEL, ModelConfig(name="mlp", widths=(12,), image_size=8)])
def test_fisher_equals_a_loop_over_batches_of_one_in_float64(kind, config):
    model = build_model(config, 4, seed=0)
    images, labels = make_images([0, 1, 2, 3, 1, 2, 0], seed=0)

    fisher = estimate_fisher(
        model, images, labels, estimator=kind, generator=torch.Generator().manual_seed(0)
    )

    expected = reference(model, images, labels, kind)
    assert fisher.values.keys() == expected.keys()
    for name, value in expected.items():
        scale = float(value.abs().max())
        torch.testing.assert_close(
            fisher.values[name].double(), value, rtol=1e-4, atol=1e-4 * scale
        )


def test_exact_fisher_of_a_linear_softmax_has_its_closed_form():
    model = build_model(ModelConfig(name="mlp", widths=(6,), image_size=8), 3, seed=0)
    images, labels = make_images([0, 1, 2, 0], seed=0)

    fisher = estimate_fisher(model, images, labels, generator=torch.Generator())

    with torch.no_grad():
        x_ND = model.features(images).double()
        p_NC = F.softmax(model.head(model.features(images)).double(), dim=1)
    variance_NC = p_NC * (1 - p_NC)
    expected_CD = variance_NC.T @ x_ND.square() / len(images)
    torch.testing.assert_close(
        fisher.values["head.weight"].double(), expected_CD, rtol=1e-4, atol=1e-8
    )
    torch.testing.assert_close(
        fisher.values["head.bias"].double(), variance_NC.mean(0), rtol=1e-4, atol=1e-8
    )


def test_sampled_fisher_averages_to_the_exact_one():
    model = build_model(MODEL, 4, seed=0)
    images, labels = make_images([0, 1, 2, 3], seed=0)
    exact = estimate_fisher(model, images, labels, generator=torch.Generator())
    many, many_labels = images.repeat(400, 1, 1, 1), labels.repeat(400)

    sampled = estimate_fisher(
        model,
        many,
        many_labels,
        estimator="sampled",
        generator=torch.Generator().manual_seed(1),
    )

    for name in ("head.weight", "stages.0.0.weight"):
        ratio = float(sampled.values[name].sum() / exact.values[name].sum())
        assert ratio == pytest.approx(1, abs=0.05), name


def test_fisher_is_the_same_on_any_number_of_workers():
    model = build_model(MODEL, 4, seed=0)
    images, labels = make_images([0, 1, 2, 3, 1, 2, 0], seed=0)

    def estimate(group):
        return estimate_fisher(
            model.copy(),
            images,
            labels,
            estimator="sampled",
            generator=torch.Generator().manual_seed(4),
            collective=group,
        )

    alone, (first, second) = estimate(None), on_workers(2, estimate)

    assert first.num_examples == second.num_examples == alone.num_examples == 7
    for name, value in alone.values.items():
        torch.testing.assert_close(first.values[name], value, rtol=1e-4, atol=1e-8)
        assert torch.equal(first.values[name], second.values[name])


def test_fisher_leaves_the_model_in_its_mode_and_weights():
    model = build_model(MODEL, 4, seed=0).train()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    images, labels = make_images([0, 1], seed=0)

    estimate_fisher(model, images, labels, generator=torch.Generator())

    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(weight.grad is None for weight in model.parameters())


def test_fisher_gives_rows_of_later_classes_no_importance():
    model = build_model(MODEL, 4, seed=0)
    images, labels = make_images([0, 1], seed=0)
    fisher = estimate_fisher(model, images, labels, generator=torch.Generator())
    model.grow(6, torch.Generator())

    padded = fisher.for_model(model)

    assert not padded.values["head.weight"][4:].any()
    assert torch.equal(padded.values["head.weight"][:4], fisher.values["head.weight"])


def test_fisher_of_another_architecture_is_refused_by_name():
    model = build_model(MODEL, 4, seed=0)
    images, labels = make_images([0, 1], seed=0)
    fisher = estimate_fisher(model, images, labels, generator=torch.Generator())
    wider = build_model(ModelConfig(widths=(8, 24), image_size=8), 4, seed=0)
    deeper = build_model(ModelConfig(widths=(8, 16, 16), image_size=8), 4, seed=0)

    with pytest.raises(LearningError, match=r"stages.1.0.weight has shape \(16, 8, 3, 3\)"):
        fisher.for_model(wider)
    with pytest.raises(LearningError, match=r"stages.2.0.bias is in only one"):
        fisher.for_model(deeper)


def test_merging_keeps_the_importance_of_weights_the_newer_estimate_lacks():
    older = Fisher({"a": torch.tensor([1.0]), "b": torch.tensor([2.0])}, "exact", 10)
    newer = Fisher({"b": torch.tensor([4.0])}, "exact", 5)

    merged = older.merged(newer, newer_share=0.25)

    assert merged.values["a"].item() == 1
    assert merged.values["b"].item() == 2.5
    assert merged.num_examples == 15

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from lifelong_ray.config import ModelConfig
from lifelong_ray.learning import Classifier, Fisher, build_model, estimate_fisher
from lifelong_ray.learning.fisher import fold_anchors
from lifelong_ray.learning.penalties import ewc_penalty
from lifelong_ray.types import LearningError
from tests.unit.learning.world import MODEL, make_images, on_workers


def reference(
    model: Classifier,
    images: torch.Tensor,
    labels: torch.Tensor,
    kind: str,
    allowed: torch.Tensor | None = None,
):
    """Batches of one, in float64, straight from the definition."""
    model = model.copy().double().eval()
    weights = dict(model.named_parameters())
    sums = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for image, label in zip(images, labels, strict=True):
        logits = model.trained_logits(image[None].double() / 255)
        if allowed is not None:
            logits = logits.masked_fill(~allowed, -torch.inf)
        log_p = F.log_softmax(logits, dim=1)[0]
        if kind == "exact":
            rounds = [(c, float(log_p[c].detach().exp())) for c in range(len(log_p))]
            rounds = [(c, share) for c, share in rounds if share]
        else:
            rounds = [(int(label), 1.0)]
        for c, weight in rounds:
            gradients = torch.autograd.grad(log_p[c], list(weights.values()), retain_graph=True)
            for name, gradient in zip(weights, gradients, strict=True):
                sums[name] += weight * gradient.square()
    return {name: value / len(images) for name, value in sums.items()}


def assert_equals_reference(model: Classifier, kind: str = "empirical", **more: object) -> None:
    images, labels = make_images([0, 1, 2, 3, 1, 2, 0], seed=0)

    fisher = estimate_fisher(
        model, images, labels, estimator=kind, generator=torch.Generator().manual_seed(0), **more
    )

    expected = reference(model, images, labels, kind)
    assert fisher.values.keys() == expected.keys()
    for name, value in expected.items():
        scale = float(value.abs().max())
        torch.testing.assert_close(
            fisher.values[name].double(), value, rtol=1e-4, atol=1e-4 * scale
        )


def with_stage(make: Callable[[], nn.Module], num_features: int) -> Classifier:
    """A classifier of 8 x 8 grey images whose only stage is of our own making."""
    torch.manual_seed(0)
    config = ModelConfig(name="mlp", widths=(num_features,), image_size=8)
    model = build_model(config, 4, seed=0)
    model.stages = nn.ModuleList([make()])
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
        if isinstance(layer, nn.GroupNorm | nn.LayerNorm | nn.BatchNorm2d):
            nn.init.normal_(layer.weight, 1, 0.3)
            nn.init.normal_(layer.bias, 0, 0.3)
    return model


@pytest.mark.parametrize("kind", ["exact", "empirical"])
def test_where_some_classes_alone_compete_the_fisher_is_of_that_likelihood(kind):
    model = build_model(MODEL, 4, seed=0)
    images, labels = make_images([1, 3, 1, 3, 3], seed=0)
    allowed = torch.tensor([False, True, False, True])

    fisher = estimate_fisher(
        model,
        images,
        labels,
        estimator=kind,
        generator=torch.Generator().manual_seed(0),
        allowed_C=allowed,
    )

    expected = reference(model, images, labels, kind, allowed)
    for name, value in expected.items():
        scale = float(value.abs().max())
        torch.testing.assert_close(
            fisher.values[name].double(), value, rtol=1e-4, atol=1e-4 * scale
        )
    assert not bool(fisher.values["head.weight"][~allowed].any())


@pytest.mark.parametrize("kind", ["exact", "empirical"])
@pytest.mark.parametrize("config", [MODEL, ModelConfig(name="mlp", widths=(12,), image_size=8)])
def test_fisher_equals_a_loop_over_batches_of_one_in_float64(kind, config):
    assert_equals_reference(build_model(config, 4, seed=0), kind)


CONVOLUTIONS = {
    "strided": {"kernel_size": 3, "stride": 2, "padding": 1},
    "strided and dilated unevenly": {
        "kernel_size": (3, 2),
        "stride": (1, 2),
        "dilation": (2, 1),
        "padding": (2, 0),
    },
    "in groups": {"kernel_size": 3, "groups": 2, "padding": 1},
    "depthwise": {"kernel_size": 3, "groups": 8, "padding": 1, "bias": False},
    "of one pixel": {"kernel_size": 1, "stride": 2},
    "of the whole image": {"kernel_size": 8},
    "padded to the same size": {"kernel_size": (3, 5), "padding": "same"},
    "without padding, by name": {"kernel_size": 3, "padding": "valid"},
    "padded with reflections": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
}


@pytest.mark.parametrize("settings", CONVOLUTIONS.values(), ids=CONVOLUTIONS.keys())
def test_fisher_knows_any_convolution(settings):
    layers = (nn.Conv2d(1, 8, 1), nn.Conv2d(8, 16, **settings), nn.Tanh())
    model = with_stage(
        lambda: nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), num_features=16
    )

    assert_equals_reference(model)


def test_fisher_knows_convolutions_with_many_inputs():
    layers = (nn.Conv2d(1, 16, 1), nn.Tanh(), nn.Conv2d(16, 6, 3, stride=2, padding=1))
    model = with_stage(
        lambda: nn.Sequential(*layers, nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten()), 6
    )

    assert_equals_reference(model, "exact")


@pytest.mark.parametrize("kernel_size", [5, 7, 8])
def test_fisher_knows_convolutions_with_few_outputs(kernel_size):
    layers = (nn.Conv2d(1, 8, 1), nn.Tanh(), nn.Conv2d(8, 6, kernel_size), nn.Tanh())
    model = with_stage(lambda: nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), 6)

    assert_equals_reference(model)


def test_fisher_knows_batch_normalisation_between_layers_that_overwrite():
    model = with_stage(
        lambda: nn.Sequential(
            nn.Conv2d(1, 6, 3),
            nn.BatchNorm2d(6),
            nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        ),
        num_features=6,
    )

    assert_equals_reference(model)


def test_fisher_knows_layers_over_sequences(caplog):
    model = with_stage(
        lambda: nn.Sequential(
            nn.Flatten(1, 2),
            nn.LayerNorm(8),
            nn.Linear(8, 5),
            nn.Tanh(),
            nn.LayerNorm((8, 5)),
            nn.Flatten(),
        ),
        num_features=40,
    )

    with caplog.at_level(logging.INFO):
        assert_equals_reference(model)

    assert "layer by layer" in caplog.text


def test_fisher_takes_layers_it_has_no_formula_for_by_themselves(caplog):
    model = with_stage(
        lambda: (
            nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.PReLU(6), nn.Unflatten(1, (2, 3)))
            .append(nn.Conv1d(2, 3, 2))
            .append(nn.Flatten())
        ),
        num_features=6,
    )

    with caplog.at_level(logging.INFO):
        assert_equals_reference(model)

    assert "layer by layer" in caplog.text


def test_fisher_of_a_cosine_head_is_taken_layer_by_layer(caplog):
    config = ModelConfig(name="mlp", widths=(12,), image_size=8, head="cosine")

    with caplog.at_level(logging.INFO):
        assert_equals_reference(build_model(config, 4, seed=0), "exact")

    assert "layer by layer" in caplog.text


class WithToken(nn.Module):
    """A weight that no layer owns."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(6))
        self.layer = nn.Linear(64, 6)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.layer(images.flatten(1)) * self.token)


class UsedTwice(nn.Module):
    """One layer at two places."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 6)
        self.twice = nn.Linear(6, 6)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.twice(torch.tanh(self.twice(torch.tanh(self.first(images.flatten(1))))))


class UsedAside(nn.Module):
    """A layer whose weight also enters beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 6)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layer(images.flatten(1)) + torch.tanh(self.layer.weight.sum(1))


class DependsOnData(UsedTwice):
    """Also branches on values, which vmap cannot follow."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        outputs = super().forward(images)
        return outputs if bool(outputs.sum() > 0) else 2 * outputs


@pytest.mark.parametrize(
    ("stage", "how"),
    [
        (WithToken, "layer by layer"),
        (UsedTwice, "by vmap over the whole model"),
        (UsedAside, "by vmap over the whole model"),
        (DependsOnData, "one example after the other"),
    ],
)
@pytest.mark.parametrize("kind", ["exact", "empirical"])
def test_fisher_of_models_that_are_more_than_their_layers(stage, how, kind, caplog):
    model = with_stage(stage, num_features=6)

    with caplog.at_level(logging.INFO):
        assert_equals_reference(model, kind)

    assert how in caplog.text


@pytest.mark.parametrize("config", [MODEL, ModelConfig(name="mlp", widths=(12,), image_size=8)])
def test_fisher_does_not_depend_on_the_memory_it_may_use(config):
    assert_equals_reference(build_model(config, 4, seed=0), max_bytes=1)


def test_fisher_of_inputs_at_a_later_stage_leaves_the_earlier_ones_out():
    model = build_model(MODEL, 4, seed=0)
    images, labels = make_images([0, 1, 2, 3], seed=0)
    whole = estimate_fisher(model, images, labels, generator=torch.Generator())
    with torch.no_grad():
        entering = model.activations(images, stop=1)

    later = estimate_fisher(model, entering, labels, generator=torch.Generator(), start=1)

    assert later.values.keys() == {n for n in whole.values if not n.startswith("stages.0.")}
    for name, value in later.values.items():
        torch.testing.assert_close(value, whole.values[name], rtol=1e-4, atol=1e-9)


def test_fisher_is_float32_under_autocast_and_for_models_of_less():
    model = build_model(MODEL, 4, seed=0)
    images, labels = make_images([0, 1, 2, 3], seed=0)
    expected = estimate_fisher(model, images, labels, generator=torch.Generator())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = estimate_fisher(model, images, labels, generator=torch.Generator())

    half = estimate_fisher(model.bfloat16(), images, labels, generator=torch.Generator())

    for name, value in expected.values.items():
        assert torch.equal(under_autocast.values[name], value)
        assert half.values[name].dtype == torch.float32


def test_exact_fisher_of_many_classes_names_its_cost(caplog):
    model = build_model(ModelConfig(name="mlp", widths=(2,), image_size=8), 100, seed=0)
    images, labels = make_images([0, 1], seed=0)

    estimate_fisher(model, images, labels, generator=torch.Generator())

    assert "100 backward passes over its 2 examples" in caplog.text
    assert "sampled takes one" in caplog.text


def test_fisher_that_is_not_finite_is_refused_by_name():
    model = build_model(MODEL, 4, seed=0)
    images, labels = make_images([0, 1], seed=0)
    with torch.no_grad():
        model.head.weight[0, 0] = torch.inf

    with pytest.raises(LearningError, match=r"the Fisher of stages.0.0.weight is not finite"):
        estimate_fisher(model, images, labels, generator=torch.Generator())


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


def test_merging_gives_weights_that_only_the_newer_names_their_share():
    older = Fisher({"a": torch.tensor([1.0])}, "exact", 10)
    newer = Fisher({"b": torch.tensor([4.0])}, "exact", 5)

    assert older.merged(newer, newer_share=0.25).values["b"].item() == 1


def test_online_fisher_decays_the_past_and_adds_the_present():
    older = Fisher({"a": torch.tensor([1.0]), "b": torch.tensor([2.0])}, "exact", 10)
    newer = Fisher({"b": torch.tensor([4.0]), "c": torch.tensor([3.0])}, "sampled", 5)

    online = older.online(newer, 0.5)

    assert {name: value.item() for name, value in online.values.items()} == {
        "a": 0.5,
        "b": 5.0,
        "c": 3.0,
    }
    assert (online.estimator, online.num_examples) == ("sampled", 15)


def test_putting_together_fishers_of_different_shapes_is_refused():
    older = Fisher({"head.bias": torch.ones(2)}, "exact", 10)
    newer = Fisher({"head.bias": torch.ones(3)}, "exact", 10)

    with pytest.raises(ValueError, match=r"head.bias has shape \(2,\) in the older and \(3,\)"):
        older.online(newer, 1.0)


@given(st.integers(0, 10_000), st.integers(1, 5))
def test_folded_anchors_give_the_differences_of_the_separate_penalties(seed, num_updates):
    generator = torch.Generator().manual_seed(seed)

    def draw() -> dict[str, torch.Tensor]:
        return {
            name: torch.randn(shape, generator=generator, dtype=torch.float64)
            for name, shape in {"a": (3,), "b": (2, 2)}.items()
        }

    def draw_fisher() -> Fisher:
        # A third of the weights matters to nobody.
        return Fisher({name: v.clamp(min=-0.4) + 0.4 for name, v in draw().items()}, "exact", 1)

    held = [(draw_fisher(), draw()) for _ in range(num_updates)]
    one, other = draw(), draw()

    fisher, anchor = held[0]
    for newer_fisher, newer_anchor in held[1:]:
        fisher, anchor = fold_anchors(fisher, anchor, newer_fisher, newer_anchor)

    separate = sum(ewc_penalty(one, a, f.values) - ewc_penalty(other, a, f.values) for f, a in held)
    folded = ewc_penalty(one, anchor, fisher.values) - ewc_penalty(other, anchor, fisher.values)
    torch.testing.assert_close(folded, separate)


def test_folded_anchor_is_the_newest_where_nothing_is_important():
    none = Fisher({"a": torch.zeros(2)}, "exact", 1)

    _, anchor = fold_anchors(none, {"a": torch.ones(2)}, none, {"a": torch.full((2,), 5.0)})

    assert anchor["a"].tolist() == [5.0, 5.0]


def test_folding_an_estimate_of_some_weights_leaves_the_others_where_they_were_held():
    older = Fisher({"a": torch.ones(1), "b": torch.ones(1)}, "exact", 1)
    newer = Fisher({"b": torch.full((1,), 3.0)}, "exact", 1)

    fisher, anchor = fold_anchors(
        older,
        {"a": torch.zeros(1), "b": torch.zeros(1)},
        newer,
        {"a": torch.ones(1), "b": torch.ones(1)},
    )

    assert (fisher.values["a"].item(), anchor["a"].item()) == (1, 0)
    assert (fisher.values["b"].item(), anchor["b"].item()) == (4, 0.75)

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lifelong_ray.config import AnalyticConfig, LearningConfig, ModelConfig, UpdateConfig
from lifelong_ray.learning import Alone, AnalyticSums, Classifier, build_model
from lifelong_ray.learning.chance import generator_for
from lifelong_ray.learning.wide import (
    Inputs,
    answers,
    answers_and_random_features,
    choose_answering,
    fit_widening,
    look,
    random_features,
    solve,
    source_for,
    take_sums,
)
from lifelong_ray.types import LearningError
from tests.unit.learning.world import MODEL, make_images, on_workers

CONFIG = AnalyticConfig(num_features=64)
IMAGES, LABELS = make_images([0, 1, 2, 3] * 12, seed=1)
HELD_OUT = make_images([0, 1, 2, 3] * 8, seed=2)


def with_analytic_head() -> tuple[Classifier, AnalyticSums]:
    """A model whose analytic head is right and whose trained head has learned nothing."""
    model = build_model(MODEL, 4, seed=0, num_random_features=64).eval()
    fit_widening(model, Inputs(IMAGES), 0, generator_for(0, "widening"))
    sums = take_sums(model, Inputs(IMAGES), LABELS, AnalyticSums.empty(64, 4), Alone())
    sums, _ = solve(model, sums, CONFIG, 0.0)
    return model, sums


def seen_twice(model: Classifier, second: torch.Tensor) -> AnalyticSums:
    """Sums of the images and of their classes once more, in modes of their own."""
    sums = take_sums(model, Inputs(IMAGES), LABELS, AnalyticSums.empty(64, 4), Alone())
    both = sums.open_modes(range(4))
    return both.merge(take_sums(model, Inputs(second), both.newest_modes[LABELS], both, Alone()))


def test_a_clearly_better_head_is_taken_over_the_preferred_one():
    model, _ = with_analytic_head()
    seen = look(model, Inputs(HELD_OUT[0]))

    answering = choose_answering(
        model, seen, HELD_OUT[1], prefer="linear", among=("linear", "analytic", "both")
    )

    assert answering.head != "linear"
    assert answering.accuracy >= 0.95
    assert model.active_head == answering.head


def test_the_preferred_head_is_kept_where_no_other_is_clearly_better():
    model, _ = with_analytic_head()
    seen = look(model, Inputs(HELD_OUT[0]))
    with torch.no_grad():
        answers = model.analytic(seen.wide, 4).argmax(1)
    labels = answers.clone()
    labels[0] = (labels[0] + 1) % 4  # One mistake, which another head may get right.

    answering = choose_answering(
        model, seen, labels, prefer="analytic", among=("analytic", "linear", "both")
    )

    assert answering.head == "analytic"
    assert answering.accuracy == pytest.approx(31 / 32)


def test_the_chosen_way_to_answer_is_the_models_own():
    model, _ = with_analytic_head()
    seen = look(model, Inputs(HELD_OUT[0]))

    answering = choose_answering(
        model, seen, HELD_OUT[1], prefer="linear", among=("linear", "both")
    )

    right = (model(HELD_OUT[0]).argmax(1) == HELD_OUT[1]).float().mean()
    assert answering.head == "both"
    assert model.analytic_weight == answering.analytic_weight
    assert float(right) == pytest.approx(answering.accuracy)


def test_modes_that_look_alike_are_put_together():
    model, once = with_analytic_head()

    sums, _ = solve(model, seen_twice(model, IMAGES), CONFIG, 0.0)

    assert sums.mode_class.tolist() == [0, 1, 2, 3]
    assert torch.equal(sums.class_sums, 2 * once.class_sums)
    assert torch.equal(sums.counts, 2 * once.counts)
    assert torch.equal(sums.gram, 2 * once.gram)


def test_modes_put_together_give_the_head_of_one_mode_per_class():
    model, _ = with_analytic_head()

    sums, ridge = solve(model, seen_twice(model, IMAGES), CONFIG, 0.0)

    torch.testing.assert_close(model.analytic.weights_MK, sums.solve(ridge), rtol=1e-3, atol=1e-4)


def test_modes_that_look_different_stay_apart():
    model, _ = with_analytic_head()
    inverted = 255 - IMAGES

    sums, _ = solve(model, seen_twice(model, inverted), CONFIG, 0.0)

    assert sums.num_modes > 4
    assert model.analytic.mode_class.tolist() == sums.mode_class.tolist()
    assert model.analytic.weights_MK.shape == (64, sums.num_modes)
    assert float((model(IMAGES).argmax(1) == LABELS).float().mean()) < 0.9  # The linear head.
    model.active_head = "analytic"
    for images in (IMAGES, inverted):
        assert float((model(images).argmax(1) == LABELS).float().mean()) >= 0.95


def test_a_class_never_has_more_than_max_modes():
    model, _ = with_analytic_head()

    sums, _ = solve(
        model,
        seen_twice(model, 255 - IMAGES),
        CONFIG.model_copy(update={"max_modes": 1}),
        0.0,
    )

    assert sums.mode_class.tolist() == [0, 1, 2, 3]
    assert sums.counts.tolist() == [24] * 4


def test_a_ridge_that_is_set_is_used():
    model, _ = with_analytic_head()
    sums = take_sums(model, Inputs(IMAGES), LABELS, AnalyticSums.empty(64, 4), Alone())

    _, ridge = solve(model, sums, CONFIG.model_copy(update={"ridge": 0.125}), 7.0)

    assert ridge == 0.125
    torch.testing.assert_close(model.analytic.weights_MK, sums.solve(0.125))


def test_workers_take_the_same_sums_together_to_the_bit():
    model, _ = with_analytic_head()
    room = AnalyticSums.empty(64, 4)

    workers = on_workers(2, lambda group: take_sums(model, Inputs(IMAGES), LABELS, room, group))

    alone = take_sums(model, Inputs(IMAGES), LABELS, room, Alone())
    for sums in workers:
        assert torch.equal(sums.gram, alone.gram)
        assert torch.equal(sums.class_sums, alone.class_sums)


def test_an_example_may_stand_for_several():
    model, _ = with_analytic_head()
    room = AnalyticSums.empty(64, 4)
    three = torch.full((48,), 3.0, dtype=torch.float64)

    weighted = take_sums(model, Inputs(IMAGES), LABELS, room, Alone(), three)

    once = take_sums(model, Inputs(IMAGES), LABELS, room, Alone())
    assert torch.equal(weighted.gram, 3 * once.gram)
    assert torch.equal(weighted.counts, 3 * once.counts)


def test_inputs_after_the_first_stage_give_the_features_of_the_images():
    model, _ = with_analytic_head()
    with torch.no_grad():
        entering = model.activations(IMAGES, stop=1)

    later = random_features(model, Inputs(entering, start=1))

    assert torch.equal(later, random_features(model, Inputs(IMAGES)))


def test_a_model_without_an_analytic_head_has_nothing_to_solve():
    model = build_model(MODEL, 4, seed=0)
    sums = AnalyticSums.empty(0, 4)

    assert solve(model, sums, CONFIG, 0.5) == (sums, 0.0)


def test_what_the_analytic_head_looks_at_follows_the_architecture():
    dense = ModelConfig(name="mlp")

    def looks_at(model: ModelConfig, source: str = "auto", **update) -> str:
        learning = LearningConfig(
            analytic=AnalyticConfig(source=source), update=UpdateConfig(**update)
        )
        return source_for(model, learning)

    assert looks_at(MODEL) == "features"
    assert looks_at(dense) == "pixels"
    assert looks_at(dense, "features") == "features"
    assert looks_at(dense, pseudo_features=5) == "features"
    with pytest.raises(LearningError, match=r"source is stages.*mlp.*use features, or pixels"):
        looks_at(dense, "stages")
    with pytest.raises(LearningError, match=r"source is pixels.*set it to features"):
        looks_at(dense, "pixels", pseudo_features=5)


def test_sums_that_are_not_finite_are_named():
    model, sums = with_analytic_head()
    spoilt = replace(sums, gram=sums.gram * float("nan"))

    with pytest.raises(LearningError, match="finite"):
        solve(model, spoilt, CONFIG.model_copy(update={"ridge": 0.1}), 0.0)


@pytest.mark.parametrize("head", ["linear", "analytic", "both"])
def test_one_pass_gives_the_answers_and_the_random_features_of_two(head):
    model, _ = with_analytic_head()
    model.active_head, model.analytic_weight = head, 2.0

    logits_NC, features_NM = answers_and_random_features(model, Inputs(IMAGES))

    with torch.no_grad():
        torch.testing.assert_close(logits_NC, model(IMAGES))
    assert torch.equal(answers(model, Inputs(IMAGES)), logits_NC)
    assert torch.equal(features_NM, random_features(model, Inputs(IMAGES)))


def test_sums_of_known_random_features_are_the_sums_of_the_images():
    model, _ = with_analytic_head()
    room = AnalyticSums.empty(64, 4)
    known_NM = random_features(model, Inputs(torch.cat([IMAGES, HELD_OUT[0]])))

    known = take_sums(model, Inputs(IMAGES), LABELS, room, Alone(), known_NM=known_NM)

    assert torch.equal(known.gram, take_sums(model, Inputs(IMAGES), LABELS, room, Alone()).gram)


@pytest.mark.parametrize("source", ["features", "stages"])
def test_an_image_has_the_same_random_features_whatever_it_comes_with(source):
    large = ModelConfig(widths=(32, 64, 128), image_size=28)
    images = torch.randint(0, 256, (300, 1, 28, 28), generator=torch.Generator().manual_seed(0))
    images = images.to(torch.uint8)
    model = build_model(large, 4, seed=0, num_random_features=200, source=source).eval()
    fit_widening(model, Inputs(images), 0, generator_for(0, "widening"))
    together = random_features(model, Inputs(images))
    passed = model.activations(images[:64].contiguous(memory_format=torch.channels_last), stop=1)

    assert torch.equal(random_features(model, Inputs(images[137:138])), together[137:138])
    assert torch.equal(random_features(model, Inputs(images[5:290])), together[5:290])
    assert torch.equal(random_features(model, Inputs(passed, 1)), together[:64])

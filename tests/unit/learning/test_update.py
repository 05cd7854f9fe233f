from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from lifelong_ray.config import LearningConfig, ReplayConfig
from lifelong_ray.learning import (
    Fit,
    Labelled,
    Learner,
    Run,
    Update,
    accuracy,
    fit_base,
    fit_update,
)
from lifelong_ray.types import LearningError
from tests.unit.learning.world import CONFIG, MODEL, TickingClock, assert_same_weights, make_images

NAMES = ("a", "b", "c", "d", "e", "f")
VALIDATION = make_images([0, 1, 2, 3, 4, 5] * 5, seed=41)
TEST_OLD = make_images([0, 1, 2, 3] * 10, seed=11)
TEST_NEW = make_images([4, 5] * 10, seed=12)


def with_update(**kwargs: Any) -> LearningConfig:
    return CONFIG.model_copy(update={"update": CONFIG.update.model_copy(update=kwargs)})


NEVER_ENOUGH = with_update(good_enough_accuracy=1.0)
"""On validation labels that no way gets all right, the fast way always falls short."""


def updated(
    parent: Learner,
    examples: Labelled,
    config: LearningConfig = CONFIG,
    validation: Labelled | None = VALIDATION,
    names: tuple[str, ...] = NAMES,
) -> Update:
    return fit_update(parent, examples, names, config, Run(TickingClock()), validation=validation)


def right(learner: Learner, examples: Labelled) -> float:
    return accuracy(learner.logits(examples[0]), examples[1])


@pytest.fixture(scope="module")
def out_of_reach() -> Labelled:
    """Validation examples of which one label in six is wrong, so that no way is good enough."""
    images, labels = VALIDATION
    wrong = labels.clone()
    wrong[:5] = (wrong[:5] + 1) % 6
    return images, wrong


def test_where_the_fast_way_is_good_enough_nothing_else_is_tried(base, new_examples):
    update = updated(base.learner, new_examples, with_update(good_enough_accuracy=0.9))

    assert list(update.fits) == ["fast"]
    assert update.best == "fast"
    assert update.chosen is update.fits["fast"]
    assert "frozen features suffice: fast reaches" in update.reason
    assert "of 0.900" in update.reason


def test_a_rare_new_class_leaves_the_update_to_the_fast_way(base, out_of_reach):
    examples = make_images([4] * 12 + [5] * 3, seed=71)
    config = with_update(good_enough_accuracy=1.0, rare_share=0.3)

    update = updated(base.learner, examples, config, out_of_reach)

    assert list(update.fits) == ["fast"]
    assert "new class f is rare: 3 examples, where learning.update.rare_share" in update.reason


def test_few_examples_of_known_classes_do_not_keep_the_slow_way_back(base, out_of_reach):
    examples = make_images([4] * 6 + [5] * 6 + [0], seed=72)
    config = with_update(good_enough_accuracy=1.0, rare_share=0.3)

    assert "slow" in updated(base.learner, examples, config, out_of_reach).fits


def test_where_the_fast_way_falls_short_the_slow_one_is_tried(base, new_examples, out_of_reach):
    update = updated(base.learner, new_examples, NEVER_ENOUGH, out_of_reach)

    assert list(update.fits) == ["fast", "slow"]
    assert "frozen features fall short: fast reaches 0.8" in update.reason
    assert "of 1.000" in update.reason


def test_a_slow_way_tried_in_vain_is_remembered_and_its_fast_rival_kept(
    base, new_examples, out_of_reach
):
    update = updated(base.learner, new_examples, NEVER_ENOUGH, out_of_reach)

    assert update.best == "fast"
    assert update.chosen.learner.slow_losses == 1
    assert update.chosen.learner.slow_rest == 1


def test_a_slow_way_tried_in_vain_sits_out_twice_as_many_updates_each_time(
    base, new_examples, out_of_reach
):
    learner, tried = base.learner, []
    for _ in range(8):
        update = updated(learner, new_examples, NEVER_ENOUGH, out_of_reach)
        tried.append("slow" in update.fits)
        if not tried[-1]:
            assert "sits out" in update.reason
        learner = update.fits["fast"].learner

    assert tried == [True, False, True, False, False, True, False, False]
    assert (learner.slow_losses, learner.slow_rest) == (3, 2)


def test_the_record_of_slow_ways_survives_saving(base, new_examples, out_of_reach):
    learner = updated(base.learner, new_examples, NEVER_ENOUGH, out_of_reach).chosen.learner

    again = Learner.from_files(learner.to_files())

    assert (again.slow_losses, again.slow_rest) == (1, 1)


def test_a_rest_is_no_matter_where_the_fast_way_is_good_enough(base, new_examples):
    parent = replace(base.learner, slow_losses=2, slow_rest=2)

    update = updated(parent, new_examples, with_update(good_enough_accuracy=0.9))

    assert "suffice" in update.reason
    assert (update.chosen.learner.slow_losses, update.chosen.learner.slow_rest) == (2, 2)


def test_a_slow_way_that_is_clearly_better_is_chosen_and_clears_the_record(base):
    # The analytic head cannot tell these apart for want of random features.
    config = CONFIG.model_copy(
        update={"analytic": CONFIG.analytic.model_copy(update={"num_features": 2})}
    )
    config = config.model_copy(
        update={
            "update": config.update.model_copy(
                update={
                    "good_enough_accuracy": 1.0,
                    "trainer": config.update.trainer.model_copy(update={"epochs": 12}),
                }
            )
        }
    )
    examples = make_images([0, 1, 2, 3] * 12, seed=1)
    parent = fit_base(examples, "abcd", MODEL, config, Run(TickingClock())).learner
    parent = replace(parent, slow_losses=3, slow_rest=0)

    update = updated(parent, make_images([0, 1, 2, 3, 4, 5] * 5, seed=5), config)

    assert update.best == "slow"
    assert update.chosen.learner.slow_losses == 0
    assert update.chosen.learner.slow_rest == 0


def with_others_right(fit: Fit, gained: int, lost: int) -> Fit:
    """The same fit, had it got so many more and so many fewer examples right."""
    assert fit.right is not None
    right = fit.right.clone()
    right[(~fit.right).nonzero()[:gained, 0]] = True
    right[fit.right.nonzero()[:lost, 0]] = False
    return replace(fit, right=right)


@pytest.mark.parametrize(
    ("memory_share", "gained", "lost", "expected"),
    [(0, 1, 0, "fast"), (1, 1, 0, "slow"), (1, 1, 1, "fast"), (1, 0, 1, "fast")],
    ids=[
        "that loses sums must be clearly better",
        "whose sums are of all examples must be better",
        "and not just as good",
        "let alone worse",
    ],
)
def test_a_slow_way_that_is_better_by_little(
    new_examples, out_of_reach, monkeypatch, memory_share, gained, lost, expected
):
    config = with_update(
        good_enough_accuracy=1.0,
        replay=CONFIG.update.replay.model_copy(update={"memory_share": memory_share}),
    )
    examples = make_images([0, 1, 2, 3] * 12, seed=1)
    parent = fit_base(examples, "abcd", MODEL, config, Run(TickingClock())).learner
    fast = updated(parent, new_examples, config, out_of_reach).fits["fast"]
    slow = with_others_right(fast, gained, lost)
    monkeypatch.setattr("lifelong_ray.learning.update.fit_slow", lambda *_, **__: slow)

    assert updated(parent, new_examples, config, out_of_reach).best == expected


def test_a_branch_that_is_no_better_is_not_kept_though_nothing_is_left_out_of_the_sums(
    new_examples, out_of_reach, monkeypatch
):
    config = with_update(
        good_enough_accuracy=1.0,
        expansion="auto",
        replay=CONFIG.update.replay.model_copy(update={"memory_share": 1}),
    )
    examples = make_images([0, 1, 2, 3] * 12, seed=1)
    parent = fit_base(examples, "abcd", MODEL, config, Run(TickingClock())).learner
    fast = updated(parent, new_examples, config, out_of_reach).fits["fast"]

    def better_by_one(*_: object, expand: bool = False, **__: object) -> Fit:
        return with_others_right(fast, 2 if expand else 1, 0)

    monkeypatch.setattr("lifelong_ray.learning.update.fit_slow", better_by_one)

    assert updated(parent, new_examples, config, out_of_reach).best == "slow"


def test_what_a_fit_got_right_is_what_its_learner_answers(base, new_examples, out_of_reach):
    update = updated(base.learner, new_examples, NEVER_ENOUGH, out_of_reach)

    images, labels = out_of_reach
    for fit in update.fits.values():
        assert fit.right is not None
        assert torch.equal(fit.right, fit.learner.logits(images).argmax(1) == labels)


def test_without_validation_both_are_tried_and_the_fast_one_is_kept(base, new_examples):
    update = updated(base.learner, new_examples, validation=None)

    assert list(update.fits) == ["fast", "slow"]
    assert update.best == "fast"
    assert "no known accuracy" in update.reason
    assert update.chosen.learner.slow_losses == 0


def test_without_validation_or_memory_the_fast_way_is_alone(new_examples):
    config = with_update(replay=ReplayConfig(memory_per_class=0))
    examples = make_images([0, 1, 2, 3] * 12, seed=1)
    parent = fit_base(examples, "abcd", MODEL, config, Run(TickingClock())).learner

    update = updated(parent, new_examples, config, validation=None)

    assert list(update.fits) == ["fast"]
    assert "no old example is left, nor any to judge by" in update.reason


@pytest.mark.parametrize(
    ("paths", "tried"), [("both", ["fast", "slow"]), ("fast", ["fast"]), ("slow", ["slow"])]
)
def test_ways_that_are_named_are_taken_whatever_they_reach(base, new_examples, paths, tried):
    config = with_update(paths=paths, good_enough_accuracy=0.5)

    update = updated(replace(base.learner, slow_rest=4), new_examples, config)

    assert list(update.fits) == tried
    assert update.reason == f"learning.update.paths is {paths}"


def test_a_parent_without_an_analytic_head_is_updated_the_slow_way(new_examples):
    config = CONFIG.model_copy(
        update={"analytic": CONFIG.analytic.model_copy(update={"num_features": 0})}
    )
    examples = make_images([0, 1, 2, 3] * 12, seed=1)
    parent = fit_base(examples, "abcd", MODEL, config, Run(TickingClock())).learner

    update = updated(parent, new_examples, config)

    assert list(update.fits) == ["slow"]
    assert update.reason == "there is no analytic head for the fast way: slow alone"
    with pytest.raises(LearningError, match=r"no analytic head.*or take the slow path"):
        updated(parent, new_examples, with_update(paths="fast"))


def test_an_update_does_not_touch_its_parent(base, new_examples, out_of_reach):
    before = base.learner.to_files()

    updated(base.learner, new_examples, with_update(expansion="auto"), out_of_reach)

    assert base.learner.to_files() == before


def test_an_update_is_reproducible_to_the_byte(base, new_examples, out_of_reach):
    one, other = (
        updated(base.learner, new_examples, with_update(expansion="auto"), out_of_reach)
        for _ in range(2)
    )

    assert one.best == other.best
    for name, fit in one.fits.items():
        assert fit.learner.to_files() == other.fits[name].learner.to_files(), name


# ---------------------------------------------------------------- expansion


def expanded(base: Fit, new_examples: Labelled, **kwargs: Any) -> Update:
    config = with_update(expansion="always", paths="both", **kwargs)
    return updated(base.learner, new_examples, config)


def test_expansion_always_stands_in_for_the_slow_way(base, new_examples):
    update = expanded(base, new_examples)

    assert list(update.fits) == ["fast", "expanded"]
    assert update.reason.endswith("learning.update.expansion is always")
    assert update.fits["expanded"].report.choices["expanded"] == 1.0


def test_expansion_auto_waits_until_both_others_fall_short(base, new_examples, out_of_reach):
    config = with_update(expansion="auto", good_enough_accuracy=0.9)

    enough = updated(base.learner, new_examples, config)
    short = updated(base.learner, new_examples, config, out_of_reach)

    assert list(enough.fits) == ["fast"]
    assert list(short.fits) == ["fast", "slow", "expanded"]
    assert "learning.update.expansion is auto" in short.reason


def test_an_expanded_network_leaves_the_old_one_untouched_to_the_bit(base, new_examples):
    learner = expanded(base, new_examples).fits["expanded"].learner

    old, new = base.learner.model.stages.state_dict(), learner.model.stages.state_dict()
    assert all(torch.equal(new[name], weight) for name, weight in old.items())
    (branch,) = learner.model.branches
    start = CONFIG.update.frozen_stages
    assert any(
        not torch.equal(weight, old[f"{int(name.split('.')[0]) + start}.{name.split('.', 1)[1]}"])
        for name, weight in branch.stages.state_dict().items()
    )


def test_a_branch_learns_where_all_stages_are_frozen_too(base, new_examples):
    learner = expanded(base, new_examples, frozen_stages=2).fits["expanded"].learner

    (branch,) = learner.model.branches
    assert branch.start == 1
    last = base.learner.model.stages[1].state_dict()
    assert any(
        not torch.equal(weight, last[name.split(".", 1)[1]])
        for name, weight in branch.stages.state_dict().items()
    )


def test_a_branch_leaves_a_head_over_pixels_as_it_was(new_examples):
    model = MODEL.model_copy(update={"name": "mlp", "widths": (16, 8)})
    examples = make_images([0, 1, 2, 3] * 12, seed=1)
    parent = fit_base(examples, "abcd", model, CONFIG, Run(TickingClock())).learner
    assert parent.model.analytic.source == "pixels"

    again = with_update(expansion="always", paths="both").model_copy(update={"seed": 7})
    learner = updated(parent, new_examples, again).fits["expanded"].learner

    before, after = parent.model.analytic.widening, learner.model.analytic.widening
    assert before.state_dict().keys() == after.state_dict().keys()
    for name, value in before.state_dict().items():
        assert torch.equal(after.state_dict()[name], value), name
    assert learner.sums_exact


def test_a_branch_that_is_trained_on_is_not_taken_for_unchanged_features(base, new_examples):
    parent = expanded(base, new_examples).fits["expanded"].learner
    second = make_images([0, 1, 2, 3, 4, 5] * 5, seed=77)

    fits = updated(parent, second, with_update(paths="both", frozen_stages=2)).fits

    assert not torch.equal(fits["slow"].learner.sums.gram, fits["fast"].learner.sums.gram)


def test_a_branch_that_moves_under_a_frozen_trunk_takes_the_sums_with_it(
    base, new_examples, caplog
):
    parent = expanded(base, new_examples).fits["expanded"].learner
    second = make_images([4, 5] * 12, seed=78)
    config = with_update(paths="slow", frozen_stages=2)

    learner = updated(parent, second, config, validation=None).fits["slow"].learner

    assert right(learner, TEST_OLD) >= 0.9
    assert "nothing is remembered" not in caplog.text


def test_pseudo_features_and_branches_are_refused_together_before_any_training(base, new_examples):
    config = with_update(pseudo_features=5, expansion="auto")

    with pytest.raises(LearningError, match="expansion to never, not auto"):
        updated(base.learner, new_examples, config)


def test_an_expanded_network_answers_as_before_until_it_is_trained(base):
    model = base.learner.model.copy()
    model.active_head = "linear"
    images = TEST_OLD[0]
    with torch.no_grad():
        before = model(images)

        model.expand(1)

        assert torch.equal(model(images), before)
    assert len(model.branches) == 1


def test_an_expanded_network_learns_new_classes_and_keeps_the_old(base, new_examples):
    learner = expanded(base, new_examples).fits["expanded"].learner

    assert right(learner, TEST_OLD) >= 0.95
    assert right(learner, TEST_NEW) >= 0.9


def test_an_expanded_network_is_saved_loaded_and_updated_again(base, new_examples):
    learner = expanded(base, new_examples).fits["expanded"].learner

    loaded = Learner.from_files(learner.to_files())

    assert_same_weights(loaded.model, learner.model)
    assert torch.equal(loaded.logits(TEST_OLD[0]), learner.logits(TEST_OLD[0]))
    again = make_images([0, 1, 2, 3, 4, 5] * 4, seed=21)
    update = updated(loaded, again, with_update(expansion="always", paths="both"))
    assert len(update.fits["expanded"].learner.model.branches) == 2
    assert len(update.fits["fast"].learner.model.branches) == 1
    for fit in update.fits.values():
        assert right(fit.learner, TEST_OLD) >= 0.9


def test_the_whole_network_can_be_expanded(base, new_examples):
    learner = expanded(base, new_examples, frozen_stages=0).fits["expanded"].learner

    (branch,) = learner.model.branches
    assert len(branch.stages) == 2
    assert right(learner, TEST_OLD) >= 0.9


# ---------------------------------------------------------------- few examples


@pytest.mark.parametrize("paths", ["fast", "slow"])
def test_five_examples_of_a_new_class_are_learned_and_nothing_is_forgotten(base, paths):
    before = right(base.learner, TEST_OLD)
    few = make_images([4] * 5, seed=51)
    config = with_update(paths=paths)

    learner = updated(base.learner, few, config, None, NAMES[:5]).chosen.learner

    assert right(learner, TEST_OLD) >= 0.95 * before
    assert right(learner, make_images([4] * 20, seed=52)) >= 0.9


# ---------------------------------------------------------------- what cannot be learned from


def test_labels_outside_the_classes_are_named(base, new_examples):
    images, labels = new_examples

    with pytest.raises(LearningError, match=r"label is 6, outside the 6 classes.*name first"):
        updated(base.learner, (images, labels + 1))


def test_images_that_are_no_integers_are_named(base, new_examples):
    images = new_examples[0].float()
    images[0, 0, 0, 0] = float("nan")

    with pytest.raises(LearningError, match=r"torch.float32.*the model takes torch.uint8"):
        updated(base.learner, (images, new_examples[1]))


def test_no_examples_at_all_are_named(base, new_examples):
    images, labels = new_examples

    with pytest.raises(LearningError, match="no new examples; at least one is needed"):
        updated(base.learner, (images[:0], labels[:0]), names=NAMES[:4])


def test_one_class_alone_makes_no_classifier():
    images, labels = make_images([0] * 8, seed=0)

    with pytest.raises(LearningError, match=r"at least two classes.*add examples of another"):
        fit_base((images, labels), "a", MODEL, CONFIG, Run(TickingClock()))


def test_validation_images_of_another_size_are_named(base, new_examples):
    images, labels = VALIDATION

    with pytest.raises(LearningError, match=r"validation images are.*the model takes"):
        updated(base.learner, new_examples, validation=(images[:, :, 1:], labels))


def test_a_fisher_of_another_architecture_is_named(base, new_examples):
    values = {f"other.{name}": value for name, value in base.learner.fisher.values.items()}
    parent = replace(base.learner, fisher=replace(base.learner.fisher, values=values))

    with pytest.raises(LearningError, match=r"Fisher is of another architecture.*with this model"):
        updated(parent, new_examples)


def test_a_memory_of_another_image_size_is_named(base, new_examples):
    memory = base.learner.memory
    larger = torch.nn.functional.pad(memory.inputs, (2, 2, 2, 2))
    parent = replace(base.learner, memory=replace(memory, inputs=larger))

    with pytest.raises(LearningError, match="memory of another image size"):
        updated(parent, new_examples, with_update(paths="fast"))

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from lifelong_ray.config import (
    DistillationConfig,
    EwcConfig,
    LearningConfig,
    ModelConfig,
    ReplayConfig,
)
from lifelong_ray.learning import (
    AnalyticSums,
    Fit,
    Labelled,
    Learner,
    Run,
    accuracy,
    fit_base,
    fit_fast,
    fit_slow,
)
from lifelong_ray.learning.chance import generator_for
from lifelong_ray.types import LearningError
from tests.unit.learning.world import CONFIG, MODEL, TickingClock, make_images

NAMES = ("a", "b", "c", "d", "e", "f")
OLD = make_images([0, 1, 2, 3] * 12, seed=1)
TEST_OLD = make_images([0, 1, 2, 3] * 10, seed=11)
TEST_NEW = make_images([4, 5] * 10, seed=12)
VALIDATION = make_images([0, 1, 2, 3, 4, 5] * 4, seed=41)
SECOND = make_images([0, 1, 2, 3, 4, 5] * 4, seed=21)

NO_EWC = EwcConfig(lambda_ewc=0, num_fisher_examples=24, num_update_fisher_examples=8)
NO_DISTILLATION = DistillationConfig(weight=0)
NO_REPLAY = ReplayConfig(share=0, memory_per_class=6)


def with_update(**kwargs: Any) -> LearningConfig:
    return CONFIG.model_copy(update={"update": CONFIG.update.model_copy(update=kwargs)})


def with_ewc(**kwargs: Any) -> LearningConfig:
    return with_update(ewc=CONFIG.update.ewc.model_copy(update=kwargs))


def with_replay(**kwargs: Any) -> LearningConfig:
    return with_update(replay=ReplayConfig(**{"memory_per_class": 6, **kwargs}))


def with_trainer(**kwargs: Any) -> LearningConfig:
    return with_update(trainer=CONFIG.update.trainer.model_copy(update=kwargs))


def base_of(config: LearningConfig, model: ModelConfig = MODEL) -> Learner:
    return fit_base(OLD, "abcd", model, config, Run(TickingClock())).learner


def slow(
    parent: Learner,
    examples: Labelled,
    config: LearningConfig = CONFIG,
    validation: Labelled | None = None,
    names: tuple[str, ...] = NAMES,
) -> Fit:
    return fit_slow(parent, examples, names, config, Run(TickingClock()), validation=validation)


def right(learner: Learner, examples: Labelled) -> float:
    return accuracy(learner.logits(examples[0]), examples[1])


def linear_right(learner: Learner, examples: Labelled) -> float:
    with torch.no_grad():
        return accuracy(learner.model.trained_logits(examples[0]), examples[1])


def assert_learned(learner: Learner) -> None:
    assert right(learner, TEST_OLD) >= 0.9
    assert right(learner, TEST_NEW) >= 0.9


# ---------------------------------------------------------------- EWC


def test_a_group_factor_holds_its_weights_harder(base, new_examples):
    def moved(factors: dict[str, float]) -> float:
        config = with_ewc(lambda_ewc=1e3, group_factors=factors)
        learner = slow(base.learner, new_examples, config).learner
        name = "stages.1.0.weight"
        change = learner.anchor[name] - base.learner.anchor[name]
        return float((base.learner.fisher.values[name] * change.square()).sum())

    assert moved({"stages": 100.0}) < moved({"head": 1.0}) < moved({"stages": 0.0})


def test_a_group_factor_that_holds_nothing_is_warned_of(base, new_examples, caplog):
    with caplog.at_level(logging.WARNING):
        slow(base.learner, new_examples, with_ewc(group_factors={"tail": 2.0}))

    assert "no weight that begins with tail" in caplog.text


def fisher_after(base: Fit, new_examples: Labelled, **ewc: Any) -> dict[str, torch.Tensor]:
    return slow(base.learner, new_examples, with_ewc(**ewc)).learner.fisher.values


def test_an_online_fisher_is_the_newer_one_and_a_share_of_the_older(base, new_examples):
    newer = fisher_after(base, new_examples, accumulation="online", gamma=0.0)
    half = fisher_after(base, new_examples, accumulation="online", gamma=0.5)

    for name, older in base.learner.fisher.for_model(base.learner.model).values.items():
        rows = len(older)
        torch.testing.assert_close(half[name][:rows] - newer[name][:rows], 0.5 * older)


def test_a_mean_fisher_is_over_all_examples_seen(base, new_examples):
    newer = fisher_after(base, new_examples, accumulation="online", gamma=0.0)
    mean = fisher_after(base, new_examples, accumulation="mean")

    share = 30 / (48 + 30)
    for name, older in base.learner.fisher.values.items():
        rows = len(older)
        expected = (1 - share) * older + share * newer[name][:rows]
        if name.startswith("stages.0."):  # Frozen: left alone by the update.
            expected = older
        torch.testing.assert_close(mean[name][:rows], expected)


def test_a_summed_fisher_holds_every_update_at_its_own_weights(base, new_examples):
    config = with_ewc(accumulation="sum")

    learner = slow(base.learner, new_examples, config).learner

    newer = fisher_after(base, new_examples, accumulation="online", gamma=0.0)
    name = "stages.1.0.weight"
    older, anchor = base.learner.fisher.values[name], base.learner.anchor[name]
    now = learner.model.get_parameter(name).detach()
    important = older + newer[name] > 1e-6
    between = (older * anchor + newer[name] * now) / (older + newer[name])
    torch.testing.assert_close(learner.fisher.values[name], older + newer[name])
    torch.testing.assert_close(
        learner.anchor[name][important], between[important], rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("accumulation", ["mean", "online", "sum"])
def test_every_accumulation_carries_on_over_several_updates(base, new_examples, accumulation):
    config = with_ewc(accumulation=accumulation, gamma=0.9)
    first = slow(base.learner, new_examples, config).learner

    second = slow(Learner.from_files(first.to_files()), SECOND, config).learner

    assert_learned(second)
    assert all(bool(value.isfinite().all()) for value in second.fisher.values.values())


@pytest.mark.parametrize("estimator", ["sampled", "empirical"])
def test_every_estimator_of_importance_carries_an_update(new_examples, estimator):
    config = with_ewc(estimator=estimator)
    parent = base_of(config)

    learner = slow(parent, new_examples, config).learner

    assert parent.fisher.estimator == learner.fisher.estimator == estimator
    assert_learned(learner)


def test_the_estimator_may_change_from_update_to_update(base, new_examples):
    learner = slow(base.learner, new_examples, with_ewc(estimator="empirical")).learner

    assert base.learner.fisher.estimator == "exact"
    assert learner.fisher.estimator == "empirical"
    assert_learned(learner)


def test_a_parent_without_a_fisher_is_warned_of(new_examples, caplog):
    config = with_ewc(num_fisher_examples=0, num_update_fisher_examples=0)
    parent = base_of(config)

    with caplog.at_level(logging.WARNING):
        fit = slow(parent, new_examples, config)

    assert "no Fisher, so ewc.lambda_ewc" in caplog.text
    assert "ewc" not in fit.report.epochs[0].losses


# ---------------------------------------------------------------- distillation


FORGETFUL = "known to fail when classes are added"


@pytest.mark.parametrize(
    "alone",
    [
        {"ewc": NO_EWC, "replay": NO_REPLAY},
        {"distillation": NO_DISTILLATION, "replay": NO_REPLAY},
    ],
)
def test_penalties_alone_are_warned_of_where_classes_are_added(base, new_examples, caplog, alone):
    with caplog.at_level(logging.WARNING):
        slow(base.learner, new_examples, with_update(**alone))

    assert FORGETFUL in caplog.text


def test_penalties_alone_are_not_warned_of_without_new_classes(base, caplog):
    again = make_images([0, 1, 2, 3] * 5, seed=6)
    config = with_update(ewc=NO_EWC, replay=NO_REPLAY)

    with caplog.at_level(logging.WARNING):
        fit = slow(base.learner, again, config, names=NAMES[:4])

    assert FORGETFUL not in caplog.text
    assert right(fit.learner, TEST_OLD) >= 0.95


def test_a_heavier_distillation_keeps_answers_closer_to_the_parents(base):
    def away(weight: float) -> float:
        config = with_update(
            ewc=NO_EWC,
            replay=NO_REPLAY,
            distillation=DistillationConfig(weight=weight, only_where_right=False),
            trainer=CONFIG.update.trainer.model_copy(update={"epochs": 8}),
        )
        return (
            slow(base.learner, ONLY_NEW, config).report.epochs[-1].losses["distillation"] / weight
        )

    assert away(10.0) < 0.5 * away(0.01)


def test_distillation_leaves_out_what_the_parent_answers_wrongly(base):
    config = with_update(ewc=NO_EWC, replay=NO_REPLAY)

    fit = slow(base.learner, ONLY_NEW, config)  # The parent knows none of these classes.

    assert fit.report.epochs[-1].losses["distillation"] == 0


# ---------------------------------------------------------------- replay


def test_dark_experience_keeps_stored_logits_through_two_updates(new_examples):
    config = with_replay(dark_weight=0.5)
    parent = base_of(config)

    first = slow(parent, new_examples, config)
    second = slow(first.learner, SECOND, config)

    memory = first.learner.memory
    old = memory.updates == 0
    assert first.report.epochs[0].losses["dark"] > 0
    assert second.report.epochs[0].losses["dark"] > 0
    assert memory.logits.shape[1] == 6
    assert bool(memory.logits[old][:, 4:].isnan().all())
    assert bool(memory.logits[old][:, :4].isfinite().all())
    assert_learned(second.learner)


def remembering_features(config: LearningConfig) -> Learner:
    return base_of(config)


def test_kept_features_carry_two_updates_of_either_kind(new_examples):
    config = with_replay(content="features")
    parent = remembering_features(config)

    first = slow(parent, new_examples, config).learner
    for second in (
        slow(first, SECOND, config).learner,
        fit_fast(first, SECOND, NAMES, config, Run(TickingClock())).learner,
    ):
        assert second.memory.content == "features"
        assert second.memory.inputs.dtype == torch.float16
        assert second.memory_stage == 1
        assert second.memory.counts().tolist() == [6] * 6
        assert_learned(second)


def test_kept_features_survive_saving(new_examples):
    config = with_replay(content="features")
    learner = slow(remembering_features(config), new_examples, config).learner

    loaded = Learner.from_files(learner.to_files())

    assert torch.equal(loaded.memory.inputs, learner.memory.inputs)
    assert slow(loaded, SECOND, config).learner.to_files() == (
        slow(learner, SECOND, config).learner.to_files()
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"frozen_stages": 0},
        {"trainer": CONFIG.update.trainer.model_copy(update={"max_shift_px": 1})},
        {"trainer": CONFIG.update.trainer.model_copy(update={"mirror": True})},
    ],
)
def test_what_would_outdate_kept_features_is_named(new_examples, changes):
    replay = ReplayConfig(memory_per_class=6, content="features")
    parent = remembering_features(with_update(replay=replay))

    with pytest.raises(
        LearningError, match=r"passed 1 stages.* keep content|kept features need stages"
    ):
        slow(parent, new_examples, with_update(replay=replay, **changes))


@pytest.mark.parametrize("selection", ["herding", "reservoir"])
def test_every_selection_of_memory_carries_two_updates(new_examples, selection):
    config = with_replay(selection=selection)

    first = slow(base_of(config), new_examples, config).learner
    second = slow(first, SECOND, config).learner

    assert len(second.memory) <= 6 * 6
    assert second.memory.seen.tolist() == [12 + 5 + 4] * 4 + [5 + 4] * 2
    assert_learned(second)


def test_a_share_of_1_keeps_sums_that_are_those_of_every_example_after_a_slow_update(new_examples):
    config = with_replay(memory_share=1.0)

    learner = slow(base_of(config), new_examples, config).learner

    images, labels = (torch.cat(both) for both in zip(OLD, new_examples, strict=True))
    with torch.no_grad():
        wide = learner.model.see(images).wide
        features = learner.model.analytic.widening.integers(wide)
    exact = AnalyticSums.of(features, labels, 6)
    assert torch.equal(learner.sums.gram, exact.gram)
    assert torch.equal(learner.sums.class_sums @ _by_class(learner), exact.class_sums)
    assert learner.sums.counts.sum() == len(images)


def _by_class(learner: Learner) -> torch.Tensor:
    """(K, C): one where a mode belongs to a class."""
    return torch.nn.functional.one_hot(learner.sums.mode_class, 6).double()


def test_replay_by_share_of_what_was_seen_works(base, new_examples):
    assert_learned(slow(base.learner, new_examples, with_replay(share="auto")).learner)


# ---------------------------------------------------------------- heads


def test_weight_alignment_makes_new_rows_as_long_as_old_ones(base, new_examples):
    aligned = slow(base.learner, new_examples, with_update(weight_alignment=True)).learner

    lengths = aligned.model.head.weight.detach().norm(dim=1)
    plain = slow(base.learner, new_examples).learner.model.head.weight
    torch.testing.assert_close(lengths[4:].mean(), lengths[:4].mean())
    assert torch.equal(aligned.model.head.weight[:4], plain[:4])
    assert not torch.equal(aligned.model.head.weight[4:], plain[4:])


def test_a_cosine_head_learns_remembers_and_is_saved(new_examples):
    parent = base_of(CONFIG, MODEL.model_copy(update={"head": "cosine"}))

    learner = slow(parent, new_examples, validation=VALIDATION).learner

    assert_learned(learner)
    loaded = Learner.from_files(learner.to_files())
    assert torch.equal(loaded.logits(TEST_NEW[0]), learner.logits(TEST_NEW[0]))


def without_memory(pseudo_features: int, **kwargs: Any) -> LearningConfig:
    return with_update(
        **{
            "ewc": NO_EWC,
            "distillation": NO_DISTILLATION,
            "replay": ReplayConfig(memory_per_class=0, share=0),
            "frozen_stages": 2,
            "pseudo_features": pseudo_features,
            "trainer": CONFIG.update.trainer.model_copy(update={"epochs": 20}),
            **kwargs,
        }
    )


ONLY_NEW = make_images([4, 5] * 15, seed=5)


def test_pseudo_features_keep_old_classes_without_any_memory():
    parent = base_of(without_memory(20))

    learner = slow(parent, ONLY_NEW, without_memory(20)).learner
    nothing = slow(parent, ONLY_NEW, without_memory(0)).learner

    assert len(learner.memory) == 0
    assert linear_right(learner, TEST_OLD) >= linear_right(nothing, TEST_OLD) + 0.2
    assert linear_right(learner, TEST_NEW) >= 0.8


def test_pseudo_features_keep_the_classes_of_an_earlier_update_too():
    first = slow(base_of(without_memory(20)), ONLY_NEW, without_memory(20)).learner
    brought = make_images([6] * 15, seed=8)

    learner = slow(first, brought, without_memory(20), names=(*NAMES, "g")).learner

    assert learner.class_means.shape[0] == 7
    assert bool((learner.class_means.norm(dim=1) > 0).all())
    assert linear_right(learner, TEST_NEW) >= 0.7
    assert linear_right(learner, make_images([6] * 10, seed=9)) >= 0.8


def test_pseudo_features_need_the_whole_backbone_frozen():
    parent = base_of(without_memory(20))

    with pytest.raises(LearningError, match="set frozen_stages to 2, not 1"):
        slow(parent, ONLY_NEW, without_memory(20, frozen_stages=1))


def test_pseudo_features_need_the_parents_means(base):
    with pytest.raises(LearningError, match=r"no mean features.*for its training as well"):
        slow(base.learner, ONLY_NEW, without_memory(20))


def test_means_of_old_classes_are_not_made_up_where_the_parent_kept_none(base, new_examples):
    config = with_update(pseudo_features=4, frozen_stages=len(base.learner.model.stages))

    learner = fit_fast(base.learner, new_examples, "abcdef", config, Run(TickingClock())).learner

    assert learner.class_means.shape == (6, 0)


def test_labels_that_compete_within_their_update_leave_the_old_rows_alone(base):
    config = with_update(
        labels_compete="update",
        ewc=NO_EWC,
        distillation=NO_DISTILLATION,
        replay=NO_REPLAY,
        frozen_stages=2,
        trainer=CONFIG.update.trainer.model_copy(update={"weight_decay": 0.0, "epochs": 20}),
    )

    learner = slow(base.learner, ONLY_NEW, config).learner

    old = base.learner.model.head.weight
    assert torch.equal(learner.model.head.weight[:4], old)
    with torch.no_grad():
        within = learner.model.trained_logits(TEST_NEW[0])[:, 4:]
    assert accuracy(within, TEST_NEW[1] - 4) >= 0.9


def test_remembered_examples_compete_with_the_classes_of_their_own_update(base):
    config = with_update(labels_compete="update", ewc=NO_EWC, distillation=NO_DISTILLATION)
    first = slow(base.learner, ONLY_NEW, config).learner
    still = with_update(
        labels_compete="update",
        ewc=NO_EWC,
        distillation=NO_DISTILLATION,
        frozen_stages=2,
        trainer=CONFIG.update.trainer.model_copy(update={"weight_decay": 0.0}),
    )

    # With one class of its own, neither it nor what is remembered pulls at the new row.
    learner = slow(first, make_images([6] * 15, seed=8), still, names=(*NAMES, "g")).learner

    grown = first.model.copy()
    grown.grow(7, generator_for(still.seed, "head", 7))
    assert torch.equal(learner.model.head.weight[6], grown.head.weight[6])


def test_labels_that_compete_within_their_update_are_not_warned_of(base, caplog):
    config = with_update(labels_compete="update", replay=NO_REPLAY)

    with caplog.at_level(logging.WARNING):
        slow(base.learner, ONLY_NEW, config)

    assert FORGETFUL not in caplog.text


# ---------------------------------------------------------------- how it is trained


def test_the_number_of_frozen_stages_is_found_on_validation_examples(base, new_examples):
    config = with_update(frozen_stages="auto")

    fit = slow(base.learner, new_examples, config, VALIDATION)

    depth = fit.report.choices["frozen_stages"]
    by_hand = slow(base.learner, new_examples, with_update(frozen_stages=depth), VALIDATION)
    assert depth in {0, 1, 2}
    assert fit.learner.to_files() == by_hand.learner.to_files()


def test_the_number_of_frozen_stages_cannot_be_found_without_validation(base, new_examples):
    with pytest.raises(LearningError, match=r"auto.*set a number.*validation_share above 0"):
        slow(base.learner, new_examples, with_update(frozen_stages="auto"))


def test_iterations_count_steps_of_an_update(base, new_examples):
    fit = slow(base.learner, new_examples, with_trainer(iterations=5))

    assert fit.report.samples_seen == 5 * 16 + 30 + 24
    assert right(fit.learner, TEST_OLD) >= 0.9


@pytest.mark.parametrize(
    "how", [{"precision": "bf16"}, {"mirror": True}, {"optimizer": "sgd", "schedule": "constant"}]
)
def test_every_way_to_train_carries_an_update(base, new_examples, how):
    learner = slow(base.learner, new_examples, with_trainer(**how)).learner

    assert_learned(learner)
    assert learner.model.head.weight.dtype == torch.float32


def test_the_learning_rate_of_an_update_can_be_found(base, new_examples):
    fit = slow(base.learner, new_examples, with_trainer(learning_rate=0))

    assert 1e-5 < float(fit.report.choices["learning_rate"]) < 0.2
    assert_learned(fit.learner)


# ---------------------------------------------------------------- together


MANY = {
    "weight_alignment": True,
    "ewc": CONFIG.update.ewc.model_copy(
        update={"accumulation": "sum", "group_factors": {"head": 2.0}, "estimator": "sampled"}
    ),
    "distillation": DistillationConfig(weight=1.0, temperature=2.0),
    "trainer": CONFIG.update.trainer.model_copy(
        update={"iterations": 12, "precision": "bf16", "max_examples_at_once": 5}
    ),
    "replay": ReplayConfig(memory_per_class=6, selection="herding", dark_weight=0.3, share="auto"),
}


def test_many_options_work_together(new_examples):
    config = with_update(**MANY)
    parent = base_of(config)

    fit = slow(parent, new_examples, config, VALIDATION)

    assert fit.report.epochs[0].losses.keys() == {"labels", "distillation", "dark", "ewc"}
    assert_learned(fit.learner)


def test_many_options_together_are_reproducible_and_survive_saving(new_examples):
    config = with_update(**MANY)
    parent = base_of(config)

    one = slow(parent, new_examples, config).learner
    other = slow(Learner.from_files(parent.to_files()), new_examples, config).learner

    assert one.to_files() == other.to_files()


def test_options_can_be_changed_from_update_to_update(base, new_examples):
    first = slow(base.learner, new_examples, with_replay(selection="herding")).learner
    fast = fit_fast(first, SECOND, NAMES, with_replay(dark_weight=0.2), Run(TickingClock()))
    config = with_update(frozen_stages=0, replay=ReplayConfig(memory_per_class=3, dark_weight=0.2))

    last = slow(fast.learner, make_images([0, 1, 2, 3, 4, 5] * 4, seed=22), config).learner

    assert last.memory.counts().tolist() == [3] * 6
    assert_learned(last)


# ---------------------------------------------------------------- rare classes


def frequent_and_rare() -> Labelled:
    return make_images([4] * 60 + [5] * 3, seed=61)


def mean_logit_of_the_rare_class(strength: float, parent: Learner) -> float:
    """How far the trained head leans to the rare new class on images of the frequent one."""
    learner = slow(parent, frequent_and_rare(), with_update(logit_adjustment=strength)).learner
    images, _ = make_images([4] * 20, seed=62)
    with torch.no_grad():
        logits_NC = learner.model.trained_logits(images)
    return float((logits_NC[:, 5] - logits_NC[:, 4]).mean())


def test_logit_adjustment_makes_up_for_classes_that_are_seldom_shown(base):
    leanings = [mean_logit_of_the_rare_class(s, base.learner) for s in (0.0, 1.0, 2.0)]

    assert leanings[0] < leanings[1] < leanings[2]


def test_without_memory_of_them_old_classes_still_answer_after_an_adjusted_update(base):
    learner = slow(
        base.learner, make_images([4, 5] * 12, seed=63), with_replay(share=0, memory_per_class=0)
    ).learner

    assert torch.isfinite(learner.logits(TEST_OLD[0])).all()
    assert right(learner, TEST_OLD) >= 0.9


def test_classes_shown_equally_often_are_learned_the_same_with_and_without_adjustment(base):
    examples = make_images([0, 1, 2, 3, 4, 5] * 8, seed=64)

    def head(strength: float) -> torch.Tensor:
        config = with_update(logit_adjustment=strength, replay=NO_REPLAY)
        return slow(base.learner, examples, config).learner.model.head.weight

    assert torch.equal(head(1.0), head(0.0))

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch

from lifelong_ray.config import DistillationConfig, EwcConfig, LearningConfig, ReplayConfig
from lifelong_ray.learning import (
    AnalyticSums,
    Fit,
    Learner,
    Run,
    accuracy,
    build_model,
    fit_base,
    fit_fast,
    fit_slow,
    mix_batches,
    train,
)
from lifelong_ray.types import LearningError
from tests.unit.learning.world import (
    CONFIG,
    MODEL,
    InterruptAfter,
    TickingClock,
    WorkerLostError,
    assert_same_weights,
    make_images,
    on_workers,
)

NAMES = ("a", "b", "c", "d", "e", "f")
TEST_OLD = make_images([0, 1, 2, 3] * 10, seed=11)
TEST_NEW = make_images([4, 5] * 10, seed=12)


def with_update(**kwargs) -> LearningConfig:
    return CONFIG.model_copy(update={"update": CONFIG.update.model_copy(update=kwargs)})


def fast(
    parent: Learner, examples, config: LearningConfig = CONFIG, names=NAMES, validation=None, **how
) -> Fit:
    run = Run(clock=TickingClock(), **how)
    return fit_fast(parent, examples, names, config, run, validation=validation)


def slow(
    parent: Learner, examples, config: LearningConfig = CONFIG, names=NAMES, validation=None, **how
) -> Fit:
    run = Run(clock=TickingClock(), **how)
    return fit_slow(parent, examples, names, config, run, validation=validation)


def base_of(examples, names="abcd", config: LearningConfig = CONFIG, validation=None, **how) -> Fit:
    run = Run(clock=TickingClock(), **how)
    return fit_base(examples, names, MODEL, config, run, validation=validation)


def right(learner: Learner, examples) -> float:
    return accuracy(learner.logits(examples[0]), examples[1])


def bytes_of(learner: Learner) -> dict[str, bytes]:
    return learner.to_files()


def test_base_training_learns_and_remembers(base):
    learner = base.learner

    assert right(learner, TEST_OLD) >= 0.95
    assert learner.sums_exact
    assert learner.sums.counts.tolist() == [12] * 4
    assert learner.memory.counts().tolist() == [6] * 4
    assert learner.memory.seen.tolist() == [12] * 4
    assert learner.fisher.estimator == "exact"
    assert learner.fisher.num_examples == 24
    assert all(value.any() for value in learner.fisher.values.values())
    assert [e.epoch for e in base.report.epochs] == [1, 2, 3, 4]
    assert all(e.validation_accuracy is not None for e in base.report.epochs)
    assert base.report.samples_seen == 4 * 48 + 48
    assert base.report.train_seconds == 4
    assert base.report.extra_seconds > 0


def test_a_full_training_is_a_base_training_by_another_name(base):
    examples = make_images([0, 1, 2, 3] * 12, seed=1)
    validation = make_images([0, 1, 2, 3] * 5, seed=2)

    full = fit_base(
        examples, "abcd", MODEL, CONFIG, Run(TickingClock()), validation=validation, yardstick=True
    )

    assert full.report.path == "full"
    assert bytes_of(full.learner) == bytes_of(base.learner)


def test_fast_path_learns_new_classes_and_keeps_the_old(base, new_examples):
    fit = fast(base.learner, new_examples)

    assert right(fit.learner, TEST_OLD) >= 0.95
    assert right(fit.learner, TEST_NEW) >= 0.9
    assert fit.learner.class_names == NAMES
    assert fit.learner.sums_exact
    assert fit.report.samples_seen == 30
    assert not fit.report.epochs


def test_fast_path_gives_the_head_that_all_examples_at_once_would_give(base, new_examples):
    learner = fast(base.learner, new_examples).learner
    old_images, old_labels = make_images([0, 1, 2, 3] * 12, seed=1)
    images = torch.cat([old_images, new_examples[0]])

    with torch.no_grad():
        features = learner.model.analytic.widening.integers(learner.model.see(images).wide)
    joint = AnalyticSums.of(features, torch.cat([old_labels, new_examples[1]]), 6)

    # The old classes that came again look as before, so that they have one mode each.
    assert learner.model.analytic.mode_class.tolist() == [0, 1, 2, 3, 4, 5]
    assert torch.equal(learner.sums.gram, joint.gram)
    assert torch.equal(learner.sums.class_sums, joint.class_sums)
    expected_MK = joint.solve(learner.ridge, CONFIG.analytic.class_balance)
    torch.testing.assert_close(learner.model.analytic.weights_MK, expected_MK)


def test_fast_path_does_not_touch_the_backbone_or_the_parent(base, new_examples):
    before = bytes_of(base.learner)

    learner = fast(base.learner, new_examples).learner

    assert bytes_of(base.learner) == before
    for name, weight in base.learner.model.stages.state_dict().items():
        assert torch.equal(learner.model.stages.state_dict()[name], weight)
    assert not learner.fisher.values["head.weight"][4:].any()


def test_slow_path_learns_new_classes_and_keeps_the_old(base, new_examples):
    fit = slow(base.learner, new_examples)

    assert right(fit.learner, TEST_OLD) >= 0.95
    assert right(fit.learner, TEST_NEW) >= 0.9
    assert not fit.learner.sums_exact
    assert fit.learner.memory.counts().tolist() == [6] * 4 + [5] * 2
    assert fit.learner.sums.counts.tolist() == pytest.approx([17] * 4 + [5] * 2)


def test_slow_path_trains_with_all_terms_at_once(base, new_examples):
    fit = slow(base.learner, new_examples)

    for epoch in fit.report.epochs:
        assert epoch.losses.keys() == {"labels", "distillation", "ewc"}
        assert all(loss > 0 for loss in epoch.losses.values())


def test_slow_path_leaves_frozen_stages_and_the_parent_alone(base, new_examples):
    before = bytes_of(base.learner)

    learner = slow(base.learner, new_examples).learner

    assert bytes_of(base.learner) == before
    old, new = base.learner.model.stages, learner.model.stages
    assert torch.equal(new[0][0].weight, old[0][0].weight)
    assert not torch.equal(new[1][0].weight, old[1][0].weight)
    assert all(weight.requires_grad for weight in learner.model.parameters())


def test_a_heavier_ewc_moves_important_weights_less(base, new_examples):
    def moved(lambda_ewc: float) -> float:
        ewc = CONFIG.update.ewc.model_copy(update={"lambda_ewc": lambda_ewc})
        learner = slow(base.learner, new_examples, with_update(ewc=ewc)).learner
        name = "stages.1.0.weight"
        change = learner.anchor[name] - base.learner.anchor[name]
        return float((base.learner.fisher.values[name] * change.square()).sum())

    assert moved(1e5) < 0.5 * moved(0.0)


def test_with_everything_off_the_slow_path_is_plain_fine_tuning_to_the_bit(base, new_examples):
    config = with_update(
        frozen_stages=0,
        ewc=EwcConfig(lambda_ewc=0, num_fisher_examples=24),
        distillation=DistillationConfig(weight=0),
        replay=ReplayConfig(share=0, memory_per_class=6),
        logit_adjustment=0,
        trainer=CONFIG.update.trainer.model_copy(update={"batch_size": 64}),
    )

    unequal = (new_examples[0][:27], new_examples[1][:27])

    learner = slow(base.learner, unequal, config).learner

    plain = fast(base.learner, unequal).learner.model
    train(
        plain,
        *unequal,
        config=config.update.trainer,
        seed=3,
        clock=TickingClock(),
        batches=mix_batches(27, 0, 0, 64),
    )
    for name, weight in plain.named_parameters():
        assert torch.equal(learner.anchor[name], weight), name


def test_slow_path_after_a_slow_one_still_works(base, new_examples):
    parent = slow(base.learner, new_examples).learner
    again = make_images([0, 1, 2, 3, 4, 5] * 4, seed=21)

    for fit in (fast(parent, again), slow(parent, again)):
        assert right(fit.learner, TEST_OLD) >= 0.95
        assert right(fit.learner, TEST_NEW) >= 0.9
        assert not fit.learner.sums_exact


def test_an_update_may_bring_examples_of_one_class_only(base):
    only = make_images([2] * 8, seed=31)

    for fit in (fast, slow):
        learner = fit(base.learner, only, names=tuple("abcd")).learner
        assert right(learner, TEST_OLD) >= 0.95


def test_validation_chooses_calibrates_and_is_never_trained_on(base, new_examples):
    validation = make_images([0, 1, 2, 3, 4, 5] * 4, seed=41)
    other = make_images([5, 4, 3, 2, 1, 0] * 4, seed=42)

    for path in (fast, slow):
        one = path(base.learner, new_examples, validation=validation)
        two = path(base.learner, new_examples, validation=other)
        without = path(base.learner, new_examples)

        assert_same_weights(one.learner.model, two.learner.model)
        assert_same_weights(one.learner.model, without.learner.model)
        assert torch.equal(one.learner.memory.inputs, two.learner.memory.inputs)
        assert torch.equal(one.learner.sums.gram, two.learner.sums.gram)
        assert one.learner.temperature != two.learner.temperature
        assert one.report.validation_accuracy == right(one.learner, validation)
        assert without.report.validation_accuracy is None


def test_confidences_are_meaningful_with_and_without_validation(base, new_examples):
    validation = make_images([0, 1, 2, 3, 4, 5] * 4, seed=41)

    for kwargs in ({}, {"validation": validation}):
        for path in (fast, slow):
            logits = path(base.learner, new_examples, **kwargs).learner.logits(TEST_OLD[0])
            confidence = float(torch.softmax(logits, 1).amax(1).mean())
            assert 0.75 < confidence < 1


def test_without_memory_the_slow_path_goes_on_from_the_old_sums(base, new_examples, caplog):
    config = with_update(replay=ReplayConfig(memory_per_class=0))
    parent = base_of(make_images([0, 1, 2, 3] * 12, seed=1), config=config).learner

    with caplog.at_level(logging.WARNING):
        learner = slow(parent, new_examples, config).learner

    assert "replay.share 0.25 has no effect" in caplog.text
    assert learner.model.active_head == "linear"
    assert learner.sums.counts.tolist() == [17] * 4 + [5] * 2


def test_shifted_images_are_not_cached_and_train(base, new_examples):
    trainer = CONFIG.update.trainer.model_copy(update={"max_shift_px": 1})

    learner = slow(base.learner, new_examples, with_update(trainer=trainer)).learner

    assert right(learner, TEST_OLD) >= 0.9


@pytest.mark.parametrize("path", [fast, slow])
def test_the_number_of_workers_does_not_change_an_update(path, base, new_examples):
    alone = path(base.learner, new_examples).learner

    workers = on_workers(2, lambda group: path(base.learner, new_examples, collective=group))

    for fit in workers:
        for name, weight in alone.anchor.items():
            torch.testing.assert_close(fit.learner.anchor[name], weight, rtol=1e-3, atol=1e-3)
        assert torch.equal(fit.learner.memory.inputs, alone.memory.inputs)
        assert fit.learner.logits(TEST_NEW[0]).argmax(1).equal(alone.logits(TEST_NEW[0]).argmax(1))
    assert bytes_of(workers[0].learner) == bytes_of(workers[1].learner)


def test_an_interrupted_slow_path_resumes_to_the_same_bytes(base, new_examples):
    interrupt = InterruptAfter(1)
    with pytest.raises(WorkerLostError):
        slow(base.learner, new_examples, on_epoch=interrupt)

    resumed = slow(base.learner, new_examples, resume=interrupt.checkpoint)

    assert bytes_of(resumed.learner) == bytes_of(slow(base.learner, new_examples).learner)


def test_an_interrupted_base_training_resumes_to_the_same_bytes(base):
    examples = make_images([0, 1, 2, 3] * 12, seed=1)
    validation = make_images([0, 1, 2, 3] * 5, seed=2)
    interrupt = InterruptAfter(3)

    def fit(**how) -> Fit:
        return base_of(examples, validation=validation, **how)

    with pytest.raises(WorkerLostError):
        fit(on_epoch=interrupt)

    assert bytes_of(fit(resume=interrupt.checkpoint).learner) == bytes_of(base.learner)


def test_unusable_examples_are_refused_by_name(base):
    images, labels = make_images([0, 1, 0, 1], seed=0)

    def base_error(images, labels, names, match: str) -> None:
        with pytest.raises(LearningError, match=match):
            base_of((images, labels), names)

    base_error(images, labels, ["a"], "label is 1, outside the 1 classes")
    base_error(images, labels - 1, ["a", "b"], "label is -1, outside the 2 classes")
    base_error(images, labels * 0, ["a"], "at least two classes")
    base_error(images, labels * 0, ["a", "b"], "no training example of class b")
    base_error(images, labels, ["a", "a"], "not distinct")
    base_error(images[:0], labels[:0], ["a", "b"], "no training examples")
    base_error(images[:2], labels, ["a", "b"], "2 examples but 4 training labels")
    base_error(images.float(), labels, ["a", "b"], "torch.float32")
    base_error(images[:, :, :4], labels, ["a", "b"], r"shape \(4, 1, 4, 8\)")
    base_error(images, labels.int(), ["a", "b"], "must be torch.int64")


def test_unusable_updates_are_refused_by_name(base, new_examples):
    images, labels = new_examples

    for fit in (fast, slow):
        with pytest.raises(LearningError, match="do not start with the parent's"):
            fit(base.learner, new_examples, names=tuple("badcef"))
        with pytest.raises(LearningError, match="no training example of class g"):
            fit(base.learner, new_examples, names=(*NAMES, "g"))
        with pytest.raises(LearningError, match="no new examples"):
            fit(base.learner, (images[:0], labels[:0]), names=tuple("abcd"))
        with pytest.raises(LearningError, match="a validation label is 6"):
            fit(base.learner, new_examples, validation=(images, labels + 1))
    with pytest.raises(LearningError, match="frozen_stages is 9"):
        slow(base.learner, new_examples, with_update(frozen_stages=9))


def test_a_diverging_training_is_named(base):
    trainer = CONFIG.base.model_copy(update={"learning_rate": 1e38})
    config = CONFIG.model_copy(update={"base": trainer})

    with pytest.raises(LearningError, match=r"labels loss is (nan|inf) at step"):
        base_of(make_images([0, 1, 2, 3] * 12, seed=1), config=config)


def test_a_parent_of_another_architecture_is_named(base, new_examples):
    other = MODEL.model_copy(update={"widths": (8, 24)})
    model = build_model(other, 4, seed=0, num_random_features=64)
    parent = replace(base.learner, model=model)

    with pytest.raises(LearningError, match="Fisher is of another architecture"):
        slow(parent, new_examples)

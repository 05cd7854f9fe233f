"""Mirror images: in the analytic sums, and of activations that frozen stages gave."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from lifelong_ray.config import LearningConfig, ReplayConfig, TrainerConfig
from lifelong_ray.learning import (
    Alone,
    AnalyticSums,
    Labelled,
    Learner,
    Run,
    build_model,
    fit_base,
    fit_fast,
    fit_slow,
    fit_update,
    forget,
    train,
)
from lifelong_ray.learning.chance import generator_for
from lifelong_ray.learning.evaluate import clearly_less
from lifelong_ray.learning.learner import SETTINGS_FILE
from lifelong_ray.learning.memory import empty_memory
from lifelong_ray.learning.wide import Inputs, fit_widening, random_features, take_sums
from lifelong_ray.types import LearningError
from tests.unit.learning.world import (
    CONFIG,
    MODEL,
    TickingClock,
    assert_same_weights,
    make_images,
    on_workers,
)

NAMES = ("a", "b", "c", "d", "e", "f")
OLD = make_images([0, 1, 2, 3] * 12, seed=1)
NEW = make_images([4, 5] * 12 + [1], seed=2)
GOES = make_images([1, 4], seed=3)


def with_mirror(mirror: object, **update: object) -> LearningConfig:
    analytic = CONFIG.analytic.model_copy(update={"mirror": mirror, "ridge": 1e-2})
    changed = CONFIG.update.model_copy(update=update)
    return CONFIG.model_copy(update={"analytic": analytic, "update": changed})


def run() -> Run:
    return Run(TickingClock())


def joined(one: Labelled, other: Labelled) -> Labelled:
    return torch.cat([one[0], other[0]]), torch.cat([one[1], other[1]])


def sums_of(learner: Learner, examples: Labelled) -> AnalyticSums:
    """Of the examples alone, as they are."""
    features_NM = random_features(learner.model, Inputs(examples[0]))
    return AnalyticSums.of(features_NM, examples[1], learner.model.num_classes)


@pytest.fixture(scope="module")
def parent() -> Learner:
    return fit_base(OLD, NAMES[:4], MODEL, with_mirror(True), run()).learner


# ---------------------------------------------------------------- analytic sums


def test_mirrored_sums_are_half_of_each_view_and_count_examples(parent):
    plain = sums_of(parent, OLD)
    turned = sums_of(parent, (OLD[0].flip(3), OLD[1]))

    assert torch.equal(parent.sums.gram, (plain.gram + turned.gram) / 2)
    assert torch.equal(parent.sums.class_sums, (plain.class_sums + turned.class_sums) / 2)
    assert torch.equal(parent.sums.counts, plain.counts)


def test_a_fast_update_of_a_mirrored_family_is_what_all_examples_at_once_would_give(parent):
    learner = fit_fast(parent, NEW, NAMES, with_mirror(True), run()).learner

    images, labels = joined(OLD, NEW)
    both = joined((images, labels), (images.flip(3), labels))
    assert torch.equal(learner.sums.gram, sums_of(learner, both).gram / 2)
    assert torch.equal(learner.sums.class_sums, sums_of(learner, both).class_sums / 2)


def test_workers_share_out_mirrored_sums_to_the_same_bits():
    model = build_model(MODEL, 4, seed=0, num_random_features=64).eval()
    fit_widening(model, Inputs(OLD[0]), 0, generator_for(0, "widening"))
    model.analytic.mirrored = True
    room = AnalyticSums.empty(64, 4)

    shared = on_workers(2, lambda group: take_sums(model, Inputs(OLD[0]), OLD[1], room, group))

    alone = take_sums(model, Inputs(OLD[0]), OLD[1], room, Alone())
    assert torch.equal(shared[0].gram, alone.gram)


def test_examples_are_taken_out_of_mirrored_sums_to_the_bit(parent):
    settings = with_mirror(True)
    learner = fit_fast(parent, joined(NEW, GOES), NAMES, settings, run()).learner

    without = forget(learner, GOES, update=1, config=settings.analytic)

    never = fit_fast(parent, NEW, NAMES, settings, run()).learner
    assert torch.equal(without.sums.gram, never.sums.gram)
    assert torch.equal(without.sums.class_sums, never.sums.class_sums)
    assert torch.equal(without.sums.counts, never.sums.counts)


@pytest.mark.parametrize("keeps_everything", [False, True])
def test_the_slow_path_takes_mirrored_sums_along(parent, keeps_everything):
    replay = CONFIG.update.replay.model_copy(
        update={"memory_share": 1.0 if keeps_everything else 0.0}
    )
    settings = with_mirror(True, replay=replay)
    base = fit_base(OLD, NAMES[:4], MODEL, settings, run()).learner

    learner = fit_slow(base, NEW, NAMES, settings, run()).learner

    assert learner.model.analytic.mirrored
    assert float(learner.sums.counts.sum()) == len(OLD[1]) + len(NEW[1])
    assert learner.sums_exact == keeps_everything
    if keeps_everything:
        images, labels = joined(OLD, NEW)
        both = joined((images, labels), (images.flip(3), labels))
        assert torch.equal(learner.sums.gram, sums_of(learner, both).gram / 2)


def test_a_version_says_whether_its_sums_are_mirrored(parent):
    files = parent.to_files()

    assert Learner.from_files(files).model.analytic.mirrored
    settings = json.loads(files[SETTINGS_FILE])
    del settings["shape"]["mirrored"]  # As versions had it before there was a choice.
    older = {**files, SETTINGS_FILE: json.dumps(settings).encode()}
    assert not Learner.from_files(older).model.analytic.mirrored


def test_activations_alone_cannot_be_mirrored_for_the_sums():
    with pytest.raises(LearningError, match=r"keep images.* or set learning\.analytic\.mirror"):
        Inputs(torch.zeros(2, 8), start=2).mirrored()


FEATURES = ReplayConfig(memory_per_class=6, content="features")


def test_sums_over_mirror_images_are_refused_where_features_stand_in_for_images():
    with pytest.raises(LearningError, match=r"keep images.* or set learning\.analytic\.mirror"):
        fit_base(OLD, NAMES[:4], MODEL, with_mirror(True, replay=FEATURES), run())


def test_auto_does_not_mirror_where_features_stand_in_for_images():
    settings = with_mirror("auto", replay=FEATURES)
    turned = OLD[0].flip(-1), OLD[1]
    parent = fit_base(OLD, NAMES[:4], MODEL, settings, run(), validation=turned).learner

    assert not parent.model.analytic.mirrored
    assert fit_slow(parent, NEW, NAMES, settings, run()).report.path == "slow"


def test_a_mirrored_family_refuses_features_in_place_of_images_before_it_trains(parent):
    settings = with_mirror(True, replay=FEATURES.model_copy(update={"memory_per_class": 0}))
    parent = replace(parent, memory=empty_memory(MODEL, 4))
    never = replace(run(), on_epoch=lambda *_: pytest.fail("it trained"))

    with pytest.raises(LearningError, match=r"keep images"):
        fit_slow(parent, NEW, NAMES, settings, never)


# ---------------------------------------------------------------- auto


def bars(first: slice, second: slice, seed: int, per_class: int = 30) -> Labelled:
    """Two classes of one bright vertical bar each."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 200, (2 * per_class, 1, 8, 8), generator=generator)
    images[:per_class, 0, :, first] += 55
    images[per_class:, 0, :, second] += 55
    labels = torch.arange(2).repeat_interleave(per_class)
    return images.to(torch.uint8), labels


def chosen(first: slice, second: slice, mirror: object = "auto", *, judged: bool = True) -> bool:
    training, validation = bars(first, second, 1), bars(first, second, 2, per_class=100)
    fit = fit_base(
        training,
        NAMES[:2],
        MODEL,
        with_mirror(mirror),
        run(),
        validation=validation if judged else None,
    )
    assert fit.report.choices["mirrored"] == float(fit.learner.model.analytic.mirrored)
    return fit.learner.model.analytic.mirrored


def test_auto_mirrors_where_that_explains_unseen_images_better():
    middle, sides = slice(3, 5), slice(0, 8, 7)

    assert chosen(middle, sides)


def test_auto_does_not_mirror_what_only_a_mirror_makes_alike():
    left, right = slice(0, 2), slice(6, 8)

    assert not chosen(left, right)


def test_auto_needs_validation_examples_and_a_setting_needs_none():
    middle, sides = slice(3, 5), slice(0, 8, 7)

    assert not chosen(middle, sides, judged=False)
    assert chosen(middle, sides, mirror=True, judged=False)
    assert not chosen(middle, sides, mirror=False)


def test_errors_of_one_example_show_nothing():
    assert not clearly_less(torch.tensor([0.0]), torch.tensor([9.0]))


# ---------------------------------------------------------------- activations


def test_training_on_kept_activations_of_both_views_is_training_on_mirrored_images():
    settings = TrainerConfig(
        epochs=2, batch_size=16, learning_rate=5e-3, max_shift_px=0, mirror=True
    )

    def trained(start: int):
        model = build_model(MODEL, 4, seed=0)
        model.freeze_stages(1)
        with torch.no_grad():
            inputs = model.activations(OLD[0], stop=1) if start else OLD[0]
            turned = model.activations(OLD[0].flip(3), stop=1) if start else None
        train(
            model,
            inputs,
            OLD[1],
            config=settings,
            seed=0,
            clock=TickingClock(),
            start=start,
            turned=turned,
        )
        return model

    assert_same_weights(trained(1), trained(0), tolerance=1e-4)


def test_the_slow_path_mirrors_although_stages_are_frozen():
    trainer = CONFIG.update.trainer.model_copy(update={"mirror": True})
    learners = [
        fit_slow(
            fit_base(OLD, NAMES[:4], MODEL, with_mirror(False), run()).learner,
            NEW,
            NAMES,
            with_mirror(False, trainer=trainer if mirrored else CONFIG.update.trainer),
            run(),
        ).learner
        for mirrored in (False, True)
    ]

    heads = [learner.model.head.weight for learner in learners]
    assert not torch.equal(*heads)


@pytest.mark.parametrize("mirror", [False, True])
def test_what_the_fast_path_looked_at_gives_the_slow_one_the_same_result(mirror):
    settings = with_mirror(
        mirror,
        paths="default",
        frozen_stages=1,
        trainer=CONFIG.update.trainer.model_copy(update={"mirror": mirror}),
    )
    base = fit_base(OLD, NAMES[:4], MODEL, settings, run()).learner
    fast = fit_fast(base, NEW, NAMES, settings, run())
    assert fast.entering is not None
    assert fast.entering.start == 1
    forgetful = replace(fast, entering=None)

    results = [
        fit_slow(base, NEW, NAMES, settings, run(), fast=one).learner.to_files()
        for one in (fast, forgetful)
    ]

    assert results[0] == results[1]
    assert (
        fit_fast(base, NEW, NAMES, with_mirror(mirror, paths="fast"), run()).learner.to_files()[
            "model.safetensors"
        ]
        == fast.learner.to_files()["model.safetensors"]
    )


def test_an_update_does_not_hold_on_to_what_its_paths_passed_on():
    settings = with_mirror(False, paths="both")
    base = fit_base(OLD, NAMES[:4], MODEL, settings, run()).learner

    update = fit_update(base, NEW, NAMES, settings, run())

    assert set(update.fits) == {"fast", "slow"}
    assert all(fit.entering is None for fit in update.fits.values())

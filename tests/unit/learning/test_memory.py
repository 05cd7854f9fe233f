from __future__ import annotations

from typing import Any

import pytest
import torch

from lifelong_ray.config import ReplayConfig, UpdateConfig
from lifelong_ray.learning import Classifier, ReplayMemory, Run, build_model, fit_fast
from lifelong_ray.learning.memory import (
    empty_memory,
    memory_stage,
    model_features,
    remember,
)
from lifelong_ray.learning.replay import herding_order
from lifelong_ray.types import LearningError
from tests.unit.learning.world import CONFIG, MODEL, TickingClock, make_images

IMAGES, LABELS = make_images([0, 1, 2, 3] * 10, seed=1)


def settings(frozen_stages: int | str = 1, **replay: Any) -> UpdateConfig:
    given = {"memory_per_class": 3, **replay}
    return UpdateConfig(frozen_stages=frozen_stages, replay=ReplayConfig(**given))


def fresh_model(num_classes: int = 4) -> Classifier:
    return build_model(MODEL, num_classes, seed=0).eval()


def remembered(config: UpdateConfig, **kwargs: Any) -> ReplayMemory:
    return remember(empty_memory(MODEL, 4), fresh_model(), IMAGES, LABELS, config, seed=0, **kwargs)


def grown_to(num_classes: int) -> Classifier:
    model = fresh_model()
    model.grow(num_classes, torch.Generator().manual_seed(1))
    return model


def test_an_empty_memory_fits_the_models_images():
    memory = empty_memory(MODEL, 4)

    assert len(memory) == 0
    assert memory.inputs.shape == (0, 1, 8, 8)
    assert memory.content == "images"


def test_as_many_examples_of_every_class_are_kept_as_asked_for():
    memory = remembered(settings())

    assert memory.counts().tolist() == [3] * 4
    assert memory.seen.tolist() == [10] * 4
    known = {image.numpy().tobytes() for image in IMAGES}
    assert all(image.numpy().tobytes() in known for image in memory.inputs)


def test_the_same_seed_and_update_keep_the_same_examples():
    one, again, other = (remembered(settings(), update=u) for u in (1, 1, 2))

    assert torch.equal(one.inputs, again.inputs)
    assert not torch.equal(one.inputs, other.inputs)


def test_a_share_of_1_keeps_everything():
    memory = remembered(settings(memory_share=1))

    assert memory.counts().tolist() == memory.seen.tolist() == [10] * 4


def test_a_reservoir_keeps_more_of_frequent_classes():
    images, labels = make_images([0] * 60 + [1] * 6 + [2] * 6 + [3] * 6, seed=3)

    memory = remember(
        empty_memory(MODEL, 4),
        fresh_model(),
        images,
        labels,
        settings(selection="reservoir", memory_per_class=6),
        seed=0,
    )

    assert len(memory) == 24
    assert int(memory.counts()[0]) > 12


def test_herding_keeps_those_whose_mean_feature_is_closest_to_their_classs():
    memory = remembered(settings(selection="herding"))

    model = fresh_model()
    for c in range(4):
        mine = IMAGES[c == LABELS]
        order = herding_order(model_features(model, mine, 0), 3)
        assert torch.equal(memory.inputs[memory.labels == c], mine[order])


def test_features_are_kept_in_place_of_images():
    memory = remembered(settings(content="features"))

    model = fresh_model()
    with torch.no_grad():
        passed = model.activations(IMAGES, stop=1).half()
    assert memory.content == "features"
    assert memory.inputs.dtype == torch.float16
    known = {one.numpy().tobytes() for one in passed}
    assert all(one.numpy().tobytes() in known for one in memory.inputs)


def test_herding_of_kept_features_looks_at_what_the_backbone_makes_of_them():
    memory = remembered(settings(content="features", selection="herding"))

    assert memory.counts().tolist() == [3] * 4
    assert memory.content == "features"


@pytest.mark.parametrize("frozen_stages", [0, "auto"])
def test_features_cannot_be_kept_of_a_backbone_that_may_change(frozen_stages):
    config = settings(frozen_stages, content="features")

    with pytest.raises(LearningError, match=f"frozen_stages is {frozen_stages}.*1 or more"):
        remembered(config)


def test_images_have_passed_no_stage_and_features_the_frozen_ones():
    assert memory_stage(settings(2)) == 0
    assert memory_stage(settings("auto")) == 0
    assert memory_stage(settings(2, content="features")) == 2


def test_without_dark_experience_no_logits_are_stored():
    assert remembered(settings()).logits.shape[1] == 0


@pytest.mark.parametrize("content", ["images", "features"])
def test_dark_experience_stores_the_trained_heads_logits(content):
    memory = remembered(settings(content=content, dark_weight=0.5))

    model, stage = fresh_model(), memory_stage(settings(content=content))
    entering = memory.inputs.float() if stage else memory.inputs
    with torch.no_grad():
        expected = model.trained_logits(entering, start=stage)
    torch.testing.assert_close(memory.logits, expected)


def test_stored_logits_stay_those_of_their_time_when_the_head_grows():
    config = settings(dark_weight=0.5)
    memory = remembered(config)
    images, labels = make_images([4, 5] * 6, seed=2)

    later = remember(memory, grown_to(6), images, labels, config, seed=0, update=1)

    old = later.updates == 0
    assert later.logits.shape == (18, 6)
    assert torch.equal(later.logits[old, :4], memory.logits)
    assert bool(later.logits[old, 4:].isnan().all())
    assert bool(later.logits[~old].isfinite().all())


def test_logits_are_stored_from_the_update_that_asks_for_them_on():
    memory = remembered(settings())
    images, labels = make_images([4, 5] * 6, seed=2)

    later = remember(
        memory, grown_to(6), images, labels, settings(dark_weight=0.5), seed=0, update=1
    )

    old = later.updates == 0
    assert bool(later.logits[old].isnan().all())
    assert bool(later.logits[~old].isfinite().all())


def test_a_memory_that_keeps_nothing_stores_no_logits():
    memory = remembered(settings(dark_weight=0.5, memory_per_class=0))

    assert memory.logits.shape == (0, 4)


def test_a_memory_of_another_image_size_is_named():
    memory = empty_memory(MODEL.model_copy(update={"image_size": 12}), 4)

    with pytest.raises(LearningError, match=r"another image size.*\(1, 12, 12\).*\(1, 8, 8\)"):
        remember(memory, fresh_model(), IMAGES, LABELS, settings(), seed=0)


def test_a_memory_that_held_images_does_not_take_features():
    memory = remembered(settings())

    with pytest.raises(LearningError, match=r"another image size|another features"):
        remember(
            memory, fresh_model(), IMAGES, LABELS, settings(content="features"), seed=0, update=1
        )


def test_the_fast_path_stores_no_logits_of_a_head_that_it_did_not_train(base, new_examples):
    replay = CONFIG.update.replay.model_copy(update={"dark_weight": 0.5})
    config = CONFIG.model_copy(
        update={"update": CONFIG.update.model_copy(update={"replay": replay})}
    )

    learner = fit_fast(base.learner, new_examples, "abcdef", config, Run(TickingClock())).learner

    memory = learner.memory
    assert memory.logits[memory.updates == 1].isnan().all()

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lifelong_ray.learning import Labelled, Learner, Run, fit_base, fit_fast, fit_slow, forget
from lifelong_ray.learning.memory import empty_memory
from lifelong_ray.types import LearningError
from tests.unit.learning.world import CONFIG, MODEL, TickingClock, make_images

NAMES = ("a", "b", "c", "d", "e", "f")
SETTINGS = CONFIG.model_copy(
    update={"analytic": CONFIG.analytic.model_copy(update={"ridge": 1e-2})}
)
STAYS = make_images([0, 1, 2, 3, 4, 5] * 5, seed=5)
GOES = make_images([1, 3, 4, 5] * 3, seed=6)


@pytest.fixture(scope="module")
def parent() -> Learner:
    examples = make_images([0, 1, 2, 3] * 12, seed=1)
    return fit_base(examples, "abcd", MODEL, SETTINGS, Run(TickingClock())).learner


def joined(one: Labelled, other: Labelled) -> Labelled:
    return torch.cat([one[0], other[0]]), torch.cat([one[1], other[1]])


def fast(learner: Learner, examples: Labelled) -> Learner:
    return fit_fast(learner, examples, NAMES, SETTINGS, Run(TickingClock())).learner


def assert_same_head(one: Learner, other: Learner) -> None:
    assert torch.equal(one.sums.gram, other.sums.gram)
    assert torch.equal(one.sums.class_sums, other.sums.class_sums)
    assert torch.equal(one.sums.counts, other.sums.counts)
    mine, its = one.model.analytic, other.model.analytic
    assert torch.equal(mine.mode_class, its.mode_class)
    torch.testing.assert_close(mine.weights_MK, its.weights_MK, rtol=1e-5, atol=1e-7)


def test_what_an_update_brought_can_be_taken_out_as_if_it_had_never_been(parent):
    learner = Learner.from_files(fast(parent, joined(STAYS, GOES)).to_files())

    without = forget(learner, GOES, 1, SETTINGS.analytic)

    assert_same_head(without, fast(parent, STAYS))


def test_what_the_base_training_brought_can_be_taken_out_after_updates(parent):
    some = make_images([0, 1, 2, 3] * 12, seed=1)
    some = (some[0][:6], some[1][:6])
    learner = fast(parent, STAYS)

    without = forget(learner, some, 0, SETTINGS.analytic)

    again = without.sums.add(
        without.model.analytic.widening.integers(without.model.see(some[0]).wide),
        without.sums.history[0, some[1]],
    )
    assert torch.equal(again.gram, learner.sums.gram)
    assert torch.equal(again.class_sums, learner.sums.class_sums)


def test_an_update_forgotten_as_a_whole_leaves_the_head_of_before(parent):
    images, labels = make_images([0, 1, 2, 3] * 3, seed=8)
    negatives = 255 - images, labels
    learner = fit_fast(parent, negatives, NAMES[:4], SETTINGS, Run(TickingClock())).learner
    assert learner.sums.num_modes > parent.sums.num_modes  # They look different, and are kept so.

    without = forget(learner, negatives, 1, SETTINGS.analytic)

    assert_same_head(without, parent)
    with pytest.raises(LearningError, match="update 1 brought no examples"):
        forget(without, negatives, 1, SETTINGS.analytic)


def test_what_is_forgotten_is_in_no_memory(parent):
    learner = fast(parent, joined(STAYS, GOES))
    remembered = [row for row in range(len(learner.memory)) if learner.memory.updates[row] == 1]
    images = torch.stack([learner.memory.inputs[row] for row in remembered])
    labels = torch.stack([learner.memory.labels[row] for row in remembered])

    without = forget(learner, (images, labels), 1, SETTINGS.analytic)

    assert not bool((without.memory.updates == 1).any())
    assert int(without.memory.seen.sum()) == int(learner.memory.seen.sum()) - len(labels)


def test_estimated_sums_are_not_taken_from(parent):
    run = Run(TickingClock())
    learner = fit_slow(fast(parent, STAYS), GOES, NAMES, SETTINGS, run).learner
    assert not learner.sums_exact

    with pytest.raises(LearningError, match=r"sums are estimates.*train a base version without"):
        forget(learner, GOES, 2, SETTINGS.analytic)


def test_examples_cannot_be_taken_out_of_decayed_sums(parent):
    decaying = SETTINGS.model_copy(
        update={"analytic": SETTINGS.analytic.model_copy(update={"decay": 0.5})}
    )
    learner = fit_fast(parent, STAYS, NAMES, decaying, Run(TickingClock())).learner

    with pytest.raises(LearningError, match="sums are estimates"):
        forget(learner, GOES, 1, decaying.analytic)


def test_a_backbone_that_moves_without_any_memory_leaves_estimates(parent):
    emptied = replace(parent, memory=empty_memory(MODEL, 4))

    learner = fit_slow(emptied, STAYS, NAMES, SETTINGS, Run(TickingClock())).learner

    assert not learner.sums_exact


@pytest.mark.parametrize("update", [-1, 0, 2])
def test_examples_of_another_update_are_refused(parent, update):
    learner = fast(parent, joined(STAYS, GOES))

    with pytest.raises(LearningError, match=rf"update {update} brought no examples.*0 to 1"):
        forget(learner, GOES, update, SETTINGS.analytic)


def test_more_than_was_learned_cannot_be_forgotten(parent):
    learner = fast(parent, STAYS)
    too_many = make_images([4] * 6, seed=7)

    with pytest.raises(LearningError, match="class 4"):
        forget(learner, too_many, 1, SETTINGS.analytic)


def test_a_version_saved_without_its_history_is_refused_with_a_reason(parent):
    learner = fast(parent, STAYS)
    unknown = replace(learner.sums, history=torch.zeros(0, 0, dtype=torch.int64))

    with pytest.raises(LearningError, match="update 1 brought no examples"):
        forget(replace(learner, sums=unknown), GOES, 1, SETTINGS.analytic)

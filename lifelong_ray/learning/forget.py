"""Take learned examples out again.

What follows from sums alone, the analytic head, becomes what it would be had they never been
there. Axes: N examples, C classes, U updates.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from lifelong_ray.config import AnalyticConfig
from lifelong_ray.learning.collective import Alone
from lifelong_ray.learning.learner import Learner
from lifelong_ray.learning.lesson import Labelled, check_known
from lifelong_ray.learning.model import in_chunks
from lifelong_ray.learning.replay import ReplayMemory
from lifelong_ray.learning.wide import Inputs, take_sums
from lifelong_ray.types import LearningError


@torch.no_grad()
def forget(learner: Learner, examples: Labelled, update: int, config: AnalyticConfig) -> Learner:
    """Return the learner without examples that one of its trainings brought.

    Exact for the analytic head: its sums are to the bit those of a learner that never had them,
    and so is the head at the same ridge, but for rounding. Copies in the memory go too. The
    backbone, the trained head, the Fisher and the ridge were found with the help of the
    examples and stay; where that is too much, train a base version without them.

    Args:
        learner: Stays as it is.
        examples: uint8 images and positions in the learner's class names, as they were learned.
        update: Which training brought them: 0 is the base training.
        config: `class_balance` as before.

    Raises:
        LearningError: If the learner has no analytic head or its sums are estimates, or if it
            cannot have learned these examples then.
    """
    check_known(learner, examples)
    if not learner.model.num_random_features or not learner.sums_exact:
        why = "are estimates" if learner.model.num_random_features else "were never taken"
        raise LearningError(
            f"the analytic sums {why}, so that examples cannot be taken out exactly; train a "
            "base version without them"
        )
    images, labels = examples
    history_UC = learner.sums.history
    known = update < len(history_UC) and bool((history_UC[update, labels] >= 0).all())
    if update < 0 or not known:
        raise LearningError(
            f"update {update} brought no examples of some of these classes; give the number of "
            f"the training that brought them, 0 to {learner.num_updates}"
        )
    model = learner.model.copy()
    gone = take_sums(model, Inputs(images), history_UC[update, labels], learner.sums, Alone())
    sums = learner.sums.less(gone).without_empty_modes()
    try:
        weights_MK = sums.solve(learner.ridge, config.class_balance)
    except LearningError as error:
        raise LearningError(
            f"without these {len(labels)} examples there is no head any more: they are all that "
            f"was learned, or not what update {update} brought; give the very images and labels "
            f"that it was trained on, and leave some ({error})"
        ) from error
    model.analytic.set_modes(sums.mode_class, weights_MK, float(model.analytic.sharpness))
    return replace(
        learner, model=model, sums=sums, memory=_memory_without(learner, examples, update)
    )


def _memory_without(learner: Learner, examples: Labelled, update: int) -> ReplayMemory:
    memory, model = learner.memory, learner.model
    images, labels = examples
    inputs = images
    if learner.memory_stage:
        inputs = in_chunks(
            lambda x: model.activations(x, stop=learner.memory_stage), images, filled_up=True
        )
        inputs = inputs.to(memory.inputs.dtype)
    gone = {one.numpy().tobytes() for one in inputs.contiguous()}
    goes_N = [
        int(number) == update and one.contiguous().numpy().tobytes() in gone
        for one, number in zip(memory.inputs, memory.updates, strict=True)
    ]
    erased_C = torch.bincount(labels, minlength=memory.num_classes)
    return memory.without(torch.tensor(goes_N, dtype=torch.bool), erased=erased_C)

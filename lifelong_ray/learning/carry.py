"""What becomes of the analytic sums when the backbone under them has moved.

Axes: N examples seen through both backbones, M random features, K modes.
"""

from __future__ import annotations

import logging
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import Module

from lifelong_ray.config import LearningConfig
from lifelong_ray.learning.analytic import AnalyticSums
from lifelong_ray.learning.chance import generator_for
from lifelong_ray.learning.fast import with_modes
from lifelong_ray.learning.learner import Learner
from lifelong_ray.learning.lesson import Run
from lifelong_ray.learning.material import Material
from lifelong_ray.learning.model import Branch, Classifier
from lifelong_ray.learning.wide import Inputs, fit_widening, random_features, solve, take_sums
from lifelong_ray.types import LearningError

logger = logging.getLogger(__name__)

_RIDGE = 1e-3


def carried_over(
    sums: AnalyticSums, before_NM: Tensor, after_NM: Tensor, old_N: Tensor
) -> AnalyticSums:
    """Return sums of old features as sums of the new features of the same examples.

    The examples themselves are gone; what a linear map makes of their old features stands in
    for their new ones. The map is fitted by ridge regression to the examples that were seen
    through both backbones, and the scatter that it leaves among the old ones of these is
    added to the Gram matrix, without which the head would trust the map too much.

    On CIFAR-10, six classes and then four, with a tenth of the old images kept, the head from
    carried sums is a point below the one from all old images, and ten points above the one
    from the kept images alone.

    Args:
        sums: Of the features before.
        before_NM: Random features of some examples before, int8 or floating point.
        after_NM: The same examples' features now.
        old_N: Which of them are of the kind that `sums` are over; at least one.

    Returns:
        Estimated sums in floating point: no longer exact.

    Raises:
        LearningError: If no map can be fitted.
    """
    if not bool(old_N.any()):
        raise LearningError(
            "sums cannot be carried over to new features without one remembered example; keep "
            "a memory, or take the fast path"
        )
    before, after = before_NM.float(), after_NM.float()
    system = (before.T @ before).double()
    system.diagonal().add_(_RIDGE * float(system.diagonal().mean()))
    factor, info = torch.linalg.cholesky_ex(system)
    if int(info.item()):
        raise LearningError("the features before the update are not finite or all zero")
    map_MM = torch.cholesky_solve((before.T @ after).double(), factor).float()
    missed = after[old_N] - before[old_N] @ map_MM
    scatter = (missed.T @ missed).double() / len(missed)
    moved = (map_MM.T @ (sums.gram.float() @ map_MM)).double()
    return AnalyticSums(
        gram=(moved + moved.T) / 2 + scatter * float(sums.counts.sum()),
        class_sums=map_MM.T.double() @ sums.class_sums,
        counts=sums.counts,
        mode_class=sums.mode_class,
        num_classes=sums.num_classes,
        history=sums.history,
    )


@torch.no_grad()
def sums_after(
    parent: Learner,
    model: Classifier,
    material: Material,
    before_NM: Tensor | None,
    config: LearningConfig,
    run: Run,
) -> tuple[AnalyticSums, float]:
    """Give the adapted backbone its analytic head; return its sums and ridge.

    Args:
        parent: Whose sums are added to.
        model: After training; its analytic head is replaced.
        material: What it was trained on.
        before_NM: The parent's random features of that, where `carries_sums` says so.
        config: The settings.
        run: The workers.
    """
    if not model.num_random_features:
        return parent.sums.grow(model.num_classes), 0.0
    inputs, labels, num_new = material.inputs, material.labels, material.num_new
    new_inputs, new_labels = inputs[:num_new], labels[:num_new]
    older = parent.sums.decayed(config.analytic.decay)
    if len(model.branches) > len(parent.model.branches) and model.analytic.source != "pixels":
        generator = generator_for(config.seed, "widening", len(model.branches))
        fit_widening(model, inputs, config.seed, generator)
    new_NM = None
    if same_features(parent, model):
        pass
    elif rebuilds_sums(parent, config):
        # Nothing was left out of the memory: its sums are those of everything.
        older = _sums_of_memory(parent, model, inputs[num_new:], run)
    elif before_NM is not None:
        after_NM = random_features(model, inputs)
        is_old_N = torch.arange(len(labels)) >= num_new
        older, new_NM = carried_over(older, before_NM, after_NM, is_old_N), after_NM
    else:
        logger.warning(
            "the backbone has moved and nothing is remembered, so the analytic head's sums of "
            "old classes are of features that are no more; keep a memory"
        )
    sums, modes_N = with_modes(older, new_labels, model.num_classes, parent.num_updates + 1)
    more = take_sums(model, new_inputs, modes_N, sums, run.collective, known_NM=new_NM)
    return solve(model, sums.merged_into(more), config.analytic, parent.ridge)


def carries_sums(parent: Learner, model: Classifier, config: LearningConfig) -> bool:
    """Whether the parent's sums will be carried over to what training makes of the network."""
    stays = not any(
        weight.requires_grad
        for stages in (model.stages, *_branch_stages(model))
        for weight in stages.parameters()
    )
    return (
        model.num_random_features > 0
        and model.analytic.source != "pixels"
        and not (stays and len(model.branches) == len(parent.model.branches))
        and len(parent.memory) > 0
        and not config.update.pseudo_features
        and not rebuilds_sums(parent, config)
    )


def rebuilds_sums(parent: Learner, config: LearningConfig) -> bool:
    """Whether the parent's sums can be taken anew of the examples themselves."""
    has_all = len(parent.memory) > 0 and _keeps_everything(parent)
    return has_all and config.analytic.decay == 1 and not config.update.pseudo_features


def _keeps_everything(parent: Learner) -> bool:
    """Whether nothing that was seen is missing from the memory."""
    return bool((parent.memory.counts() == parent.memory.seen).all())


def _sums_of_memory(
    parent: Learner, model: Classifier, remembered: Inputs, run: Run
) -> AnalyticSums:
    """Exact sums over a memory that kept everything, one mode per class and update."""
    memory = parent.memory
    room = AnalyticSums.empty(0, len(parent.class_names))
    modes_N = torch.zeros(len(memory), dtype=torch.int64)
    for number in memory.updates.unique().tolist():
        mine = memory.updates == number
        room, modes_N[mine] = with_modes(room, memory.labels[mine], room.num_classes, number)
        # A mode counts as taken once it has an example.
        room = replace(room, counts=room.counts.clone().index_fill_(0, modes_N[mine], 1.0))
    return take_sums(model, remembered, modes_N, room, run.collective)


def same_features(parent: Learner, model: Classifier) -> bool:
    """Whether the analytic head sees what it saw before."""
    if model.analytic.source == "pixels":
        return True
    if len(model.branches) != len(parent.model.branches):
        return False
    now = (model.stages, *_branch_stages(model))
    before = (parent.model.stages, *_branch_stages(parent.model))
    return all(
        torch.equal(value.cpu(), was.cpu())
        for its, theirs in zip(now, before, strict=True)
        for value, was in zip(its.state_dict().values(), theirs.state_dict().values(), strict=True)
    )


def _branch_stages(model: Classifier) -> list[Module]:
    """The stages of each branch, without the head that it has of its own."""
    return [branch.stages for branch in model.branches if isinstance(branch, Branch)]

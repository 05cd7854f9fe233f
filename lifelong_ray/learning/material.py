"""What the slow path trains on: examples where they enter the network, and in which batches.

Axes: N examples (new ones, then remembered or made-up old ones), C classes, D backbone features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lifelong_ray.config import UpdateConfig
from lifelong_ray.learning.chance import generator_for
from lifelong_ray.learning.learner import Learner
from lifelong_ray.learning.lesson import Labelled
from lifelong_ray.learning.model import Classifier, in_chunks, rows_at_once, with_rows
from lifelong_ray.learning.replay import BatchPlan, endless_batches, mix_batches
from lifelong_ray.learning.trainer import Rivals
from lifelong_ray.learning.wide import NO_MIRROR, Inputs, replays_no_images
from lifelong_ray.types import LearningError

_MAX_CACHE_BYTES = 4_000_000_000
_MOST_REPLAYED = 0.75


@dataclass(frozen=True, eq=False)
class Material:
    """What a network is trained on.

    Attributes:
        inputs: New examples, then remembered or made-up old ones (N, ...).
        labels: Their classes (N,).
        num_new: How many are new.
        batches: Which of them are shown together.
        rivals: Which classes an example's label competes with; None means all.
        class_offsets: Added to the logits in the labels' loss (C,); None means nothing.
    """

    inputs: Inputs
    labels: Tensor
    num_new: int
    batches: BatchPlan
    rivals: Rivals | None
    class_offsets: Tensor | None


def material_for(
    parent: Learner,
    model: Classifier,
    training: Labelled,
    depth: int,
    update: UpdateConfig,
    entering: Inputs | None = None,
) -> Material:
    """Return what `model`, whose first `depth` stages are frozen, is to be trained on.

    Args:
        parent: Whose memory is replayed.
        model: With room for all classes, on its device.
        training: New examples.
        depth: Frozen stages.
        update: The settings.
        entering: What `enter_trained_stages` made of the new examples, if it is known.

    Raises:
        LearningError: If memory and settings do not go together.
    """
    inputs, labels = _entering(parent, model, training, depth, update, entering)
    num_new = len(training[1])
    batches = _plan(parent, num_new, len(labels), update)
    return Material(
        inputs,
        labels,
        num_new,
        batches,
        _rivals(parent, training[1], len(labels), model.num_classes, update),
        _class_offsets(labels, batches, model.num_classes, update.logit_adjustment),
    )


@torch.no_grad()
def enter_trained_stages(
    parent: Learner, model: Classifier, images: Tensor, update: UpdateConfig
) -> Inputs:
    """Return new images where they enter the stages that the slow path will train.

    For the fast path, which looks at them anyway, so that the slow one need not begin anew.
    Their mirror images come along where both paths need them. Where nothing can be kept, or the
    fast path would not have looked, they are the images themselves.
    """
    depth = update.frozen_stages
    if not isinstance(depth, int) or depth > len(model.stages) or update.pseudo_features:
        return Inputs(images)
    slow_sits_out = update.paths == "default" and parent.slow_rest > 0
    if slow_sits_out or model.analytic.source == "pixels":
        return Inputs(images)
    start = _kept_stages(parent, model, len(images), depth, update)
    if not start:
        return Inputs(images)
    turned = None
    if model.analytic.mirrored and update.trainer.mirror:
        turned = _passed(model, [(images.flip(3), 0)], start)
    return Inputs(_passed(model, [(images, 0)], start), start, images, turned)


@torch.no_grad()
def _entering(
    parent: Learner,
    model: Classifier,
    training: Labelled,
    depth: int,
    update: UpdateConfig,
    entering: Inputs | None,
) -> tuple[Inputs, Tensor]:
    """Return what is trained on: new, then remembered or made-up old examples, with labels.

    What frozen stages make of an image is the same in every epoch, so it is computed once, and
    once more for its mirror image, unless images are shifted or it would take too much memory.
    """
    images, labels = training
    memory, stage = parent.memory, parent.memory_stage
    if model.analytic.mirrored and replays_no_images(update):
        raise LearningError(NO_MIRROR)
    if update.pseudo_features:
        return _with_pseudo_features(parent, model, training, depth, update)
    moves = update.trainer.max_shift_px or update.trainer.mirror
    features = stage or update.replay.content == "features"
    if (stage and stage != depth) or (moves and features):
        raise LearningError(
            f"the memory holds {memory.content} that passed {stage} stages; with "
            f"replay.content {update.replay.content}, {depth} frozen stages and "
            f"{'' if moves else 'no '}images moved about it would not fit the new ones: keep "
            "content and frozen_stages as they were for the base training, without shifts"
        )
    start = _kept_stages(parent, model, len(images), depth, update)
    all_labels = torch.cat([labels, memory.labels])
    pixels = None if stage else torch.cat([images, memory.inputs])
    if not start:
        assert pixels is not None
        return Inputs(pixels), all_labels

    known = entering if entering is not None and entering.start == start else Inputs(images)
    remembered = memory.inputs
    passed = _passed(model, [(known.tensor, known.start), (remembered, stage)], start)
    turned = None
    if update.trainer.mirror:
        new = known.mirrored()
        turned = _passed(model, [(new.tensor, new.start), (remembered.flip(3), stage)], start)
    return Inputs(passed, start, pixels, turned), all_labels


def _kept_stages(
    parent: Learner, model: Classifier, num_new: int, depth: int, update: UpdateConfig
) -> int:
    """How many stages need not be run at every step, since what they give is kept."""
    start = 0 if update.trainer.max_shift_px else depth
    # The analytic head may look at what enters the last stage, a branch at what enters it.
    if model.analytic.source == "stages":
        start = min(start, len(model.stages) - 1)
    start = min([start, *model.shape.branch_starts])
    num_views = 2 if update.trainer.mirror else 1
    num_bytes = _bytes_at(model, start) * (num_new + len(parent.memory)) * num_views
    if start and not parent.memory_stage and num_bytes > _MAX_CACHE_BYTES:
        return 0
    return start


def _passed(model: Classifier, sources: list[tuple[Tensor, int]], stop: int) -> Tensor:
    """What the stages up to `stop` make of inputs that have passed so many of them."""

    def through(x: Tensor, first: int) -> Tensor:
        x = (x.float() if x.dtype == torch.float16 else x).to(model.device)
        if x.dim() == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        return model.activations(x, start=first, stop=stop).cpu()

    rows = rows_at_once(model.device)
    held: Tensor | None = None
    place = 0
    for source, first in sources:
        for piece in source.split(rows):
            h = through(with_rows(piece, rows), first)[: len(piece)]
            if held is None:  # filled in place, since it may be most of the memory there is
                held = h.new_empty(sum(len(tensor) for tensor, _ in sources), *h.shape[1:])
                if h.dim() == 4:
                    held = held.contiguous(memory_format=torch.channels_last)
            held[place : place + len(h)] = h
            place += len(h)
    assert held is not None
    return held


@torch.no_grad()
def _with_pseudo_features(
    parent: Learner, model: Classifier, training: Labelled, depth: int, update: UpdateConfig
) -> tuple[Inputs, Tensor]:
    """New features, and for each old class some of the nearest new class, moved to its mean.

    Source: Petit et al. 2023 (FeTrIL), arXiv:2211.13131.
    """
    images, labels = training
    if len(model.branches):
        raise LearningError(
            "pseudo_features stand in for the features of the trunk alone, and this network has "
            "branches; set pseudo_features and expansion to what this family began with"
        )
    if depth < len(model.stages):
        raise LearningError(
            f"pseudo_features stand in for old features, so the whole backbone must be frozen: "
            f"set frozen_stages to {len(model.stages)}, not {depth}"
        )
    means_CD = parent.class_means
    if not means_CD.shape[1]:
        raise LearningError(
            "the parent kept no mean features by class; set learning.update.pseudo_features for "
            "its training as well"
        )
    features_ND = in_chunks(lambda x: model.features(x.to(model.device)).cpu(), images)
    new_classes = labels.unique().tolist()
    new_means = torch.stack([features_ND[labels == c].mean(0) for c in new_classes])
    generator = generator_for(0, "pseudo", len(labels))
    made, made_labels = [], []
    for old in range(len(means_CD)):
        if old in new_classes:
            continue
        near = int(torch.cosine_similarity(new_means, means_CD[old][None]).argmax())
        donors = (labels == new_classes[near]).nonzero()[:, 0]
        drawn = torch.randint(len(donors), (update.pseudo_features,), generator=generator)
        made.append(features_ND[donors[drawn]] + means_CD[old] - new_means[near])
        made_labels.append(torch.full((update.pseudo_features,), old))
    tensor = torch.cat([features_ND, *made])
    all_labels = torch.cat([labels, *made_labels]).long()
    return Inputs(tensor, len(model.stages)), all_labels


def _bytes_at(model: Classifier, stage: int) -> int:
    config = model.config
    blank = torch.zeros(1, config.channels, config.image_size, config.image_size)
    with torch.no_grad():
        one = model.activations(blank.to(model.device), stop=stage)
    return one.numel() * one.element_size()


def _plan(parent: Learner, num_new: int, num_all: int, update: UpdateConfig) -> BatchPlan:
    """The batches: new examples, each with its share of old ones."""
    num_old, trainer = num_all - num_new, update.trainer
    seen = float(parent.memory.seen.sum())
    share = min(_MOST_REPLAYED, seen / (seen + num_new))
    if update.replay.share != "auto":
        share = update.replay.share
    if update.pseudo_features:
        share = num_old / num_all
    if not trainer.iterations:
        return mix_batches(num_new, num_old, share, trainer.batch_size)
    replayed = round(trainer.batch_size * share) if num_old else 0
    return endless_batches(
        num_new, num_old, trainer.batch_size - replayed, replayed, trainer.iterations
    )


def _class_offsets(
    labels: Tensor, plan: BatchPlan, num_classes: int, strength: float
) -> Tensor | None:
    """What makes up for classes that are shown more often than others, for each of them.

    The logarithm of its share of an epoch, so that what the logits learn is the rest: how an
    image looks. A class that is not shown counts as one that is shown once.

    Source: Menon et al. 2021, Long-tail learning via logit adjustment, arXiv:2007.07314, eq. 10.
    """
    if not strength:
        return None
    shown_N = torch.cat(plan(generator_for(0, "class shares")))
    counts_C = torch.bincount(labels[shown_N], minlength=num_classes).clamp(min=1)
    if bool((counts_C == counts_C[0]).all()):
        return None
    return strength * (counts_C / counts_C.sum()).log()


def _rivals(
    parent: Learner, labels: Tensor, num_all: int, num_classes: int, update: UpdateConfig
) -> Rivals | None:
    """For `labels_compete`: the classes of each example's own update."""
    if update.labels_compete == "all":
        return None
    memory = parent.memory
    group_N = torch.zeros(num_all, dtype=torch.int64)
    allowed = [torch.bincount(labels, minlength=num_classes) > 0]
    if update.pseudo_features:  # Made up of classes, not of updates.
        group_N[len(labels) :] = 1
        allowed.append(torch.ones(num_classes, dtype=torch.bool))
    else:
        for number in memory.updates.unique().tolist():
            mine = memory.updates == number
            group_N[len(labels) :][mine] = len(allowed)
            allowed.append(torch.bincount(memory.labels[mine], minlength=num_classes) > 0)
    return Rivals(group_N, torch.stack(allowed))

"""The slow path of an update: fine-tune the backbone without forgetting.

Then the analytic head is fitted anew on the adapted backbone, and the best way to answer is
chosen.

Axes: N training examples (new ones, then remembered or made-up old ones), C classes, D
backbone features.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import Module

from lifelong_ray.config import LearningConfig, UpdateConfig
from lifelong_ray.learning.analytic import AnalyticSums
from lifelong_ray.learning.carry import carried_over
from lifelong_ray.learning.chance import generator_for
from lifelong_ray.learning.evaluate import accuracy, fit_temperature
from lifelong_ray.learning.fast import grown, with_modes
from lifelong_ray.learning.heads import align_new_rows
from lifelong_ray.learning.learner import Learner
from lifelong_ray.learning.lesson import Fit, FitReport, Labelled, Run, Stopwatch, check_update
from lifelong_ray.learning.memory import check_memory, remember, stage_after
from lifelong_ray.learning.model import Classifier, in_chunks
from lifelong_ray.learning.replay import (
    BatchPlan,
    ReplayMemory,
    endless_batches,
    mix_batches,
)
from lifelong_ray.learning.terms import (
    accumulated,
    class_means_after,
    fisher_of,
    update_terms,
    warn_of_forgetting,
)
from lifelong_ray.learning.trainer import Rivals, TrainReport, train
from lifelong_ray.learning.wide import (
    Answering,
    Inputs,
    answers,
    answers_and_random_features,
    choose_answering,
    fit_widening,
    look,
    random_features,
    solve,
    take_sums,
)
from lifelong_ray.types import LearningError

logger = logging.getLogger(__name__)

_MAX_CACHE_BYTES = 4_000_000_000
_MOST_REPLAYED = 0.75
_ROWS_AT_ONCE = 256
_TRIAL_SHARE = 0.25


def fit_slow(
    parent: Learner,
    training: Labelled,
    class_names: Sequence[str],
    config: LearningConfig,
    run: Run,
    *,
    validation: Labelled | None = None,
    expand: bool = False,
    fast: Fit | None = None,
) -> Fit:
    """Fine-tune the backbone without forgetting, then fit the analytic head anew on it.

    The gradient phase trains on the new examples and the replayed memory under EWC and
    distillation. Then the analytic sums are carried over to the adapted features (see
    `carried_over`) and those of the new examples added. The best way to answer on
    `validation` is taken; without validation, the analytic head.

    Arguments and errors are those of `fit_fast`.

    Args:
        parent: Stays as it is.
        training: New examples: uint8 images and positions in `class_names`.
        class_names: The parent's, then the new ones; each new one has an example.
        config: `config.update` is the training.
        run: How it is carried out.
        validation: Examples that choose the head and calibrate, and are never trained on.
        expand: Train a new branch of the backbone beside the old one, which stays as it is.
        fast: What the fast path gave, whose sums are taken over where they still hold.
    """
    watch = Stopwatch(run.clock)
    names = check_update(parent, training, validation, class_names)
    update, memory = config.update, parent.memory
    check_memory(memory, parent.memory_stage, parent.model.config, update)
    warn_of_forgetting(parent, update, has_new_classes=len(names) > len(parent.class_names))
    if not len(memory) and update.replay.share:
        logger.warning(
            "nothing is remembered, so replay.share %s has no effect", update.replay.share
        )
    depth = _depth(parent, training, names, config, run, validation)
    model = grown(parent, len(names), config.seed).to(run.device)
    if expand:  # A branch has at least one stage, which is not frozen.
        depth = min(depth, len(model.stages) - 1)
    model.freeze_stages(depth)
    if expand:
        model.expand(depth)
        model.freeze_but_last_branch()
    lesson = _train(parent, model, training, depth, config, run)
    inputs, labels, trained = lesson.inputs, lesson.labels, lesson.report
    extra_seconds = watch.lap() - trained.seconds
    model.eval()
    model.requires_grad_(True)
    if update.weight_alignment and len(names) > len(parent.class_names):
        align_new_rows(model.head, len(parent.class_names))
    num_new = len(training[1])
    exact = parent.sums_exact and (_same_features(parent, model) or _keeps_everything(parent))
    if fast is not None and _same_features(parent, model):
        sums, ridge = fast.learner.sums, fast.learner.ridge
        model.analytic = copy.deepcopy(fast.learner.model.analytic).to(run.device)
    else:
        sums, ridge = _sums_after(parent, model, lesson, num_new, config, run)
    outdated = not len(parent.memory) and not _same_features(parent, model)
    outdated = outdated or bool(update.pseudo_features)
    stands_for_N = torch.ones(len(labels), dtype=torch.float64)
    if not update.pseudo_features:
        stands_for_N[num_new:] = memory.weights()
    answering = _choose(
        model,
        inputs,
        labels,
        stands_for_N,
        sums,
        ridge,
        config.analytic.class_balance,
        memory,
        validation,
        outdated=outdated,
    )
    learner = _remembering(
        parent, model, training, names, config, run, inputs[:num_new], sums, ridge, answering
    )
    learner = replace(learner, sums_exact=exact)
    report = FitReport(
        path="slow",
        samples_seen=trained.samples_seen + len(labels),
        train_seconds=trained.seconds,
        extra_seconds=extra_seconds + watch.lap(),
        epochs=trained.epochs,
        validation_accuracy=None if validation is None else answering.accuracy,
        choices=_choices(learner, trained, depth, expand=expand),
    )
    return Fit(learner, report, answering.right)


@dataclass(frozen=True, eq=False)
class _Lesson:
    """What the network was trained on, and how that went.

    Attributes:
        inputs: New examples, then remembered or made-up old ones (N, ...).
        labels: Their classes (N,).
        report: Of the training.
        random_before: The parent's random features of `inputs` (N, M), where its sums are to be
            carried over.
    """

    inputs: Inputs
    labels: Tensor
    report: TrainReport
    random_before: Tensor | None


def _train(
    parent: Learner,
    model: Classifier,
    training: Labelled,
    depth: int,
    config: LearningConfig,
    run: Run,
) -> _Lesson:
    """Train `model` as the update's settings say."""
    update, num_new = config.update, len(training[1])
    inputs, labels = _entering(parent, model, training, depth, update)
    # What the parent makes of the examples is looked at once, for both who need it.
    teacher_NC, before_NM = None, None
    teacher = parent.model.copy().to(run.device)
    if _carries_sums(parent, model, config):
        teacher_NC, before_NM = answers_and_random_features(teacher, inputs)
    elif update.distillation.weight:
        teacher_NC = answers(teacher, inputs)
    plan = _plan(parent, num_new, len(labels), update)
    trained = train(
        model,
        inputs.tensor,
        labels,
        config=update.trainer,
        seed=config.seed,
        clock=run.clock,
        terms=update_terms(parent, model, labels, update, teacher_NC),
        batches=plan,
        start=inputs.start,
        rivals=_rivals(parent, training[1], len(labels), model.num_classes, update),
        class_offsets=_class_offsets(labels, plan, model.num_classes, update.logit_adjustment),
        collective=run.collective,
        resume=run.resume,
        on_epoch=run.on_epoch,
    )
    return _Lesson(inputs, labels, trained, before_NM)


def _choices(
    learner: Learner, trained: TrainReport, depth: int, *, expand: bool
) -> dict[str, str | float]:
    return {
        "head": learner.model.active_head,
        "ridge": learner.ridge,
        "frozen_stages": depth,
        "learning_rate": trained.learning_rate,
        "expanded": float(expand),
    }


def _remembering(
    parent: Learner,
    model: Classifier,
    training: Labelled,
    names: tuple[str, ...],
    config: LearningConfig,
    run: Run,
    new_inputs: Inputs,
    sums: AnalyticSums,
    ridge: float,
    answering: Answering,
) -> Learner:
    """Gather what the learner carries after the update."""
    images, labels = training
    number = parent.num_updates + 1
    newer = fisher_of(
        model,
        new_inputs,
        labels,
        config,
        run.collective,
        num_examples=config.update.ewc.num_update_fisher_examples,
    )
    memory = remember(
        parent.memory, model, images, labels, config.update, seed=config.seed, update=number
    )
    means_CD = class_means_after(parent, model, new_inputs, labels, config)
    model.to("cpu")
    fisher, anchor = accumulated(parent, model, newer, len(labels), config)
    return Learner(
        model=model,
        class_names=names,
        fisher=fisher,
        anchor=anchor,
        sums=sums,
        memory=memory,
        class_means=means_CD,
        temperature=answering.temperature,
        sums_exact=False,
        ridge=ridge,
        num_updates=number,
        memory_stage=stage_after(parent.memory_stage, parent.memory, config.update),
    )


def _depth(
    parent: Learner,
    training: Labelled,
    names: tuple[str, ...],
    config: LearningConfig,
    run: Run,
    validation: Labelled | None,
) -> int:
    """How many stages to freeze: as set, or the best of short trials on `validation`."""
    wanted, num_stages = config.update.frozen_stages, len(parent.model.stages)
    if isinstance(wanted, int):
        if wanted > num_stages:
            raise LearningError(
                f"update.frozen_stages is {wanted} but the backbone has {num_stages} stages"
            )
        return wanted
    if validation is None:
        raise LearningError(
            "update.frozen_stages is auto, which is decided on validation examples, and there "
            "are none; set a number, or learning.update.validation_share above 0"
        )
    trainer = config.update.trainer
    short = {
        "iterations": math.ceil(trainer.iterations * _TRIAL_SHARE),
        "epochs": math.ceil(trainer.epochs * _TRIAL_SHARE),
    }
    best, best_depth = -1.0, num_stages
    briefly = config.update.model_copy(update={"trainer": trainer.model_copy(update=short)})
    trial = config.model_copy(update={"update": briefly})
    alone = replace(run, resume=None, on_epoch=None)  # Checkpoints are of the real training.
    for depth in range(num_stages, -1, -1):
        model = grown(parent, len(names), config.seed).to(run.device)
        model.freeze_stages(depth)
        _train(parent, model, training, depth, trial, alone)
        model.eval()
        features_ND = look(model, Inputs(validation[0])).features
        score = accuracy(model.logits_of(features_ND.to(run.device)).cpu(), validation[1])
        logger.info("with %d frozen stages a short training reaches %.3f", depth, score)
        if score > best:
            best, best_depth = score, depth
    return best_depth


@torch.no_grad()
def _entering(
    parent: Learner, model: Classifier, training: Labelled, depth: int, update: UpdateConfig
) -> tuple[Inputs, Tensor]:
    """Return what is trained on: new, then remembered or made-up old examples, with labels.

    What frozen stages make of an image is the same in every epoch, so it is computed once,
    unless images are moved about or would take too much memory.
    """
    images, labels = training
    memory, stage = parent.memory, parent.memory_stage
    if update.pseudo_features:
        return _with_pseudo_features(parent, model, training, depth, update)
    moves = update.trainer.max_shift_px or update.trainer.mirror
    start = 0 if moves else depth
    features = stage or update.replay.content == "features"
    if features and (stage != depth or moves):
        raise LearningError(
            f"the memory holds {memory.content} that passed {stage} stages; with "
            f"replay.content {update.replay.content}, {depth} frozen stages and "
            f"{'' if moves else 'no '}images moved about it would not fit the new ones: keep "
            "content and frozen_stages as they were for the base training, without shifts"
        )
    # The analytic head may look at what enters the last stage, a branch at what enters it.
    if model.analytic.source == "stages":
        start = min(start, len(model.stages) - 1)
    start = min([start, *model.shape.branch_starts])
    if start and not stage and _bytes_at(model, start) * len(images) > _MAX_CACHE_BYTES:
        start = 0
    all_labels = torch.cat([labels, memory.labels])
    pixels = None if stage else torch.cat([images, memory.inputs])
    if not start:
        assert pixels is not None
        return Inputs(pixels), all_labels

    return Inputs(_passed(model, images, memory.inputs, stage, start), start, pixels), all_labels


def _passed(model: Classifier, images: Tensor, remembered: Tensor, stage: int, stop: int) -> Tensor:
    """What the stages up to `stop` make of new images, and of inputs that passed `stage`."""

    def through(x: Tensor, first: int) -> Tensor:
        x = (x.float() if x.dtype == torch.float16 else x).to(model.device)
        if x.dim() == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        return model.activations(x, start=first, stop=stop).cpu()

    held: Tensor | None = None
    place = 0
    for source, first in ((images, 0), (remembered, stage)):
        for piece in source.split(_ROWS_AT_ONCE):
            h = through(piece, first)
            if held is None:  # filled in place, since it may be most of the memory there is
                held = h.new_empty(len(images) + len(remembered), *h.shape[1:])
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


@torch.no_grad()
def _sums_after(
    parent: Learner,
    model: Classifier,
    lesson: _Lesson,
    num_new: int,
    config: LearningConfig,
    run: Run,
) -> tuple[AnalyticSums, float]:
    """Give the adapted backbone its analytic head; return its sums and ridge."""
    if not model.num_random_features:
        return parent.sums.grow(model.num_classes), 0.0
    inputs, labels = lesson.inputs, lesson.labels
    new_inputs, new_labels = inputs[:num_new], labels[:num_new]
    older = parent.sums.decayed(config.analytic.decay)
    if len(model.branches) > len(parent.model.branches) and model.analytic.source != "pixels":
        generator = generator_for(config.seed, "widening", len(model.branches))
        fit_widening(model, inputs, config.seed, generator)
    new_NM = None
    if _same_features(parent, model):
        pass
    elif _rebuilds_sums(parent, config):
        # Nothing was left out of the memory: its sums are those of everything.
        older = _sums_of_memory(parent, model, inputs[num_new:], run)
    elif lesson.random_before is not None:
        after_NM = random_features(model, inputs)
        is_old_N = torch.arange(len(labels)) >= num_new
        older, new_NM = carried_over(older, lesson.random_before, after_NM, is_old_N), after_NM
    else:
        logger.warning(
            "the backbone has moved and nothing is remembered, so the analytic head's sums of "
            "old classes are of features that are no more; keep a memory"
        )
    sums, modes_N = with_modes(older, new_labels, model.num_classes, parent.num_updates + 1)
    more = take_sums(model, new_inputs, modes_N, sums, run.collective, known_NM=new_NM)
    return solve(model, sums.merge(more), config.analytic, parent.ridge)


def _carries_sums(parent: Learner, model: Classifier, config: LearningConfig) -> bool:
    """Whether the parent's sums will be carried over to what training makes of the network."""
    stays = not any(weight.requires_grad for weight in model.stages.parameters())
    return (
        model.num_random_features > 0
        and model.analytic.source != "pixels"
        and not (stays and len(model.branches) == len(parent.model.branches))
        and len(parent.memory) > 0
        and not config.update.pseudo_features
        and not _rebuilds_sums(parent, config)
    )


def _rebuilds_sums(parent: Learner, config: LearningConfig) -> bool:
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
    room = AnalyticSums.empty(model.num_random_features, len(parent.class_names))
    modes_N = torch.zeros(len(memory), dtype=torch.int64)
    for number in memory.updates.unique().tolist():
        mine = memory.updates == number
        room, modes_N[mine] = with_modes(room, memory.labels[mine], room.num_classes, number)
        # A mode counts as taken once it has an example.
        room = replace(room, counts=room.counts.clone().index_fill_(0, modes_N[mine], 1.0))
    return take_sums(model, remembered, modes_N, room, run.collective)


def _same_features(parent: Learner, model: Classifier) -> bool:
    """Whether the analytic head sees what it saw before."""
    if model.analytic.source == "pixels":
        return True
    if len(model.branches) != len(parent.model.branches):
        return False
    return all(
        torch.equal(value.cpu(), was.cpu())
        for now, before in ((model.stages, parent.model.stages), *_branch_stages(model, parent))
        for value, was in zip(now.state_dict().values(), before.state_dict().values(), strict=True)
    )


def _branch_stages(model: Classifier, parent: Learner) -> list[tuple[Module, Module]]:
    return list(zip(model.branches, parent.model.branches, strict=True))


@torch.no_grad()
def _choose(
    model: Classifier,
    inputs: Inputs,
    labels: Tensor,
    stands_for_N: Tensor,
    sums: AnalyticSums,
    ridge: float,
    class_balance: float,
    memory: ReplayMemory,
    validation: Labelled | None,
    *,
    outdated: bool,
) -> Answering:
    """Choose how to answer, and calibrate."""
    analytic = model.num_random_features > 0
    if validation is not None:
        seen = look(model, Inputs(validation[0]))
        return choose_answering(
            model,
            seen,
            validation[1],
            prefer="analytic" if analytic else "linear",
            among=("both", "linear") if analytic else ("linear",),
        )
    if not analytic or outdated:
        model.active_head = "linear"
        return Answering("linear", 0.0, 1.0, 1.0, 1.0)
    model.active_head = "analytic"
    features_NM = random_features(model, inputs)
    num_new = len(labels) - len(memory)
    modes_N = sums.newest_modes[labels]
    modes_N[num_new:] = sums.modes_of(memory.updates, labels[num_new:])
    left_out_NK = sums.left_out_scores(
        features_NM, modes_N, torch.ones(len(labels)), ridge, class_balance
    )
    left_out_NC = model.analytic.together(left_out_NK, model.num_classes)
    temperature = fit_temperature(left_out_NC, labels, stands_for_N)
    return Answering("analytic", 0.0, temperature, 1.0, float(model.analytic.sharpness))

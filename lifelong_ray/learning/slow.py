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
from dataclasses import replace

import torch
from torch import Tensor

from lifelong_ray.config import LearningConfig, UpdateConfig
from lifelong_ray.learning.analytic import AnalyticSums
from lifelong_ray.learning.carry import (
    carries_sums,
    rebuilds_sums,
    same_features,
    sums_after,
)
from lifelong_ray.learning.evaluate import accuracy, fit_temperature
from lifelong_ray.learning.fast import grown
from lifelong_ray.learning.heads import align_new_rows
from lifelong_ray.learning.learner import Learner
from lifelong_ray.learning.lesson import Fit, FitReport, Labelled, Run, Stopwatch, check_update
from lifelong_ray.learning.material import Material, material_for
from lifelong_ray.learning.memory import check_memory, remember, stage_after
from lifelong_ray.learning.model import Classifier
from lifelong_ray.learning.replay import (
    ReplayMemory,
)
from lifelong_ray.learning.terms import (
    accumulated,
    class_means_after,
    fisher_of,
    update_terms,
    warn_of_forgetting,
)
from lifelong_ray.learning.trainer import TrainReport, train
from lifelong_ray.learning.wide import (
    Answering,
    Inputs,
    answers,
    answers_and_random_features,
    choose_answering,
    look,
    random_features,
)
from lifelong_ray.types import LearningError

logger = logging.getLogger(__name__)

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
    check_memory(memory, parent.memory_stage, parent.model, update)
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
    entering = None if fast is None else fast.entering
    material = material_for(parent, model, training, depth, update, entering)
    inputs, labels, num_new = material.inputs, material.labels, material.num_new
    carries = carries_sums(parent, model, config)
    teacher_NC, before_NM = _taught(parent, material, update, run, carries=carries)
    trained = _train(parent, model, material, teacher_NC, config, run)
    extra_seconds = watch.lap() - trained.seconds
    model.eval()
    model.requires_grad_(True)
    if update.weight_alignment and len(names) > len(parent.class_names):
        align_new_rows(model.head, len(parent.class_names))
    exact = parent.sums_exact and config.analytic.decay == 1
    exact = exact and (same_features(parent, model) or rebuilds_sums(parent, config))
    if fast is not None and same_features(parent, model):
        sums, ridge = fast.learner.sums, fast.learner.ridge
        model.analytic = copy.deepcopy(fast.learner.model.analytic).to(run.device)
    else:
        sums, ridge = sums_after(parent, model, material, before_NM, config, run)
    outdated = not len(parent.memory) and not same_features(parent, model)
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


def _taught(
    parent: Learner, material: Material, update: UpdateConfig, run: Run, *, carries: bool
) -> tuple[Tensor | None, Tensor | None]:
    """What the parent makes of the material, looked at once for both who need it.

    Returns:
        Its answers (N, C), for distillation, and its random features (N, M), for carrying its
        sums over; None for what is not needed.
    """
    if not (carries or update.distillation.weight):
        return None, None
    teacher = parent.model.copy().to(run.device)
    if carries:
        return answers_and_random_features(teacher, material.inputs)
    return answers(teacher, material.inputs), None


def _train(
    parent: Learner,
    model: Classifier,
    material: Material,
    teacher_NC: Tensor | None,
    config: LearningConfig,
    run: Run,
) -> TrainReport:
    """Train `model` as the update's settings say."""
    return train(
        model,
        material.inputs.tensor,
        material.labels,
        config=config.update.trainer,
        seed=config.seed,
        clock=run.clock,
        terms=update_terms(parent, model, material.labels, config.update, teacher_NC),
        batches=material.batches,
        start=material.inputs.start,
        turned=material.inputs.turned,
        rivals=material.rivals,
        class_offsets=material.class_offsets,
        collective=run.collective,
        resume=run.resume,
        on_epoch=run.on_epoch,
    )


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
        material = material_for(parent, model, training, depth, briefly)
        teacher_NC, _ = _taught(parent, material, briefly, run, carries=False)
        _train(parent, model, material, teacher_NC, trial, alone)
        model.eval()
        features_ND = look(model, Inputs(validation[0])).features
        score = accuracy(model.logits_of(features_ND.to(run.device)).cpu(), validation[1])
        logger.info("with %d frozen stages a short training reaches %.3f", depth, score)
        if score > best:
            best, best_depth = score, depth
    return best_depth


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
            prefer="both" if analytic else "linear",
            among=("analytic", "linear") if analytic else ("linear",),
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

"""The fast path of an update: the analytic head alone, from one look at the new examples.

Axes: N examples, C classes, K modes, M random features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lifelong_ray.config import LearningConfig
from lifelong_ray.learning.analytic import AnalyticSums
from lifelong_ray.learning.chance import generator_for
from lifelong_ray.learning.evaluate import fit_temperature
from lifelong_ray.learning.learner import Learner
from lifelong_ray.learning.lesson import Fit, FitReport, Labelled, Run, Stopwatch, check_update
from lifelong_ray.learning.material import enter_trained_stages
from lifelong_ray.learning.memory import check_memory, remember, stage_after
from lifelong_ray.learning.model import Classifier
from lifelong_ray.learning.terms import class_means_after
from lifelong_ray.learning.wide import (
    Inputs,
    choose_answering,
    look,
    num_views,
    random_features,
    solve,
    take_sums,
)
from lifelong_ray.types import LearningError

_NUM_CALIBRATING = 500


def fit_fast(
    parent: Learner,
    training: Labelled,
    class_names: Sequence[str],
    config: LearningConfig,
    run: Run,
    *,
    validation: Labelled | None = None,
) -> Fit:
    """Update the analytic head alone: one forward pass over the new examples.

    The backbone and its Fisher stay as they are. With `parent.sums_exact` the head is the
    one that training it on every example ever seen would give.

    Args:
        parent: Stays as it is.
        training: New examples: uint8 images and positions in `class_names`.
        class_names: The parent's, then the new ones; each new one has an example.
        config: Seed, analytic head and memory size.
        run: How it is carried out.
        validation: Examples that calibrate; None calibrates by leaving one out.

    Raises:
        LearningError: If the examples do not fit the parent, or it has no analytic head.
    """
    watch = Stopwatch(run.clock)
    names = check_update(parent, training, validation, class_names)
    check_memory(parent.memory, parent.memory_stage, parent.model, config.update)
    if not parent.model.num_random_features:
        raise LearningError(
            "the parent has no analytic head, which is all that the fast path updates; set "
            "learning.analytic.num_features for its base training, or take the slow path"
        )
    images, labels = training
    model = grown(parent, len(names), config.seed).to(run.device)
    inputs = Inputs(images)
    if config.update.paths in ("default", "both"):
        inputs = enter_trained_stages(parent, model, images, config.update)
    update = parent.num_updates + 1
    older = parent.sums.decayed(config.analytic.decay)
    sums, modes_N = with_modes(older, labels, len(names), update)
    sums = sums.merged_into(take_sums(model, inputs, modes_N, sums, run.collective))
    sums, ridge = solve(model, sums, config.analytic, parent.ridge)
    model.active_head = "analytic"
    train_seconds = watch.lap()

    answering = None
    if validation is not None:
        seen = look(model, Inputs(validation[0]))
        answering = choose_answering(
            model, seen, validation[1], prefer="analytic", among=("analytic",)
        )
        temperature = answering.temperature
    else:
        temperature = _left_out_temperature(
            model, parent, inputs, labels, sums, ridge, config.analytic.class_balance
        )
    model.to("cpu")
    learner = Learner(
        model=model,
        class_names=names,
        fisher=parent.fisher.for_model(model),
        anchor=anchor_of(parent, model),
        sums=sums,
        memory=remember(
            parent.memory,
            model,
            images,
            labels,
            config.update,
            seed=config.seed,
            update=update,
            is_trained=False,
        ),
        class_means=class_means_after(parent, model, inputs, labels, config),
        temperature=temperature,
        sums_exact=parent.sums_exact and config.analytic.decay == 1,
        ridge=ridge,
        num_updates=update,
        memory_stage=stage_after(parent.memory_stage, parent.memory, config.update),
        slow_losses=parent.slow_losses,
        slow_rest=parent.slow_rest,
    )
    report = FitReport(
        path="fast",
        samples_seen=len(images) * num_views(model),
        train_seconds=train_seconds,
        extra_seconds=watch.lap(),
        epochs=(),
        validation_accuracy=answering.accuracy if answering else None,
        choices={"head": "analytic", "ridge": ridge},
    )
    return Fit(learner, report, answering.right if answering else None, inputs)


def grown(parent: Learner, num_classes: int, seed: int) -> Classifier:
    """Return a copy of the parent's model with room for all classes."""
    model = parent.model.copy()
    model.grow(num_classes, generator_for(seed, "head", num_classes))
    return model


def with_modes(
    sums: AnalyticSums, labels: Tensor, num_classes: int, update: int
) -> tuple[AnalyticSums, Tensor]:
    """Return sums with a mode for every class of an update's labels, and the mode of each.

    A class that is new has one mode already; a known one that comes again gets a further
    one, since what comes again may look different.
    """
    classes = labels.unique().tolist()
    sums = sums.grow(num_classes).open_modes(classes).noted(update, classes)
    return sums, sums.newest_modes[labels]


def anchor_of(parent: Learner, model: Classifier) -> dict[str, Tensor]:
    """Return the parent's anchor with the rows that `model` has grown since."""
    anchor = {}
    for name, weight in model.named_parameters():
        held = parent.anchor.get(name)
        fresh = weight.detach()
        if held is None:
            held = fresh
        anchor[name] = held if held.shape == fresh.shape else torch.cat([held, fresh[len(held) :]])
    return anchor


def _left_out_temperature(
    model: Classifier,
    parent: Learner,
    inputs: Inputs,
    labels: Tensor,
    sums: AnalyticSums,
    ridge: float,
    class_balance: float,
) -> float:
    """Calibrate on remembered and new examples, each judged by a head that never had it.

    In a mirrored family the head still has its mirror image.
    """
    memory = parent.memory
    stride = max(1, len(inputs) // _NUM_CALIBRATING)
    chosen = torch.arange(0, len(inputs), stride)
    features_NM = random_features(model, inputs[chosen])
    both_N, modes_N = labels[chosen], sums.newest_modes[labels[chosen]]
    stands_for_N = torch.full((len(chosen),), float(stride), dtype=torch.float64)
    if len(memory):
        remembered = Inputs(memory.inputs, parent.memory_stage)
        if model.analytic.source != "pixels" or memory.content == "images":
            features_NM = torch.cat([random_features(model, remembered), features_NM])
            both_N = torch.cat([memory.labels, both_N])
            modes_N = torch.cat([sums.modes_of(memory.updates, memory.labels), modes_N])
            stands_for_N = torch.cat([memory.weights(), stands_for_N])
    left_out_NK = sums.left_out_scores(
        features_NM,
        modes_N,
        torch.full_like(stands_for_N, 1 / num_views(model)),
        ridge,
        class_balance,
    )
    left_out_NC = model.analytic.together(left_out_NK, model.num_classes)
    return fit_temperature(left_out_NC, both_N, stands_for_N)

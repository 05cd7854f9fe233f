"""The base training of a family, and the full retraining that updates are measured against.

Decides what a first version remembers. Validation data chooses between heads and
calibrates; nothing is ever trained on it.

Axes: N examples, C classes.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from lifelong_ray.config import LearningConfig, ModelConfig
from lifelong_ray.learning.analytic import AnalyticSums
from lifelong_ray.learning.chance import generator_for
from lifelong_ray.learning.evaluate import clearly_less
from lifelong_ray.learning.learner import Learner
from lifelong_ray.learning.lesson import Fit, FitReport, Labelled, Run, Stopwatch, check_base
from lifelong_ray.learning.memory import empty_memory, memory_stage, remember
from lifelong_ray.learning.model import Classifier, Head, Seen, build_model
from lifelong_ray.learning.terms import class_means, fisher_of
from lifelong_ray.learning.trainer import train
from lifelong_ray.learning.wide import (
    Answering,
    Inputs,
    choose_answering,
    fit_widening,
    look,
    mirror_for,
    solve,
    source_for,
    take_sums,
)


def fit_base(
    training: Labelled,
    class_names: Sequence[str],
    model_config: ModelConfig,
    config: LearningConfig,
    run: Run,
    *,
    validation: Labelled | None = None,
    yardstick: bool = False,
) -> Fit:
    """Train a family's first version from nothing.

    Args:
        training: uint8 images (N, channels, height, width) as `model_config` says, and their
            positions in `class_names`.
        class_names: At least two; each has an example.
        model_config: The architecture, which all updates inherit.
        config: `config.base` is the training; seed and analytic head come from it too.
        run: How it is carried out.
        validation: Examples that choose the head and calibrate, and are never trained on.
        yardstick: A full retraining, which updates are compared with: each epoch's report has
            the accuracy of the best head at that point, so that one can say when it became as
            good as an update. An honest yardstick does not wait for the linear head alone.

    Raises:
        LearningError: If the examples cannot give a classifier, or training diverges.
    """
    names = check_base(training, validation, class_names, model_config)
    images, labels = training
    inputs = Inputs(images)
    source = source_for(model_config, config)
    model = build_model(
        model_config,
        len(names),
        config.seed,
        num_random_features=config.analytic.num_features,
        source=source,
    ).to(run.device)
    room = AnalyticSums.empty(0, len(names))
    wanted = mirror_for(config)

    def draw_features() -> None:
        model.eval()
        fit_widening(model, inputs, config.seed, generator_for(config.seed, "widening"))

    def add_analytic_head(
        *, mirrored: bool, plain: AnalyticSums | None = None
    ) -> tuple[AnalyticSums, float]:
        model.analytic.mirrored = mirrored
        sums = take_sums(model, inputs, labels, room, run.collective, plain=plain)
        return solve(model, sums.noted(0, range(len(names))), config.analytic, 0.0)

    def add_best_analytic_head() -> tuple[AnalyticSums, float]:
        draw_features()
        if wanted != "auto" or validation is None or not model.num_random_features:
            return add_analytic_head(mirrored=wanted is True)
        seen = look(model, Inputs(validation[0]))
        sums, ridge = add_analytic_head(mirrored=False)
        plain_head = copy.deepcopy(model.analytic)
        misses_N = _analytic_misses(model, seen, validation[1])
        both = add_analytic_head(mirrored=True, plain=sums)
        if clearly_less(_analytic_misses(model, seen, validation[1]), misses_N):
            return both
        model.analytic = plain_head
        return sums, ridge

    def measured(so_far: Classifier) -> float:
        assert validation is not None
        if yardstick:
            draw_features()
            add_analytic_head(mirrored=wanted is True)
        score = _choose(so_far, validation, yardstick=yardstick).accuracy
        so_far.active_head = "linear"
        return score

    model.learns_statistics = True
    trained = train(
        model,
        images,
        labels,
        config=config.base,
        seed=config.seed,
        clock=run.clock,
        collective=run.collective,
        validate=None if validation is None else measured,
        resume=run.resume,
        on_epoch=run.on_epoch,
    )
    model.learns_statistics = False
    watch = Stopwatch(run.clock)
    sums, ridge = add_best_analytic_head()
    answering = None
    if validation is not None:
        answering = _choose(model, validation, yardstick=True)
    fisher = fisher_of(
        model,
        inputs,
        labels,
        config,
        run.collective,
        num_examples=config.update.ewc.num_fisher_examples,
    )
    memory = remember(
        empty_memory(model_config, len(names)),
        model,
        images,
        labels,
        config.update,
        seed=config.seed,
    )
    means_CD = class_means(model, inputs, labels, len(names), config)
    model.to("cpu")
    learner = Learner(
        model=model,
        class_names=names,
        fisher=fisher,
        anchor=_weights(model),
        sums=sums,
        memory=memory,
        class_means=means_CD,
        temperature=1.0 if answering is None else answering.temperature,
        sums_exact=True,
        ridge=ridge,
        memory_stage=memory_stage(config.update),
    )
    report = FitReport(
        path="full" if yardstick else "base",
        samples_seen=trained.samples_seen + len(images),
        train_seconds=trained.seconds,
        extra_seconds=watch.lap(),
        epochs=trained.epochs,
        validation_accuracy=None if answering is None else answering.accuracy,
        choices={
            "head": model.active_head,
            "learning_rate": trained.learning_rate,
            "mirrored": float(model.analytic.mirrored),
        },
    )
    return Fit(learner, report)


def _choose(model: Classifier, validation: Labelled, *, yardstick: bool) -> Answering:
    images, labels = validation
    among: tuple[Head, ...] = ("linear",)
    if yardstick and model.num_random_features:
        among = ("linear", "analytic", "both")
    return choose_answering(
        model, look(model, Inputs(images)), labels, prefer="linear", among=among
    )


def _analytic_misses(model: Classifier, seen: Seen, labels_N: Tensor) -> Tensor:
    """How far the analytic head's scores are from 1 for the right class and 0 elsewhere, (N,)."""
    scores_NC = model.analytic(seen.wide.to(model.device), model.num_classes).cpu()
    wanted_NC = F.one_hot(labels_N, model.num_classes).to(scores_NC)
    misses_N: Tensor = (scores_NC - wanted_NC).square().sum(1)
    return misses_N


def _weights(model: Classifier) -> dict[str, Tensor]:
    return {name: weight.detach() for name, weight in model.named_parameters()}

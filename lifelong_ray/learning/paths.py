"""The ways to a new version: a base training, and the fast and slow paths of an update.

Decides what is trained on what, with which terms, and what the result remembers. Knows
nothing of versions, gates or where data comes from. Validation data chooses between
heads and calibrates; nothing is ever trained on it.

Axes: N examples, C classes, M random features.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lifelong_ray.config import LearningConfig, ModelConfig
from lifelong_ray.learning.analytic import AnalyticSums, projection
from lifelong_ray.learning.chance import generator_for
from lifelong_ray.learning.collective import Alone, Collective
from lifelong_ray.learning.evaluate import accuracy, fit_temperature
from lifelong_ray.learning.fisher import Fisher, estimate_fisher
from lifelong_ray.learning.learner import Learner
from lifelong_ray.learning.model import Classifier, Head, build_model, in_chunks
from lifelong_ray.learning.penalties import EwcPenalty, distillation_loss
from lifelong_ray.learning.replay import ReplayMemory, mix_batches
from lifelong_ray.learning.trainer import (
    Clock,
    EpochReport,
    ExampleTerm,
    LossTerm,
    OnEpoch,
    TrainReport,
    WeightTerm,
    train,
)
from lifelong_ray.types import LearningError

logger = logging.getLogger(__name__)

Path = Literal["base", "full", "fast", "slow"]
Labelled = tuple[Tensor, Tensor]
"""uint8 images (N, channels, height, width) and int64 labels (N,)."""

_SUMS_CHUNK = 2_048
_MAX_CACHE_BYTES = 2_000_000_000


@dataclass(frozen=True)
class FitReport:
    """What a path did and what it cost.

    Attributes:
        path: Which one.
        samples_seen: Examples shown in gradient steps, plus one pass over those that the
            analytic sums were taken of.
        train_seconds: Gradient steps (slow, base), or the new examples' sums (fast).
        extra_seconds: All else: Fisher, sums, choice of head, calibration, memory.
        epochs: One report per pass of gradient training; empty for the fast path.
        validation_accuracy: Of the result; None without validation data.
    """

    path: Path
    samples_seen: int
    train_seconds: float
    extra_seconds: float
    epochs: tuple[EpochReport, ...]
    validation_accuracy: float | None


@dataclass(frozen=True)
class Fit:
    """A new learner and how it came about."""

    learner: Learner
    report: FitReport


def fit_base(
    images: Tensor,
    labels: Tensor,
    class_names: Sequence[str],
    model_config: ModelConfig,
    config: LearningConfig,
    *,
    clock: Clock,
    validation: Labelled | None = None,
    collective: Collective | None = None,
    resume: bytes | None = None,
    on_epoch: OnEpoch | None = None,
    device: str = "cpu",
) -> Fit:
    """Train a family's first version from nothing.

    Args:
        images: uint8, (N, channels, height, width) as `model_config` says.
        labels: Positions in `class_names`, int64.
        class_names: At least two; each has an example.
        model_config: The architecture, which all updates inherit.
        config: `config.base` is the training; seed and analytic head come from it too.
        clock: Gives seconds.
        validation: Examples that choose the head and calibrate, and are never trained on.
        collective: The workers, all called with the same arguments; None means one.
        resume: A checkpoint of this very training.
        on_epoch: See `OnEpoch`.
        device: Where the gradients are computed; the result is on the CPU.

    Raises:
        LearningError: If the examples cannot give a classifier, or training diverges.
    """
    return _fit_from_nothing(
        "base",
        images,
        labels,
        class_names,
        model_config,
        config,
        clock=clock,
        validation=validation,
        collective=collective,
        resume=resume,
        on_epoch=on_epoch,
        device=device,
    )


def fit_full(
    images: Tensor,
    labels: Tensor,
    class_names: Sequence[str],
    model_config: ModelConfig,
    config: LearningConfig,
    *,
    clock: Clock,
    validation: Labelled | None = None,
    collective: Collective | None = None,
    resume: bytes | None = None,
    on_epoch: OnEpoch | None = None,
    device: str = "cpu",
) -> Fit:
    """Retrain from nothing on everything: the yardstick of the updates.

    The same training as `fit_base`. Each epoch's report has the accuracy of the better of
    both heads, as an update too may answer with either, and the seconds and samples from
    which the cost of reaching some accuracy follows. The seconds leave out the head's sums.
    """
    return _fit_from_nothing(
        "full",
        images,
        labels,
        class_names,
        model_config,
        config,
        clock=clock,
        validation=validation,
        collective=collective,
        resume=resume,
        on_epoch=on_epoch,
        device=device,
    )


def fit_fast(
    parent: Learner,
    images: Tensor,
    labels: Tensor,
    class_names: Sequence[str],
    config: LearningConfig,
    *,
    clock: Clock,
    validation: Labelled | None = None,
    collective: Collective | None = None,
    device: str = "cpu",
) -> Fit:
    """Update the analytic head alone: one forward pass over the new examples.

    The backbone and its Fisher stay as they are. With `parent.sums_exact` the head is the
    one that training it on every example ever seen would give.

    Args:
        parent: Stays as it is.
        images: New examples, uint8.
        labels: Positions in `class_names`.
        class_names: The parent's, then the new ones; each new one has an example.
        config: Seed, analytic head and memory size.
        clock: Gives seconds.
        validation: Examples that calibrate; None calibrates by leaving one out.
        collective: The workers, all called with the same arguments; None means one.
        device: Where features are computed.

    Raises:
        LearningError: If the examples do not fit the parent.
    """
    began_s = clock()
    names = _check_update(parent, images, labels, class_names, validation)
    group = collective or Alone()
    model = _grown(parent, len(names), config.seed).to(device)
    features_NM = in_chunks(lambda x: _random_features(model, x, 0), images)
    new_sums = _sums(features_NM, labels, len(names), None, group)
    sums = parent.sums.grow(len(names)).merge(new_sums)
    model.analytic_MC = sums.solve(config.analytic.ridge).to(device)
    model.active_head = "analytic"
    train_seconds = clock() - began_s

    if validation is not None:
        logits_NC = in_chunks(model, validation[0])
        temperature = fit_temperature(logits_NC, validation[1])
        score = accuracy(logits_NC, validation[1])
    else:
        old = parent.memory
        old_NM = in_chunks(lambda x: _random_features(model, x, 0), old.images)
        stands_for_N = torch.cat([old.weights(), torch.ones(len(labels), dtype=torch.float64)])
        both_NM, both_N = torch.cat([old_NM, features_NM]), torch.cat([old.labels, labels])
        left_out_NC = sums.left_out_scores(
            both_NM, both_N, torch.ones_like(stands_for_N), config.analytic.ridge
        )
        temperature, score = fit_temperature(left_out_NC, both_N, stands_for_N), None
    model.to("cpu")
    learner = Learner(
        model=model,
        class_names=names,
        fisher=parent.fisher.for_model(model),
        sums=sums,
        memory=_remember(parent.memory, images, labels, len(names), config),
        temperature=temperature,
        sums_exact=parent.sums_exact,
    )
    extra_seconds = clock() - began_s - train_seconds
    return Fit(learner, FitReport("fast", len(images), train_seconds, extra_seconds, (), score))


def fit_slow(
    parent: Learner,
    images: Tensor,
    labels: Tensor,
    class_names: Sequence[str],
    config: LearningConfig,
    *,
    clock: Clock,
    validation: Labelled | None = None,
    collective: Collective | None = None,
    resume: bytes | None = None,
    on_epoch: OnEpoch | None = None,
    device: str = "cpu",
) -> Fit:
    """Fine-tune the backbone without forgetting, then fit the analytic head anew on it.

    The gradient phase trains on the new examples and the replayed memory under EWC and
    distillation. Then the analytic sums are taken again with the adapted features, of the
    new examples and of the memory, each remembered example weighted by how many it stands
    for. The better head on `validation` answers; without validation, the analytic one.

    Arguments and errors are those of `fit_fast` and `fit_base`.
    """
    began_s = clock()
    names = _check_update(parent, images, labels, class_names, validation)
    update, memory = config.update, parent.memory
    group = collective or Alone()
    if not len(memory) and update.replay.share:
        logger.warning(
            "nothing is remembered, so replay.share %g has no effect", update.replay.share
        )
    model = _grown(parent, len(names), config.seed).to(device)
    frozen = update.frozen_stages
    if frozen > len(model.stages):
        raise LearningError(
            f"update.frozen_stages is {frozen} but the backbone has {len(model.stages)} stages"
        )
    model.freeze_stages(frozen)
    all_images = torch.cat([images, memory.images])
    all_labels = torch.cat([labels, memory.labels])
    start = _cached_stages(model, len(all_images), config)
    inputs = all_images
    if start:
        inputs = in_chunks(lambda x: model.activations(x.to(device), stop=start).cpu(), all_images)
        if inputs.dim() == 4:  # A fifth faster on CPUs, for images of many channels.
            model.to(memory_format=torch.channels_last)
            inputs = inputs.contiguous(memory_format=torch.channels_last)
    terms = _terms(parent, model, inputs, all_labels, start, config)
    ready_s = clock()
    trained = train(
        model,
        inputs,
        all_labels,
        config=update.trainer,
        seed=config.seed,
        clock=clock,
        terms=terms,
        batches=mix_batches(
            len(images), len(memory), update.replay.share, update.trainer.batch_size
        ),
        start=start,
        collective=group,
        resume=resume,
        on_epoch=on_epoch,
    )
    trained_s = clock()
    return _after_slow(
        parent,
        model,
        (images, labels),
        inputs,
        names,
        config,
        validation,
        group,
        trained,
        start=start,
        clock=clock,
        preparing_s=ready_s - began_s,
        trained_s=trained_s,
    )


def _after_slow(
    parent: Learner,
    model: Classifier,
    new: Labelled,
    inputs: Tensor,
    names: tuple[str, ...],
    config: LearningConfig,
    validation: Labelled | None,
    group: Collective,
    trained: TrainReport,
    *,
    start: int,
    clock: Clock,
    preparing_s: float,
    trained_s: float,
) -> Fit:
    """Fit the analytic head on the adapted backbone and gather what the learner carries."""
    images, labels = new
    num_new, memory, ridge = len(images), parent.memory, config.analytic.ridge
    model.eval().requires_grad_(True)
    weights_N = torch.cat([torch.ones(num_new, dtype=torch.float64), memory.weights()])
    all_labels = torch.cat([labels, memory.labels])
    features_NM = in_chunks(lambda x: _random_features(model, x, start), inputs)
    covered = bool(((memory.counts() > 0) | (memory.seen == 0)).all())
    if covered:
        sums = _sums(features_NM, all_labels, len(names), weights_N, group)
    else:
        # Nothing remembered of some class: its sums, of the features before, are all there is.
        new_sums = _sums(features_NM[:num_new], labels, len(names), None, group)
        sums = parent.sums.grow(len(names)).merge(new_sums)
    model.analytic_MC = sums.solve(ridge).to(model.device)
    score = None
    if validation is not None:
        temperature, score = _choose_head(model, validation, prefer="analytic")
    elif covered:
        model.active_head = "analytic"
        left_out_NC = sums.left_out_scores(features_NM, all_labels, weights_N, ridge)
        temperature = fit_temperature(left_out_NC, all_labels, weights_N)
    else:
        model.active_head, temperature = "linear", 1.0
    num_fisher = config.update.ewc.num_update_fisher_examples
    newer = _fisher(model, inputs[:num_new], labels, config, group, start, num_fisher)
    seen = float(memory.seen.sum()) + num_new
    learner = Learner(
        model=model.to("cpu", memory_format=torch.contiguous_format),  # type: ignore[call-overload]
        class_names=names,
        fisher=_on_cpu(
            parent.fisher.for_model(model).merged(_on_cpu(newer), newer_share=num_new / seen)
        ),
        sums=sums,
        memory=_remember(memory, images, labels, len(names), config),
        temperature=temperature,
        sums_exact=False,
    )
    report = FitReport(
        path="slow",
        samples_seen=trained.samples_seen + len(inputs),
        train_seconds=trained.seconds,
        extra_seconds=preparing_s + clock() - trained_s,
        epochs=trained.epochs,
        validation_accuracy=score,
    )
    return Fit(learner, report)


def _fit_from_nothing(
    path: Path,
    images: Tensor,
    labels: Tensor,
    class_names: Sequence[str],
    model_config: ModelConfig,
    config: LearningConfig,
    *,
    clock: Clock,
    validation: Labelled | None,
    collective: Collective | None,
    resume: bytes | None,
    on_epoch: OnEpoch | None,
    device: str,
) -> Fit:
    names = tuple(class_names)
    group = collective or Alone()
    _check(images, labels, names, model_config, "training")
    if validation is not None:
        _check(*validation, names, model_config, "validation")
    if len(names) < 2:
        raise LearningError(
            f"a classifier needs at least two classes, and only {list(names)} are given; "
            "add examples of another class"
        )
    _need_examples(labels, names, range(len(names)))
    num_random_features = config.analytic.num_features
    model = build_model(
        model_config, len(names), config.seed, num_random_features=num_random_features
    )
    model.projection_DM = projection(model.num_features, num_random_features, config.seed)
    model.to(device)

    def with_analytic_head() -> AnalyticSums:
        model.eval()
        features_NM = in_chunks(lambda x: _random_features(model, x, 0), images)
        sums = _sums(features_NM, labels, len(names), None, group)
        model.analytic_MC = sums.solve(config.analytic.ridge).to(device)
        return sums

    def measured(so_far: Classifier) -> float:
        assert validation is not None
        if path == "base":
            return _accuracy(so_far, validation)
        with_analytic_head()
        score = _choose_head(so_far, validation, prefer="linear")[1]
        so_far.active_head = "linear"
        return score

    trained = train(
        model,
        images,
        labels,
        config=config.base,
        seed=config.seed,
        clock=clock,
        collective=group,
        validate=None if validation is None else measured,
        resume=resume,
        on_epoch=on_epoch,
    )
    extra_began_s = clock()
    sums = with_analytic_head()
    temperature, score = 1.0, None
    if validation is not None:
        temperature, score = _choose_head(model, validation, prefer="linear")
    num_fisher = config.update.ewc.num_fisher_examples
    fisher = _fisher(model, images, labels, config, group, 0, num_fisher)
    shape = (model_config.channels, model_config.image_size, model_config.image_size)
    memory = ReplayMemory.empty(shape, len(names))
    learner = Learner(
        model=model.to("cpu"),
        class_names=names,
        fisher=_on_cpu(fisher),
        sums=sums,
        memory=_remember(memory, images, labels, len(names), config),
        temperature=temperature,
        sums_exact=True,
    )
    report = FitReport(
        path=path,
        samples_seen=trained.samples_seen + len(images),
        train_seconds=trained.seconds,
        extra_seconds=clock() - extra_began_s,
        epochs=trained.epochs,
        validation_accuracy=score,
    )
    return Fit(learner, report)


def _terms(
    parent: Learner,
    model: Classifier,
    inputs: Tensor,
    labels: Tensor,
    start: int,
    config: LearningConfig,
) -> tuple[LossTerm, ...]:
    """The update's losses beside the labels' own."""
    update = config.update
    terms: list[LossTerm] = []
    if update.ewc.lambda_ewc:
        importance = parent.fisher.for_model(parent.model).values
        moving = [name for name, weight in model.named_parameters() if weight.requires_grad]
        penalty = EwcPenalty(
            {name: parent.anchor[name].to(model.device) for name in moving},
            {name: importance[name].to(model.device) for name in moving},
        )
        terms.append(
            WeightTerm(
                "ewc", update.ewc.lambda_ewc, lambda now: penalty(dict(now.named_parameters()))
            )
        )
    if update.distillation.weight:
        teacher = parent.model.copy().to(model.device)
        teacher_NC = (
            in_chunks(
                lambda x: teacher.answer(teacher.features(x.to(model.device), start=start)), inputs
            )
            / parent.temperature
        )
        # Where the teacher is wrong, as on drifted images, its answer is what must change.
        worth_N = (teacher_NC.argmax(1) == labels.to(model.device)).float()
        temperature = update.distillation.temperature
        terms.append(
            ExampleTerm(
                "distillation",
                update.distillation.weight,
                lambda logits_BC, positions: (
                    worth_N[positions]
                    * distillation_loss(logits_BC, teacher_NC[positions], temperature)
                ),
            )
        )
    return tuple(terms)


def _cached_stages(model: Classifier, num_images: int, config: LearningConfig) -> int:
    """How many stages to run once, ahead of training.

    Without shifts, what frozen stages make of an image is the same in every epoch.
    """
    frozen = config.update.frozen_stages
    if config.update.trainer.max_shift_px or not frozen:
        return 0
    settings = model.config
    blank = torch.zeros(1, settings.channels, settings.image_size, settings.image_size)
    one = model.activations(blank.to(model.device), stop=frozen)
    return frozen if one.numel() * one.element_size() * num_images <= _MAX_CACHE_BYTES else 0


def _grown(parent: Learner, num_classes: int, seed: int) -> Classifier:
    model = parent.model.copy()
    model.grow(num_classes, generator_for(seed, "head", num_classes))
    return model


@torch.no_grad()
def _random_features(model: Classifier, inputs: Tensor, start: int) -> Tensor:
    return model.random_features(model.features(inputs.to(model.device), start=start)).cpu()


def _sums(
    features_NM: Tensor,
    labels: Tensor,
    num_classes: int,
    weights_N: Tensor | None,
    group: Collective,
) -> AnalyticSums:
    """Sums over all examples, of which each worker takes its share."""
    sums = AnalyticSums.empty(features_NM.shape[1], num_classes)
    for first in range(group.rank * _SUMS_CHUNK, len(labels), group.world_size * _SUMS_CHUNK):
        piece = slice(first, first + _SUMS_CHUNK)
        weights = None if weights_N is None else weights_N[piece]
        sums = sums.merge(AnalyticSums.of(features_NM[piece], labels[piece], num_classes, weights))
    group.sum([sums.gram, sums.class_sums, sums.counts])
    return sums


def _fisher(
    model: Classifier,
    inputs: Tensor,
    labels: Tensor,
    config: LearningConfig,
    group: Collective,
    start: int,
    num_examples: int,
) -> Fisher:
    generator = generator_for(config.seed, "fisher")
    chosen = torch.randperm(len(inputs), generator=generator)[:num_examples]
    return estimate_fisher(
        model,
        inputs[chosen].to(model.device),
        labels[chosen].to(model.device),
        estimator=config.update.ewc.estimator,
        generator=generator,
        start=start,
        collective=group,
    )


def _on_cpu(fisher: Fisher) -> Fisher:
    values = {name: value.cpu() for name, value in fisher.values.items()}
    return Fisher(values, fisher.estimator, fisher.num_examples)


def _remember(
    memory: ReplayMemory, images: Tensor, labels: Tensor, num_classes: int, config: LearningConfig
) -> ReplayMemory:
    """Offer the examples to the memory, with draws that differ from update to update."""
    generator = generator_for(config.seed, "memory", int(memory.seen.sum()))
    per_class = config.update.replay.memory_per_class
    return memory.updated(images, labels, per_class, generator, num_classes=num_classes)


def _choose_head(model: Classifier, validation: Labelled, *, prefer: Head) -> tuple[float, float]:
    """Make the better head on `validation` the active one; return temperature and accuracy."""
    images, labels = validation
    features_ND = in_chunks(lambda x: model.features(x.to(model.device)), images)
    other: Head = "linear" if prefer == "analytic" else "analytic"
    best: tuple[float, Head, Tensor] | None = None
    for head in (prefer, other):
        model.active_head = head
        logits_NC = in_chunks(model.answer, features_ND).cpu()
        score = accuracy(logits_NC, labels)
        if best is None or score > best[0]:
            best = (score, head, logits_NC)
    assert best is not None
    score, model.active_head, logits_NC = best
    return fit_temperature(logits_NC, labels), score


def _accuracy(model: Classifier, validation: Labelled) -> float:
    logits_NC = in_chunks(lambda x: model(x.to(model.device)).cpu(), validation[0])
    return accuracy(logits_NC, validation[1])


def _check_update(
    parent: Learner,
    images: Tensor,
    labels: Tensor,
    class_names: Sequence[str],
    validation: Labelled | None,
) -> tuple[str, ...]:
    names, known = tuple(class_names), parent.class_names
    if names[: len(known)] != known:
        raise LearningError(
            f"the update's classes {list(names)} do not start with the parent's {list(known)}; "
            "keep those in order and put new ones at the end"
        )
    _check(images, labels, names, parent.model_config, "new")
    if validation is not None:
        _check(*validation, names, parent.model_config, "validation")
    _need_examples(labels, names, range(len(known), len(names)))
    return names


def _check(
    images: Tensor, labels: Tensor, names: tuple[str, ...], config: ModelConfig, what: str
) -> None:
    """Refuse examples that cannot be what the caller means."""
    if len(set(names)) != len(names):
        raise LearningError(f"the class names {list(names)} are not distinct; name each class once")
    if len(images) != len(labels):
        raise LearningError(f"there are {len(images)} {what} images but {len(labels)} labels")
    if not len(images):
        raise LearningError(f"there are no {what} examples; at least one is needed")
    shape = (config.channels, config.image_size, config.image_size)
    if images.dtype != torch.uint8 or tuple(images.shape[1:]) != shape:
        raise LearningError(
            f"the {what} images are {images.dtype} of shape {tuple(images.shape)}; the model takes "
            f"torch.uint8 of shape (N, {', '.join(map(str, shape))})"
        )
    if labels.dtype != torch.int64 or labels.dim() != 1:
        raise LearningError(
            f"the {what} labels are {labels.dtype} of shape {tuple(labels.shape)}; "
            "they must be torch.int64 of shape (N,)"
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= len(names):
        raise LearningError(
            f"a {what} label is {low if low < 0 else high}, outside the {len(names)} classes "
            f"{list(names)}; give its class a name first"
        )


def _need_examples(labels: Tensor, names: tuple[str, ...], classes: range) -> None:
    counts = torch.bincount(labels, minlength=len(names))
    without = [names[c] for c in classes if not counts[c]]
    if without:
        raise LearningError(
            f"there is no training example of class {without[0]}; add some or leave the class out"
        )

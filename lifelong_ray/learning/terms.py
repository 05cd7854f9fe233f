"""The losses that an update adds to the labels' own, and what they need to have been measured.

Axes: N training examples (new ones, then remembered ones), B examples of a batch, C classes.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from lifelong_ray.config import LearningConfig, UpdateConfig
from lifelong_ray.learning.chance import generator_for
from lifelong_ray.learning.collective import Collective
from lifelong_ray.learning.fisher import Fisher, estimate_fisher, fold_anchors
from lifelong_ray.learning.learner import Learner
from lifelong_ray.learning.model import Classifier
from lifelong_ray.learning.penalties import EwcPenalty, dark_loss, distillation_loss
from lifelong_ray.learning.trainer import ExampleTerm, LossTerm, WeightTerm
from lifelong_ray.learning.wide import Inputs, look

logger = logging.getLogger(__name__)


def update_terms(
    parent: Learner,
    model: Classifier,
    labels: Tensor,
    config: UpdateConfig,
    teacher_NC: Tensor | None,
) -> tuple[LossTerm, ...]:
    """Return the update's losses beside the labels' own; any subset works together.

    Args:
        parent: The version to stay close to.
        model: What is trained, on its device.
        labels: Classes of the new examples, then of the parent's remembered ones in their order.
        config: The weights of the losses.
        teacher_NC: What the parent answers to these; only distillation needs it.
    """
    terms: list[LossTerm] = []
    if config.ewc.lambda_ewc:
        terms += _ewc(parent, model, config)
    if config.distillation.weight:
        assert teacher_NC is not None
        terms.append(_distillation(teacher_NC / parent.temperature, labels, config))
    if config.replay.dark_weight and config.pseudo_features:
        logger.warning(
            "made-up features have no stored logits, so replay.dark_weight %g has no effect",
            config.replay.dark_weight,
        )
    elif config.replay.dark_weight:
        terms += _dark(parent, model, len(labels), config)
    return tuple(terms)


def warn_of_forgetting(parent: Learner, config: UpdateConfig, *, has_new_classes: bool) -> None:
    """Say so where the chosen methods are known to fail.

    Without old examples, nothing in the loss tells new classes from old ones: on Split MNIST
    EWC and LwF alone end where plain fine-tuning does, at a fifth (van de Ven et al. 2022,
    doi:10.1038/s42256-022-00568-3).
    """
    rehearses = len(parent.memory) > 0 and config.replay.share != 0
    if rehearses or config.pseudo_features or config.labels_compete == "update":
        return
    if has_new_classes:
        logger.warning(
            "EWC and distillation alone are known to fail when classes are added: without old "
            "examples the trained head forgets the old classes; keep a memory "
            "(replay.memory_per_class), make pseudo_features, or use the fast path"
        )


def fisher_of(
    model: Classifier,
    inputs: Inputs,
    labels: Tensor,
    config: LearningConfig,
    group: Collective,
    *,
    num_examples: int,
) -> Fisher:
    """Estimate the importance of each weight on some examples; zero where none are asked for."""
    if not num_examples:
        zeros = {name: torch.zeros_like(w).cpu() for name, w in model.named_parameters()}
        return Fisher(zeros, config.update.ewc.estimator, 0)
    allowed_C = None
    if config.update.labels_compete == "update":
        allowed_C = torch.bincount(labels, minlength=model.num_classes) > 0
    generator = generator_for(config.seed, "fisher")
    chosen = torch.randperm(len(inputs), generator=generator)[:num_examples]
    piece = inputs.tensor[chosen]
    piece = piece.float() if piece.dtype == torch.float16 else piece
    fisher = estimate_fisher(
        model,
        piece.to(model.device),
        labels[chosen].to(model.device),
        estimator=config.update.ewc.estimator,
        generator=generator,
        start=inputs.start,
        allowed_C=allowed_C,
        collective=group,
    )
    values = {name: value.cpu() for name, value in fisher.values.items()}
    return Fisher(values, fisher.estimator, fisher.num_examples)


def accumulated(
    parent: Learner, model: Classifier, newer: Fisher, num_new: int, config: LearningConfig
) -> tuple[Fisher, dict[str, Tensor]]:
    """Return importance and anchor after an update, on the CPU.

    Args:
        parent: The version before.
        model: After the update, on the CPU.
        newer: Estimated on the update's own examples.
        num_new: How many examples the update had.
        config: How to accumulate.
    """
    ewc = config.update.ewc
    anchor = {name: weight.detach() for name, weight in model.named_parameters()}
    older = parent.fisher.for_model(model)
    if not newer.num_examples:
        return older, anchor
    if older.num_examples and older.estimator != newer.estimator:
        logger.warning(
            "the parent's Fisher is of the estimator %s and the update's of %s, whose sizes do not "
            "compare: lambda_ewc fits one of the two at most",
            older.estimator,
            newer.estimator,
        )
    if ewc.accumulation == "online":
        return older.online(newer, ewc.gamma), anchor
    if ewc.accumulation == "sum":
        held = {name: _over(anchor[name], value) for name, value in parent.anchor.items()}
        return fold_anchors(older, anchor | held, newer, anchor)
    seen = float(parent.memory.seen.sum()) + num_new
    return older.merged(newer, newer_share=num_new / seen), anchor


def class_means(
    model: Classifier, inputs: Inputs, labels: Tensor, num_classes: int, config: LearningConfig
) -> Tensor:
    """Return the mean backbone features by class (C, D); zeros for a class without examples.

    Only where pseudo-features will need them: empty (C, 0) else.
    """
    if not config.update.pseudo_features:
        return torch.zeros(num_classes, 0)
    features = look(model, inputs).features
    sums = torch.zeros(num_classes, features.shape[1]).index_add_(0, labels, features)
    counts = torch.bincount(labels, minlength=num_classes).clamp(min=1)
    return sums / counts[:, None]


def _unlikely_where_unknown(stored_NK: Tensor) -> Tensor:
    """Stored logits with a class not known at storing time as unlikely as the least likely one.

    A head that had all classes from the start would have learned to rule them out.
    """
    unknown_NK = stored_NK.isnan()
    least_N1 = stored_NK.masked_fill(unknown_NK, torch.inf).amin(1, keepdim=True)
    nothing_N1 = unknown_NK.all(1, keepdim=True)
    return torch.where(unknown_NK & ~nothing_N1, least_N1, stored_NK)


def class_means_after(
    parent: Learner, model: Classifier, inputs: Inputs, labels: Tensor, config: LearningConfig
) -> Tensor:
    """Return the parent's class means, followed by those of the classes that are new.

    None at all if the parent kept none: old classes would seem to lie at zero.
    """
    if not parent.class_means.shape[1]:
        return torch.zeros(model.num_classes, 0)
    means_CD = class_means(model, inputs, labels, model.num_classes, config)
    old = parent.class_means
    if means_CD.shape[1] == old.shape[1]:
        means_CD[: len(old)] = old
    return means_CD


def _over(new: Tensor, old: Tensor) -> Tensor:
    """`old`, with the rows that only `new` has."""
    return old if old.shape == new.shape else torch.cat([old, new[len(old) :]])


def _ewc(parent: Learner, model: Classifier, config: UpdateConfig) -> list[LossTerm]:
    importance = parent.fisher.for_model(parent.model).values
    moving = [
        name
        for name, weight in model.named_parameters()
        if weight.requires_grad and name in importance
    ]
    if parent.fisher.num_examples == 0:
        logger.warning(
            "the parent has no Fisher, so ewc.lambda_ewc %g has no effect; give its training "
            "ewc.num_fisher_examples",
            config.ewc.lambda_ewc,
        )
        return []
    penalty = EwcPenalty(
        {name: parent.anchor[name].to(model.device) for name in moving},
        {name: importance[name].to(model.device) for name in moving},
        config.ewc.group_factors,
    )
    return [WeightTerm("ewc", config.ewc.lambda_ewc, penalty, penalty.add_gradient)]


@torch.no_grad()
def _distillation(teacher_NC: Tensor, labels: Tensor, config: UpdateConfig) -> ExampleTerm:
    worth_N = torch.ones(len(labels), device=teacher_NC.device)
    if config.distillation.only_where_right:
        # Where the teacher is wrong, as on drifted images or on classes it never knew, its
        # answer is what must change.
        worth_N = (teacher_NC.argmax(1) == labels.to(teacher_NC.device)).float()
    temperature = config.distillation.temperature

    def loss(logits_BC: Tensor, positions: Tensor) -> Tensor:
        return worth_N[positions] * distillation_loss(logits_BC, teacher_NC[positions], temperature)

    return ExampleTerm("distillation", config.distillation.weight, loss)


def _dark(
    parent: Learner, model: Classifier, num_examples: int, config: UpdateConfig
) -> list[LossTerm]:
    if not parent.memory.logits.shape[1]:
        logger.warning(
            "no logits were stored with the memory, so replay.dark_weight %g has no effect this "
            "time; it will from the next update on",
            config.replay.dark_weight,
        )
        return []
    stored_NK = _unlikely_where_unknown(parent.memory.padded(model.num_classes).logits)
    stored_NK = stored_NK.to(model.device)
    first = num_examples - len(stored_NK)

    def loss(logits_BC: Tensor, positions: Tensor) -> Tensor:
        rows = positions - first
        losses_B = dark_loss(logits_BC, stored_NK[rows.clamp(min=0)])
        return torch.where((rows >= 0).to(losses_B.device), losses_B, 0.0)

    return [ExampleTerm("dark", config.replay.dark_weight, loss)]

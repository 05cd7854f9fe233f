"""How much each weight matters for what the model already knows.

The diagonal of the Fisher information: the mean over examples of the squared gradient
of one example's log-likelihood. Squares are taken per example, never of a batch mean,
in float32, in eval mode, on images as they are. Knows which gradients are asked for and how
estimates of several updates go together; does not know how gradients of single examples are
had, or what the estimate is used for.

Axes: N examples, C classes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from lifelong_ray.learning.checks import check_labels
from lifelong_ray.learning.collective import Alone, Collective
from lifelong_ray.learning.model import Classifier, check_inputs
from lifelong_ray.learning.squares import Cotangents, sums_of_squares
from lifelong_ray.types import LearningError

logger = logging.getLogger(__name__)

Estimator = Literal["exact", "sampled", "empirical"]

_MANY_CLASSES = 100


@dataclass(frozen=True)
class Fisher:
    """Importance of each weight.

    Attributes:
        values: Mean squared per-example gradient by weight name; shapes as the weights.
        estimator: Which label the gradients were of.
        num_examples: How many examples the mean is over.
    """

    values: dict[str, Tensor]
    estimator: Estimator
    num_examples: int

    def for_model(self, model: Classifier) -> Fisher:
        """Return it with zero importance for head rows and branches that `model` has grown.

        Raises:
            LearningError: If it belongs to another architecture.
        """
        return Fisher(fit_to_model(self.values, model, "Fisher"), self.estimator, self.num_examples)

    def merged(self, newer: Fisher, *, newer_share: float) -> Fisher:
        """Return the weighted mean with a newer estimate.

        Weights that `newer` does not name keep their importance: its training left them alone.
        Weights that only `newer` names had none before.

        Raises:
            ValueError: If shapes differ; see `for_model`.
        """
        return self._with(newer, lambda old, new: torch.lerp(old, new, newer_share))

    def online(self, newer: Fisher, gamma: float) -> Fisher:
        """Return ``gamma * old + new``, the importance of one running quadratic.

        Weights that only one of the two names have no importance in the other, so that the
        old importance of weights that were left alone decays too: it is the weight of the past
        as a whole.

        Raises:
            ValueError: If shapes differ; see `for_model`.

        Source: Schwarz et al. 2018, arXiv:1805.06370, eq. 9.
        """
        decayed = {name: gamma * value for name, value in self.values.items()}
        return Fisher(decayed, self.estimator, self.num_examples)._with(newer, torch.add)

    def _with(self, newer: Fisher, put_together: Callable[[Tensor, Tensor], Tensor]) -> Fisher:
        values = dict(self.values)
        for name, new in newer.values.items():
            old = values.get(name, torch.zeros_like(new))
            _same_shape(name, old, new)
            values[name] = put_together(old, new)
        return Fisher(values, newer.estimator, self.num_examples + newer.num_examples)


def fold_anchors(
    old_fisher: Fisher,
    old_anchor: Mapping[str, Tensor],
    new_fisher: Fisher,
    new_anchor: Mapping[str, Tensor],
) -> tuple[Fisher, dict[str, Tensor]]:
    """Put two penalties with anchors of their own into one that differs by a constant.

    A sum of quadratics is a quadratic: its Fisher is the sum of the two, its anchor their mean
    weighted by importance. So the penalty of any number of updates, each held at its own
    weights, needs the memory and the time of one. Where nothing is important the new anchor
    stays.

    Args:
        old_fisher: Of all updates so far, already folded.
        old_anchor: Its weights, by name.
        new_fisher: Of the newest update; weights that it does not name have no importance in
            it, as of stages that were not trained.
        new_anchor: Its weights, by name; those that only it names had no importance before.

    Raises:
        ValueError: If shapes differ; see `fit_to_model`.

    Source: the sum over tasks of Kirkpatrick et al. 2017, arXiv:1612.00796, eq. 3, completed
    to a square; compare Huszár 2018, arXiv:1712.03847, who starts from a running posterior.
    """
    total = old_fisher.online(new_fisher, 1.0)
    anchor: dict[str, Tensor] = {}
    for name, new in new_anchor.items():
        if name not in old_fisher.values or name not in old_anchor:
            anchor[name] = new.clone()
            continue
        old, importance = old_anchor[name], total.values[name]
        _same_shape(name, old, new)
        old_share = torch.where(importance > 0, old_fisher.values[name] / importance, 0.0)
        anchor[name] = torch.lerp(new, old, old_share)
    return total, anchor


def _same_shape(name: str, old: Tensor, new: Tensor) -> None:
    if old.shape != new.shape:
        raise ValueError(
            f"{name} has shape {tuple(old.shape)} in the older and {tuple(new.shape)} in the "
            "newer one; pad the older one to the model first"
        )


def fit_to_model(values: dict[str, Tensor], model: Classifier, what: str) -> dict[str, Tensor]:
    """Return per-weight `values` padded with zeros where the model has grown since.

    Heads grow by rows, and the network by whole branches.

    Raises:
        LearningError: If names or shapes are otherwise not those of `model`.
    """
    fitted: dict[str, Tensor] = {}
    weights = dict(model.named_parameters())
    odd = sorted(
        name
        for name in values.keys() ^ weights.keys()
        if name in values or not name.startswith("branches.")
    )
    if odd:
        raise LearningError(
            f"the {what} is of another architecture: {odd[0]} is in only one of the two; "
            "use what was saved with this model"
        )
    for name, weight in weights.items():
        value = values.get(name)
        if value is None:
            fitted[name] = torch.zeros_like(weight.detach())
            continue
        rows = (value.shape[0] if value.dim() else 0, weight.shape[0] if weight.dim() else 0)
        missing = rows[1] - rows[0] if value.dim() == weight.dim() else -1
        grown = f".{name}".rsplit(".", 2)[-2] == "head" and missing >= 0
        if value.shape[1:] != weight.shape[1:] or not (missing == 0 or grown):
            raise LearningError(
                f"the {what} is of another architecture: {name} has shape {tuple(value.shape)} "
                f"there and {tuple(weight.shape)} in the model; use what was saved with this model"
            )
        padding = [0, 0] * (value.dim() - 1) + [0, missing]
        fitted[name] = F.pad(value, padding) if missing else value
    return fitted


def estimate_fisher(
    model: Classifier,
    inputs: Tensor,
    labels: Tensor,
    *,
    estimator: Estimator = "exact",
    generator: torch.Generator,
    start: int = 0,
    allowed_C: Tensor | None = None,
    collective: Collective | None = None,
    max_bytes: int | None = None,
) -> Fisher:
    """Estimate the Fisher diagonal of the backbone and the trained head.

    ``exact`` takes the expectation over the model's own labels, ``sampled`` draws one of
    them for each example, ``empirical`` takes the true label. Workers share the examples
    out; sums and counts are added up over them.

    ``sampled`` and ``empirical`` cost about a forward and backward pass over the examples,
    ``exact`` one backward pass per class.

    Args:
        model: Used in eval mode and left as it was.
        inputs: uint8 images, or activations that enter stage `start`.
        labels: True labels (N,), for ``empirical``.
        estimator: Which label the gradients are of.
        generator: Draws labels for ``sampled``; the same on every worker.
        start: Stages passed already; their weights are not estimated.
        allowed_C: Which classes compete, bool; None means all. The likelihood has to be the one
            that was trained, and where tasks are known that is among the task's classes.
        collective: The workers; None means this one alone.
        max_bytes: As in `sums_of_squares`.

    Raises:
        LearningError: If there is no example, an input or label is none that the model knows,
            or an input or a gradient is not finite.

    Source: van de Ven 2025, arXiv:2502.11756 (estimators).
    """
    group = collective or Alone()
    if estimator not in get_args(Estimator):
        raise ValueError(f"the estimator is {estimator!r}, not one of {get_args(Estimator)}")
    check_inputs(model, inputs, start, "Fisher's inputs")
    if not len(inputs):
        raise LearningError("the Fisher needs at least one example, and got none; give it some")
    if estimator == "empirical":
        check_labels(labels, len(inputs), model.num_classes, "Fisher label")
    if allowed_C is not None:
        _check_allowed(allowed_C, model.num_classes)
    if estimator == "exact" and model.num_classes >= _MANY_CLASSES and group.rank == 0:
        logger.warning(
            "the exact Fisher takes %d backward passes over its %d examples, one per class; "
            "the estimator sampled takes one",
            model.num_classes,
            len(inputs),
        )
    draws_N = torch.rand(len(inputs), generator=generator, dtype=torch.float64)
    mine = slice(group.rank, None, group.world_size)
    true_N = labels[mine] if estimator == "empirical" else labels
    cotangents = _cotangents(estimator, true_N, draws_N[mine], allowed_C)
    if any(weight.dtype != torch.float32 for weight in model.parameters()):
        model = model.copy().float()
    was_training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        sums = sums_of_squares(model, inputs[mine], cotangents, start=start, max_bytes=max_bytes)
    finally:
        for module, training in was_training.items():
            module.training = training
    count = torch.tensor([float(len(inputs[mine]))], dtype=torch.float64, device=model.device)
    group.sum([*sums.values(), count])
    num_examples = int(count.item())
    values = {name: value / num_examples for name, value in sums.items()}
    for name, value in values.items():
        if not bool(torch.isfinite(value).all()):
            raise LearningError(
                f"the Fisher of {name} is not finite: the model's weights or inputs have "
                "overflowed; lower the learning rate and train again"
            )
    return Fisher(values, estimator, num_examples)


def _check_allowed(allowed_C: Tensor, num_classes: int) -> None:
    if tuple(allowed_C.shape) != (num_classes,) or allowed_C.dtype != torch.bool:
        raise ValueError(
            f"the allowed classes are {allowed_C.dtype} of shape {tuple(allowed_C.shape)}; say of "
            f"each of the {num_classes} classes whether it competes, as torch.bool"
        )
    if not bool(allowed_C.any()):
        raise ValueError("no class is allowed to compete; allow those that the task has")


def _cotangents(
    estimator: Estimator, labels_N: Tensor, draws_N: Tensor, allowed_C: Tensor | None
) -> Cotangents:
    """Give the gradients of the log-likelihood at the logits.

    Those of ``exact`` are times the root of the label's probability, so that their squares
    are weighted by it.
    """

    def cotangents(logits_NC: Tensor, piece: slice) -> Iterator[Tensor]:
        # In float64: one minus the probability of a sure answer would keep few digits.
        scores_NC = logits_NC.double()
        labels = list(range(scores_NC.shape[1]))
        if allowed_C is not None:
            scores_NC = scores_NC.masked_fill(~allowed_C.to(scores_NC.device), -torch.inf)
            labels = allowed_C.nonzero()[:, 0].tolist()
        p_NC = F.softmax(scores_NC, dim=1)
        if estimator == "exact":
            for c in labels:
                gradient_NC = -p_NC
                gradient_NC[:, c] += 1
                yield (gradient_NC * p_NC[:, c : c + 1].sqrt()).to(logits_NC.dtype)
            return
        if estimator == "sampled":
            edges_NC = p_NC.cumsum(1)
            target_N1 = draws_N[piece, None].to(edges_NC.device) * edges_NC[:, -1:]
            chosen_N = (edges_NC < target_N1).sum(1).clamp(max=p_NC.shape[1] - 1)
        else:
            chosen_N = labels_N[piece].to(p_NC.device)
        one_hot_NC = F.one_hot(chosen_N.long(), p_NC.shape[1])
        yield (one_hot_NC - p_NC).to(logits_NC.dtype)

    return cotangents

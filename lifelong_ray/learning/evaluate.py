"""How good answers are, and how sure a model should be of them.

Pure functions of logits and labels; probabilities work as logits too where only the
order matters.

Axes: N examples, C classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

_ECE_BINS = 15
_BISECTIONS = 50
_LOG_SHARPNESS = (math.log(1e-2), math.log(1e4))


@dataclass(frozen=True)
class Evaluation:
    """What one model does on one labelled set.

    Attributes:
        num_examples: Examples judged.
        accuracy: Share answered correctly.
        per_class_accuracy: By class; None for a class without examples.
        old_accuracy: Accuracy on examples of the old classes, all classes competing.
        within_old_accuracy: The same with only the old classes competing: what was
            forgotten, apart from what became confusable.
        new_accuracy: Accuracy on examples of the classes after the old ones.
        calibration_error: Expected calibration error, 15 bins of equal width.
        negative_log_likelihood: Mean, in nats.
        negative_flip_share: Share that the parent answered correctly and this model does not.
    """

    num_examples: int
    accuracy: float
    per_class_accuracy: tuple[float | None, ...]
    old_accuracy: float | None
    within_old_accuracy: float | None
    new_accuracy: float | None
    calibration_error: float
    negative_log_likelihood: float
    negative_flip_share: float | None


def evaluate(
    logits_NC: Tensor,
    labels_N: Tensor,
    *,
    num_old_classes: int | None = None,
    parent_logits: Tensor | None = None,
) -> Evaluation:
    """Judge a model's calibrated logits against labels.

    Args:
        logits_NC: Calibrated logits; at least one row.
        labels_N: True classes.
        num_old_classes: The first so many classes are the old ones; None means all.
        parent_logits: The parent's logits for the same examples; may have fewer classes.

    Raises:
        ValueError: If there are no examples.

    Source: Guo et al. 2017, arXiv:1706.04599 (calibration error); Yan et al. 2021,
    arXiv:2011.09161 (negative flips).
    """
    if not len(labels_N):
        raise ValueError("there are no examples to judge a model on")
    num_classes = logits_NC.shape[1]
    num_old = num_classes if num_old_classes is None else num_old_classes
    right_N = logits_NC.argmax(1) == labels_N
    is_old_N = labels_N < num_old
    within_N = logits_NC[:, :num_old].argmax(1) == labels_N
    flips = None
    if parent_logits is not None:
        flips = _share((parent_logits.argmax(1) == labels_N) & ~right_N)
    return Evaluation(
        num_examples=len(labels_N),
        accuracy=float(right_N.double().mean()),
        per_class_accuracy=tuple(_share(right_N[labels_N == c]) for c in range(num_classes)),
        old_accuracy=_share(right_N[is_old_N]),
        within_old_accuracy=_share(within_N[is_old_N]),
        new_accuracy=_share(right_N[~is_old_N]),
        calibration_error=_calibration_error(logits_NC, right_N),
        negative_log_likelihood=float(F.cross_entropy(logits_NC.double(), labels_N)),
        negative_flip_share=flips,
    )


def accuracy(logits_NC: Tensor, labels_N: Tensor) -> float:
    """Return the share of rows whose largest logit is the label's."""
    return float((logits_NC.argmax(1) == labels_N).double().mean())


def fit_temperature(logits_NC: Tensor, labels_N: Tensor, weights_N: Tensor | None = None) -> float:
    """Return the temperature that makes ``softmax(logits / temperature)`` most likely.

    The labels are smoothed by one in the number of examples plus one, so that a model
    without a single mistake is not taken to be infallible.

    Args:
        logits_NC: Uncalibrated logits of examples the model was not fitted to.
        labels_N: True classes.
        weights_N: How many examples each row stands for; None means one.

    Source: Guo et al. 2017, arXiv:1706.04599. The optimum is found by bisection, as the
    likelihood is concave in the inverse temperature.
    """
    z_NC = logits_NC.double()
    z_NC = z_NC - z_NC.mean(1, keepdim=True)
    num_examples = len(z_NC)
    doubt = 1 / (num_examples + 1)
    wanted_N = (1 - doubt) * z_NC.gather(1, labels_N[:, None])[:, 0]
    weights_N = torch.ones_like(wanted_N) if weights_N is None else weights_N.double()
    target = torch.dot(weights_N, wanted_N)
    low, high = _LOG_SHARPNESS
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        p_NC = F.softmax(z_NC * math.exp(middle), dim=1)
        if torch.dot(weights_N, (p_NC * z_NC).sum(1)) < target:
            low = middle
        else:
            high = middle
    return math.exp(-(low + high) / 2)


def _share(flags: Tensor) -> float | None:
    return float(flags.double().mean()) if len(flags) else None


def _calibration_error(logits_NC: Tensor, right_N: Tensor) -> float:
    confidence_N = F.softmax(logits_NC.double(), dim=1).amax(1)
    bins_N = (confidence_N * _ECE_BINS).long().clamp(max=_ECE_BINS - 1)
    gap_B = torch.zeros(_ECE_BINS, dtype=torch.float64)
    gap_B.index_add_(0, bins_N.cpu(), (confidence_N - right_N.double()).cpu())
    return float(gap_B.abs().sum()) / len(right_N)

"""How good answers are, and how sure a model should be of them.

Pure functions of logits and labels; probabilities work as logits too where only the
order matters. A clock is handed in where time is measured.

Axes: N examples, C classes, T tasks.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lifelong_ray.learning.checks import check_finite, check_labels, check_rows, check_whole_numbers
from lifelong_ray.types import LearningError

_ECE_BINS = 15
_BISECTIONS = 50
_LOG_SHARPNESS = (math.log(1e-2), math.log(1e4))
_NOT_FINITE = (
    "the model has overflowed or was shown such images: look at its weights and at what it "
    "answers to, and judge a version that answers with numbers"
)


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
        positive_flip_share: Share that this model answers correctly and the parent did not.
            Accuracy gained over the parent is this less the negative flips.
        mean_class_accuracy: Mean accuracy over the classes that have examples: rare ones count
            as much as frequent ones.
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
    positive_flip_share: float | None
    mean_class_accuracy: float


def evaluate(
    logits_NC: Tensor,
    labels_N: Tensor,
    *,
    num_old_classes: int | None = None,
    parent_logits: Tensor | None = None,
    allowed_NC: Tensor | None = None,
) -> Evaluation:
    """Judge a model's calibrated logits against labels.

    Args:
        logits_NC: Calibrated logits; at least one row.
        labels_N: True classes.
        num_old_classes: The first so many classes are the old ones; None means all.
        parent_logits: The parent's logits for the same examples; may have fewer classes.
        allowed_NC: The classes that compete for each example, as where its task is known
            (`allowed_classes`); None means all of them. The parent answers under the same rule.

    Raises:
        LearningError: If there are no examples, the shapes do not fit, a logit is not finite, or
            a label is outside the classes or not allowed.

    Source: Guo et al. 2017, arXiv:1706.04599 (calibration error); Yan et al. 2021,
    arXiv:2011.09161 (negative flips).
    """
    _check(logits_NC, labels_N)
    if parent_logits is not None:
        _check_parent(parent_logits, logits_NC)
    if allowed_NC is not None:
        _check_allowed(allowed_NC, logits_NC, labels_N)
        logits_NC = logits_NC.masked_fill(~allowed_NC, -math.inf)
        if parent_logits is not None:
            theirs = allowed_NC[:, : parent_logits.shape[1]]
            parent_logits = parent_logits.masked_fill(~theirs, -math.inf)
    num_classes = logits_NC.shape[1]
    num_old = num_classes if num_old_classes is None else num_old_classes
    right_N = logits_NC.argmax(1) == labels_N
    is_old_N = labels_N < num_old
    within_N = right_N
    if 0 < num_old < num_classes:
        within_N = logits_NC[:, :num_old].argmax(1) == labels_N
    worse = better = None
    if parent_logits is not None:
        parent_right_N = parent_logits.argmax(1) == labels_N
        worse, better = _share(parent_right_N & ~right_N), _share(right_N & ~parent_right_N)
    per_class = tuple(_share(right_N[labels_N == c]) for c in range(num_classes))
    return Evaluation(
        num_examples=len(labels_N),
        accuracy=float(right_N.double().mean()),
        per_class_accuracy=per_class,
        old_accuracy=_share(right_N[is_old_N]),
        within_old_accuracy=_share(within_N[is_old_N]),
        new_accuracy=_share(right_N[~is_old_N]),
        calibration_error=_calibration_error(logits_NC, right_N),
        negative_log_likelihood=float(F.cross_entropy(logits_NC.double(), labels_N)),
        negative_flip_share=worse,
        positive_flip_share=better,
        mean_class_accuracy=statistics.fmean(share for share in per_class if share is not None),
    )


def allowed_classes(
    tasks_N: Tensor, classes_of_task: Sequence[Sequence[int]], num_classes: int
) -> Tensor:
    """Return which classes compete for each example whose task is known, bool (N, C).

    Args:
        tasks_N: The task of each example, int64.
        classes_of_task: The classes of each task.
        num_classes: C.

    Raises:
        LearningError: If a task or a class does not exist.

    >>> allowed_classes(torch.tensor([1, 0]), [[0, 2], [1]], 3).int().tolist()
    [[0, 1, 0], [1, 0, 1]]
    """
    num_tasks = len(classes_of_task)
    check_whole_numbers(tasks_N, "task")
    if len(tasks_N) and not 0 <= int(tasks_N.min()) <= int(tasks_N.max()) < num_tasks:
        raise LearningError(
            f"tasks run from {int(tasks_N.min())} to {int(tasks_N.max())} but there are "
            f"{num_tasks}; list the classes of every task, counted from 0"
        )
    allowed_TC = torch.zeros(num_tasks, num_classes, dtype=torch.bool)
    for task, classes in enumerate(classes_of_task):
        if outside := [c for c in classes if not 0 <= c < num_classes]:
            raise LearningError(
                f"task {task} has class {outside[0]} but there are {num_classes} classes, counted "
                "from 0"
            )
        allowed_TC[task, list(classes)] = True
    return allowed_TC.to(tasks_N.device)[tasks_N]


def accuracy(logits_NC: Tensor, labels_N: Tensor) -> float:
    """Return the share of rows whose largest logit is the label's.

    A class that the model does not answer with counts as a mistake.

    Raises:
        LearningError: If there are no examples, not as many logits as labels, or a logit that is
            not finite.
    """
    _check_logits(logits_NC, labels_N)
    return float((logits_NC.argmax(1) == labels_N).double().mean())


def time_per_image(
    predict: Callable[[Tensor], object],
    images: Tensor,
    clock: Callable[[], float],
    rounds: int,
) -> float:
    """Return how long a prediction takes, milliseconds per image: the median of some rounds.

    One more round goes ahead untimed, as the first one allocates and compiles.

    Args:
        predict: Answers a batch, and returns when it is done: on a GPU it has to wait for it.
        images: One batch.
        clock: Gives seconds.
        rounds: Timed calls of `predict`.

    Raises:
        LearningError: If there is no image or no round.
    """
    if not len(images) or rounds < 1:
        raise LearningError(
            f"{rounds} rounds over {len(images)} images have no time per image; both must be at "
            "least 1"
        )
    predict(images)
    seconds: list[float] = []
    for _ in range(rounds):
        began_s = clock()
        predict(images)
        seconds.append(clock() - began_s)
    return 1e3 * statistics.median(seconds) / len(images)


def clearly_better(right_N: Tensor, than_N: Tensor) -> bool:
    """Whether one model answers more of the same examples rightly than another, beyond chance.

    By more than one standard error of the paired difference: of many candidates, the best on a
    few examples is mostly the luckiest.

    >>> a, b = torch.ones(9, dtype=torch.bool), torch.ones(9, dtype=torch.bool)
    >>> b[:1] = False
    >>> clearly_better(a, b)
    False
    >>> b[:3] = False
    >>> clearly_better(a, b)
    True
    """
    won, lost = int((right_N & ~than_N).sum()), int((than_N & ~right_N).sum())
    return won - lost > math.sqrt(won + lost)


def clearly_less(error_N: Tensor, than_N: Tensor) -> bool:
    """Whether the errors of one model on some examples are less than another's on the same.

    By more than one standard error of the mean paired difference, as in `clearly_better`, which
    needs more examples, since it looks at answers alone.

    >>> errors = torch.tensor([0.1, 0.2, 0.4, 0.3])
    >>> clearly_less(errors, errors + 0.1), clearly_less(errors, errors.flip(0))
    (True, False)
    """
    gain_N = (than_N - error_N).double()
    if len(gain_N) < 2:
        return False
    return bool(gain_N.mean() > gain_N.std() / math.sqrt(len(gain_N)))


def fit_temperature(logits_NC: Tensor, labels_N: Tensor, weights_N: Tensor | None = None) -> float:
    """Return the temperature that makes ``softmax(logits / temperature)`` most likely.

    The labels are smoothed by one in the number of examples plus one, so that a model
    without a single mistake is not taken to be infallible.

    Args:
        logits_NC: Uncalibrated logits of examples the model was not fitted to.
        labels_N: True classes.
        weights_N: How many examples each row stands for; None means one.

    Raises:
        LearningError: If there are no examples, the shapes do not fit, a logit or weight is not
            finite, or a label is outside the classes.

    Source: Guo et al. 2017, arXiv:1706.04599. The optimum is found by bisection, as the
    likelihood is concave in the inverse temperature.
    """
    _check(logits_NC, labels_N)
    if weights_N is not None:
        _check_weights(weights_N, len(labels_N))
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


def _check_logits(logits_NC: Tensor, labels_N: Tensor) -> None:
    check_whole_numbers(labels_N, "label")
    if not len(labels_N):
        raise LearningError("there are no examples to judge a model on; at least one is needed")
    check_rows(logits_NC, "logits")
    if logits_NC.dim() != 2 or not logits_NC.shape[1] or not logits_NC.is_floating_point():
        raise LearningError(
            f"the logits are {logits_NC.dtype} of shape {tuple(logits_NC.shape)}; they must be "
            "floating-point of shape (N, C): one row per example, one column per class"
        )
    if len(logits_NC) != len(labels_N):
        raise LearningError(
            f"there are logits of {len(logits_NC)} examples but {len(labels_N)} labels; give "
            "every example one of each"
        )
    check_finite(logits_NC, "logits", _NOT_FINITE)


def _check(logits_NC: Tensor, labels_N: Tensor) -> None:
    _check_logits(logits_NC, labels_N)
    check_labels(
        labels_N,
        len(logits_NC),
        logits_NC.shape[1],
        "label",
        "leave its examples out, or judge a model that knows it",
    )


def _check_parent(parent_logits: Tensor, logits_NC: Tensor) -> None:
    if parent_logits.dim() != 2 or len(parent_logits) != len(logits_NC):
        raise LearningError(
            f"the parent has logits of shape {tuple(parent_logits.shape)} but {len(logits_NC)} "
            "examples are judged; let both models answer the same ones"
        )
    if parent_logits.shape[1] > logits_NC.shape[1]:
        raise LearningError(
            f"the parent answers with {parent_logits.shape[1]} classes and the model with only "
            f"{logits_NC.shape[1]}; a model knows its parent's classes, so change the two round"
        )
    check_finite(parent_logits, "parent's logits", _NOT_FINITE)


def _check_weights(weights_N: Tensor, num_examples: int) -> None:
    if tuple(weights_N.shape) != (num_examples,):
        raise LearningError(
            f"there are weights of shape {tuple(weights_N.shape)} for {num_examples} examples; "
            "say of each how many it stands for"
        )
    check_finite(weights_N, "examples' weights", "say of each example how many it stands for")
    if float(weights_N.min()) < 0 or not float(weights_N.sum()):
        raise LearningError(
            f"the examples' weights run from {float(weights_N.min()):g} and add up to "
            f"{float(weights_N.sum()):g}; give each 0 or more, and one of them more than 0"
        )


def _check_allowed(allowed_NC: Tensor, logits_NC: Tensor, labels_N: Tensor) -> None:
    if allowed_NC.shape != logits_NC.shape or allowed_NC.dtype != torch.bool:
        raise LearningError(
            f"the allowed classes are {allowed_NC.dtype} of shape {tuple(allowed_NC.shape)} but "
            f"the logits of shape {tuple(logits_NC.shape)}; say for every example which classes "
            "compete, as torch.bool (see allowed_classes)"
        )
    permitted_N = allowed_NC.gather(1, labels_N[:, None])[:, 0]
    if not permitted_N.all():
        row = int((~permitted_N).nonzero()[0, 0])
        raise LearningError(
            f"example {row} is of class {int(labels_N[row])}, which is not among those allowed "
            "for it; put the class into the example's task"
        )


def _share(flags: Tensor) -> float | None:
    return float(flags.double().mean()) if len(flags) else None


def _calibration_error(logits_NC: Tensor, right_N: Tensor) -> float:
    confidence_N = F.softmax(logits_NC.double(), dim=1).amax(1)
    bins_N = (confidence_N * _ECE_BINS).long().clamp(max=_ECE_BINS - 1)
    gap_B = torch.zeros(_ECE_BINS, dtype=torch.float64)
    gap_B.index_add_(0, bins_N.cpu(), (confidence_N - right_N.double()).cpu())
    return float(gap_B.abs().sum()) / len(right_N)

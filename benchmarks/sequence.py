"""One method through a sequence of experiences, judged after each of them.

Knows neither where the experiences are from nor which settings make a method.

Axes: N examples, C classes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from common import as_tensors, mean_and_std
from peak import waiting_clock

from lifelong_ray.config import LearningConfig, ModelConfig
from lifelong_ray.learning import (
    Classifier,
    Fit,
    History,
    Labelled,
    Learner,
    Run,
    accuracy,
    allowed_classes,
    build_model,
    evaluate,
    fit_base,
    fit_update,
    time_per_image,
)
from lifelong_ray.learning.model import in_chunks
from lifelong_ray.scenarios import Scenario

_ONE_ASIDE_IN = 2  # Of a class of few images, at most every second one is set aside.
_WARMING_IMAGES = 4
_TIMED_BATCH, _TIMED_ROUNDS = 32, 5


@dataclass(frozen=True)
class Protocol:
    """What all methods have in common.

    Attributes:
        scenario: class, domain or task.
        iterations: Gradient steps per experience, where a method takes any.
        batch_size: New examples of a step; as many remembered ones come on top.
        memory_per_class: Remembered images per class of the data.
        lambda_ewc: Penalty of `ewc`.
        precision: Of the gradient steps.
        device: Where they are computed.
        num_experiences: How many arrive.
        num_classes: Of the data.
        classes_per_label: Classes of the data that share one label; 1 but in domain scenarios.
    """

    scenario: str
    iterations: int
    batch_size: int
    memory_per_class: int
    lambda_ewc: float
    precision: Literal["fp32", "bf16"]
    device: str
    num_experiences: int
    num_classes: int
    classes_per_label: int


@dataclass(frozen=True)
class Method:
    """One method as settings of the engine.

    Attributes:
        learning: The settings.
        held_out: Images of each label and experience that are not trained on but choose;
            they count as stored.
        jointly: Whether it sees everything at once: the reference.
    """

    learning: LearningConfig
    held_out: int = 0
    jointly: bool = False


def run_method(
    scenario: Scenario, model: ModelConfig, how: Method, device: str = "cpu"
) -> dict[str, Any]:
    """Learn the experiences one after the other and judge after each.

    Returns:
        Figures by name; the seconds are those of learning alone. ``updates`` has what
        `evaluate` says after each experience, on the test parts of all so far.
    """
    if how.jointly:
        return _run_jointly(scenario, model, how, device)
    tests = [as_tensors(e.test_images, e.test_labels) for e in scenario.experiences]
    history = History(
        tuple(len(labels) for _, labels in tests),
        untrained=_untrained(scenario, model, how.learning.seed, tests),
    )
    learner: Learner | None = None
    held_out: list[Labelled] = []
    cost = _Cost()
    updates: list[dict[str, Any]] = []
    parent_logits: list[torch.Tensor] = []
    reasons: list[str] = []
    run = Run(clock=waiting_clock(device), device=device)
    known = 0
    for index, experience in enumerate(scenario.experiences):
        training = as_tensors(experience.train_images, experience.train_labels)
        if how.held_out:
            training, mine = _set_aside(training, how.held_out, how.learning.seed)
            held_out.append(mine)
        validation = _joined(held_out) if held_out else None
        before = known
        known = max(known, int(training[1].max()) + 1)
        names = scenario.class_names[:known]
        if learner is not None:
            parent_logits.append(learner.logits(tests[index][0]))
        with cost.counted(run.clock):
            if learner is None:
                fit = fit_base(training, names, model, how.learning, run, validation=validation)
            else:
                update = fit_update(
                    learner, training, names, how.learning, run, validation=validation
                )
                reasons.append(f"{update.best}: {update.reason}")
                fit = update.chosen
                cost.samples += sum(
                    f.report.samples_seen for name, f in update.fits.items() if name != update.best
                )
        cost.add(fit)
        learner = fit.learner
        logits = [learner.logits(images) for images, _ in tests[: index + 1]]
        updates.append(_judged(scenario, tests, logits, parent_logits))
        parent_logits = logits
        row: list[float | None] = []
        within = []
        for number, (images, labels) in enumerate(tests):
            if number > index:
                later = _answerable(scenario, labels, known)
                row.append(accuracy(learner.logits(images), labels) if later else None)
                continue
            logits_NC = logits[number]
            allowed_NC = _allowed(scenario, number, logits_NC)
            row.append(evaluate(logits_NC, labels, allowed_NC=allowed_NC).accuracy)
            old = before if before else known
            if number < index and int(labels.max()) < old:
                within.append(float((logits_NC[:, :old].argmax(1) == labels).float().mean()))
        history = history.after_update(row, within if index else None)
    assert learner is not None
    return {
        **history.summary(),
        **_last_and_mean(updates),
        "milliseconds_per_image": _milliseconds(learner, tests[0][0]),
        "rows": [list(row) for row in history.rows],
        "updates": updates,
        **cost.figures(),
        "choices": reasons,
    }


class _Cost:
    """What learning took so far.

    Attributes:
        samples: Examples seen, those of results that were not kept too.
    """

    def __init__(self) -> None:
        self.samples = 0
        self._seconds, self._cpu_seconds = 0.0, 0.0
        self._gradient_seconds, self._gradient_samples = 0.0, 0

    @contextmanager
    def counted(self, clock: Callable[[], float]) -> Iterator[None]:
        """Count the seconds of what is done inside."""
        began_s, cpu_began_s = clock(), time.process_time()
        yield
        self._seconds += clock() - began_s
        self._cpu_seconds += time.process_time() - cpu_began_s

    def add(self, fit: Fit) -> None:
        """Count the examples of a result that was kept."""
        self.samples += fit.report.samples_seen
        if fit.report.epochs:
            self._gradient_seconds += fit.report.epochs[-1].seconds
            self._gradient_samples += fit.report.epochs[-1].samples_seen

    def figures(self) -> dict[str, float]:
        """Return the totals by name."""
        return {
            "train_seconds": self._seconds,
            "train_cpu_seconds": self._cpu_seconds,
            "samples_seen": self.samples,
            "gradient_seconds": self._gradient_seconds,
            "gradient_samples": self._gradient_samples,
        }


def _answerable(scenario: Scenario, labels: torch.Tensor, num_classes: int) -> bool:
    """Whether a version of so many classes can have learned to answer these examples."""
    return scenario.kind != "task" and int(labels.max()) < num_classes


def _untrained(
    scenario: Scenario, config: ModelConfig, seed: int, tests: list[Labelled]
) -> tuple[float | None, ...]:
    """Accuracies with random weights, where experiences ask for classes known from the start.

    Elsewhere forward transfer is not defined: nothing can answer with a class that has not
    arrived.
    """
    known = int(scenario.experiences[0].train_labels.max()) + 1
    model: Classifier | None = None
    shares: list[float | None] = []
    for images, labels in tests:
        if not _answerable(scenario, labels, known):
            shares.append(None)
            continue
        model = model or build_model(config, known, seed).eval()
        shares.append(accuracy(in_chunks(model, images), labels))
    return tuple(shares)


def _judged(
    scenario: Scenario,
    tests: list[Labelled],
    logits: list[torch.Tensor],
    parent_logits: list[torch.Tensor],
) -> dict[str, Any]:
    """What a version does on the test parts of the experiences so far, beside its parent."""
    labels_N = torch.cat([labels for _, labels in tests[: len(logits)]])
    masks = [_allowed(scenario, number, one) for number, one in enumerate(logits)]
    judged = evaluate(
        torch.cat(logits),
        labels_N,
        parent_logits=torch.cat(parent_logits) if parent_logits else None,
        allowed_NC=torch.cat([mask for mask in masks if mask is not None])
        if masks[0] is not None
        else None,
    )
    return {
        "accuracy": judged.accuracy,
        "per_class_accuracy": list(judged.per_class_accuracy),
        "mean_class_accuracy": judged.mean_class_accuracy,
        "calibration_error": judged.calibration_error,
        "negative_flip_share": judged.negative_flip_share,
        "positive_flip_share": judged.positive_flip_share,
    }


def _last_and_mean(updates: list[dict[str, Any]]) -> dict[str, Any]:
    """State after the last update; flips are between two versions, so their mean."""
    flips = ("negative_flip_share", "positive_flip_share")
    states = ("per_class_accuracy", "mean_class_accuracy", "calibration_error")
    return {key: updates[-1][key] for key in states} | {
        key: mean_and_std([update[key] for update in updates[1:]])[0] for key in flips
    }


def _milliseconds(learner: Learner, images: torch.Tensor) -> float:
    """How long an answer takes on the processor, in batches as serving forms them."""
    return time_per_image(learner.logits, images[:_TIMED_BATCH], time.perf_counter, _TIMED_ROUNDS)


def warm_up(scenario: Scenario, model: ModelConfig, how: Method, device: str) -> None:
    """Let torch import what it imports at the first step, which is nobody's cost."""
    one_step = how.learning.base.model_copy(update={"iterations": 1})
    learning = how.learning.model_copy(update={"base": one_step})
    first = scenario.experiences[0]
    images, labels = as_tensors(first.train_images, first.train_labels)
    some = torch.cat([(labels == c).nonzero()[:_WARMING_IMAGES, 0] for c in labels.unique()])
    names = scenario.class_names[: int(labels.max()) + 1]
    training = images[some], labels[some]
    fit_base(training, names, model, learning, Run(clock=time.perf_counter, device=device))


def _run_jointly(
    scenario: Scenario, model: ModelConfig, how: Method, device: str
) -> dict[str, Any]:
    parts = [as_tensors(e.train_images, e.train_labels) for e in scenario.experiences]
    tests = [as_tensors(e.test_images, e.test_labels) for e in scenario.experiences]
    steps = how.learning.base.iterations * len(parts)
    learning = how.learning.model_copy(
        update={"base": how.learning.base.model_copy(update={"iterations": steps})}
    )
    run = Run(clock=waiting_clock(device), device=device)
    cost = _Cost()
    with cost.counted(run.clock):
        fit = fit_base(_joined(parts), scenario.class_names, model, learning, run)
    cost.add(fit)
    logits = [fit.learner.logits(images) for images, _ in tests]
    judged = _judged(scenario, tests, logits, [])
    row = [
        evaluate(one, labels, allowed_NC=_allowed(scenario, number, one)).accuracy
        for number, (one, (_, labels)) in enumerate(zip(logits, tests, strict=True))
    ]
    return {
        "final_accuracy": judged["accuracy"],
        **_last_and_mean([judged]),
        "milliseconds_per_image": _milliseconds(fit.learner, tests[0][0]),
        "rows": [row],
        "updates": [judged],
        **cost.figures(),
    }


def _allowed(scenario: Scenario, number: int, logits_NC: torch.Tensor) -> torch.Tensor | None:
    """Which classes compete for test examples of an experience, where it is known: a task."""
    if scenario.kind != "task":
        return None
    num, num_classes = logits_NC.shape
    tasks = [
        [c for c, task in enumerate(scenario.task_of_class[:num_classes]) if task == t]
        for t in range(len(scenario.experiences))
    ]
    return allowed_classes(torch.full((num,), number), tasks, num_classes)


def _set_aside(training: Labelled, per_label: int, seed: int) -> tuple[Labelled, Labelled]:
    """Take the hold-out's part of the memory budget out of the training examples."""
    images, labels = training
    generator = torch.Generator().manual_seed(seed)
    aside = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique().tolist():
        mine = (labels == label).nonzero()[:, 0]
        some = min(per_label, len(mine) // _ONE_ASIDE_IN)
        aside[mine[torch.randperm(len(mine), generator=generator)[:some]]] = True
    return (images[~aside], labels[~aside]), (images[aside], labels[aside])


def _joined(parts: list[Labelled]) -> Labelled:
    return torch.cat([images for images, _ in parts]), torch.cat([labels for _, labels in parts])

"""The sweep over lambda_ewc and learning rate of the slow path, on Ray Tune.

Knows how trials are drawn, run and compared. A trial is one update of the stable
version, trained as any other but never registered; it wins by what it learns, if it
keeps what must be kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import ray
import torch
import yaml
from matplotlib.figure import Figure
from ray import tune
from ray.tune.search.optuna import OptunaSearch

from lifelong_ray.config import Config
from lifelong_ray.cycle import Turn, judge, prepare_update
from lifelong_ray.fitting import fit_alone
from lifelong_ray.learning import Fisher, Learner, estimate_fisher
from lifelong_ray.learning.fisher import Estimator
from lifelong_ray.on_ray.training import ensure_ray, storage_path
from lifelong_ray.storage import Store
from lifelong_ray.types import LearningError

_LAMBDA = "lambda_ewc"
_LEARNING_RATE = "learning_rate"
_PRICE_OF_FORGETTING = 10.0
_WORST = -_PRICE_OF_FORGETTING - 1
"""Below the objective of every trial that ends: what one that diverges tells the search."""

_MARKERS = {"exact": "o", "sampled": "s", "empirical": "^"}
_COLOURS = {"exact": "#4477aa", "sampled": "#228833", "empirical": "#aa3377"}


@dataclass(frozen=True)
class Trial:
    """One setting of the slow path, and what came of it.

    Attributes:
        estimator: Of the Fisher that lambda_ewc weighs.
        lambda_ewc: Penalty weight.
        learning_rate: Peak of the schedule.
        retention: Share of the parent's hold-out accuracy that is kept; None if it failed.
        plasticity: Accuracy on validation examples, which are of what is new; None if it failed.
        error: Why it failed; empty if it did not.
    """

    estimator: Estimator
    lambda_ewc: float
    learning_rate: float
    retention: float | None
    plasticity: float | None
    error: str = ""

    @property
    def point(self) -> tuple[float, float] | None:
        """Plasticity and retention, in the order in which trials are compared."""
        if self.retention is None or self.plasticity is None:
            return None
        return self.plasticity, self.retention


@dataclass(frozen=True)
class Sweep:
    """What a sweep found.

    Attributes:
        trials: In the order in which they were drawn, estimator by estimator.
        best: The winning trial, of the estimator that the stable version's Fisher is of.
        min_retention: What a winner had to keep.
    """

    trials: tuple[Trial, ...]
    best: Trial
    min_retention: float

    def best_overrides(self) -> tuple[str, ...]:
        """The winner as ``section.key=value`` overrides."""
        return (
            f"learning.update.ewc.estimator={self.best.estimator}",
            f"learning.update.ewc.lambda_ewc={self.best.lambda_ewc!r}",
            f"learning.update.trainer.learning_rate={self.best.learning_rate!r}",
        )

    @property
    def better_elsewhere(self) -> Trial | None:
        """A trial of another estimator that beats the winner, if there is one."""
        if not _keeping(self.trials, self.min_retention):
            return None
        rival = choose_best(self.trials, self.min_retention)
        return rival if rival.estimator != self.best.estimator else None

    def to_json(self) -> dict[str, Any]:
        """The trials as plain values, those on the Pareto front marked."""
        front = pareto_front(self.trials)
        rows = [asdict(trial) | {"on_front": trial in front} for trial in self.trials]
        return {
            "min_retention": self.min_retention,
            "trials": rows,
            "best": rows[self.trials.index(self.best)],
        }


def sweep(config: Config, store: Store, *, run_id: str, now_s: Callable[[], float]) -> Sweep:
    """Try settings of the slow path on the new examples in the log.

    Every estimator in ``tuning.estimators`` has a search of its own: how large importance is
    differs between them by orders of magnitude, so that a weight found with one says nothing
    about another (van de Ven 2025, arXiv:2502.11756). Only trials of the stable version's own
    estimator can win, as its Fisher is what an update will weigh. For the others that Fisher
    is estimated anew on the remembered examples.

    Raises:
        DataError: If there is nothing new to learn.
        LearningError: If no trial keeps ``tuning.min_retention``, there are no validation
            examples, or an estimator cannot be tried on this version.
    """
    config = _slow_only(config)
    turn = prepare_update(config, store, run_id=run_id, now_s=now_s)
    if not len(turn.job.validation):
        raise LearningError(
            "a sweep needs validation examples to compare its trials by; "
            "set learning.update.validation_share above 0"
        )
    assert turn.job.parent_files is not None  # it is an update
    parent = Learner.from_files(turn.job.parent_files)
    estimators = estimators_to_try(config.tuning.estimators, parent.fisher.estimator)
    turns = {
        estimator: replace(
            turn, job=replace(turn.job, parent_files=parent_with(parent, estimator, config))
        )
        for estimator in estimators
    }
    ensure_ray(config)
    trials: list[Trial] = []
    for estimator in estimators:
        trials += _search(
            turns[estimator], with_estimator(config, estimator), name=f"{run_id}-{estimator}"
        )
    own = [trial for trial in trials if trial.estimator == parent.fisher.estimator]
    min_retention = config.tuning.min_retention
    return Sweep(tuple(trials), choose_best(own, min_retention), min_retention)


def estimators_to_try(wanted: Sequence[Estimator], own: Estimator) -> tuple[Estimator, ...]:
    """Return the estimators of a sweep, each once; by default the stable version's.

    >>> estimators_to_try((), "exact")
    ('exact',)

    Raises:
        LearningError: If the stable version's is not among them.
    """
    estimators = tuple(dict.fromkeys(wanted)) or (own,)
    if own not in estimators:
        raise LearningError(
            f"tuning.estimators is {list(wanted)}, but the stable version's Fisher is {own!r}, "
            f"and an update weighs that one; add {own}, or make a base training with "
            f"learning.update.ewc.estimator={estimators[0]}"
        )
    return estimators


def parent_with(parent: Learner, estimator: Estimator, config: Config) -> dict[str, bytes]:
    """Return a version's files with its Fisher by `estimator`.

    One of another estimator is estimated on the remembered examples.

    Raises:
        LearningError: If it would have to be, and nothing is remembered.
    """
    if estimator == parent.fisher.estimator:
        return parent.to_files()
    memory = parent.memory
    if not len(memory):
        raise LearningError(
            f"tuning.estimators has {estimator!r}, which needs remembered examples to estimate "
            "importance on, and the stable version has none; leave it out, or keep a memory with "
            "learning.update.replay.memory_per_class"
        )
    fisher = estimate_fisher(
        parent.model,
        memory.inputs.float() if memory.inputs.is_floating_point() else memory.inputs,
        memory.labels,
        estimator=estimator,
        generator=torch.Generator().manual_seed(config.learning.seed),
        start=parent.memory_stage,
    )
    # Of stages that remembered features have passed already nothing is known, and nothing needed.
    known = fisher.values
    values = {
        name: known[name].detach() if name in known else torch.zeros_like(weight)
        for name, weight in parent.model.state_dict().items()
        if name in parent.fisher.values
    }
    return replace(parent, fisher=Fisher(values, estimator, fisher.num_examples)).to_files()


def _search(turn: Turn, config: Config, *, name: str) -> list[Trial]:
    """Run the trials of one estimator."""
    prepared = ray.put(turn)
    tuning, estimator = config.tuning, config.learning.update.ewc.estimator

    def trial(sampled: dict[str, float]) -> None:
        tune.report(measure(ray.get(prepared), with_setting(config, sampled)))

    results = tune.Tuner(
        tune.with_resources(trial, {"cpu": config.training.cpus_per_worker}),
        param_space={
            _LAMBDA: tune.loguniform(*tuning.lambda_ewc),
            _LEARNING_RATE: tune.loguniform(*tuning.learning_rate),
        },
        tune_config=tune.TuneConfig(
            metric="objective",
            mode="max",
            num_samples=tuning.num_trials,
            max_concurrent_trials=tuning.max_concurrent,
            search_alg=OptunaSearch(seed=config.learning.seed),
        ),
        run_config=tune.RunConfig(name=name, storage_path=storage_path(config), verbose=0),
    ).fit()
    return [
        trial_from(estimator, result.config, result.metrics or {}, result.error)
        for result in (results[i] for i in range(len(results)))
        if result.config
    ]


def trial_from(
    estimator: Estimator,
    sampled: Mapping[str, Any],
    metrics: Mapping[str, Any],
    crash: Exception | None,
) -> Trial:
    """Return what Tune says of one trial, whichever way it ended."""
    error = str(metrics.get("error", ""))
    if crash is not None:
        # The last line of a remote trace is the error itself.
        error = next(iter(reversed(str(crash).strip().splitlines())), repr(crash))
    failed = bool(error) or "retention" not in metrics
    return Trial(
        estimator,
        float(sampled[_LAMBDA]),
        float(sampled[_LEARNING_RATE]),
        None if failed else float(metrics["retention"]),
        None if failed else float(metrics["plasticity"]),
        error or ("it ended without a result" if failed else ""),
    )


def measure(turn: Turn, config: Config) -> dict[str, float | str]:
    """Train one setting and measure it; training data never judges."""
    cascade = config.learning.cascade.model_copy(update={"enabled": False})
    learning = config.learning.model_copy(update={"cascade": cascade})
    alone = config.model_copy(update={"learning": learning})
    try:
        outcome = fit_alone(replace(turn.job, config=alone))
    except LearningError as error:
        # Far too large a learning rate, mostly: the search shall learn from that too.
        return {"error": str(error), "objective": _WORST}
    slow = outcome.paths["slow"]
    judged = judge(slow.files, turn.job.parent_files, turn.holdout, config)
    retention = judged.check("retention") or 0.0
    plasticity = slow.report["validation_accuracy"]
    assert isinstance(plasticity, float)  # there are validation examples
    # Optuna learns from one number: what is learned, less what the limit is missed by.
    missed = max(0.0, config.tuning.min_retention - retention)
    return {
        "retention": retention,
        "plasticity": plasticity,
        "objective": plasticity - _PRICE_OF_FORGETTING * missed,
    }


def choose_best(trials: Sequence[Trial], min_retention: float) -> Trial:
    """The trial that learns most among those that keep enough.

    >>> trials = Trial("exact", 100, 1e-3, 0.99, 0.8), Trial("exact", 1, 1e-3, 0.9, 0.9)
    >>> choose_best(trials, 0.95).lambda_ewc
    100

    Raises:
        LearningError: If no trial keeps enough.
    """
    keeping = _keeping(trials, min_retention)
    if keeping:
        return max(keeping, key=lambda trial: trial.point or (0.0, 0.0))
    failed = [trial for trial in trials if trial.error]
    if trials and len(failed) == len(trials):
        raise LearningError(
            f"none of {len(trials)} trials came to an end; the first one: {failed[0].error}"
        )
    best = max((trial.retention for trial in trials if trial.retention is not None), default=0.0)
    raise LearningError(
        f"none of {len(trials)} trials keeps {min_retention:.2f} of the old accuracy, the best "
        f"{best:.3f}; widen tuning.lambda_ewc upwards or lower tuning.learning_rate"
    )


def pareto_front(trials: Sequence[Trial]) -> tuple[Trial, ...]:
    """Return the trials that no other one beats, by rising plasticity.

    One trial beats another if it keeps and learns at least as much, and more of one of the
    two. Trials that failed are beaten.

    >>> trials = [
    ...     Trial("exact", 100.0, 1e-3, retention=0.99, plasticity=0.7),
    ...     Trial("exact", 10.0, 1e-3, retention=0.97, plasticity=0.9),
    ...     Trial("exact", 1.0, 1e-3, retention=0.90, plasticity=0.9),
    ... ]
    >>> [trial.lambda_ewc for trial in pareto_front(trials)]
    [100.0, 10.0]
    """
    front: list[Trial] = []
    kept, learned = -1.0, -1.0
    measured = [(trial.point, trial) for trial in trials if trial.point is not None]
    for (plasticity, retention), trial in sorted(measured, key=lambda pair: pair[0], reverse=True):
        if retention > kept or (retention, plasticity) == (kept, learned):
            front.append(trial)
            kept, learned = retention, plasticity
    return tuple(reversed(front))


def draw(found: Sweep, path: Path) -> None:
    """Draw what each trial kept against what it learned, as PNG."""
    figure = Figure(figsize=(8, 5), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    for estimator in dict.fromkeys(trial.estimator for trial in found.trials):
        trials = [trial for trial in found.trials if trial.estimator == estimator]
        points = [(trial, trial.point) for trial in trials if trial.point is not None]
        num_failed = len(trials) - len(points)
        axes.scatter(
            [point[0] for _, point in points],
            [point[1] for _, point in points],
            marker=_MARKERS[estimator],
            color=_COLOURS[estimator],
            s=45,
            zorder=3,
            label=f"{estimator}, {num_failed} failed" if num_failed else estimator,
        )
    front = [
        (trial, trial.point) for trial in pareto_front(found.trials) if trial.point is not None
    ]
    for trial, point in front:
        axes.annotate(
            f"{float(f'{trial.lambda_ewc:.2g}'):g}",
            point,
            xytext=(5, 5),
            textcoords="offset points",
            fontsize=8,
        )
    axes.plot(
        [point[0] for _, point in front],
        [point[1] for _, point in front],
        drawstyle="steps-pre",  # no setting is known between two trials
        color="#888888",
        zorder=1,
        label="Pareto front, with lambda_ewc",
    )
    axes.axhline(
        found.min_retention,
        color="#ee6677",
        linestyle="--",
        linewidth=1,
        label=f"tuning.min_retention, {found.min_retention:g}",
    )
    if found.best.point is not None:
        axes.scatter(
            *found.best.point,
            s=190,
            facecolors="none",
            edgecolors="black",
            linewidths=1.4,
            zorder=2,
            label="winner",
        )
    axes.set_xlabel("plasticity: accuracy on the new validation examples")
    axes.set_ylabel("retention: share of the old accuracy kept")
    axes.margins(0.08)
    axes.grid(alpha=0.25)
    axes.legend(loc="best", fontsize=9)
    figure.suptitle("What each trial kept and learned")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")


def write_config(found: Sweep, path: Path, base: dict[str, Any]) -> None:
    """Write a configuration that ``train_job.py --config`` takes."""
    update = base.setdefault("learning", {}).setdefault("update", {})
    ewc = update.setdefault("ewc", {})
    ewc["estimator"], ewc[_LAMBDA] = found.best.estimator, found.best.lambda_ewc
    update.setdefault("trainer", {})[_LEARNING_RATE] = found.best.learning_rate
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(base, sort_keys=False), encoding="utf-8")


def with_setting(config: Config, sampled: Mapping[str, float]) -> Config:
    """Return the tree with the two values of a trial."""
    update = config.learning.update
    return _with_update(
        config,
        ewc=update.ewc.model_copy(update={_LAMBDA: sampled[_LAMBDA]}),
        trainer=update.trainer.model_copy(update={_LEARNING_RATE: sampled[_LEARNING_RATE]}),
    )


def with_estimator(config: Config, estimator: Estimator) -> Config:
    """Return the tree with another Fisher estimator."""
    ewc = config.learning.update.ewc.model_copy(update={"estimator": estimator})
    return _with_update(config, ewc=ewc)


def _slow_only(config: Config) -> Config:
    return _with_update(config, paths="slow", expansion="never")


def _with_update(config: Config, **changes: object) -> Config:
    update = config.learning.update.model_copy(update=changes)
    learning = config.learning.model_copy(update={"update": update})
    return config.model_copy(update={"learning": learning})


def _keeping(trials: Sequence[Trial], min_retention: float) -> list[Trial]:
    return [t for t in trials if t.retention is not None and t.retention >= min_retention]

"""The sweep over lambda_ewc and learning rate of the slow path, on Ray Tune.

Knows how trials are drawn, run and compared. A trial is one update of the stable
version, trained as any other but never registered; it wins by what it learns, if it
keeps what must be kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
import yaml
from ray import tune
from ray.tune.search.optuna import OptunaSearch

from lifelong_ray.config import Config
from lifelong_ray.cycle import Turn, judge, prepare_update
from lifelong_ray.fitting import fit_alone
from lifelong_ray.on_ray.training import ensure_ray, storage_path
from lifelong_ray.storage import Store
from lifelong_ray.types import LearningError

_LAMBDA = "lambda_ewc"
_LEARNING_RATE = "learning_rate"


@dataclass(frozen=True)
class Sweep:
    """What a sweep found.

    Attributes:
        trials: One row per trial: lambda_ewc, learning_rate, retention, plasticity.
        best: The winning row.
    """

    trials: tuple[dict[str, float], ...]
    best: dict[str, float]

    def best_overrides(self) -> tuple[str, ...]:
        """The winner as ``section.key=value`` overrides."""
        return (
            f"learning.update.ewc.lambda_ewc={self.best[_LAMBDA]!r}",
            f"learning.update.trainer.learning_rate={self.best[_LEARNING_RATE]!r}",
        )


def sweep(config: Config, store: Store, *, run_id: str, now_s: Callable[[], float]) -> Sweep:
    """Try settings of the slow path on the new examples in the log.

    Raises:
        DataError: If there is nothing new to learn.
        LearningError: If no trial keeps ``tuning.min_retention``.
    """
    config = _slow_only(config)
    ensure_ray(config)
    prepared = ray.put(prepare_update(config, store, run_id=run_id, now_s=now_s))
    tuning = config.tuning

    def trial(sampled: dict[str, float]) -> None:
        tune.report(_try(ray.get(prepared), _with(config, sampled)))

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
        run_config=tune.RunConfig(name=run_id, storage_path=storage_path(config), verbose=0),
    ).fit()
    rows = tuple(
        {
            _LAMBDA: float(result.config[_LAMBDA]),
            _LEARNING_RATE: float(result.config[_LEARNING_RATE]),
            "retention": float(result.metrics["retention"]),
            "plasticity": float(result.metrics["plasticity"]),
        }
        for result in (results[i] for i in range(len(results)))
        if result.error is None and result.metrics and result.config
    )
    return Sweep(rows, choose_best(rows, tuning.min_retention))


def _try(turn: Turn, config: Config) -> dict[str, float]:
    """Train one setting and measure it; training data never judges."""
    outcome = fit_alone(replace(turn.job, config=config))
    slow = outcome.paths["slow"]
    judged = judge(slow.files, turn.job.parent_files, turn.holdout, config)
    retention = judged.check("retention") or 0.0
    plasticity = slow.report["validation_accuracy"]
    if not isinstance(plasticity, float):
        raise LearningError(
            "a sweep needs validation examples to compare its trials by; "
            "set learning.update.validation_share above 0"
        )
    # Optuna learns from one number: what is learned, less what the limit is missed by.
    missed = max(0.0, config.tuning.min_retention - retention)
    return {
        "retention": retention,
        "plasticity": plasticity,
        "objective": plasticity - 10 * missed,
    }


def choose_best(rows: tuple[dict[str, float], ...], min_retention: float) -> dict[str, float]:
    """The trial that learns most among those that keep enough.

    >>> rows = ({"retention": 0.99, "plasticity": 0.8}, {"retention": 0.9, "plasticity": 0.9})
    >>> choose_best(rows, 0.95)
    {'retention': 0.99, 'plasticity': 0.8}

    Raises:
        LearningError: If no trial keeps enough.
    """
    keeping = [row for row in rows if row["retention"] >= min_retention]
    if not keeping:
        best = max((row["retention"] for row in rows), default=0.0)
        raise LearningError(
            f"none of {len(rows)} trials keeps {min_retention:.2f} of the old accuracy, the best "
            f"{best:.3f}; widen tuning.lambda_ewc upwards or lower tuning.learning_rate"
        )
    return max(keeping, key=lambda row: (row["plasticity"], row["retention"]))


def write_config(sweep: Sweep, path: Path, base: dict[str, Any]) -> None:
    """Write a configuration that ``train_job.py --config`` takes."""
    update = base.setdefault("learning", {}).setdefault("update", {})
    update.setdefault("ewc", {})[_LAMBDA] = sweep.best[_LAMBDA]
    update.setdefault("trainer", {})[_LEARNING_RATE] = sweep.best[_LEARNING_RATE]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(base, sort_keys=False), encoding="utf-8")


def _with(config: Config, sampled: dict[str, float]) -> Config:
    update = config.learning.update
    changed = update.model_copy(
        update={
            "ewc": update.ewc.model_copy(update={_LAMBDA: sampled[_LAMBDA]}),
            "trainer": update.trainer.model_copy(update={_LEARNING_RATE: sampled[_LEARNING_RATE]}),
        }
    )
    learning = config.learning.model_copy(update={"update": changed})
    return config.model_copy(update={"learning": learning})


def _slow_only(config: Config) -> Config:
    update = config.learning.update.model_copy(update={"paths": "slow"})
    return config.model_copy(
        update={"learning": config.learning.model_copy(update={"update": update})}
    )

"""What an incremental update costs and loses, against retraining and against a warm epoch.

    python benchmarks/update_cost.py --data FILE.npz --new-classes 8,9 --seeds 3 --out FILE

A base version learns all classes but the new ones; then each method learns the new ones:

- full: retraining from nothing on everything, for as many epochs as the base had.
- warm_epoch: the base version trained for one more epoch on everything, without any continual
  learning: the control that an update has to beat to be worth its name. warm_0.1 and such
  are the same for a share of the seconds of full.
- fast: the analytic head, no old image needed.
- slow: fine-tuning with replay, distillation and EWC, then the analytic head carried over.
- default: fast, and slow where that falls short; the better one on a hold-out. default_0.1
  and such have as many gradient steps as a share of the seconds of full has room for.
- datafree: what default does where no old image may be kept.

Seconds are those of learning, on one machine in one run; the methods of one seed run in turn.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from common import as_tensors, load_arrays, mean_and_std, set_up, table, write

from lifelong_ray.config import (
    AnalyticConfig,
    DistillationConfig,
    EwcConfig,
    LearningConfig,
    ModelConfig,
    ReplayConfig,
    TrainerConfig,
    UpdateConfig,
)
from lifelong_ray.learning import (
    Classifier,
    Labelled,
    Learner,
    Run,
    Update,
    evaluate,
    fit_base,
    fit_update,
    time_per_image,
    train,
)
from lifelong_ray.learning.chance import generator_for
from lifelong_ray.learning.model import in_chunks
from lifelong_ray.scenarios import grow

_HELD_OUT_SHARE = 0.05
_TRIAL_STEPS = (20, 140)
_SAFETY = 0.95
_CHEAPEST_STEP = 0.2
_FEWEST_STEPS = 20
_TIMED_BATCH, _TIMED_ROUNDS = 32, 5
_KEYS = ("accuracy", "old_accuracy", "new_accuracy", "retention", "retention_within_old")


def main(
    data: Annotated[str, typer.Option(help="An .npz, or what else data.source takes.")],
    new_classes: Annotated[str, typer.Option(help="Labels that arrive later.")] = "8,9",
    epochs: Annotated[int, typer.Option(help="Of base and full training.")] = 5,
    model: Annotated[str, typer.Option(help="As model.name.")] = "convnet",
    norm: Annotated[str, typer.Option(help="As model.norm.")] = "batch",
    learning_rate: Annotated[float, typer.Option(help="Peak, of all gradient training.")] = 4e-3,
    mirror: Annotated[bool, typer.Option(help="Mirror training images.")] = False,
    memory_share: Annotated[
        float, typer.Option(help="Share of the old images that slow and default may replay.")
    ] = 1.0,
    distillation: Annotated[
        float, typer.Option(help="Weight; with every old image replayed it adds nothing.")
    ] = 0.0,
    budgets: Annotated[
        str, typer.Option(help="Shares of full's seconds for default and the warm control.")
    ] = "0.05,0.1,0.2",
    num_features: Annotated[int, typer.Option(help="Of the analytic head.")] = 5_000,
    source: Annotated[
        str, typer.Option(help="As analytic.source; empty: stages, where the model can.")
    ] = "",
    class_balance: Annotated[float, typer.Option(help="As analytic.class_balance.")] = 0.5,
    shots: Annotated[
        int, typer.Option(help="Images of each new class that there are; 0 means all.")
    ] = 0,
    precision: Annotated[
        str, typer.Option(help="fp32 or bf16, of all gradient training.")
    ] = "fp32",
    seeds: Annotated[int, typer.Option(help="Seeds 0, 1, ...")] = 3,
    fraction: Annotated[float, typer.Option(help="Share of the examples: a dry run.")] = 1.0,
    out: Annotated[Path | None, typer.Option(help="JSON to write.")] = None,
) -> None:
    """Measure updates against full retraining and against warm epochs."""
    arrays = load_arrays(data, fraction)
    source = source or ("stages" if model in ("convnet", "resnet20", "resnet32") else "auto")
    scenario = grow(arrays, new_classes.split(","))
    height, channels = arrays.train_images.shape[1], arrays.train_images.shape[3]
    config = ModelConfig(
        name=model,
        norm=norm,
        image_size=height,
        channels=channels,
        pool_size=4 if channels == 3 else 2,
    )
    trainer = TrainerConfig(
        epochs=epochs,
        batch_size=128,
        learning_rate=learning_rate,
        max_shift_px=0,
        mirror=mirror,
        num_shards=1,
        precision=precision,
    )
    learning = LearningConfig(
        base=trainer,
        analytic=AnalyticConfig(
            num_features=num_features, source=source, class_balance=class_balance
        ),
        update=UpdateConfig(
            paths="default",
            frozen_stages=2,
            trainer=trainer.model_copy(update={"epochs": 1, "mirror": False}),
            ewc=EwcConfig(lambda_ewc=10, num_fisher_examples=200, num_update_fisher_examples=0),
            distillation=DistillationConfig(weight=distillation),
            replay=ReplayConfig(memory_per_class=0, memory_share=memory_share, share="auto"),
        ),
    )
    shares = tuple(float(part) for part in budgets.split(","))
    runs: dict[str, list[dict[str, Any]]] = {}
    for seed in range(seeds):
        work = _Seed(scenario, config, learning.model_copy(update={"seed": seed}), seed, shots)
        for name, figures in work.methods(shares):
            runs.setdefault(name, []).append(figures)
            print(
                f"{name}, seed {seed}: {figures['accuracy']:.4f} old {figures['old_accuracy']:.4f} "
                f"new {figures['new_accuracy']:.4f} in {figures['seconds']:.1f} s "
                f"({figures['seconds_share']:.3f}) {figures.get('reason', '')}",
                flush=True,
            )
    report = {
        "setup": set_up(
            data=Path(data).name,
            new_classes=new_classes,
            model=config.model_dump(mode="json"),
            epochs=epochs,
            memory_share=memory_share,
            distillation=distillation,
            num_features=num_features,
            source=source,
            class_balance=class_balance,
            shots=shots,
            mirror=mirror,
            precision=precision,
            seeds=seeds,
            fraction=fraction,
        ),
        "methods": {name: _summary(runs, name) for name in runs},
    }
    write(out, report)
    print(_table(report["methods"]))


class _Seed:
    """One seed: its base version, and every method's way on from there."""

    def __init__(
        self,
        scenario: Any,
        config: ModelConfig,
        learning: LearningConfig,
        seed: int,
        shots: int = 0,
    ) -> None:
        first, second = scenario.experiences
        self._names = scenario.class_names
        self._num_old = len(first.classes)
        self._config, self._learning, self._seed = config, learning, seed
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._run = Run(clock=time.perf_counter, device=device)
        old, old_held = _set_aside(as_tensors(first.train_images, first.train_labels), seed)
        new = as_tensors(second.train_images, second.train_labels)
        new, new_held = _set_aside(_few(new, shots, seed) if shots else new, seed)
        self._old, self._new, self._held = old, new, _joined(old_held, new_held)
        self._all = _joined(old, new)
        self._tests = _joined(
            as_tensors(first.test_images, first.test_labels),
            as_tensors(second.test_images, second.test_labels),
        )
        self._base = fit_base(
            old, self._names[: self._num_old], config, learning, self._run, validation=old_held
        ).learner
        is_old = self._tests[1] < self._num_old
        before = self._base.logits(self._tests[0][is_old])
        self._before = evaluate(before, self._tests[1][is_old]).accuracy
        self._full_seconds, self._full_steps = 0.0, 1

    def methods(self, shares: tuple[float, ...]) -> Any:
        """Yield every method's name and figures, full first."""
        yield "full", self._full()
        yield "warm_epoch", self._warm(1.0)
        yield "fast", self._with_steps(1, "fast")
        yield "slow", self._with_steps(0, "slow")
        yield "default", self._with_steps(0)
        free = _without_images(self._base)
        no_memory = _with_update(self._learning, replay=ReplayConfig(memory_per_class=0, share=0))
        yield (
            "datafree",
            self._updated(lambda _: fit_update(free, self._new, self._names, no_memory, self._run)),
        )
        for share in shares:
            yield f"default_{share:g}", self._default(share)
            yield f"warm_{share:g}", self._warm(self._epochs_in(share))

    def _full(self) -> dict[str, Any]:
        plain = self._learning.model_copy(update={"analytic": AnalyticConfig(num_features=0)})
        plain = _with_update(
            plain,
            ewc=EwcConfig(num_fisher_examples=0),
            replay=ReplayConfig(memory_per_class=0),
        )
        fit = fit_base(self._all, self._names, self._config, plain, self._run)
        self._full_seconds = fit.report.train_seconds
        batch = self._learning.base.batch_size
        self._full_steps = self._learning.base.epochs * math.ceil(len(self._all[1]) / batch)
        return self._figures(
            fit.learner.logits,
            fit.report.train_seconds,
            fit.report.samples_seen - len(self._all[1]),
        )

    def _warm(self, epochs: float) -> dict[str, Any]:
        """Train the base version on for some of an epoch, all images alike, new rows added."""
        classifier = self._base.model.copy()
        classifier.grow(len(self._names), generator_for(self._seed, "head"))
        classifier.active_head = "linear"
        classifier.to(self._run.device).requires_grad_(True)
        classifier.learns_statistics = True
        steps = max(1, round(epochs * len(self._all[1]) / self._learning.base.batch_size))
        settings = self._learning.base.model_copy(update={"iterations": steps})
        images, labels = self._all
        report = train(
            classifier,
            images,
            labels,
            config=settings,
            seed=self._seed,
            clock=time.perf_counter,
        )
        classifier.eval().to("cpu")
        return self._figures(_logits_by(classifier), report.seconds, report.samples_seen)

    def _epochs_in(self, share: float) -> float:
        return share * self._learning.base.epochs

    def _default(self, share: float) -> dict[str, Any]:
        """The default update with as many gradient steps as the share of seconds has room for.

        How many that is follows from two short trial updates, which are not counted: in
        production it is a setting.
        """
        budget_s = share * self._full_seconds
        few, more = (self._with_steps(steps)["seconds"] for steps in _TRIAL_STEPS)
        # On a noisy machine the difference may be anything; a step of an update is never much
        # cheaper than one of full retraining.
        least_s = _CHEAPEST_STEP * self._full_seconds / self._full_steps
        per_step_s = max((more - few) / (_TRIAL_STEPS[1] - _TRIAL_STEPS[0]), least_s)
        steps = int(_TRIAL_STEPS[0] + (_SAFETY * budget_s - few) / per_step_s)
        if steps < _FEWEST_STEPS:
            learning = _with_update(self._learning, paths="fast")
            return self._updated(
                lambda learner: fit_update(
                    learner, self._new, self._names, learning, self._run, validation=self._held
                )
            )
        return self._with_steps(steps)

    def _with_steps(self, steps: int, paths: str = "default") -> dict[str, Any]:
        trainer = self._learning.update.trainer.model_copy(update={"iterations": steps})
        learning = _with_update(self._learning, trainer=trainer, paths=paths)
        return self._updated(
            lambda learner: fit_update(
                learner, self._new, self._names, learning, self._run, validation=self._held
            )
        )

    def _updated(self, update: Callable[[Learner], Update]) -> dict[str, Any]:
        began_s = time.perf_counter()
        result = update(self._base)
        seconds = time.perf_counter() - began_s
        samples = sum(fit.report.samples_seen for fit in result.fits.values())
        figures = self._figures(result.chosen.learner.logits, seconds, samples)
        choices = result.chosen.report.choices
        return figures | {"chosen": result.best, "reason": result.reason, "choices": choices}

    def _figures(
        self, answer: Callable[[torch.Tensor], torch.Tensor], seconds: float, samples: int
    ) -> dict[str, Any]:
        images, labels = self._tests
        judged = evaluate(answer(images), labels, num_old_classes=self._num_old)
        old, within = judged.old_accuracy or 0.0, judged.within_old_accuracy or 0.0
        return {
            "seconds": seconds,
            "seconds_share": seconds / self._full_seconds,
            "samples_seen": samples,
            "accuracy": judged.accuracy,
            "old_accuracy": old,
            "new_accuracy": judged.new_accuracy,
            "retention": old / self._before,
            "retention_within_old": within / self._before,
            "calibration_error": judged.calibration_error,
            "milliseconds_per_image": time_per_image(
                answer, images[:_TIMED_BATCH], time.perf_counter, _TIMED_ROUNDS
            ),
        }


def _few(examples: Labelled, shots: int, seed: int) -> Labelled:
    """That many examples of each class, drawn at random."""
    images, labels = examples
    order = torch.randperm(len(labels), generator=generator_for(seed, "shots"))
    kept = torch.cat([order[labels[order] == c][:shots] for c in labels.unique().tolist()])
    return images[kept], labels[kept]


def _set_aside(examples: Labelled, seed: int) -> tuple[Labelled, Labelled]:
    """Training examples, and a small hold-out that only chooses and calibrates.

    A class's last example is never set aside: without one it could not be learned.
    """
    images, labels = examples
    order = torch.randperm(len(labels), generator=generator_for(seed, "held out"))
    last = [int((labels[order] == c).nonzero()[-1, 0]) for c in labels.unique().tolist()]
    may_go = torch.ones(len(labels), dtype=torch.bool)
    may_go[last] = False
    held = order[may_go][: max(1, round(len(labels) * _HELD_OUT_SHARE))]
    stays = torch.ones(len(labels), dtype=torch.bool)
    stays[held] = False
    return (images[stays], labels[stays]), (images[held], labels[held])


def _joined(one: Labelled, other: Labelled) -> Labelled:
    return torch.cat([one[0], other[0]]), torch.cat([one[1], other[1]])


def _logits_by(classifier: Classifier) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda images: in_chunks(classifier, images)


def _without_images(learner: Learner) -> Learner:
    """The version as it is where no image may be kept: its sums, weights and counts."""
    memory = learner.memory
    return replace(
        learner, memory=memory.without(torch.arange(len(memory)), erased=memory.counts())
    )


def _with_update(learning: LearningConfig, **changes: object) -> LearningConfig:
    return learning.model_copy(update={"update": learning.update.model_copy(update=changes)})


def _summary(runs: dict[str, list[dict[str, Any]]], name: str) -> dict[str, Any]:
    figures = runs[name]
    keys = ("seconds", "seconds_share", "samples_seen", *_KEYS, "calibration_error")
    keys += ("milliseconds_per_image",)
    gaps = [
        100 * (mine["accuracy"] - full["accuracy"])
        for mine, full in zip(figures, runs["full"], strict=True)
    ]
    return {
        **{key: mean_and_std([run[key] for run in figures])[0] for key in keys},
        "accuracy_std": mean_and_std([run["accuracy"] for run in figures])[1],
        "points_over_full": mean_and_std(gaps)[0],
        "runs": figures,
    }


def _table(methods: dict[str, Any]) -> str:
    keys = ("seconds", "seconds_share", "samples_seen", *_KEYS, "points_over_full")
    titles = ("method", "seconds", "share", "samples", "all", "old", "new", "retention")
    rows = [[name, *(figures[key] for key in keys)] for name, figures in methods.items()]
    return table([*titles, "within old", "points over full"], rows)


if __name__ == "__main__":
    typer.run(main)

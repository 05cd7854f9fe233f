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

Data that says itself which classes arrive later (`cifar100-50+50`, or a scenario of the continuum
library with two experiences as `continuum:package.module:function`) needs no `--new-classes`.

Where `--logit-adjustment` or `--replay-share` lists several values, slow and default run once for
each combination.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from common import (
    DATA_HELP,
    DEFAULT_FOLDER,
    SIZE_HELP,
    as_tensors,
    chosen_device,
    chosen_precision,
    data_config,
    growing_scenario,
    mean_and_std,
    set_up,
    skip,
    table,
    write,
)
from peak import (
    device_name,
    throughput,
    training_flops_per_example,
    waiting_clock,
    why_not_on,
)

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
    History,
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
from lifelong_ray.scenarios import Scenario

_HELD_OUT_SHARE = 0.05
_TRIAL_STEPS = (20, 140)
_WIDTH, _WIDTH_IN_COLOUR = 5_000, 6_000
_CHEAPEST_STEP = 0.2
_FEWEST_STEPS = 20
_TIMED_BATCH, _TIMED_ROUNDS = 32, 5
METHODS = ("full", "warm_epoch", "fast", "slow", "default", "datafree")
_KEYS = ("accuracy", "old_accuracy", "new_accuracy", "retention", "retention_within_old")

_MORE_KEYS = (
    "plasticity",
    "forgetting",
    "backward_transfer",
    "forward_transfer",
    "average_incremental_accuracy",
    "mean_class_accuracy",
    "negative_flip_share",
    "positive_flip_share",
    "calibration_error",
    "milliseconds_per_image",
)


def main(
    data: Annotated[str, typer.Option(help=DATA_HELP)],
    new_classes: Annotated[
        str, typer.Option(help="Labels that arrive later; empty where the data says it itself.")
    ] = "",
    folder: Annotated[str, typer.Option(help="As data.folder.")] = DEFAULT_FOLDER,
    image_size: Annotated[int, typer.Option(help=SIZE_HELP)] = 0,
    methods: Annotated[str, typer.Option(help="Comma-separated.")] = ",".join(METHODS),
    epochs: Annotated[int, typer.Option(help="Of base and full training.")] = 5,
    model: Annotated[str, typer.Option(help="As model.name.")] = "convnet",
    norm: Annotated[str, typer.Option(help="As model.norm.")] = "batch",
    learning_rate: Annotated[float, typer.Option(help="Peak, of all gradient training.")] = 4e-3,
    mirror: Annotated[bool, typer.Option(help="Mirror training images.")] = False,
    memory_share: Annotated[
        float, typer.Option(help="Share of the old images that slow and default may replay.")
    ] = 1.0,
    memory_per_class: Annotated[
        int, typer.Option(help="Old images per class that they may replay, where that is more.")
    ] = 0,
    replay_share: Annotated[
        str, typer.Option(help="As learning.update.replay.share; several values run in turn.")
    ] = "auto",
    logit_adjustment: Annotated[
        str, typer.Option(help="As learning.update.logit_adjustment; several values likewise.")
    ] = "0.5",
    update_epochs: Annotated[int, typer.Option(help="Of slow and default.")] = 1,
    distillation: Annotated[
        float, typer.Option(help="Weight; with every old image replayed it adds nothing.")
    ] = 0.0,
    budgets: Annotated[
        str,
        typer.Option(help="Shares of full's seconds for default and the warm control, or nothing."),
    ] = "0.05,0.1,0.2",
    num_features: Annotated[
        int | None,
        typer.Option(
            help="Of the analytic head; 0 leaves slow with the trained head alone. "
            "If not given, 5,000, and 6,000 for images in colour."
        ),
    ] = None,
    source: Annotated[
        str, typer.Option(help="As analytic.source; empty: stages, where the model can.")
    ] = "",
    class_balance: Annotated[float, typer.Option(help="As analytic.class_balance.")] = 0.5,
    shots: Annotated[
        int, typer.Option(help="Images of each new class that there are; 0 means all.")
    ] = 0,
    precision: Annotated[
        str, typer.Option(help="fp32, bf16 or auto, of all gradient training.")
    ] = "fp32",
    device: Annotated[
        str, typer.Option(help="cpu, cuda, or auto: cuda where there is one.")
    ] = "auto",
    peak_tflops: Annotated[
        float, typer.Option(help="The device's peak, 1e12 per second; 0: by its name.")
    ] = 0.0,
    seeds: Annotated[int, typer.Option(help="Seeds 0, 1, ...")] = 3,
    fraction: Annotated[float, typer.Option(help="Share of the examples: a dry run.")] = 1.0,
    out: Annotated[Path | None, typer.Option(help="JSON to write.")] = None,
) -> None:
    """Measure updates against full retraining and against warm epochs."""
    wanted = methods.split(",")
    shares = tuple(float(part) for part in budgets.split(",") if part)
    _check(wanted, shares, num_features)
    device = chosen_device(device)
    precision = chosen_precision(precision, device)
    source = source or ("stages" if model in ("convnet", "resnet20", "resnet32") else "auto")
    told: dict[str, object] = {
        "data": Path(data).name,
        "new_classes": new_classes,
        "epochs": epochs,
        "update_epochs": update_epochs,
        "memory_share": memory_share,
        "memory_per_class": memory_per_class,
        "replay_share": replay_share,
        "logit_adjustment": logit_adjustment,
        "distillation": distillation,
        "source": source,
        "class_balance": class_balance,
        "shots": shots,
        "mirror": mirror,
        "device": device,
        "precision": precision,
        "seeds": seeds,
        "fraction": fraction,
    }
    if reason := why_not_on(device):
        skip(out, set_up(**told), reason)
        return
    scenario = growing_scenario(data_config(data, fraction, folder), new_classes, image_size)
    told["new_classes"] = new_classes or f"{len(scenario.experiences[1].classes)} of the data's own"
    _, height, _, channels = scenario.experiences[0].train_images.shape
    config = ModelConfig(
        name=model,
        norm=norm,
        image_size=height,
        channels=channels,
        pool_size=4 if channels == 3 else 2,
    )
    if num_features is None:
        num_features = _WIDTH_IN_COLOUR if channels == 3 else _WIDTH
    told["model"], told["num_features"] = config.model_dump(mode="json"), num_features
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
            num_features=num_features,
            source=source,
            class_balance=class_balance,
            mirror=mirror or "auto",
        ),
        update=UpdateConfig(
            paths="default",
            frozen_stages=2,
            trainer=trainer.model_copy(update={"epochs": update_epochs}),
            ewc=EwcConfig(lambda_ewc=10, num_fisher_examples=200, num_update_fisher_examples=0),
            distillation=DistillationConfig(weight=distillation),
            replay=ReplayConfig(
                memory_per_class=memory_per_class, memory_share=memory_share, share="auto"
            ),
        ),
    )
    ways = combinations(learning, replay_share, logit_adjustment)
    runs: dict[str, list[dict[str, Any]]] = {}
    for seed in range(seeds):
        ways_of_seed = {name: way.model_copy(update={"seed": seed}) for name, way in ways.items()}
        work = _Seed(scenario, config, ways_of_seed, seed, shots, device, peak_tflops)
        for name, figures in work.methods(wanted, shares):
            runs.setdefault(name, []).append(figures)
            _say(name, seed, figures)
    report = {
        "setup": set_up(**told),
        "methods": {name: _summary(runs, name) for name in runs},
    }
    write(out, report)
    print(_table(report["methods"]))


def _check(wanted: list[str], shares: tuple[float, ...], num_features: int | None) -> None:
    """Refuse methods that do not exist or cannot run."""
    if unknown := set(wanted) - set(METHODS):
        raise typer.BadParameter(
            f"{min(unknown)} is not a method; choose from {', '.join(METHODS)}"
        )
    if shares and "full" not in wanted:
        raise typer.BadParameter(
            "--budgets are shares of the seconds of full; add it to --methods, or give --budgets ''"
        )
    if num_features == 0 and (needs := {"fast", "datafree"} & set(wanted)):
        raise typer.BadParameter(
            f"{min(needs)} needs the analytic head; leave it out of --methods, or set "
            "--num-features above 0"
        )


def combinations(
    learning: LearningConfig, replay_shares: str, logit_adjustments: str
) -> dict[str, LearningConfig]:
    """Settings for each combination of the values listed, by what to add to a method's name.

    >>> list(combinations(LearningConfig(), "0.25", "0,1"))
    [' share 0.25 tau 0', ' share 0.25 tau 1']
    """
    pairs = [
        (share.strip(), tau.strip())
        for share in replay_shares.split(",")
        for tau in logit_adjustments.split(",")
    ]
    ways = {}
    for share, tau in pairs:
        replay = ReplayConfig(
            **learning.update.replay.model_dump()
            | {"share": share if share == "auto" else float(share)}
        )
        name = f" share {share} tau {tau}" if len(pairs) > 1 else ""
        ways[name] = _with_update(learning, replay=replay, logit_adjustment=float(tau))
    return ways


def _say(name: str, seed: int, figures: dict[str, Any]) -> None:
    share = figures["seconds_share"]
    print(
        f"{name}, seed {seed}: {figures['accuracy']:.4f} old {figures['old_accuracy']:.4f} "
        f"new {figures['new_accuracy']:.4f} in {figures['seconds']:.1f} s "
        f"({'-' if share is None else f'{share:.3f}'}) {figures.get('reason', '')}",
        flush=True,
    )


class _Seed:
    """One seed: its base version, and every method's way on from there."""

    def __init__(
        self,
        scenario: Scenario,
        config: ModelConfig,
        ways: dict[str, LearningConfig],
        seed: int,
        shots: int,
        device: str,
        peak_tflops: float,
    ) -> None:
        first, second = scenario.experiences
        self._names = scenario.class_names
        self._num_old = len(first.classes)
        self._config, self._ways, self._seed = config, ways, seed
        # What base training and controls learn does not depend on how an update replays.
        self._learning = next(iter(ways.values()))
        self._peak_tflops = peak_tflops
        self._run = Run(clock=waiting_clock(device), device=device)
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
            old,
            self._names[: self._num_old],
            config,
            self._learning,
            self._run,
            validation=old_held,
        ).learner
        # New classes included, which count as mistakes: what an update is compared with.
        self._base_logits = self._base.logits(self._tests[0])
        is_old = self._tests[1] < self._num_old
        self._before = evaluate(self._base_logits[is_old], self._tests[1][is_old]).accuracy
        self._full_seconds, self._full_steps = 0.0, 1

    def methods(
        self, wanted: list[str], shares: tuple[float, ...]
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the name and figures of every method that is wanted, full first."""
        if "full" in wanted:
            yield "full", self._full()
        if "warm_epoch" in wanted:
            yield "warm_epoch", self._warm(1.0)
        if "fast" in wanted:
            yield "fast", self._with_steps(1, "fast")
        for suffix, way in self._ways.items():
            if "slow" in wanted:
                yield f"slow{suffix}", self._with_steps(0, "slow", way)
            if "default" in wanted:
                yield f"default{suffix}", self._with_steps(0, "default", way)
        if "datafree" in wanted:
            yield "datafree", self._datafree()
        for share in shares:
            yield f"default_{share:g}", self._default(share)
            yield f"warm_{share:g}", self._warm(self._epochs_in(share))

    def _datafree(self) -> dict[str, Any]:
        free = _without_images(self._base)
        no_memory = _with_update(self._learning, replay=ReplayConfig(memory_per_class=0, share=0))
        return self._updated(
            lambda _: fit_update(free, self._new, self._names, no_memory, self._run)
        )

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
        samples = fit.report.samples_seen - len(self._all[1])
        return self._figures(fit.learner.logits, fit.report.train_seconds, samples) | (
            self._throughput(fit.report.train_seconds, samples)
        )

    def _throughput(self, seconds: float, num_examples: int) -> dict[str, Any]:
        """What a training of the whole network computed, where a peak may be known."""
        if self._run.device == "cpu" and not self._peak_tflops:
            return {}
        figures = throughput(
            training_flops_per_example(self._config, len(self._names)),
            num_examples,
            seconds,
            device=device_name(self._run.device),
            precision=self._learning.base.precision,
            peak_tflops=self._peak_tflops,
        )
        return {"throughput": figures}

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
            clock=self._run.clock,
        )
        classifier.eval().to("cpu")
        return self._figures(_logits_by(classifier), report.seconds, report.samples_seen) | (
            self._throughput(report.seconds, report.samples_seen)
        )

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
        steps = int(_TRIAL_STEPS[0] + (budget_s - few) / per_step_s)
        if steps < _FEWEST_STEPS:
            learning = _with_update(self._learning, paths="fast")
            figures = self._updated(
                lambda learner: fit_update(
                    learner, self._new, self._names, learning, self._run, validation=self._held
                )
            )
            return figures | {"reason": "the budget has no room for gradients: fast alone"}
        return self._with_steps(steps)

    def _with_steps(
        self, steps: int, paths: str = "default", way: LearningConfig | None = None
    ) -> dict[str, Any]:
        way = way or self._learning
        trainer = way.update.trainer.model_copy(update={"iterations": steps})
        learning = _with_update(way, trainer=trainer, paths=paths)
        return self._updated(
            lambda learner: fit_update(
                learner, self._new, self._names, learning, self._run, validation=self._held
            )
        )

    def _updated(self, update: Callable[[Learner], Update]) -> dict[str, Any]:
        began_s = self._run.clock()
        result = update(self._base)
        seconds = self._run.clock() - began_s
        samples = sum(fit.report.samples_seen for fit in result.fits.values())
        figures = self._figures(result.chosen.learner.logits, seconds, samples)
        return figures | {
            "chosen": result.best,
            "reason": result.reason,
            "choices": result.chosen.report.choices,
            "mirrored_sums": result.chosen.learner.model.analytic.mirrored,
        }

    def _figures(
        self, answer: Callable[[torch.Tensor], torch.Tensor], seconds: float, samples: int
    ) -> dict[str, Any]:
        images, labels = self._tests
        judged = evaluate(
            answer(images),
            labels,
            num_old_classes=self._num_old,
            parent_logits=self._base_logits,
        )
        old, within = judged.old_accuracy or 0.0, judged.within_old_accuracy or 0.0
        num_old = int((labels < self._num_old).sum())
        history = History.of(
            [[self._before], [old, judged.new_accuracy]],
            num_examples=[num_old, len(labels) - num_old],
        )
        return {
            "seconds": seconds,
            "seconds_share": seconds / self._full_seconds if self._full_seconds else None,
            "samples_seen": samples,
            "accuracy": judged.accuracy,
            "old_accuracy": old,
            "new_accuracy": judged.new_accuracy,
            "retention": old / self._before,
            "retention_within_old": within / self._before,
            "plasticity": judged.new_accuracy,
            "forgetting": history.forgetting,
            "backward_transfer": history.backward_transfer,
            # Of classes that the base version cannot answer with, nothing transfers forward.
            "forward_transfer": history.forward_transfer,
            "average_incremental_accuracy": history.average_incremental_accuracy,
            "per_class_accuracy": list(judged.per_class_accuracy),
            "mean_class_accuracy": judged.mean_class_accuracy,
            "negative_flip_share": judged.negative_flip_share,
            "positive_flip_share": judged.positive_flip_share,
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
    keys = ("seconds", "seconds_share", "samples_seen", *_KEYS, *_MORE_KEYS)
    gaps = [
        100 * (mine["accuracy"] - full["accuracy"])
        for mine, full in zip(figures, runs.get("full", ()), strict="full" in runs)
    ]
    shares = [run.get("throughput", {}).get("share_of_peak") for run in figures]
    kept = [run["chosen"] for run in figures if "chosen" in run]
    by_class = zip(*(run["per_class_accuracy"] for run in figures), strict=True)
    return {
        **{key: mean_and_std([run[key] for run in figures])[0] for key in keys},
        "per_class_accuracy": [mean_and_std(column)[0] for column in by_class],
        "share_of_peak": mean_and_std(shares)[0],
        "accuracy_std": mean_and_std([run["accuracy"] for run in figures])[1],
        "kept": ", ".join(dict.fromkeys(kept)) or "-",
        "points_over_full": mean_and_std(gaps)[0],
        "runs": figures,
    }


def _table(methods: dict[str, Any]) -> str:
    keys = ("kept", "seconds", "seconds_share", "samples_seen", *_KEYS, "points_over_full")
    titles = ("method", "kept", "seconds", "share", "samples", "all", "old", "new", "retention")
    rows = [[name, *(figures[key] for key in keys)] for name, figures in methods.items()]
    return table([*titles, "within old", "points over full"], rows)


if __name__ == "__main__":
    typer.run(main)

r"""Methods of continual learning side by side on one sequence of experiences.

    python benchmarks/continual.py --data FILE.npz --scenario class --experiences 5 \\
        --methods default,naive,joint,ewc,lwf,er,derpp,analytic,datafree --seeds 3 --out FILE

`--preset split` is the published Split MNIST protocol (van de Ven et al. 2022,
doi:10.1038/s42256-022-00568-3): an MLP with two layers of 400, Adam at 1e-3, batches of 128
and as many remembered ones, a hundred remembered images a class. Every method is a setting of
the same engine. `--compare avalanche` runs Avalanche's strategies on the same data, seed by
seed between ours; `make avalanche` makes the environment it needs.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import typer
from common import as_tensors, load_arrays, mean_and_std, native_precision, set_up, table, write

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
    Labelled,
    Learner,
    Run,
    allowed_classes,
    evaluate,
    fit_base,
    fit_update,
)
from lifelong_ray.learning.history import History
from lifelong_ray.scenarios import Scenario, split

AVALANCHE_PYTHON = Path(".venv-avalanche/bin/python")
_WIDE = 4_000
_HELD_OUT_SHARE = 0.2
_ONE_ASIDE_IN = 2  # Of a class of few images, at most every second one is set aside.
_WARMING_IMAGES = 4


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
    """

    scenario: str
    iterations: int
    batch_size: int
    memory_per_class: int
    lambda_ewc: float
    precision: Literal["fp32", "bf16"] = "fp32"


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


def method(name: str, protocol: Protocol, seed: int, labels_per_class: int) -> Method:
    """Return the settings of a method.

    Args:
        name: See `METHODS`.
        protocol: What all have in common.
        seed: Of the training.
        labels_per_class: Classes of the data that share one label; 1 but in domain scenarios.
    """
    kept = protocol.memory_per_class * labels_per_class
    both = TrainerConfig(
        iterations=protocol.iterations,
        batch_size=protocol.batch_size,
        optimizer="adamw",
        schedule="constant",
        learning_rate=1e-3,
        weight_decay=0,
        max_shift_px=0,
        num_shards=1,
        precision=protocol.precision,
    )
    replaying = both.model_copy(update={"batch_size": 2 * protocol.batch_size})
    compete = "update" if protocol.scenario == "task" else "all"

    def of(
        trainer: TrainerConfig = both, *, wide: int = 0, held_out: int = 0, **update: object
    ) -> Method:
        settings: dict[str, Any] = {
            "paths": "slow",
            "frozen_stages": 0,
            "labels_compete": compete,
            "logit_adjustment": 0,
            "trainer": trainer,
            "ewc": EwcConfig(lambda_ewc=0, num_fisher_examples=0, num_update_fisher_examples=0),
            "distillation": DistillationConfig(weight=0),
            "replay": ReplayConfig(memory_per_class=0, share=0),
        }
        return Method(
            LearningConfig(
                seed=seed,
                base=both,
                analytic=AnalyticConfig(num_features=wide),
                update=UpdateConfig(**(settings | update)),
            ),
            held_out,
        )

    replay = ReplayConfig(memory_per_class=kept, share=0.5)
    held_out = round(protocol.memory_per_class * _HELD_OUT_SHARE)
    makers: dict[str, Callable[[], Method]] = {
        "default": lambda: of(
            replaying,
            wide=_WIDE,
            paths="default",
            logit_adjustment=0.5,
            replay=ReplayConfig(
                memory_per_class=kept - held_out * labels_per_class, share=0.5, dark_weight=0.2
            ),
            held_out=held_out,
        ),
        "naive": of,
        "joint": lambda: Method(of().learning, jointly=True),
        "ewc": lambda: of(
            ewc=EwcConfig(
                lambda_ewc=protocol.lambda_ewc,
                accumulation="sum",
                num_fisher_examples=500,
                num_update_fisher_examples=500,
            )
        ),
        "lwf": lambda: of(
            distillation=DistillationConfig(weight=1, temperature=2, only_where_right=False)
        ),
        "er": lambda: of(replaying, replay=replay),
        "derpp": lambda: of(replaying, replay=replay.model_copy(update={"dark_weight": 0.2})),
        "analytic": lambda: of(wide=_WIDE, paths="fast", replay=replay),
        "datafree": lambda: of(wide=_WIDE, paths="default"),
    }
    if name not in makers:
        raise typer.BadParameter(f"{name} is not a method; choose from {', '.join(METHODS)}")
    return makers[name]()


METHODS = ("default", "naive", "joint", "ewc", "lwf", "er", "derpp", "analytic", "datafree")


def run_method(scenario: Scenario, model: ModelConfig, how: Method) -> dict[str, Any]:
    """Learn the experiences one after the other and judge after each.

    Returns:
        Figures by name; the seconds are those of learning alone.
    """
    if how.jointly:
        return _run_jointly(scenario, model, how)
    tests = [as_tensors(e.test_images, e.test_labels) for e in scenario.experiences]
    history = History(tuple(len(labels) for _, labels in tests))
    learner: Learner | None = None
    held_out: list[Labelled] = []
    seconds, cpu_seconds, samples = 0.0, 0.0, 0
    reasons: list[str] = []
    run = Run(clock=time.perf_counter, device="cuda" if torch.cuda.is_available() else "cpu")
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
        began_s, cpu_began_s = time.perf_counter(), time.process_time()
        if learner is None:
            fit = fit_base(training, names, model, how.learning, run, validation=validation)
        else:
            update = fit_update(learner, training, names, how.learning, run, validation=validation)
            reasons.append(f"{update.best}: {update.reason}")
            fit = update.chosen
            samples += sum(
                f.report.samples_seen for name, f in update.fits.items() if name != update.best
            )
        seconds += time.perf_counter() - began_s
        cpu_seconds += time.process_time() - cpu_began_s
        samples += fit.report.samples_seen
        learner = fit.learner
        row, within = [], []
        for number, (images, labels) in enumerate(tests[: index + 1]):
            logits_NC = learner.logits(images)
            allowed_NC = None
            if scenario.kind == "task":
                allowed_NC = _of_own_task(scenario, number, len(labels), logits_NC.shape[1])
            row.append(evaluate(logits_NC, labels, allowed_NC=allowed_NC).accuracy)
            old = before if before else known
            if number < index and int(labels.max()) < old:
                within.append(float((logits_NC[:, :old].argmax(1) == labels).float().mean()))
        history = history.after_update(row, within if index else None)
    return {
        **history.summary(),
        "rows": [list(row) for row in history.rows],
        "train_seconds": seconds,
        "train_cpu_seconds": cpu_seconds,
        "samples_seen": samples,
        "choices": reasons,
    }


def _warm_up(scenario: Scenario, model: ModelConfig, how: Method) -> None:
    """Let torch import what it imports at the first step, which is nobody's cost."""
    one_step = how.learning.base.model_copy(update={"iterations": 1})
    learning = how.learning.model_copy(update={"base": one_step})
    first = scenario.experiences[0]
    images, labels = as_tensors(first.train_images, first.train_labels)
    some = torch.cat([(labels == c).nonzero()[:_WARMING_IMAGES, 0] for c in labels.unique()])
    names = scenario.class_names[: int(labels.max()) + 1]
    training = images[some], labels[some]
    fit_base(training, names, model, learning, Run(clock=time.perf_counter))


def _run_jointly(scenario: Scenario, model: ModelConfig, how: Method) -> dict[str, Any]:
    parts = [as_tensors(e.train_images, e.train_labels) for e in scenario.experiences]
    steps = how.learning.base.iterations * len(parts)
    learning = how.learning.model_copy(
        update={"base": how.learning.base.model_copy(update={"iterations": steps})}
    )
    run = Run(clock=time.perf_counter, device="cuda" if torch.cuda.is_available() else "cpu")
    began_s, cpu_began_s = time.perf_counter(), time.process_time()
    fit = fit_base(_joined(parts), scenario.class_names, model, learning, run)
    seconds, cpu_seconds = time.perf_counter() - began_s, time.process_time() - cpu_began_s
    row = []
    for number, experience in enumerate(scenario.experiences):
        images, labels = as_tensors(experience.test_images, experience.test_labels)
        logits_NC = fit.learner.logits(images)
        allowed_NC = None
        if scenario.kind == "task":
            allowed_NC = _of_own_task(scenario, number, len(labels), logits_NC.shape[1])
        row.append(evaluate(logits_NC, labels, allowed_NC=allowed_NC).accuracy)
    sizes = np.array([len(e.test_labels) for e in scenario.experiences])
    return {
        "final_accuracy": float(np.average(row, weights=sizes)),
        "rows": [row],
        "train_seconds": seconds,
        "train_cpu_seconds": cpu_seconds,
        "samples_seen": fit.report.samples_seen,
    }


def _of_own_task(scenario: Scenario, number: int, num: int, num_classes: int) -> torch.Tensor:
    """Which classes compete for test examples of a task that is known."""
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


# ---------------------------------------------------------------- the command


def main(
    data: Annotated[str, typer.Option(help="An .npz, or what else data.source takes.")],
    scenario: Annotated[str, typer.Option(help="class, domain or task.")] = "class",
    experiences: Annotated[int, typer.Option(help="Groups that the classes come in.")] = 5,
    methods: Annotated[str, typer.Option(help="Comma-separated.")] = ",".join(METHODS),
    model: Annotated[str, typer.Option(help="As model.name.")] = "mlp",
    widths: Annotated[str, typer.Option(help="As model.widths; empty for the default.")] = "",
    iterations: Annotated[int, typer.Option(help="Gradient steps per experience.")] = 250,
    memory_per_class: Annotated[int, typer.Option(help="Stored images per class.")] = 100,
    batch_size: Annotated[int, typer.Option(help="New examples per step.")] = 128,
    lambda_ewc: Annotated[float, typer.Option(help="Of the method ewc.")] = 1e6,
    precision: Annotated[
        str, typer.Option(help="fp32, bf16, or auto: bf16 where the processor computes in it.")
    ] = "auto",
    seeds: Annotated[int, typer.Option(help="Seeds 0, 1, ...")] = 3,
    preset: Annotated[str, typer.Option(help="split: the published protocol.")] = "",
    fraction: Annotated[float, typer.Option(help="Share of the examples: a dry run.")] = 1.0,
    compare: Annotated[str, typer.Option(help="avalanche, or nothing.")] = "",
    out: Annotated[Path | None, typer.Option(help="JSON to write.")] = None,
) -> None:
    """Compare methods of continual learning."""
    if preset not in ("", "split"):
        raise typer.BadParameter(f"{preset} is not a preset; there is split")
    if compare not in ("", "avalanche"):
        raise typer.BadParameter(f"{compare} is not known; there is avalanche")
    if compare and not data.endswith(".npz"):
        raise typer.BadParameter(f"--compare reads an .npz, not {data}")
    if compare and not AVALANCHE_PYTHON.exists():
        raise typer.BadParameter(f"{AVALANCHE_PYTHON} is missing; `make avalanche` makes it")
    if preset == "split":
        model, widths, batch_size = "mlp", "400,400", 128
    arrays = load_arrays(data, fraction)
    parts = split(arrays, scenario, experiences)
    labels_per_class = len(arrays.class_names) // len(parts.class_names)
    precision = native_precision() if precision == "auto" else precision
    protocol = Protocol(scenario, iterations, batch_size, memory_per_class, lambda_ewc, precision)
    height, channels = arrays.train_images.shape[1], arrays.train_images.shape[3]
    config = ModelConfig(
        name=model,
        image_size=height,
        channels=channels,
        **({"widths": tuple(int(w) for w in widths.split(","))} if widths else {}),
    )
    names = methods.split(",")
    theirs = [name for name in ("naive", "er", "derpp", "ewc", "lwf") if name in names]
    runs: dict[str, list[dict[str, Any]]] = {}
    _warm_up(parts, config, method("naive", protocol, 0, labels_per_class))
    for seed in range(seeds):
        for name in names:
            how = method(name, protocol, seed, labels_per_class)
            result = run_method(parts, config, how)
            runs.setdefault(name, []).append(result)
            _say(name, seed, result)
        if compare and theirs:
            for name, result in _avalanche(data, protocol, seed, experiences, theirs).items():
                runs.setdefault(f"avalanche {name}", []).append(result)
                _say(f"avalanche {name}", seed, result)
    report = {
        "setup": set_up(
            data=Path(data).name,
            scenario=scenario,
            experiences=experiences,
            model=config.model_dump(mode="json"),
            iterations=iterations,
            memory_per_class=memory_per_class,
            precision=precision,
            seeds=seeds,
            fraction=fraction,
        ),
        "methods": {name: _summary(results) for name, results in runs.items()},
    }
    write(out, report)
    print(_table(report["methods"]))


def _avalanche(
    data: str, protocol: Protocol, seed: int, experiences: int, theirs: list[str]
) -> dict[str, dict[str, Any]]:
    """Run Avalanche's strategies of the same names in their own environment."""
    if protocol.scenario == "task":
        raise typer.BadParameter("Avalanche is compared in class and domain scenarios only")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "peer.json"
        subprocess.run(
            [
                *(str(AVALANCHE_PYTHON), str(Path(__file__).with_name("avalanche_peer.py"))),
                *("--data", data, "--scenario", protocol.scenario, "--seed", str(seed)),
                *("--experiences", str(experiences), "--methods", ",".join(theirs)),
                *("--iterations", str(protocol.iterations), "--out", str(out)),
                *("--memory-per-class", str(protocol.memory_per_class)),
            ],
            check=True,
        )
        report = json.loads(out.read_text(encoding="utf-8"))
    sizes = report["num_test_examples"]
    return {
        name: History.of(result["accuracy"], num_examples=sizes).summary() | result
        for name, result in report["methods"].items()
    }


def _summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    def of(key: str) -> tuple[float | None, float | None]:
        return mean_and_std([result.get(key) for result in results])

    accuracy, std = of("final_accuracy")
    return {
        "final_accuracy_mean": accuracy,
        "final_accuracy_std": std,
        "retention_mean": of("retention")[0],
        "final_retention_mean": of("final_retention")[0],
        "retention_within_old_mean": of("retention_within_old")[0],
        "forgetting_mean": of("forgetting")[0],
        "backward_transfer_mean": of("backward_transfer")[0],
        "plasticity_mean": of("plasticity")[0],
        "average_incremental_accuracy_mean": of("average_incremental_accuracy")[0],
        "train_seconds": of("train_seconds")[0],
        "train_cpu_seconds": of("train_cpu_seconds")[0],
        "samples_seen": of("samples_seen")[0],
        "runs": results,
    }


def _say(name: str, seed: int, result: dict[str, Any]) -> None:
    print(
        f"{name}, seed {seed}: {result['final_accuracy']:.4f} in {result['train_seconds']:.1f} s",
        flush=True,
    )


def _table(methods: dict[str, Any]) -> str:
    keys = ("final_accuracy_mean", "final_accuracy_std", "retention_mean", "forgetting_mean")
    keys += ("plasticity_mean", "train_seconds", "samples_seen")
    titles = ("method", "final accuracy", "std", "retention", "forgetting", "plasticity")
    rows = [[name, *(figures[key] for key in keys)] for name, figures in methods.items()]
    return table([*titles, "seconds", "samples"], rows)


if __name__ == "__main__":
    typer.run(main)

r"""Methods of continual learning side by side on one sequence of experiences.

    python benchmarks/continual.py --data FILE.npz --scenario class --experiences 5 \\
        --methods default,naive,joint,ewc,lwf,er,derpp,analytic,datafree --seeds 3 --out FILE

`--preset split` is the published Split MNIST protocol (van de Ven et al. 2022,
doi:10.1038/s42256-022-00568-3): an MLP with two layers of 400, Adam at 1e-3, batches of 128
and as many remembered ones, a hundred remembered images a class. Every method is a setting of
the same engine. `--compare avalanche` runs Avalanche's strategies seed by seed between ours: on
the very same experiences, with the same widths, batches, memory, iterations and precision.
`make avalanche` makes the environment it needs.

Data is whatever `data.source` takes, and is cut into experiences by classes. `cifar100-50+50` and
`continuum:package.module:function` say themselves what arrives when; the function returns a
scenario of the continuum library, or a tuple of two, train and test.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from avalanche_run import AVALANCHE_PYTHON, PEER_METHODS, hand_over, peer_command, run_peer
from common import (
    DATA_HELP,
    DEFAULT_FOLDER,
    SIZE_HELP,
    chosen_device,
    chosen_precision,
    cut_scenario,
    data_config,
    mean_and_std,
    set_up,
    skip,
    table,
    write,
)
from peak import device_name, throughput, training_flops_per_example, why_not_on
from sequence import Method, Protocol, run_method, warm_up

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

_WIDE = 4_000
_HELD_OUT_SHARE = 0.2
_WHOLE_NETWORK = ("naive", "joint")  # Whose gradient steps are those of the plain network.


def method(name: str, protocol: Protocol, seed: int) -> Method:
    """Return the settings of a method.

    Args:
        name: See `METHODS`.
        protocol: What all have in common.
        seed: Of the training.
    """
    kept = protocol.memory_per_class * protocol.classes_per_label
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
                memory_per_class=kept - held_out * protocol.classes_per_label,
                share=0.5,
                dark_weight=0.2,
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


# ---------------------------------------------------------------- the command


def main(
    data: Annotated[str, typer.Option(help=DATA_HELP)],
    scenario: Annotated[str, typer.Option(help="class, domain or task.")] = "class",
    experiences: Annotated[int, typer.Option(help="Groups that the classes come in.")] = 5,
    order_seed: Annotated[
        int, typer.Option(help="Order of the classes: 0 is the data's, 1993 the literature's.")
    ] = 0,
    folder: Annotated[str, typer.Option(help="As data.folder.")] = DEFAULT_FOLDER,
    image_size: Annotated[int, typer.Option(help=SIZE_HELP)] = 0,
    methods: Annotated[str, typer.Option(help="Comma-separated.")] = ",".join(METHODS),
    model: Annotated[str, typer.Option(help="As model.name.")] = "mlp",
    widths: Annotated[str, typer.Option(help="As model.widths; empty for the default.")] = "",
    iterations: Annotated[int, typer.Option(help="Gradient steps per experience.")] = 250,
    memory_per_class: Annotated[int, typer.Option(help="Stored images per class.")] = 100,
    batch_size: Annotated[int, typer.Option(help="New examples per step.")] = 128,
    lambda_ewc: Annotated[float, typer.Option(help="Of the method ewc.")] = 1e6,
    precision: Annotated[
        str, typer.Option(help="fp32, bf16, or auto: bf16 where the device computes in it.")
    ] = "auto",
    device: Annotated[
        str, typer.Option(help="cpu, cuda, or auto: cuda where there is one.")
    ] = "auto",
    peak_tflops: Annotated[
        float, typer.Option(help="The device's peak, 1e12 per second; 0: by its name.")
    ] = 0.0,
    seeds: Annotated[int, typer.Option(help="Seeds 0, 1, ...")] = 3,
    preset: Annotated[str, typer.Option(help="split: the published protocol.")] = "",
    fraction: Annotated[float, typer.Option(help="Share of the examples: a dry run.")] = 1.0,
    compare: Annotated[str, typer.Option(help="avalanche, or nothing.")] = "",
    out: Annotated[Path | None, typer.Option(help="JSON to write.")] = None,
) -> None:
    """Compare methods of continual learning."""
    if preset == "split":
        model, widths, batch_size = "mlp", "400,400", 128
    names = methods.split(",")
    _check(preset, compare, scenario, model, names)
    device = chosen_device(device)
    precision = chosen_precision(precision, device)
    told: dict[str, object] = {
        "data": Path(data).name,
        "scenario": scenario,
        "experiences": experiences,
        "iterations": iterations,
        "memory_per_class": memory_per_class,
        "batch_size": batch_size,
        "order_seed": order_seed,
        "device": device,
        "precision": precision,
        "seeds": seeds,
        "fraction": fraction,
    }
    if reason := why_not_on(device):
        skip(out, set_up(**told), reason)
        return
    loaded = data_config(data, fraction, folder)
    parts, num_classes = cut_scenario(loaded, scenario, experiences, order_seed, image_size)
    protocol = Protocol(
        scenario=scenario,
        iterations=iterations,
        batch_size=batch_size,
        memory_per_class=memory_per_class,
        lambda_ewc=lambda_ewc,
        precision=precision,
        device=device,
        num_experiences=len(parts.experiences),
        num_classes=num_classes,
        # Only a domain scenario that was cut by classes shares a label among several.
        classes_per_label=num_classes // len(parts.class_names),
    )
    _, height, _, channels = parts.experiences[0].train_images.shape
    config = ModelConfig(
        name=model,
        image_size=height,
        channels=channels,
        **({"widths": tuple(int(w) for w in widths.split(","))} if widths else {}),
    )
    told |= {"experiences": len(parts.experiences), "model": config.model_dump(mode="json")}
    runs: dict[str, list[dict[str, Any]]] = {}
    warm_up(parts, config, method("naive", protocol, 0), device)
    theirs = [name for name in PEER_METHODS if compare and name in names]
    with tempfile.TemporaryDirectory() as scratch:
        if theirs:
            hand_over(parts, Path(scratch))
        for seed in range(seeds):
            for name in names:
                result = run_method(parts, config, method(name, protocol, seed), device)
                if name in _WHOLE_NETWORK and (device != "cpu" or peak_tflops):
                    result["throughput"] = throughput(
                        training_flops_per_example(config, len(parts.class_names)),
                        result["gradient_samples"],
                        result["gradient_seconds"],
                        device=device_name(device),
                        precision=precision,
                        peak_tflops=peak_tflops,
                    )
                runs.setdefault(name, []).append(result)
                _say(name, seed, result)
            if theirs:
                command = peer_command(protocol, config.widths, theirs, seed, Path(scratch))
                told["avalanche"], found = run_peer(command, Path(scratch))
                for name, result in found.items():
                    runs.setdefault(f"avalanche {name}", []).append(result)
                    _say(f"avalanche {name}", seed, result)
    report = {
        "setup": set_up(**told),
        "methods": {name: _summary(results) for name, results in runs.items()},
    }
    write(out, report)
    print(_table(report["methods"]))


def _check(preset: str, compare: str, scenario: str, model: str, names: list[str]) -> None:
    """Refuse options that name nothing or do not go together."""
    for given, known, what in (
        (preset, ("", "split"), "a preset"),
        (compare, ("", "avalanche"), "known to compare with"),
        (scenario, ("class", "domain", "task"), "a scenario"),
        *((name, METHODS, "a method") for name in names),
    ):
        if given not in known:
            raise typer.BadParameter(f"{given} is not {what}; choose from {', '.join(known)}")
    if not compare:
        return
    if scenario == "task":
        raise typer.BadParameter("Avalanche is compared in class and domain scenarios only")
    if model != "mlp":
        raise typer.BadParameter(f"Avalanche is compared with an mlp only, not with {model}")
    if not AVALANCHE_PYTHON.exists():
        raise typer.BadParameter(f"{AVALANCHE_PYTHON} is missing; `make avalanche` makes it")


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
        "forward_transfer_mean": of("forward_transfer")[0],
        "plasticity_mean": of("plasticity")[0],
        "average_incremental_accuracy_mean": of("average_incremental_accuracy")[0],
        "per_class_accuracy_mean": _mean_by_class(results),
        "negative_flip_share_mean": of("negative_flip_share")[0],
        "positive_flip_share_mean": of("positive_flip_share")[0],
        "calibration_error_mean": of("calibration_error")[0],
        "milliseconds_per_image": of("milliseconds_per_image")[0],
        "train_seconds": of("train_seconds")[0],
        "train_cpu_seconds": of("train_cpu_seconds")[0],
        "samples_seen": of("samples_seen")[0],
        "share_of_peak": mean_and_std(
            [result.get("throughput", {}).get("share_of_peak") for result in results]
        )[0],
        "runs": results,
    }


def _mean_by_class(results: list[dict[str, Any]]) -> list[float | None] | None:
    """Mean over seeds of the accuracy of every class after the last update."""
    rows = [result["per_class_accuracy"] for result in results if "per_class_accuracy" in result]
    return [mean_and_std(column)[0] for column in zip(*rows, strict=True)] if rows else None


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

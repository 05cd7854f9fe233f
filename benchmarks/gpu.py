"""Training, Fisher and EWC step on a GPU in bf16, and the share of its peak that they reach.

    python benchmarks/gpu.py --models mlp,convnet,resnet18 --out benchmarks/results/gpu.json

- training: the trainer itself, as an update or a base training calls it, images on the host.
- fisher: `benchmarks/fisher.py`; the share is that of its plain pass.
- ewc_step: `benchmarks/ewc_step.py`; the share is that of its plain step.

The share is that of the device's documented dense bf16 peak, in operations of matrix products
and convolutions; `--peak-tflops` gives the peak of a device that is not in `benchmarks/peak.py`.
Without a GPU every case is written with the reason why it was skipped, and nothing fails.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import ewc_step
import fisher
import torch
import typer
from common import chosen_device, chosen_precision, set_up, table, write
from peak import (
    Precision,
    device_name,
    throughput,
    training_flops_per_example,
    waiting_clock,
    why_not_on,
)

from lifelong_ray.config import TrainerConfig
from lifelong_ray.learning import build_model, train
from lifelong_ray.types import LifelongError

CASES = ("training", "fisher", "ewc_step")
_NUM_CLASSES = 10
_WARM_UP_STEPS = 10
_NUM_BATCHES = 8  # Different images, so that no step finds its own in a cache.
_COLUMNS = ("model, case", "TFLOP/s", "peak, TFLOP/s", "share of peak, %")


def main(
    models: Annotated[str, typer.Option(help=f"Of {', '.join(fisher.MODELS)}.")] = (
        "mlp,convnet,resnet18"
    ),
    batch: Annotated[int, typer.Option(help="Examples per step of training and EWC.")] = 1_024,
    steps: Annotated[int, typer.Option(help="Of the training; pairs of EWC steps.")] = 300,
    examples: Annotated[int, typer.Option(help="Random images for the Fisher.")] = 2_000,
    rounds: Annotated[int, typer.Option(help="Of the Fisher.")] = 7,
    device: Annotated[str, typer.Option(help="cuda, or cpu with --peak-tflops.")] = "cuda",
    precision: Annotated[str, typer.Option(help="bf16 or fp32.")] = "bf16",
    peak_tflops: Annotated[
        float, typer.Option(help="The device's peak, 1e12 per second; 0: by its name.")
    ] = 0.0,
    out: Annotated[Path | None, typer.Option(help="JSON to write.")] = None,
) -> None:
    """Measure every model in turn."""
    if unknown := set(models.split(",")) - fisher.MODELS.keys():
        raise typer.BadParameter(
            f"{min(unknown)} is not a model; choose from {', '.join(fisher.MODELS)}"
        )
    device = chosen_device(device)
    kind = chosen_precision(precision, device)
    now_s = waiting_clock(device)
    alike: dict[str, Any] = {
        "device": device,
        "precision": kind,
        "peak_tflops": peak_tflops,
        "now_s": now_s,
    }
    results: dict[str, dict[str, Any]] = {}
    for name in models.split(","):
        work: dict[str, Callable[[], dict[str, Any]]] = {
            "training": partial(measure_training, name, steps, batch, **alike),
            "fisher": partial(
                fisher.measure, name, examples, rounds, exact_rounds=1, num_general=0, **alike
            ),
            "ewc_step": partial(ewc_step.measure, name, steps, batch, **alike),
        }
        results[name] = {case: _measured(work[case], device) for case in CASES}
        for case, found in results[name].items():
            if "skipped" in found:
                print(f"{name}, {case} is skipped: {found['skipped']}", flush=True)
            elif why := found["plain_throughput"].get("no_share"):
                print(f"{name}, {case} has no share: {why}", flush=True)
    rows = [
        _row(f"{name}, {case}", found["plain_throughput"])
        for name, cases in results.items()
        for case, found in cases.items()
        if "skipped" not in found
    ]
    if rows:
        print(table(_COLUMNS, rows))
    setup = set_up(
        batch=batch,
        steps=steps,
        examples=examples,
        rounds=rounds,
        device=device_name(device) if why_not_on(device) is None else device,
        precision=precision,
    )
    write(out, {"setup": setup, "models": results})


def _measured(work: Callable[[], dict[str, Any]], device: str) -> dict[str, Any]:
    """What a case gives, or why it cannot be had here."""
    if reason := why_not_on(device):
        return {"skipped": reason}
    try:
        return work()
    except LifelongError as error:
        return {"skipped": str(error)}


def measure_training(
    name: str,
    steps: int,
    batch: int,
    *,
    device: str,
    precision: Precision,
    peak_tflops: float,
    now_s: Callable[[], float],
) -> dict[str, Any]:
    """Train one of `fisher.MODELS` for so many steps and return what it reached."""
    config = fisher.MODELS[name]
    model = build_model(config, _NUM_CLASSES, seed=0).to(device)
    model.learns_statistics = True
    generator = torch.Generator().manual_seed(0)
    num = _NUM_BATCHES * batch
    shape = (num, config.channels, config.image_size, config.image_size)
    images = torch.randint(0, 256, shape, generator=generator).to(torch.uint8)
    labels = torch.randint(0, _NUM_CLASSES, (num,), generator=generator)

    def trained(iterations: int) -> float:
        settings = TrainerConfig(
            iterations=iterations,
            batch_size=batch,
            learning_rate=1e-5,
            schedule="constant",
            max_shift_px=0,
            num_shards=1,
            precision=precision,
        )
        return train(model, images, labels, config=settings, seed=0, clock=now_s).seconds

    trained(min(steps, _WARM_UP_STEPS))
    seconds = trained(steps)
    return {
        "milliseconds_per_step": 1e3 * seconds / steps,
        "plain_throughput": throughput(
            training_flops_per_example(config, _NUM_CLASSES),
            steps * batch,
            seconds,
            device=device_name(device),
            precision=precision,
            peak_tflops=peak_tflops,
        ),
    }


def _row(case: str, figures: dict[str, Any]) -> list[object]:
    share = figures["share_of_peak"]
    return [
        case,
        figures["tflops_per_second"],
        figures["peak_tflops_per_second"],
        None if share is None else 100 * share,
    ]


if __name__ == "__main__":
    typer.run(main)

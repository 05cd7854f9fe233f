"""Images per second of a served model, by precision and memory layout.

    python benchmarks/precision.py --out benchmarks/results/serving_precision.json

The ways take turns, so that whatever slows the machine slows them all. Measured is what a front
runs: arrays in, probabilities out.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from common import chosen_device, set_up, table, write
from numpy.typing import NDArray

from lifelong_ray.config import LearningConfig, ModelConfig, Precision
from lifelong_ray.learning import Learner, Predictor, Run, fit_base
from lifelong_ray.types import LearningError

_NUM_CLASSES = 10
_PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16", "int8")
_LAYOUTS = {"channels_last": True, "contiguous": False}
_COLUMNS = ("model, batch", "precision", "layout", "ms", "images/s", "times fp32, contiguous")
MODELS = {
    "convnet": ModelConfig(),
    "mlp": ModelConfig(name="mlp", widths=(512, 512), image_size=28),
    "resnet18": ModelConfig(name="models:resnet18", image_size=32, channels=3),
}


def main(
    models: Annotated[str, typer.Option(help=f"Of {', '.join(MODELS)}.")] = "resnet18,convnet",
    batches: Annotated[str, typer.Option(help="Images at a time.")] = "32,1",
    rounds: Annotated[int, typer.Option(help="Turns of every way.")] = 30,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto.")] = "cpu",
    threads: Annotated[int, typer.Option(help="Of torch; a front has one.")] = 1,
    out: Annotated[Path | None, typer.Option(help="JSON to write.")] = None,
) -> None:
    """Measure every model at every batch size."""
    torch.set_num_threads(threads)
    if unknown := set(models.split(",")) - MODELS.keys():
        raise typer.BadParameter(f"{min(unknown)} is not a model; choose from {', '.join(MODELS)}")
    device = chosen_device(device)
    results: dict[str, Any] = {}
    for name in models.split(","):
        learner = untrained(MODELS[name])
        ways, left_out = predictors(learner, device)
        results[name] = {
            "weights": sum(weight.numel() for weight in learner.model.parameters()),
            "left_out": left_out,
            "lowered_share": {p: ways[p, "channels_last"].lowered_share for p, _ in ways},
            "batches": {},
        }
        for size in map(int, batches.split(",")):
            found = measure(ways, MODELS[name], size, rounds)
            results[name]["batches"][size] = found
            plain_ms = found["fp32"]["contiguous"]["ms_median"]
            rows = [
                (
                    f"{name}, {size}",
                    precision,
                    layout,
                    one["ms_median"],
                    one["images_per_second"],
                    plain_ms / one["ms_median"],
                )
                for precision, layouts in found.items()
                for layout, one in layouts.items()
            ]
            print(table(_COLUMNS, rows), flush=True)
    write(out, {"setup": set_up(rounds=rounds, device=device), "models": results})


def untrained(config: ModelConfig) -> Learner:
    """A learner of that architecture; how much it knows changes no time."""
    rng = np.random.default_rng(0)
    shape = (2 * _NUM_CLASSES, config.channels, config.image_size, config.image_size)
    images = torch.from_numpy(rng.integers(0, 256, shape, np.uint8))
    labels = torch.arange(len(images)) % _NUM_CLASSES
    plain = LearningConfig()
    base = plain.base.model_copy(update={"epochs": 1})
    ewc = plain.update.ewc.model_copy(update={"num_fisher_examples": 0})
    brief = plain.model_copy(
        update={
            "base": base,
            "analytic": plain.analytic.model_copy(update={"num_features": 0}),
            "update": plain.update.model_copy(update={"ewc": ewc}),
        }
    )
    names = [str(label) for label in range(_NUM_CLASSES)]
    return fit_base((images, labels), names, config, brief, Run(time.perf_counter)).learner


Way = tuple[str, str]


def predictors(learner: Learner, device: str) -> tuple[dict[Way, Predictor], dict[str, str]]:
    """Every way that the model can be served in, and why not in the others."""
    ways: dict[Way, Predictor] = {}
    left_out: dict[str, str] = {}
    for precision in _PRECISIONS:
        for layout, channels_last in _LAYOUTS.items():
            try:
                predictor = Predictor(learner, device, precision, channels_last=channels_last)
            except LearningError as error:
                left_out[precision] = str(error)
            else:
                ways[precision, layout] = predictor
    return ways, left_out


def measure(
    ways: dict[Way, Predictor], config: ModelConfig, batch: int, rounds: int
) -> dict[str, dict[str, dict[str, float]]]:
    """Median times of one batch, by precision and layout."""
    rng = np.random.default_rng(1)
    shape = (batch, config.channels, config.image_size, config.image_size)
    images = rng.integers(0, 256, shape, np.uint8)
    for predictor in ways.values():
        predictor.warm_up((batch, batch), images)
    seconds: dict[Way, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, predictor in ways.items():
            seconds[way].append(_timed(predictor, images))
    found: dict[str, dict[str, dict[str, float]]] = {}
    for (precision, layout), taken in seconds.items():
        median_s = statistics.median(taken)
        found.setdefault(precision, {})[layout] = {
            "ms_median": 1e3 * median_s,
            "ms_best": 1e3 * min(taken),
            "images_per_second": batch / median_s,
        }
    return found


def _timed(predictor: Predictor, images: NDArray[np.uint8]) -> float:
    began_s = time.perf_counter()
    predictor.predict(images)  # gives arrays, so that a GPU is done when it returns
    return time.perf_counter() - began_s


if __name__ == "__main__":
    typer.run(main)

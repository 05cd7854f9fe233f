"""What a light model beside a heavy one saves, and what it costs in accuracy.

    python benchmarks/cascade.py --data fashion_mnist.npz --limits 0.01,0.02,0.05 \
        --out benchmarks/results/cascade.json

The light model is taught and trusted as `learning.cascade` has it: a threshold chosen on one half
of a hold-out and measured on the other. Test images, which neither of these saw, say what it came
to. With and without it take turns on every batch of them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from common import as_tensors, data_config, load_arrays, set_up, table, timed, write
from numpy.typing import NDArray

from lifelong_ray.config import CascadeConfig, LearningConfig, ModelConfig, Precision
from lifelong_ray.learning import (
    Answerer,
    Calibration,
    Labelled,
    Learner,
    Light,
    Predictor,
    Run,
    calibrate,
    fit_base,
    teach_light,
    with_light,
)

_PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")
_COLUMNS = (
    "limit, precision",
    "light share, stated",
    "light share",
    "accuracy alone",
    "accuracy together",
    "loss, stated",
    "loss",
    "images/s alone",
    "images/s together",
    "times",
)


def main(
    data: Annotated[str, typer.Option(help="An .npz, or what else data.source takes.")] = "digits",
    model: Annotated[str, typer.Option(help="Of the heavy model.")] = "models:resnet18",
    widths: Annotated[str, typer.Option(help="Of the light one.")] = "16,32",
    training: Annotated[int, typer.Option(help="Images to train on.")] = 6_000,
    holdout: Annotated[int, typer.Option(help="Images to choose and measure by.")] = 4_000,
    testing: Annotated[int, typer.Option(help="Images to test on.")] = 2_000,
    epochs: Annotated[int, typer.Option(help="Of the heavy model.")] = 4,
    limits: Annotated[str, typer.Option(help="Allowed losses.")] = "0.01,0.02,0.05",
    batches: Annotated[str, typer.Option(help="Images at a time.")] = "32,1",
    threads: Annotated[int, typer.Option(help="Of torch; a front has one.")] = 1,
    seed: Annotated[int, typer.Option(help="Of both trainings.")] = 0,
    out: Annotated[Path | None, typer.Option(help="JSON to write.")] = None,
) -> None:
    """Train both models, then measure every limit and precision."""
    torch.set_num_threads(threads)
    arrays = load_arrays(data_config(data, 1.0))
    images, labels = as_tensors(arrays.train_images, arrays.train_labels)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    learn, hold = order[:training], order[training : training + holdout]
    tests, truth = as_tensors(arrays.test_images, arrays.test_labels)
    tested = tests[:testing].numpy(), truth[:testing].numpy()
    config = settings(tuple(int(width) for width in widths.split(",")), epochs, seed)
    heavy_config = ModelConfig(name=model, image_size=images.shape[2], channels=images.shape[1])
    run = Run(time.perf_counter)
    names = arrays.class_names
    taught: Labelled = (images[learn], labels[learn])
    fit, heavy_s = timed(lambda: fit_base(taught, names, heavy_config, config, run))
    light, light_s = timed(lambda: teach_light(fit.learner, taught, config, run))
    print(f"heavy trained in {heavy_s:.0f} s, light in {light_s:.0f} s", flush=True)
    held = images[hold].numpy(), labels[hold].numpy()
    results = []
    for limit in map(float, limits.split(",")):
        trusted = calibrated(fit.learner, light, held, config.cascade, limit)
        for precision in _PRECISIONS:
            result = measure(
                fit.learner, trusted, precision, tested, [int(size) for size in batches.split(",")]
            )
            results.append({"max_accuracy_loss": limit, **result})
    print(table(_COLUMNS, [row_of(result) for result in results]))
    setup = set_up(
        training=training,
        holdout=holdout,
        testing=testing,
        heavy=model,
        light_widths=widths,
        heavy_seconds=heavy_s,
        light_seconds=light_s,
    )
    write(out, {"setup": setup, "results": results})


def settings(widths: tuple[int, ...], epochs: int, seed: int) -> LearningConfig:
    """What is trained, and how: nothing of what only an update would need."""
    plain = LearningConfig(seed=seed)
    base = {"epochs": epochs, "precision": "bf16", "learning_rate": 2e-3}
    ewc = plain.update.ewc.model_copy(update={"num_fisher_examples": 0})
    return plain.model_copy(
        update={
            "base": plain.base.model_copy(update=base),
            "analytic": plain.analytic.model_copy(update={"num_features": 0}),
            "update": plain.update.model_copy(update={"ewc": ewc}),
            "cascade": plain.cascade.model_copy(update={"widths": widths}),
        }
    )


Held = tuple[NDArray[np.uint8], NDArray[np.int64]]


def calibrated(
    learner: Learner, light: Light, held: Held, cascade: CascadeConfig, limit: float
) -> Light:
    """The light model with the threshold of that limit."""
    images, labels = held
    found = calibrate(
        Predictor(light).predict(images).probabilities,
        in_batches(Predictor(learner), images, 64),
        labels,
        np.arange(len(labels)) % 2 == 0,
        cascade.model_copy(update={"max_accuracy_loss": limit, "min_light_share": 0.0}),
    )
    return replace(light, calibration=found)


def measure(
    learner: Learner, light: Light, precision: Precision, tested: Held, batches: Sequence[int]
) -> dict[str, Any]:
    """Accuracy and throughput with and without the light model."""
    images, labels = tested
    alone = Predictor(learner, precision=precision)
    together = with_light(alone, light)
    alone_right = in_batches(alone, images, 64).argmax(1) == labels
    answers = [together.predict(images[first : first + 64]) for first in range(0, len(images), 64)]
    both_right = np.concatenate([a.probabilities for a in answers]).argmax(1) == labels
    calibration = light.calibration
    assert isinstance(calibration, Calibration)
    return {
        "precision": precision,
        "calibration": asdict(calibration),
        "light_share": float(np.concatenate([a.light for a in answers]).mean()),
        "accuracy_alone": float(alone_right.mean()),
        "accuracy_together": float(both_right.mean()),
        "images_per_second": {size: paced(alone, together, images, size) for size in batches},
    }


def in_batches(answerer: Answerer, images: NDArray[np.uint8], size: int) -> NDArray[np.float32]:
    """Probabilities (N, C)."""
    pieces = [images[first : first + size] for first in range(0, len(images), size)]
    return np.concatenate([answerer.predict(piece).probabilities for piece in pieces])


def paced(
    alone: Answerer, together: Answerer, images: NDArray[np.uint8], size: int, at_most: int = 40
) -> dict[str, float]:
    """Images per second of both, over the same batches, which take turns."""
    for answerer in (alone, together):
        answerer.warm_up((size, size), images[:size])
    seconds = {"alone": 0.0, "together": 0.0}
    num_batches = min(at_most, len(images) // size)
    for index in range(num_batches):
        batch = images[index * size : (index + 1) * size]
        for name, answerer in (("alone", alone), ("together", together)):
            began_s = time.perf_counter()
            answerer.predict(batch)
            seconds[name] += time.perf_counter() - began_s
    return {name: num_batches * size / total_s for name, total_s in seconds.items()}


def row_of(result: dict[str, Any]) -> tuple[object, ...]:
    """The result at the first batch size, as `_COLUMNS` has it."""
    calibration = result["calibration"]
    speed = next(iter(result["images_per_second"].values()))
    return (
        f"{result['max_accuracy_loss']:g}, {result['precision']}",
        calibration["light_share"],
        result["light_share"],
        result["accuracy_alone"],
        result["accuracy_together"],
        calibration["accuracy_loss"],
        result["accuracy_alone"] - result["accuracy_together"],
        speed["alone"],
        speed["together"],
        speed["together"] / speed["alone"],
    )


if __name__ == "__main__":
    typer.run(main)

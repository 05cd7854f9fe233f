"""Erase examples from the analytic head and compare it with one that never saw them.

    python benchmarks/unlearning.py --data images.npz --features 2000 --erase 1000 \
        --seeds 3 --out benchmarks/results/unlearning.json

Random features are of raw pixels. What is timed is what an erasure costs: the features of the
erased examples, their subtraction from the sums, and the solution.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from common import DEFAULT_FOLDER, SIZE_HELP, as_tensors, data_config, load_arrays, set_up, write
from torch import Tensor

from lifelong_ray.learning.analytic import AnalyticSums
from lifelong_ray.learning.chance import generator_for
from lifelong_ray.learning.live import LiveHead
from lifelong_ray.learning.widening import RandomFeatures

_SAMPLE = 2_000
_ROWS: tuple[tuple[str, str, str], ...] = (
    ("largest difference of a weight", "max_weight_difference", "at most 1e-5"),
    ("largest difference of a sum", "max_sum_difference", "0"),
    ("erasure, seconds", "erase_seconds", "under 1"),
    ("- features of the erased", "erase_features_seconds", ""),
    ("- subtraction", "erase_subtract_seconds", ""),
    ("- solution", "erase_solve_seconds", ""),
    ("learning from the rest instead, seconds", "relearn_seconds", ""),
    ("one example out of a live head, seconds", "live_erase_one_seconds", ""),
    ("accuracy before", "accuracy_before_share", ""),
    ("accuracy after", "accuracy_after_share", ""),
    ("accuracy of never having learned", "accuracy_never_share", "as after"),
    ("ridge", "ridge_share", ""),
)


def main(
    data: Annotated[str, typer.Option(help="An .npz, or what else data.source takes.")],
    features: Annotated[int, typer.Option(help="Width of the random projection.")] = 2_000,
    erase: Annotated[int, typer.Option(help="Examples to erase, drawn at random.")] = 1_000,
    seeds: Annotated[int, typer.Option(help="How many, from 0.")] = 3,
    fraction: Annotated[float, typer.Option(help="Share of the examples: a dry run.")] = 1.0,
    folder: Annotated[str, typer.Option(help="As data.folder.")] = DEFAULT_FOLDER,
    image_size: Annotated[int, typer.Option(help=SIZE_HELP)] = 0,
    out: Annotated[Path | None, typer.Option(help="JSON to write.")] = None,
) -> None:
    """Measure exactness and cost of erasure, once per seed."""
    arrays = load_arrays(data_config(data, fraction, folder), image_size)
    train = as_tensors(arrays.train_images, arrays.train_labels)
    test = as_tensors(arrays.test_images, arrays.test_labels)
    if not 0 < erase < len(train[0]):
        raise typer.BadParameter(f"--erase must be between 1 and {len(train[0]) - 1}, not {erase}")
    runs = [_measured(train, test, features, erase, seed) for seed in range(seeds)]
    setup = set_up(
        data=Path(data).name,
        fraction=fraction,
        num_train_examples=len(train[0]),
        num_features=features,
        num_erased=erase,
    )
    write(out, {"setup": setup, "runs": runs})
    print(_table(runs, setup))


def _measured(
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    num_features: int,
    num_erased: int,
    seed: int,
) -> dict[str, Any]:
    images, labels = train
    num_classes = int(labels.max()) + 1
    order = torch.randperm(len(labels), generator=generator_for(seed, "erase"))
    gone, kept = order[:num_erased].sort().values, order[num_erased:].sort().values
    widening = RandomFeatures.fitted(_pixels(images[order[-_SAMPLE:]]), num_features, seed)
    everything = AnalyticSums.of(widening.integers(_pixels(images)), labels, num_classes)
    ridge = everything.choose_ridge()

    began_s = time.perf_counter()
    erased_NM = widening.integers(_pixels(images[gone]))
    features_s = time.perf_counter()
    erased = everything.subtract(erased_NM, labels[gone])
    subtracted_s = time.perf_counter()
    weights = erased.solve(ridge, dtype=torch.float64)
    solved_s = time.perf_counter()
    never = AnalyticSums.of(widening.integers(_pixels(images[kept])), labels[kept], num_classes)
    never_weights = never.solve(ridge, dtype=torch.float64)
    relearned_s = time.perf_counter()
    live = LiveHead.of(everything, ridge)
    live_began_s = time.perf_counter()
    live.with_examples(erased_NM[:1], labels[gone[:1]], -1)
    live_s = time.perf_counter() - live_began_s

    tested_NM = widening(_pixels(test[0]))

    def accuracy(head: Tensor) -> float:
        return float(((tested_NM @ head.float()).argmax(1) == test[1]).float().mean())

    return {
        "seed": seed,
        "max_weight_difference": float((weights - never_weights).abs().max()),
        "max_sum_difference": max(
            float((erased.gram - never.gram).abs().max()),
            float((erased.class_sums - never.class_sums).abs().max()),
        ),
        "erase_seconds": solved_s - began_s,
        "erase_features_seconds": features_s - began_s,
        "erase_subtract_seconds": subtracted_s - features_s,
        "erase_solve_seconds": solved_s - subtracted_s,
        "relearn_seconds": relearned_s - solved_s,
        "live_erase_one_seconds": live_s,
        "accuracy_before_share": accuracy(everything.solve(ridge)),
        "accuracy_after_share": accuracy(weights),
        "accuracy_never_share": accuracy(never_weights),
        "ridge_share": ridge,
    }


def _pixels(images: Tensor) -> Tensor:
    return images.flatten(1).float() / 255


def _table(runs: list[dict[str, Any]], setup: dict[str, Any]) -> str:
    lines = [
        f"Measured {setup['date']} on {setup['cpus']} cores ({setup['machine']}), "
        f"{setup['num_erased']:,} of {setup['num_train_examples']:,} examples erased, "
        f"{setup['num_features']:,} features:",
        "",
        "| what | " + " | ".join(f"seed {run['seed']}" for run in runs) + " | aim |",
        "|---|" + "---:|" * len(runs) + "---|",
    ]
    for what, key, aim in _ROWS:
        cells = " | ".join(f"{run[key]:.4g}" for run in runs)
        lines.append(f"| {what} | {cells} | {aim} |")
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)

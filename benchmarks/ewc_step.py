"""What the EWC penalty costs of a training step.

    python benchmarks/ewc_step.py --models mlp,convnet,resnet18 --steps 400 \
        --out benchmarks/results/ewc_step.json

Steps with and without the penalty take turns on the same model, in pairs whose order is drawn
at random, so that whatever slows the machine slows both. The share is the median difference
within a pair over the median plain step, with a bootstrap upper bound. The penalty as a term of
the loss, differentiated by autograd, is measured beside it in the same way.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from common import chosen_device, chosen_precision, set_up, table, write
from fisher import CLOCKS, MODELS, under
from peak import Precision, device_name, throughput, training_flops_per_example, why_not_on
from torch import nn
from torch.nn import functional as F

from lifelong_ray.learning import build_model
from lifelong_ray.learning.penalties import EwcPenalty
from lifelong_ray.types import LifelongError

_NUM_CLASSES = 10
_LAMBDA = 10.0
_RESAMPLES = 2_000
_WARM_UP_STEPS = 10
_COLUMNS = ("model, way", "plain step, ms", "penalty, ms", "share, %", "upper 95 % bound, %")


def main(
    models: Annotated[str, typer.Option(help=f"Of {', '.join(MODELS)}.")] = "mlp,convnet,resnet18",
    steps: Annotated[int, typer.Option(help="Pairs of steps per model and way.")] = 400,
    batch: Annotated[int, typer.Option(help="Examples per step.")] = 128,
    device: Annotated[
        str, typer.Option(help="cpu, cuda, or auto: cuda where there is one.")
    ] = "cpu",
    precision: Annotated[str, typer.Option(help="fp32 or bf16, of the step's products.")] = "fp32",
    peak_tflops: Annotated[
        float, typer.Option(help="The device's peak, 1e12 per second; 0: by its name.")
    ] = 0.0,
    threads: Annotated[int, typer.Option(help="Of torch; 0 leaves its own number.")] = 0,
    clock: Annotated[
        str, typer.Option(help="wall, or cpu where other programs share the cores.")
    ] = "wall",
    out: Annotated[Path | None, typer.Option(help="JSON to write.")] = None,
) -> None:
    """Measure every model in turn."""
    if threads:
        torch.set_num_threads(threads)
    results: dict[str, Any] = {}
    if unknown := set(models.split(",")) - MODELS.keys():
        raise typer.BadParameter(f"{min(unknown)} is not a model; choose from {', '.join(MODELS)}")
    device = chosen_device(device)
    reason = why_not_on(device)
    for name in models.split(","):
        if reason:
            print(f"{name} is skipped: {reason}")
            results[name] = {"skipped": reason}
            continue
        try:
            results[name] = measure(
                name,
                steps,
                batch,
                device=device,
                precision=chosen_precision(precision, device),
                peak_tflops=peak_tflops,
                now_s=CLOCKS[clock],
            )
        except LifelongError as error:
            print(f"{name} is left out: {error}")
            continue
        rows = [
            (
                f"{name}, {way}",
                found["plain_step_ms_median"],
                found["penalty_ms_median"],
                100 * found["share_of_plain_step"],
                100 * found["share_of_plain_step_upper_95"],
            )
            for way, found in results[name]["ways"].items()
        ]
        print(table(_COLUMNS, rows), flush=True)
    setup = set_up(
        steps=steps,
        batch=batch,
        optimizer="AdamW, fused",
        device=device,
        precision=precision,
        clock=clock,
    )
    write(out, {"setup": setup, "models": results})


def measure(
    name: str,
    steps: int,
    batch: int,
    *,
    device: str,
    precision: Precision,
    peak_tflops: float,
    now_s: Callable[[], float],
) -> dict[str, Any]:
    """Measure one of `MODELS`; arguments as the command's options.

    Raises:
        LearningError: If the model cannot be built here.
    """
    config = MODELS[name]
    model = build_model(config, _NUM_CLASSES, seed=0).to(device)
    model.train()
    generator = torch.Generator().manual_seed(0)
    shape = (batch, config.channels, config.image_size, config.image_size)
    images = torch.randint(0, 256, shape, generator=generator).to(torch.uint8).to(device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, _NUM_CLASSES, (batch,), generator=generator).to(device)
    weights = dict(model.named_parameters())
    fisher = {n: torch.rand(w.shape, generator=generator).to(device) for n, w in weights.items()}
    penalty = EwcPenalty(weights, fisher)
    optimizer = torch.optim.AdamW(weights.values(), lr=1e-5, fused=True)

    def step(way: str) -> None:
        optimizer.zero_grad()
        with under(precision, model.device):
            logits_BC = model.trained_logits(images)
        loss = F.cross_entropy(logits_BC.float(), labels)
        if way == "by_autograd":
            loss = loss + _LAMBDA * penalty(weights)
        loss.backward()
        if way == "in_place":
            penalty.add_gradient(weights, _LAMBDA)
        optimizer.step()

    ways = {way: _paired(step, way, steps, device, now_s) for way in ("in_place", "by_autograd")}
    return {
        "num_weights": _count(weights),
        "plain_throughput": throughput(
            training_flops_per_example(config, _NUM_CLASSES),
            batch,
            ways["in_place"]["plain_step_ms_median"] / 1e3,
            device=device_name(device),
            precision=precision,
            peak_tflops=peak_tflops,
        ),
        "ways": ways,
    }


def _count(weights: dict[str, nn.Parameter]) -> int:
    return sum(weight.numel() for weight in weights.values())


def _paired(
    step: Callable[[str], None], way: str, steps: int, device: str, now_s: Callable[[], float]
) -> dict[str, float]:
    order = random.Random(0)
    for _ in range(_WARM_UP_STEPS):
        step(way)
        step("plain")
    plain_s, extra_s = [], []
    for _ in range(steps):
        pair = [way, "plain"]
        order.shuffle(pair)
        took_s = {one: _timed(step, one, device, now_s) for one in pair}
        plain_s.append(took_s["plain"])
        extra_s.append(took_s[way] - took_s["plain"])
    extra, plain = np.array(extra_s), np.array(plain_s)
    draws = np.random.default_rng(0).integers(0, steps, (_RESAMPLES, steps))
    shares = np.median(extra[draws], axis=1) / np.median(plain[draws], axis=1)
    return {
        "plain_step_ms_median": 1e3 * statistics.median(plain_s),
        "penalty_ms_median": 1e3 * statistics.median(extra_s),
        "penalty_ms_mean": 1e3 * statistics.fmean(extra_s),
        "share_of_plain_step": statistics.median(extra_s) / statistics.median(plain_s),
        "share_of_plain_step_upper_95": float(np.quantile(shares, 0.95)),
    }


def _timed(step: Callable[[str], None], way: str, device: str, now_s: Callable[[], float]) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    began_s = now_s()
    step(way)
    if device == "cuda":
        torch.cuda.synchronize()
    return now_s() - began_s


if __name__ == "__main__":
    typer.run(main)

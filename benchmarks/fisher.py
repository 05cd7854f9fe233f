"""What the Fisher costs beside a plain pass over the same examples, and how exact it is.

    python benchmarks/fisher.py --models mlp,convnet,resnet18 --examples 2000 --rounds 7 \
        --out benchmarks/results/fisher.json

A plain pass is forward, cross-entropy and backward to all weights in batches of 128, without
an optimizer, in whichever memory format is faster. `--precision` is that of the plain pass alone:
the estimators compute in float32, whatever a training does. Estimators, plain passes and two
general ways to the same numbers, vmap and a loop over batches of one, take turns; the general
ways run on fewer examples and are scaled up.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from common import chosen_device, chosen_precision, set_up, table, write
from peak import (
    Precision,
    device_name,
    throughput,
    training_flops_per_example,
    why_not_on,
)
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from lifelong_ray.config import ModelConfig
from lifelong_ray.learning import Classifier, build_model, estimate_fisher
from lifelong_ray.types import LifelongError

MODELS = {
    "mlp": ModelConfig(name="mlp", widths=(400, 400), image_size=28),
    "convnet": ModelConfig(name="convnet", widths=(32, 64, 128), image_size=28),
    "convnet_rgb": ModelConfig(name="convnet", widths=(32, 64, 128), image_size=32, channels=3),
    "resnet18": ModelConfig(name="torchvision:resnet18", image_size=32, channels=3),
    "resnet20": ModelConfig(name="resnet20", image_size=32, channels=3),
}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
_BATCH = 128
_NUM_CLASSES = 10
_NUM_COMPARED = 8
# Entries below this share of their weight's largest one are rounding noise in the reference too.
_TINY_SHARE = 1e-3
_COLUMNS = (
    "model, way",
    "seconds, median",
    "quartiles",
    "plain passes",
    "largest relative error",
    "1 - cosine",
)


def main(
    models: Annotated[str, typer.Option(help=f"Of {', '.join(MODELS)}.")] = (
        "mlp,convnet,convnet_rgb,resnet18"
    ),
    examples: Annotated[int, typer.Option(help="Random images per pass.")] = 2_000,
    rounds: Annotated[int, typer.Option(help="Times that every way has its turn.")] = 7,
    exact_rounds: Annotated[
        int, typer.Option(help="The same for the exact estimator; 0 leaves it out.")
    ] = 3,
    general_examples: Annotated[
        int, typer.Option(help="Images for vmap and the loop; 0 leaves them out.")
    ] = 128,
    device: Annotated[
        str, typer.Option(help="cpu, cuda, or auto: cuda where there is one.")
    ] = "cpu",
    precision: Annotated[str, typer.Option(help="fp32 or bf16, of the plain pass.")] = "fp32",
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
    now_s = CLOCKS[clock]
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
                examples,
                rounds,
                exact_rounds=exact_rounds,
                num_general=general_examples,
                device=device,
                precision=chosen_precision(precision, device),
                peak_tflops=peak_tflops,
                now_s=now_s,
            )
        except LifelongError as error:
            print(f"{name} is left out: {error}")
            continue
        print(table(_COLUMNS, _table_rows(name, results[name])), flush=True)
    write(
        out,
        {
            "setup": set_up(
                examples=examples,
                batch=_BATCH,
                rounds=rounds,
                device=device,
                precision=precision,
                clock=clock,
            ),
            "models": results,
        },
    )


def measure(
    name: str,
    num_examples: int,
    rounds: int,
    *,
    exact_rounds: int,
    num_general: int,
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
    generator = torch.Generator().manual_seed(0)
    shape = (num_examples, config.channels, config.image_size, config.image_size)
    images = torch.randint(0, 256, shape, generator=generator).to(torch.uint8).to(model.device)
    labels = torch.randint(0, _NUM_CLASSES, (num_examples,), generator=generator).to(model.device)
    model.eval()
    first = model.copy().to(memory_format=torch.contiguous_format)
    ways: dict[str, tuple[Callable[[], object], float, int]] = {
        "plain_contiguous": (partial(_plain, first, images, labels, precision), 1, rounds),
        "plain_channels_last": (partial(_plain, model, images, labels, precision), 1, rounds),
    }
    for estimator, turns in (
        ("empirical", rounds),
        ("sampled", rounds),
        ("exact", exact_rounds),
    ):
        ways[estimator] = (partial(_estimate, model, images, labels, estimator), 1, turns)
    if num_general:
        few = images[:num_general], labels[:num_general]
        scale = num_examples / len(few[0])
        ways["empirical_by_vmap"] = (partial(_by_vmap, model, *few), scale, min(rounds, 3))
        ways["empirical_by_loop"] = (partial(_by_loop, model, *few), scale, min(rounds, 3))
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(rounds + 1):
        for way, (run, scale, turns) in ways.items():
            # The first turn warms up and does not count.
            if turn <= turns and (turn or way != "exact"):
                took_s = _timed(run, model.device, now_s) * scale
                if turn:
                    seconds[way].append(took_s)
    plain_s = min(statistics.median(seconds[f"plain_{f}"]) for f in ("contiguous", "channels_last"))
    report: dict[str, Any] = {
        "num_weights": sum(weight.numel() for weight in model.parameters()),
        "plain_seconds": plain_s,
        "plain_throughput": throughput(
            training_flops_per_example(config, _NUM_CLASSES),
            num_examples,
            plain_s,
            device=device_name(device),
            precision=precision,
            peak_tflops=peak_tflops,
        ),
        "ways": {},
    }
    for way, took in seconds.items():
        if not took:
            continue
        low, median, high = _quartiles(took)
        report["ways"][way] = {
            "seconds_median": median,
            "seconds_quartiles": [low, high],
            "ratio_to_plain_pass": median / plain_s,
        }
        if way in ("empirical", "exact"):
            report["ways"][way] |= _errors(model, images, labels, way)
    return report


def _plain(model: Classifier, images: Tensor, labels: Tensor, precision: Precision) -> None:
    for first in range(0, len(images), _BATCH):
        piece = slice(first, first + _BATCH)
        model.zero_grad()
        inputs = images[piece]
        if _is_channels_last(model):
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        with under(precision, model.device):
            logits_BC = model.trained_logits(inputs)
        F.cross_entropy(logits_BC.float(), labels[piece]).backward()


def under(precision: Precision, device: torch.device) -> torch.autocast:
    """The precision of products, as the trainer sets it."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def _is_channels_last(model: Classifier) -> bool:
    return any(
        weight.dim() == 4
        and weight.shape[1] > 1
        and weight.is_contiguous(memory_format=torch.channels_last)
        and not weight.is_contiguous()
        for weight in model.parameters()
    )


def _estimate(
    model: Classifier, images: Tensor, labels: Tensor, estimator: Any
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return estimate_fisher(model, images, labels, estimator=estimator, generator=generator).values


class _Likelihood(torch.nn.Module):
    def __init__(self, model: Classifier) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor, label: Tensor) -> Tensor:
        h = self.model.activations(image[None], stop=0)
        log_p_C = F.log_softmax(self.model.trained_logits(h)[0], dim=0)
        return log_p_C.gather(0, label[None])[0]


def _by_vmap(model: Classifier, images: Tensor, labels: Tensor) -> None:
    likelihood = _Likelihood(model)
    weights = {name: weight.detach() for name, weight in likelihood.named_parameters()}

    def log_p(at: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        found: Tensor = functional_call(likelihood, at, (image, label))
        return found

    sums = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    # As many as fit a gigabyte of gradients, up to 32: more are slower.
    num_weights = sum(weight.numel() for weight in weights.values())
    chunk = max(1, min(32, 250_000_000 // num_weights))
    for first in range(0, len(images), chunk):
        piece = slice(first, first + chunk)
        gradients = vmap(grad(log_p), in_dims=(None, 0, 0))(weights, images[piece], labels[piece])
        for name, value in gradients.items():
            sums[name] += value.square().sum(0)


def _by_loop(model: Classifier, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Sums of squares from batches of one, in the model's own precision."""
    weights = dict(model.named_parameters())
    sums = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for image, label in zip(images, labels, strict=True):
        inputs = model.activations(image[None], stop=0).to(model.head.weight.dtype)
        log_p = F.log_softmax(model.trained_logits(inputs), dim=1)[0, label]
        gradients = torch.autograd.grad(log_p, list(weights.values()))
        for name, gradient in zip(weights, gradients, strict=True):
            sums[name].addcmul_(gradient, gradient)
    return sums


def _errors(model: Classifier, images: Tensor, labels: Tensor, estimator: str) -> dict[str, float]:
    """Compare with batches of one in float64, on a few examples."""
    few, few_labels = images[:_NUM_COMPARED], labels[:_NUM_COMPARED]
    found = _estimate(model, few, few_labels, estimator)
    precise = model.copy().double()
    expected = {name: torch.zeros_like(w) for name, w in precise.named_parameters()}
    if estimator == "exact":
        with torch.no_grad():
            inputs = precise.activations(few, stop=0).double()
            p_NC = F.softmax(precise.trained_logits(inputs), dim=1)
        for image, p_C in zip(few, p_NC, strict=True):
            for label, share in enumerate(p_C.tolist()):
                one = _by_loop(precise, image[None], few_labels.new_tensor([label]))
                for name, value in one.items():
                    expected[name] += share * value
    else:
        expected = _by_loop(precise, few, few_labels)
    worst, products, ours, theirs = 0.0, 0.0, 0.0, 0.0
    for name, total in expected.items():
        value, reference = found[name].double(), total / len(few)
        large = reference > _TINY_SHARE * reference.max()
        if bool(large.any()):
            relative = (value - reference).abs()[large] / reference[large]
            worst = max(worst, float(relative.max()))
        products += float((value * reference).sum())
        ours, theirs = ours + float(value.square().sum()), theirs + float(reference.square().sum())
    cosine = products / (ours * theirs) ** 0.5
    return {"max_relative_error": worst, "cosine": cosine}


def _timed(run: Callable[[], object], device: torch.device, now_s: Callable[[], float]) -> float:
    began_s = now_s()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return now_s() - began_s


def _quartiles(values: list[float]) -> tuple[float, float, float]:
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def _table_rows(model: str, report: dict[str, Any]) -> list[tuple[object, ...]]:
    rows: list[tuple[object, ...]] = []
    for name, way in report["ways"].items():
        low, high = way["seconds_quartiles"]
        error, cosine = way.get("max_relative_error"), way.get("cosine")
        rows.append(
            (
                f"{model}, {name}",
                way["seconds_median"],
                f"{low:.3f} to {high:.3f}",
                f"{way['ratio_to_plain_pass']:.2f}",
                "-" if error is None else f"{error:.1e}",
                "-" if cosine is None else f"{1 - cosine:.1e}",
            )
        )
    return rows


if __name__ == "__main__":
    typer.run(main)

"""How much of a device's documented peak a training reaches, and why there is no figure.

Counts the products of matrices and convolutions, forward and backward, as torch counts them;
what else a step does (optimizer, normalisation, loss) takes time and counts nothing. So the
share is of useful work, and below what a profiler calls utilisation.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Literal

import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from lifelong_ray.config import ModelConfig
from lifelong_ray.learning import build_model

Precision = Literal["fp32", "bf16"]

# Dense, without sparsity, accumulated in float32, per second; from the vendor's data sheets. The
# first that fits a device's name counts.
_PEAK_BF16 = (
    (r"\bB200\b", 2_250e12),
    (r"\bH200 NVL\b", 835e12),
    (r"\bG?H200\b", 989e12),
    (r"\bH100 PCIe\b", 756e12),
    (r"\bH100 NVL\b", 835e12),
    (r"\bH100\b", 989e12),
    (r"\bA100\b", 312e12),
    (r"\bL40S\b", 362e12),
    (r"\bL40\b", 181e12),
    (r"\bA10G\b", 70e12),
    (r"\bA10\b", 125e12),
    (r"\bL4\b", 121e12),
    (r"\bT4\b", 65e12),  # Of fp16: it has no bf16 of its own.
)
# A part of a device has a part of the peak, which its name does not tell.
_PARTITION = re.compile(r"\bMIG\b")
_COUNTED_EXAMPLES = 2


def why_not_on(device: str) -> str | None:
    """Say why nothing can be measured on `device`; None where it can."""
    if device == "cpu" or torch.cuda.is_available():
        return None
    if torch.version.cuda is None:
        return f"no CUDA device: torch {torch.__version__} is built without CUDA"
    return f"no CUDA device: torch {torch.__version__} finds no GPU with a working driver"


def waiting_clock(device: str) -> Callable[[], float]:
    """Return a clock in seconds that lets `device` finish before it is read."""
    if device != "cuda":
        return time.perf_counter

    def now_s() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return now_s


def device_name(device: str) -> str:
    """Return what the maker calls it; for a processor just ``cpu``."""
    return torch.cuda.get_device_name() if device == "cuda" else device


def documented_peak(name: str, precision: Precision) -> float | None:
    """Return the operations per second of a device by its name; None if they are not known.

    For ``fp32`` they never are: how fast that is depends on whether torch is allowed TF32.

    >>> documented_peak("NVIDIA A100-SXM4-80GB", "bf16")
    312000000000000.0
    """
    if precision != "bf16" or _PARTITION.search(name):
        return None
    return next((peak for pattern, peak in _PEAK_BF16 if re.search(pattern, name)), None)


def training_flops_per_example(config: ModelConfig, num_classes: int) -> int:
    """Count the operations of one example's forward and backward pass to all weights.

    Two per multiplication with addition. Counted on the CPU by running two examples; nothing
    of it depends on device, precision or batch.
    """
    model = build_model(config, num_classes, seed=0)
    model.learns_statistics = True
    model.train()
    shape = (_COUNTED_EXAMPLES, config.channels, config.image_size, config.image_size)
    labels = torch.zeros(_COUNTED_EXAMPLES, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        logits_NC = model.trained_logits(torch.zeros(shape, dtype=torch.uint8))
        F.cross_entropy(logits_NC, labels).backward()
    return int(counter.get_total_flops()) // _COUNTED_EXAMPLES


def throughput(
    flops_per_example: int,
    num_examples: int,
    seconds: float,
    *,
    device: str,
    precision: Precision,
    peak_tflops: float = 0.0,
) -> dict[str, float | str | None]:
    """Return what a training computed per second, and its share of the peak.

    Args:
        flops_per_example: As `training_flops_per_example` counts them.
        num_examples: Shown in gradient steps, repetitions included.
        seconds: That these took.
        device: The device's name, as `device_name` gives it.
        precision: Of the products.
        peak_tflops: The peak in 1e12 operations per second, where it is known better than from
            the device's name; 0 means it is not.

    Returns:
        Figures by name. `share_of_peak` is None where no peak is known; then `no_share` says
        what to do.
    """
    if seconds <= 0 or num_examples < 1:
        raise ValueError(
            f"{num_examples} examples in {seconds} seconds have no rate; measure at least one"
        )
    peak = 1e12 * peak_tflops or documented_peak(device, precision)
    flops_per_second = flops_per_example * num_examples / seconds
    figures: dict[str, float | str | None] = {
        "flops_per_example": flops_per_example,
        "examples_per_second": num_examples / seconds,
        "tflops_per_second": flops_per_second / 1e12,
        "peak_tflops_per_second": peak / 1e12 if peak else None,
        "share_of_peak": flops_per_second / peak if peak else None,
    }
    if not peak:
        figures["no_share"] = (
            f"no documented {precision} peak of {device}; give it with --peak-tflops"
        )
    return figures

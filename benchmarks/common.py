"""What the learning benchmarks share: data as tensors, the set-up, and tables."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import typer
from numpy.typing import NDArray

from lifelong_ray.config import DataConfig
from lifelong_ray.datasets import (
    DataSource,
    LabelledImages,
    SourceArrays,
    as_source_arrays,
    comes_in_parts,
    load_source,
)
from lifelong_ray.feedback import to_model_input
from lifelong_ray.learning import Labelled, keep_freed_memory
from lifelong_ray.scenarios import Kind, Scenario, grow, load_scenario, split

keep_freed_memory()

DATA_HELP = (
    "An .npz, what else data.source takes, cifar100-50+50, or continuum:package.module:function."
)
SIZE_HELP = "Scale images to squares of so many pixels; 0 takes them as they are."
DEFAULT_FOLDER = DataConfig().folder
_LEAST_EXPERIENCES = 2


def data_config(data: str, fraction: float, folder: str = DEFAULT_FOLDER) -> DataConfig:
    """What is to be loaded, as the configuration's branch."""
    return DataConfig(source=data, fraction=fraction, folder=folder)


def load_arrays(config: DataConfig, image_size: int = 0) -> SourceArrays:
    """Load whatever `data.source` accepts, whole or a share of it.

    Args:
        config: What to load.
        image_size: Pixels, to which images are scaled as in training and serving; 0 takes them
            as they are, which must be squares of one size.
    """
    source = load_source(config, seed=0)
    if image_size:
        has_colour = any(image.shape[2] > 1 for image in source.train.images)
        channels = 3 if has_colour else 1
        source = DataSource(
            _scaled(source.train, image_size, channels), _scaled(source.test, image_size, channels)
        )
    sizes = {i.shape for part in (source.train, source.test) for i in part.images}
    if len(sizes) > 1 or any(height != width for height, width, _ in sizes):
        raise typer.BadParameter(
            f"{config.source} has images of the shapes {sorted(sizes)[:3]} (height, width, "
            "channels); give the side of the square that all are to be scaled to as --image-size"
        )
    return as_source_arrays(source)


def _scaled(images: LabelledImages, size: int, channels: int) -> LabelledImages:
    pixels = [to_model_input(image, size, channels).transpose(1, 2, 0) for image in images.images]
    return LabelledImages.from_array(np.stack(pixels), images.labels)


def cut_scenario(
    config: DataConfig,
    kind: Kind,
    num_experiences: int,
    order_seed: int = 0,
    image_size: int = 0,
) -> tuple[Scenario, int]:
    """Load data as a sequence of experiences.

    Data that comes in parts by itself (CIFAR-100 as 50 + 50 classes, a scenario of continuum)
    keeps them; any other is cut into so many groups of classes.

    Returns:
        The scenario, and how many classes the data has.
    """
    if comes_in_parts(config):
        _refuse_scaling(config, image_size)
        scenario = load_scenario(config, seed=0, kind=kind)
        found = len(scenario.experiences)
        if found < _LEAST_EXPERIENCES:
            raise typer.BadParameter(
                f"{config.source} has {found} experience; at least 2 are needed to forget one"
            )
        print(f"{config.source} says itself which classes arrive when: {found} experiences")
        return scenario, len(scenario.class_names)
    arrays = load_arrays(config, image_size)
    scenario = split(arrays, kind, num_experiences, order=order_seed or None)
    return scenario, len(arrays.class_names)


def _refuse_scaling(config: DataConfig, image_size: int) -> None:
    if image_size:
        raise typer.BadParameter(
            f"{config.source} is taken as it is; leave out --image-size, and scale the images "
            "before they enter a scenario"
        )


def growing_scenario(config: DataConfig, new_classes: str, image_size: int = 0) -> Scenario:
    """Load data as two experiences, the second of which brings only classes that are new.

    Args:
        config: What to load.
        new_classes: Names of the classes that arrive later, comma-separated; must be empty
            where the data says so itself.
        image_size: As in `load_arrays`.
    """
    if not comes_in_parts(config):
        if not new_classes:
            raise typer.BadParameter("--new-classes is empty; name the labels that arrive later")
        return grow(load_arrays(config, image_size), new_classes.split(","))
    _refuse_scaling(config, image_size)
    if new_classes:
        raise typer.BadParameter(
            f"{config.source} says itself which classes arrive later; leave out --new-classes"
        )
    # As known tasks, whose experiences have no class in common.
    scenario = load_scenario(config, seed=0, kind="task")
    if len(scenario.experiences) != 2:
        raise typer.BadParameter(
            f"{config.source} has {len(scenario.experiences)} experiences, and one update is "
            "measured, from the first to the second; benchmarks/continual.py takes any number"
        )
    return scenario


def as_tensors(images: NDArray[np.uint8], labels: NDArray[np.int64]) -> Labelled:
    """Images (N, H, W, C) as the learner takes them: (N, C, H, W)."""
    # A source's own array may be read-only, which torch does not take.
    own = images if images.flags.writeable else images.copy()
    return torch.from_numpy(own).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels)


def chosen_device(wanted: str) -> str:
    """Resolve --device: auto is cuda where there is one, else cpu."""
    if wanted not in ("auto", "cpu", "cuda"):
        raise typer.BadParameter(f"{wanted} is not a device; choose cpu, cuda or auto")
    if wanted != "auto":
        return wanted
    return "cuda" if torch.cuda.is_available() else "cpu"


def chosen_precision(wanted: str, device: str) -> Literal["fp32", "bf16"]:
    """Resolve --precision: auto is bf16 where the device multiplies in it, else fp32."""
    if wanted not in ("auto", "fp32", "bf16"):
        raise typer.BadParameter(f"{wanted} is not a precision; choose fp32 or bf16")
    if wanted != "auto":
        return "bf16" if wanted == "bf16" else "fp32"
    if device == "cuda":
        able = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
        return "bf16" if able else "fp32"
    flags = Path("/proc/cpuinfo")
    has = flags.exists() and re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", flags.read_text())
    return "bf16" if has else "fp32"


def set_up(**more: object) -> dict[str, object]:
    """When, how and on what a benchmark ran; of paths only the file's name is told."""
    arguments = [Path(word).name if os.sep in word else word for word in sys.argv[1:]]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *arguments]),
        "cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "gpu": gpu,
        "python": platform.python_version(),
        "torch": torch.__version__.split("+")[0],
        **more,
    }


def write(out: Path | None, report: dict[str, Any]) -> None:
    """Write a report as JSON."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        print(f"written to {out}")


def skip(out: Path | None, setup: dict[str, object], reason: str) -> None:
    """Report that a command measured nothing, and why."""
    print(f"skipped: {reason}")
    write(out, {"setup": setup, "skipped": reason})


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Rows as a Markdown table; numbers to the right."""
    lines = ["| " + " | ".join(columns) + " |", "|---|" + "---:|" * (len(columns) - 1)]
    lines += ["| " + " | ".join(_shown(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def mean_and_std(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    """Mean and sample standard deviation; None where a value is missing."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None, None
    spread = float(np.std(known, ddof=1)) if len(known) > 1 else 0.0
    return float(np.mean(known)), spread


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """Run `work`; return what it gives and its seconds."""
    began_s = time.perf_counter()
    result = work()
    return result, time.perf_counter() - began_s


def _shown(cell: object) -> str:
    if cell is None:
        return "-"
    if isinstance(cell, float):
        return f"{cell:.3f}" if abs(cell) < 100 else f"{cell:,.0f}"
    return f"{cell:,}" if isinstance(cell, int) else str(cell)

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
from lifelong_ray.datasets import SourceArrays, as_source_arrays, load_source
from lifelong_ray.learning import Labelled, keep_freed_memory

keep_freed_memory()


def load_arrays(data: str, fraction: float) -> SourceArrays:
    """Load whatever `data.source` accepts, whole or a share of it; images must be square."""
    arrays = as_source_arrays(load_source(DataConfig(source=data, fraction=fraction), seed=0))
    height, width = arrays.train_images.shape[1:3]
    if height != width:
        raise typer.BadParameter(
            f"the images of {Path(data).name} are {height} pixels high and {width} wide, and the "
            "models take square ones; scale or pad them to a square and save them anew"
        )
    return arrays


def as_tensors(images: NDArray[np.uint8], labels: NDArray[np.int64]) -> Labelled:
    """Images (N, H, W, C) as the learner takes them: (N, C, H, W)."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels)


def native_precision() -> Literal["fp32", "bf16"]:
    """bf16 where the device multiplies in it, else fp32."""
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
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

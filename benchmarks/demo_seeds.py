"""Run the demo with several seeds and put the figures side by side.

    python benchmarks/demo_seeds.py --seeds 0,1,2 --out benchmarks/results/demo.json

Writes every run's ``report.json`` into one file with the machine it ran on, prints
the table, and with ``--readme`` puts that table between the README's markers.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer

_BEGIN, _END = "<!-- demo-figures:begin -->", "<!-- demo-figures:end -->"
_ROWS: tuple[tuple[str, str, str], ...] = (
    ("retention of the old classes", "retention", "at least 0.95"),
    ("old classes as before: before the update", "old_class_accuracy_before", ""),
    ("old classes as before: after it", "old_class_accuracy_after", ""),
    ("old classes, drifted: before the update", "drifted_old_class_accuracy_before", ""),
    ("old classes, drifted: after it", "drifted_old_class_accuracy_after", ""),
    ("new classes", "new_class_accuracy", "at least 0.90"),
    ("all test images: after the update", "all_accuracy_after", ""),
    ("all test images: full retraining", "full_retrain_accuracy", ""),
    ("update, CPU seconds of learning", "incremental_seconds", ""),
    ("the same, measured beside the traffic", "incremental_seconds_beside_traffic", ""),
    ("full retraining, CPU seconds of learning", "full_retrain_seconds", ""),
    ("cost share in seconds", "cost_share", "at most 0.2"),
    (
        "full retraining, CPU seconds until as good as the update",
        "full_retrain_seconds_to_update_accuracy",
        "",
    ),
    ("cost share in samples", "cost_share_samples", "at most 0.3"),
    ("requests", "requests_total", ""),
    ("failed requests", "requests_failed", "0"),
    ("damaged candidate, past the gate", "bad_candidate_outcome", "aborted"),
    ("rollback, seconds", "rollback_seconds", ""),
    ("whole demo, seconds", "wall_seconds", "under 300"),
)


def main(
    seeds: Annotated[str, typer.Option(help="Comma-separated.")] = "0,1,2",
    data: Annotated[str, typer.Option(help="As in lifelong demo.")] = "digits",
    out: Annotated[Path, typer.Option(help="JSON to write.")] = Path(
        "benchmarks/results/demo.json"
    ),
    pictures: Annotated[
        Path | None, typer.Option(help="Folder for the first seed's pictures.")
    ] = None,
    readme: Annotated[Path | None, typer.Option(help="File whose table to replace.")] = None,
) -> None:
    """Run the demo once per seed, one after the other."""
    reports: list[dict[str, Any]] = []
    for seed in (int(part) for part in seeds.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            demo = Path(folder) / "demo"
            subprocess.run(
                [
                    *(str(Path(sys.executable).parent / "lifelong"), "demo"),
                    *("--out", str(demo), "--seed", str(seed), "--data", data),
                ],
                check=False,  # a missed aim is a figure too
            )
            reports.append(json.loads((demo / "report.json").read_text(encoding="utf-8")))
            if pictures is not None and len(reports) == 1:
                pictures.mkdir(parents=True, exist_ok=True)
                for picture in demo.glob("*.png"):
                    shutil.copy(picture, pictures / picture.name)
    setup = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"setup": setup, "runs": reports}, indent=1) + "\n", encoding="utf-8")
    table = _table(reports, setup)
    print(table)
    if readme is not None:
        text = readme.read_text(encoding="utf-8")
        before, rest = text.split(_BEGIN)
        after = rest.split(_END)[1]
        readme.write_text(f"{before}{_BEGIN}\n{table}\n{_END}{after}", encoding="utf-8")


def _table(reports: list[dict[str, Any]], setup: dict[str, Any]) -> str:
    lines = [
        f"Measured {setup['date']} on {setup['cpus']} cores ({setup['machine']}), "
        f"Python {setup['python']}:",
        "",
        "| what | " + " | ".join(f"seed {r['seed']}" for r in reports) + " | aim |",
        "|---|" + "---:|" * len(reports) + "---|",
    ]
    for what, key, aim in _ROWS:
        cells = " | ".join(_shown(r[key]) for r in reports)
        lines.append(f"| {what} | {cells} | {aim} |")
    return "\n".join(lines)


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3f}" if value < 10 else f"{value:.1f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


if __name__ == "__main__":
    typer.run(main)

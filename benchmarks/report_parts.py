"""What every section of the report is made of."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

OURS, OTHERS = "#4878a8", "#b04040"


def said(setup: dict[str, Any]) -> str:
    """When, how and on what a benchmark ran."""
    facts = ("seeds", "iterations", "memory_per_class", "epochs", "memory_share", "num_features")
    facts += ("source", "mirror", "shots", "precision", "rounds", "seconds")
    found = [f"{worded(key)} {setup[key]}" for key in facts if setup.get(key)]
    how = f"\n\n    {setup['command']}" if "command" in setup else ""
    where = f"on {setup['cpus']} cores, torch {setup['torch']}"
    if setup.get("device", "cpu") != "cpu" and setup.get("gpu", "none") != "none":
        where = f"on one {setup['gpu']}, torch {setup['torch']}"
    return f"Measured {setup['date']} {where}{': ' if found else ''}{', '.join(found)}.{how}"


def worded(key: str) -> str:
    """A key as words."""
    return key.replace("_", " ")


def save(figure: Any, path: Path) -> None:
    """Write a picture that is the same wherever it is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def number(value: float | None, digits: int = 2) -> str:
    """A figure, or that there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


Section = tuple[str, str, Callable[[dict[str, Any]], str]]


def sections(results: Path, wanted: Sequence[Section]) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Name, figures and text of each section whose result is there.

    Args:
        results: Folder of JSON files.
        wanted: Of each the file's name, what stands above the figures, and what makes text of them.
    """
    for name, intro, section in wanted:
        path = results / f"{name}.json"
        if path.exists():
            report = json.loads(path.read_text(encoding="utf-8"))
            yield name, report, f"\n{intro}\n{said(report['setup'])}\n\n{section(report)}\n"

"""What the demo leaves behind: ``report.json``, three pictures, a table.

Draws what it is given; measures nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from lifelong_ray.demo.story import Story, aims
from lifelong_ray.demo.traffic import SentRequest

mpl.use("Agg")

_WINDOW_S = 4.0
_STEP_S = 1.0
_COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377")


def write_reports(story: Story, out: Path) -> list[Path]:
    """Write every file of the report and return their paths."""
    paths = [out / "report.json"]
    paths[0].write_text(json.dumps(story.figures, indent=1) + "\n", encoding="utf-8")
    pictures: tuple[tuple[str, Callable[[Figure, Story], None], tuple[float, float]], ...] = (
        ("accuracy_over_time.png", _draw_accuracy, (11, 5)),
        ("traffic_share.png", _draw_shares, (11, 4.2)),
        ("cost.png", _draw_cost, (10, 4.2)),
    )
    for name, draw, size in pictures:
        figure = Figure(figsize=size, dpi=110, layout="constrained")
        draw(figure, story)
        figure.savefig(out / name)
        paths.append(out / name)
    return paths


def print_table(figures: Mapping[str, Any], console: Console) -> None:
    """Print the figures that matter, with what each is measured against."""
    table = Table(title="lifelong demo", title_justify="left")
    table.add_column("what")
    table.add_column("measured", justify="right")
    table.add_column("aim", justify="right")
    f = figures
    bounds = {aim.figure: f"{aim.bound} {'✓' if aim.met else '✗'}" for aim in aims(f)}
    rollback = f"{f['rollback_seconds']:.2f} s" if "rollback_seconds" in f else "-"
    level = f["full_retrain_seconds_to_update_accuracy"]
    rows = (
        ("stable", f"{f['base_version']} → {f['promoted_version']}", "promoted_version"),
        ("learned by", f"{f['update_path']} path", ""),
        (
            "old classes, as before",
            f"{f['old_class_accuracy_before']:.3f} → {f['old_class_accuracy_after']:.3f}",
            "",
        ),
        ("retention", f"{f['retention']:.3f}", "retention"),
        (
            "old classes, drifted",
            f"{f['drifted_old_class_accuracy_before']:.3f} → "
            f"{f['drifted_old_class_accuracy_after']:.3f}",
            "",
        ),
        ("new classes", f"{f['new_class_accuracy']:.3f}", "new_class_accuracy"),
        (
            "all of it, against retraining",
            f"{f['all_accuracy_after']:.3f} against {f['full_retrain_accuracy']:.3f}",
            "",
        ),
        (
            "cost in seconds",
            f"{f['incremental_seconds']:.1f} of {f['full_retrain_seconds']:.1f} = "
            f"{f['cost_share']:.3f}",
            "cost_share",
        ),
        (
            "cost in samples",
            f"{f['incremental_samples_seen']:,} of {f['full_retrain_samples_seen']:,} = "
            f"{f['cost_share_samples']:.3f}",
            "cost_share_samples",
        ),
        (
            "retraining as good as the update",
            "never" if level is None else f"after {level:.1f} s",
            "",
        ),
        (
            "failed requests",
            f"{f['requests_failed']} of {f['requests_total']:,}",
            "requests_failed",
        ),
        (
            "damaged candidate",
            f"{f['bad_candidate_gate']} by the gate, {f['bad_candidate_outcome']} past it",
            "bad_candidate_outcome",
        ),
        ("rollback", rollback, ""),
        ("all in", f"{f['wall_seconds']:.0f} s", "wall_seconds"),
    )
    for what, measured, figure in rows:
        table.add_row(what, measured, bounds.get(figure, ""))
    console.print(table)


def _draw_accuracy(figure: Figure, story: Story) -> None:
    axes = figure.add_subplot()
    start_s = story.requests[0].at_s
    old = [r for r in story.requests if r.label in story.old_classes]
    new = [r for r in story.requests if r.label not in story.old_classes]
    for rows, name, colour in (
        (old, "old classes", _COLOURS[0]),
        (new, "new classes", _COLOURS[1]),
    ):
        times, shares = _rolling(rows, lambda r: float(r.answer == r.label))
        axes.plot(np.array(times) - start_s, shares, label=name, color=colour, linewidth=2)
    axes.set_ylim(-0.03, 1.03)
    axes.set_ylabel(f"accuracy of the answers, {_WINDOW_S:.0f} s window")
    _mark_moments(axes, story, start_s)
    axes.legend(loc="lower right")
    figure.suptitle("What users got: accuracy of old and new classes as versions change")


def _draw_shares(figure: Figure, story: Story) -> None:
    axes = figure.add_subplot()
    start_s = story.requests[0].at_s
    answered = [r for r in story.requests if r.version]
    versions = list(dict.fromkeys(r.version for r in answered))
    times: list[float] = []
    shares = []
    for version in versions:
        times, share = _rolling(answered, partial(_is_by, version))
        shares.append(share)
    axes.stackplot(
        np.array(times) - start_s,
        100 * np.array(shares),
        labels=versions,
        colors=_COLOURS[: len(versions)],
        alpha=0.85,
    )
    axes.set_ylim(0, 100)
    axes.set_ylabel("share of the answers, %")
    _mark_moments(axes, story, start_s)
    axes.legend(loc="upper left")
    figure.suptitle("Traffic share by version")


def _draw_cost(figure: Figure, story: Story) -> None:
    f = story.figures
    samples = {
        name: f[f"{name}_path"]["samples_seen"] for name in ("fast", "slow") if f[f"{name}_path"]
    }
    left, middle, right = figure.subplots(1, 3)
    for axes, unit, parts, total in (
        (left, "CPU seconds", f["path_seconds"], f["full_retrain_seconds"]),
        (middle, "samples seen", samples, f["full_retrain_samples_seen"]),
    ):
        bottom = 0.0
        for (name, part), colour in zip(parts.items(), _COLOURS[2:], strict=False):
            axes.bar("update", part, bottom=bottom, color=colour, label=f"{name} path")
            bottom += part
        axes.bar("full retraining", total, color=_COLOURS[0])
        axes.text(0, bottom, f"{100 * bottom / total:.0f} %", ha="center", va="bottom")
        axes.set_ylabel(unit)
        axes.legend(loc="upper left")
    names = ["old", "old, drifted", "new"]
    before = [f["old_class_accuracy_before"], f["drifted_old_class_accuracy_before"], 0.0]
    after = [
        f["old_class_accuracy_after"],
        f["drifted_old_class_accuracy_after"],
        f["new_class_accuracy"],
    ]
    positions = np.arange(3)
    right.bar(positions - 0.2, before, 0.4, color=_COLOURS[3], label=f["base_version"])
    right.bar(positions + 0.2, after, 0.4, color=_COLOURS[2], label=f["candidate_version"])
    right.set_xticks(positions, names)
    right.set_ylim(0, 1.05)
    right.set_ylabel("test accuracy")
    right.legend(loc="lower left")
    figure.suptitle("What the update cost and what it gave")


def _is_by(version: str, request: SentRequest) -> float:
    return float(request.version == version)


def _rolling(
    rows: list[SentRequest], value: Callable[[SentRequest], float]
) -> tuple[list[float], list[float]]:
    """Mean of `value` over a sliding window; nan where the window is empty."""
    if not rows:
        return [], []
    at_s = np.array([r.at_s for r in rows])
    values = np.array([value(r) for r in rows])
    times = np.arange(at_s.min(), at_s.max(), _STEP_S)
    means = []
    for moment in times:
        inside = (at_s > moment - _WINDOW_S / 2) & (at_s <= moment + _WINDOW_S / 2)
        means.append(float(values[inside].mean()) if inside.any() else float("nan"))
    return times.tolist(), means


def _mark_moments(axes: Axes, story: Story, start_s: float) -> None:
    """Number the moments above the axes and list them beside."""
    axes.set_xlabel("seconds of traffic")
    axes.set_xlim(0, story.requests[-1].at_s - start_s)
    above = axes.get_xaxis_transform()
    previous_s, height = -np.inf, 1.03
    for number, (at_s, _) in enumerate(story.marks, start=1):
        x = at_s - start_s
        crowded = x - previous_s < 0.015 * (story.requests[-1].at_s - start_s)
        height = height + 0.055 if crowded else 1.03
        previous_s = x
        axes.axvline(x, color="0.7", linewidth=0.8, linestyle=":")
        axes.text(x, height, str(number), transform=above, ha="center", fontsize=8)
    moments = "\n".join(f"{n:2d}  {what}" for n, (_, what) in enumerate(story.marks, start=1))
    axes.text(1.015, 1.0, moments, transform=axes.transAxes, va="top", fontsize=8)

"""Write docs/benchmarks.md and its pictures from the results that are there.

    python benchmarks/report.py

Reads benchmarks/results/*.json and measures nothing. Sections whose results are missing are
left out.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from common import table
from matplotlib import pyplot as plt
from report_parts import OTHERS, OURS, said, save, worded
from report_release import release_sections
from report_serving import serving_sections

_INTRO = """# Benchmarks

Made by `python benchmarks/report.py` from `benchmarks/results/`. Every figure comes from a
command in this repository, on any `.npz` with `x_train`, `y_train`, `x_test` and `y_test`; seconds
are of two shared cores, so read ratios within one table and not seconds across them.
"""
_SCENARIOS = {
    "class": "Classes arrive a few at a time, and all that were seen compete for every answer.",
    "domain": "The same few answers are asked for all along; what they stand for comes in parts, "
    "other classes of the data behind each answer every time.",
    "task": "Classes arrive a few at a time, and a test image comes with the experience it is "
    "from, whose classes alone compete.",
}
_CONTINUAL = """
## Classes that arrive in parts

Training images are never shown again, but for those that a method remembers: as many per class as
stated below, a fifth of which `default` keeps as a hold-out. `datafree` keeps no image at all, and
neither do `naive`, `ewc` and `lwf`. `joint` sees everything at once. Retention is the accuracy on
what was known before an update, after it, as a share of that before it; the mean over updates.
"""
_UPDATE = """
## Updates against full retraining

A version that knows the other classes learns the new ones. `full` trains from nothing on
everything. `warm_...` goes on training on everything, for an epoch or for as many seconds as the
share says: the control that any update has to beat. `default_...` takes as many gradient steps as
that share has room for, and the fast path alone where it has room for none; `kept` is the path
whose result was taken. `datafree` keeps no old image. `within old` is retention with only the old
classes competing: what was forgotten, apart from what became confusable. In the picture updates are
blue, retraining and controls red.
"""
_FISHER = """## Cost of the Fisher

What the per-example squared gradients of some images cost, in forward and backward passes over the
same images in the faster memory format. `exact` sums over all ten labels, `sampled` draws one,
`empirical` takes the image's own; vmap and a loop over batches of one are general ways to the same
numbers. The error is against that loop in float64.
"""
_STEP = """## Cost of the EWC penalty

What the penalty adds to a training step of 128 images, from steps with and without it by turns.
`in place` adds the gradient in closed form, as the trainer does; `by autograd` is the textbook's
way. It weighs most in the MLP, which uses each of its many weights once per image: the penalty
reads and writes them all, and takes as long as the memory does.
"""
_GPU = """## Share of a GPU's peak

Operations of matrix products and convolutions per second, as a share of the device's documented
dense peak: of the trainer, of the Fisher's plain pass and of the plain step beside the EWC penalty.
Optimizer, normalisation and loss take time and count no operation.
"""
_UNLEARNING = """## Exact unlearning

A thousand random training images are taken out of the analytic head's sums, and the head is
compared with one that was never given them, in float64. `one image` is the live head, which takes
a single image out without solving anew.
"""


def main(
    results: Annotated[Path, typer.Option(help="Folder of JSON files.")] = Path(
        "benchmarks/results"
    ),
    docs: Annotated[Path, typer.Option(help="Folder for the report.")] = Path("docs"),
) -> None:
    """Write the report."""
    parts = [_INTRO]
    for kind, intro, section in (
        ("continual", _CONTINUAL, _continual),
        ("update", _UPDATE, _update),
    ):
        if paths := sorted(results.glob(f"{kind}_*.json")):
            parts += [intro, *(section(path, docs) for path in paths)]
    for kind, intro, rows_of, columns in _COSTS:
        runs = [
            json.loads(path.read_text(encoding="utf-8"))
            for path in sorted(results.glob(f"{kind}*.json"))
        ]
        if runs:
            parts.append(f"\n{intro}")
        parts += [_cost(run, rows_of(run), columns) for run in runs]
    parts += [*serving_sections(results, docs), *release_sections(results)]
    (docs / "benchmarks.md").write_text("\n".join(parts), encoding="utf-8")
    print(f"written {docs / 'benchmarks.md'}")


def _cost(report: dict[str, Any], rows: list[list[object]], columns: tuple[str, ...]) -> str:
    """Figures of a cost benchmark as a table, and what it could not measure."""
    parts = [said(report["setup"]), *([table(columns, rows)] if rows else [])]
    reached = [
        f"{model} {100 * share:.1f} %"
        for model, its in report.get("models", {}).items()
        if (share := its.get("plain_throughput", {}).get("share_of_peak")) is not None
    ]
    if reached:
        parts.append(f"Share of the device's peak without it: {', '.join(reached)}.")
    parts += _left_out(report)
    return "\n\n".join(parts) + "\n"


def _left_out(report: dict[str, Any]) -> list[str]:
    """A line for all that was skipped for the same reason."""
    cases: dict[str, list[str]] = {}
    for model, its in report.get("models", {}).items():
        if "skipped" in its:
            cases.setdefault(its["skipped"], []).append(model)
        for case, found in its.items():
            if isinstance(found, dict) and "skipped" in found:
                cases.setdefault(found["skipped"], []).append(f"{model} {worded(case)}")
    return [f"Skipped: {', '.join(names)}: {reason}." for reason, names in cases.items()]


def _continual(path: Path, docs: Path) -> str:
    report = json.loads(path.read_text(encoding="utf-8"))
    if "skipped" in report:
        return _skipped(path, report)
    setup, methods = report["setup"], report["methods"]
    keys = ("final_accuracy_mean", "final_accuracy_std", "retention_mean", "forgetting_mean")
    keys += ("plasticity_mean", "train_seconds", "samples_seen")
    rows = [[name, *(figures[key] for key in keys)] for name, figures in methods.items()]
    picture = f"images/{path.stem}.png"
    _bars(
        {name: figures["final_accuracy_mean"] for name, figures in methods.items()},
        {name: figures["final_accuracy_std"] or 0.0 for name, figures in methods.items()},
        "final accuracy",
        docs / picture,
    )
    title = f"{setup['data']}, {setup['scenario']}-incremental, {setup['experiences']} experiences"
    columns = ("method", "final accuracy", "std", "retention", "forgetting", "plasticity")
    return (
        f"\n### {title}\n\n{_SCENARIOS[setup['scenario']]}\n\n"
        f"{said(setup)}\n\n{_of_avalanche(setup, methods)}"
        f"{table([*columns, 'seconds', 'samples'], rows)}\n\n![final accuracy]({picture})\n"
    )


def _of_avalanche(setup: dict[str, Any], methods: dict[str, Any]) -> str:
    """Say how Avalanche's strategies ran, where that is not how ours did."""
    if not any(name.startswith("avalanche ") for name in methods):
        return ""
    theirs = setup.get("avalanche", {}).get("precision", "fp32")
    ours = setup.get("precision", "fp32")
    if theirs == ours:
        return f"Avalanche's strategies computed in {theirs} too.\n\n"
    return (
        f"Avalanche's strategies computed in {theirs} and ours in {ours}, so read their seconds "
        "with care.\n\n"
    )


def _skipped(path: Path, report: dict[str, Any]) -> str:
    """Say in place of figures why there are none."""
    setup = report["setup"]
    return f"\n### {setup['data']}: {path.stem}\n\n{said(setup)}\n\nSkipped: {report['skipped']}.\n"


def _update(path: Path, docs: Path) -> str:
    report = json.loads(path.read_text(encoding="utf-8"))
    if "skipped" in report:
        return _skipped(path, report)
    setup, methods = report["setup"], report["methods"]
    keys = ("seconds_share", "samples_seen", "accuracy", "old_accuracy", "new_accuracy")
    keys += ("retention", "retention_within_old", "points_over_full")
    rows = [
        [name, figures.get("kept", "-"), *(figures[key] for key in keys)]
        for name, figures in methods.items()
    ]
    picture, shown = f"images/{path.stem}.png", ""
    if any(figures["seconds_share"] is not None for figures in methods.values()):
        _scatter(methods, docs / picture)
        shown = f"\n![accuracy against share of seconds]({picture})\n"
    columns = ("method", "kept", "share of seconds", "samples", "all", "old", "new", "retention")
    title = f"{setup['data']}: new classes {setup['new_classes']}"
    if setup.get("shots"):
        title += f", {setup['shots']} examples of each"
    return (
        f"\n### {title}\n\n{said(setup)}\n\n"
        f"{table([*columns, 'within old', 'points over full'], rows)}\n{shown}"
    )


def _bars(values: dict[str, float], spreads: dict[str, float], label: str, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 0.4 * len(values) + 1))
    names = list(values)[::-1]
    axes.barh(names, [values[n] for n in names], xerr=[spreads[n] for n in names], color=OURS)
    for position, name in enumerate(names):
        axes.text(0.01, position, f"{values[name]:.3f}", va="center", color="white", fontsize=8)
    axes.set_xlim(0, 1)
    axes.set_xlabel(label)
    save(figure, path)


def _scatter(methods: dict[str, Any], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 4))
    named: dict[tuple[float, float], list[str]] = {}
    for name, figures in methods.items():
        share, reached = figures["seconds_share"], figures["accuracy"]
        if share is None:
            continue
        colour = OTHERS if name.startswith(("warm", "full")) else OURS
        axes.scatter(share, reached, color=colour)
        # Points that lie on one another share a label.
        near = (p for p in named if abs(p[1] - reached) < 5e-4 and 0.7 < p[0] / share < 1.4)
        named.setdefault(next(near, (share, reached)), []).append(name)
    for place, names in named.items():
        axes.annotate(
            ", ".join(names), place, textcoords="offset points", xytext=(5, 4), fontsize=8
        )
    axes.margins(x=0.15)
    axes.set_xscale("log")
    axes.set_xlabel("seconds, as a share of full retraining")
    axes.set_ylabel("accuracy on all classes")
    axes.grid(alpha=0.3)
    save(figure, path)


def _fisher_rows(report: dict[str, Any]) -> list[list[object]]:
    return _by_way(
        report,
        lambda figures: [
            f"{figures['seconds_median']:.3f}",
            f"{figures['ratio_to_plain_pass']:.2f}",
            _error(figures.get("max_relative_error")),
        ],
    )


def _step_rows(report: dict[str, Any]) -> list[list[object]]:
    return _by_way(
        report,
        lambda figures: [
            f"{figures['plain_step_ms_median']:.1f}",
            f"{figures['penalty_ms_median']:.2f}",
            f"{100 * figures['share_of_plain_step']:.1f}",
            f"{100 * figures['share_of_plain_step_upper_95']:.1f}",
        ],
    )


def _by_way(
    report: dict[str, Any], cells: Callable[[dict[str, Any]], list[object]]
) -> list[list[object]]:
    """One row for each model and each way of doing it."""
    return [
        [model, worded(way), *cells(figures)]
        for model, its in report["models"].items()
        for way, figures in its.get("ways", {}).items()
    ]


def _gpu_rows(report: dict[str, Any]) -> list[list[object]]:
    return [
        [model, worded(case), *_shares(found["plain_throughput"])]
        for model, its in report["models"].items()
        for case, found in its.items()
        if "skipped" not in found
    ]


def _shares(figures: dict[str, Any]) -> list[object]:
    peak, share = figures["peak_tflops_per_second"], figures["share_of_peak"]
    return [
        f"{figures['tflops_per_second']:.1f}",
        "-" if peak is None else f"{peak:.0f}",
        "-" if share is None else f"{100 * share:.1f}",
    ]


def _unlearning_rows(report: dict[str, Any]) -> list[list[object]]:
    return [
        [
            run["seed"],
            f"{run['max_weight_difference']:.1e}",
            f"{run['erase_seconds']:.3f}",
            f"{1_000 * run['live_erase_one_seconds']:.1f}",
            f"{run['relearn_seconds']:.2f}",
        ]
        for run in report["runs"]
    ]


def _error(value: float | None) -> str:
    return "-" if value is None else f"{value:.0e}"


_COSTS = (
    (
        "fisher",
        _FISHER,
        _fisher_rows,
        ("model", "way", "seconds", "in plain passes", "largest relative error"),
    ),
    (
        "ewc_step",
        _STEP,
        _step_rows,
        ("model", "way", "plain step, ms", "penalty, ms", "share, %", "upper 95 % bound, %"),
    ),
    (
        "gpu",
        _GPU,
        _gpu_rows,
        ("model", "case", "TFLOP/s", "peak, TFLOP/s", "share of peak, %"),
    ),
    (
        "unlearning",
        _UNLEARNING,
        _unlearning_rows,
        ("seed", "largest difference", "erasing, s", "one image, ms", "learning anew, s"),
    ),
)


if __name__ == "__main__":
    typer.run(main)

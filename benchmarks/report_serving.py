"""The sections of the report, and the picture, on serving, and on what makes it faster."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from common import table
from matplotlib import pyplot as plt
from report_parts import OTHERS, OURS, number, save, sections

_BARE, _OTHER, _SPREAD = "#a9c1da", "#8a8a8a", "#303030"
_PICTURE = "images/serving.png"
_MOST_ACCOUNT, _LEAST_OF_TORCH = 0.1, 0.9
_TITLES = {
    "tiny-png": "Tiny model, PNG of 32x32 pixels",
    "tiny-jpeg": "Tiny model, JPEG of 224x224 pixels",
    "resnet18-png": "ResNet-18, PNG of 32x32 pixels, one thread",
    "resnet18-png-2": "ResNet-18, PNG of 32x32 pixels, two threads",
}
_NAMES = {
    "lifelong_ray": "lifelong_ray",
    "lifelong_ray_bare": "without log, assignment, metrics",
    "lifelong_ray_thread": "models on a thread",
    "ray": "Ray Serve",
    "fastapi": "FastAPI",
    "fastapi_batch": "FastAPI, batches by hand",
    "litserve": "LitServe",
    "bentoml": "BentoML",
}
_SERVING = """## Serving

`POST /predict` of one version of a model, beside other servers of the same version. Server and
client share the machine; the client is a closed loop of so many connections, and sends every image
once, so that nothing remembered helps. Ours runs with everything on: checks of what is sent, signed
request ids, assignment, prediction log with images, metrics, release controller. The others decode
with Pillow, answer, and keep nothing. `without log, assignment, metrics` is ours with these three
taken out, and its images not sent back for the log; no rollout is under way, so that assignment is
the cheap case. Figures are medians of rounds, which are interleaved; in brackets the lowest and the
highest round. `torch` is the model alone on batches of 32, without a server.
"""
_THREAD = """## Models beside the event loop

The same application with its models in a process of their own, as it is by default, and on a thread
of the front's process (`serving.model_process: false`).
"""
_PRECISION = """## Serving precision

What a front runs, arrays in and probabilities out, by precision and memory layout, on one thread
of a CPU; the ways take turns. `times` is against fp32 in contiguous memory.
"""
_CASCADE = """## A light model beside a heavy one

The light model answers where it is sure, the heavy one the rest. The threshold is chosen on one
half of a hold-out and measured on the other (`stated`); test images, which neither saw, say what it
came to. Images per second are of one thread, in batches of that size.
"""
_IMAGE_LOG = """## Images in the log

One Parquet file of a thousand images, compressed with zstd, made and read again. `rows` is what the
log writes: every row of pixels less the row above; `png` is what files of version 0.1 have, at the
fastest level; `plain` is the pixels as they are.
"""


def serving_sections(results: Path, docs: Path) -> Iterator[str]:
    """One section for each result that is there; writes the picture.

    Args:
        results: Folder of JSON files.
        docs: Folder of the report.
    """
    for name, report, text in sections(results, _SECTIONS):
        yield text
        if name == "serving":
            _draw(report, docs / _PICTURE)
            yield f"![Requests per second and latency of every server]({_PICTURE})\n"


# -- serving ---------------------------------------------------------------------------


def _serving(report: dict[str, Any]) -> str:
    parts = []
    for case, servers in report["cases"].items():
        parts += [f"### {_TITLES.get(case, case)}", _servers_table(servers)]
        if alone := servers.get("torch"):
            parts.append(f"`torch`: {_spread(alone, 'images_per_s')} images/s.")
    parts += ["### Ours against the others", _ratios_table(report), _verdict(report)]
    parts += _skipped(report)
    return "\n\n".join(parts)


def _thread(report: dict[str, Any]) -> str:
    parts = [_servers_table(servers) for servers in report["cases"].values()]
    gains = [
        f"{its['requests_over_lifelong_ray_thread']:.1f} at {count}"
        for _, count, its in _ratios(report)
        if its.get("requests_over_lifelong_ray_thread") is not None
    ]
    parts.append(
        f"The process answers this many times the requests, by connections: {', '.join(gains)}. It "
        "costs the memory of one more process with PyTorch."
    )
    return "\n\n".join(parts)


def _servers_table(servers: Mapping[str, Any]) -> str:
    rows = [
        [
            _NAMES.get(name, name),
            count,
            _spread(its, "requests_per_s"),
            "-" if its["p50_ms"] is None else f"{its['p50_ms']:.1f}",
            _spread(its, "p99_ms"),
            its["errors"],
        ]
        for name, found in servers.items()
        for count, its in found.get("connections", {}).items()
    ]
    return table(("server", "connections", "requests/s", "p50, ms", "p99, ms", "errors"), rows)


def _spread(figures: Mapping[str, Any], key: str) -> str:
    """A median and its lowest and highest round."""
    if figures[key] is None:
        return "-"
    rounds = [value for value in figures[f"rounds_{key}"] if value is not None]
    digits = 0 if figures[key] >= 100 else 1
    middle, low, high = (f"{one:,.{digits}f}" for one in (figures[key], min(rounds), max(rounds)))
    return f"{middle} ({low}-{high})" if len(rounds) > 1 else middle


def _ratios_table(report: dict[str, Any]) -> str:
    others = [
        name
        for name in _NAMES
        if any(f"requests_over_{name}" in its for _, _, its in _ratios(report))
    ]
    rows = [
        [
            case,
            count,
            *(
                f"{number(its.get(f'requests_over_{name}'))} / "
                f"{number(its.get(f'p99_over_{name}'))}"
                for name in others
            ),
            _account(its),
            _percent(its.get("share_of_torch")) if case.startswith("resnet") else "-",
        ]
        for case, count, its in _ratios(report)
    ]
    named = [f"{_NAMES[name]}: requests/s, p99" for name in others]
    columns = ("case", "connections", *named, "cost of log and so on, %", "of torch, %")
    return table(columns, rows)


def _ratios(report: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for case, by_count in report["ratios"].items():
        for count, its in by_count.items():
            yield case, count, its


def _verdict(report: dict[str, Any]) -> str:
    """What was aimed at and where it is missed, from the figures."""
    shares = {
        (case, count): its["account_share"]
        for case, count, its in _ratios(report)
        if its.get("account_share") is not None
    }
    of_torch = {
        (case, count): its["share_of_torch"]
        for case, count, its in _ratios(report)
        if case.startswith("resnet") and its.get("share_of_torch") is not None
    }
    slower = {
        (case, count): its["requests_over_ray"]
        for case, count, its in _ratios(report)
        if its.get("requests_over_ray") is not None
    }
    said_so = [
        _missed(
            "Log, assignment and metrics are to cost at most 10 % of the requests per second",
            {key: share for key, share in shares.items() if share > _MOST_ACCOUNT},
            shares,
        ),
        _missed(
            "The ResNet is to answer at least 90 % of the images per second of the model alone",
            {key: share for key, share in of_torch.items() if share < _LEAST_OF_TORCH},
            of_torch,
        ),
        _missed(
            "No fewer requests are to be answered than by bare Ray Serve",
            {key: ratio for key, ratio in slower.items() if ratio < 1},
            slower,
        ),
    ]
    ours = [found["lifelong_ray"] for found in report["cases"].values() if "lifelong_ray" in found]
    unlogged = sum(its.get("not_logged", 0) for its in ours)
    said_so.append(
        f"The queue of the log had no room for {unlogged:,} predictions, which were answered and "
        "not logged: there the cost of the log is understated."
        if unlogged
        else "Every prediction was logged."
    )
    return " ".join(filter(None, said_so))


def _missed(aim: str, misses: Mapping[Any, float], measured: Mapping[Any, float]) -> str:
    if not measured:
        return ""
    if not misses:
        return f"{aim}: reached everywhere."
    where = ", ".join(
        f"{case} at {count} ({100 * value:.0f} %)" for (case, count), value in misses.items()
    )
    return f"{aim}: missed in {len(misses)} of {len(measured)}: {where}."


def _skipped(report: dict[str, Any]) -> list[str]:
    reasons = {
        _NAMES.get(name, name): found["skipped"]
        for servers in report["cases"].values()
        for name, found in servers.items()
        if "skipped" in found
    }
    return [f"Skipped: {name}: {reason}." for name, reason in reasons.items()]


def _draw(report: dict[str, Any], path: Path) -> None:
    """One row of panels for each case and figure, one column for each number of connections."""
    cases = report["cases"]
    tiny = [case for case in cases if case.startswith("tiny")]
    rows = [(case, key) for case in tiny for key in ("requests_per_s", "p99_ms")]
    rows += [(case, "requests_per_s") for case in cases if case not in tiny]
    counts = report["setup"]["connections"]
    figure, grid = plt.subplots(
        len(rows), len(counts), figsize=(11, 1.75 * len(rows) + 0.5), squeeze=False
    )
    for (case, key), panels in zip(rows, grid, strict=True):
        for count, axes in zip(counts, panels, strict=True):
            _panel(axes, cases[case], str(count), key)
            # The empty line is for the title of the row.
            axes.set_title(f"\n{count} connection{'s' if count > 1 else ''}", fontsize=8)
            if axes is not panels[0]:
                axes.set_yticklabels([])
        what = "p99 latency, ms" if key == "p99_ms" else "requests/s"
        if case not in tiny:
            what += "; red: the model alone, dotted nine tenths of it"
        _above(panels[0], f"{_TITLES.get(case, case)}: {what}")
    rounds = report["setup"]["rounds"]
    shown = f"median of {rounds} rounds; lines: lowest to highest" if rounds > 1 else "one round"
    figure.supxlabel(f"bars: {shown}", fontsize=8)
    save(figure, path)


def _above(axes: Any, title: str) -> None:
    """Write over a whole row, which the layout would give to its first panel."""
    axes.annotate(
        title,
        (0, 1),
        xycoords="axes fraction",
        xytext=(0, 17),
        textcoords="offset points",
        fontsize=9,
    ).set_in_layout(False)


def _panel(axes: Any, servers: Mapping[str, Any], count: str, key: str) -> None:
    shown = [name for name in _NAMES if count in servers.get(name, {}).get("connections", {})]
    figures = {name: servers[name]["connections"][count] for name in reversed(shown)}
    colours = {"lifelong_ray": OURS, "lifelong_ray_bare": _BARE}
    lines = [] if _is_tiny(servers) else [1.0, _LEAST_OF_TORCH]
    top = 0.0
    for place, (name, its) in enumerate(figures.items()):
        if its[key] is None:
            continue
        found = [value for value in its[f"rounds_{key}"] if value is not None]
        axes.barh(place, its[key], color=colours.get(name, _OTHER), height=0.75)
        axes.plot([min(found), max(found)], [place, place], color=_SPREAD, linewidth=1)
        label = f"{its[key]:,.0f}" if its[key] >= 10 else f"{its[key]:.1f}"
        axes.annotate(
            label,
            (0 if lines else max(found), place),  # beside the bar, unless lines go there
            textcoords="offset points",
            xytext=(3, 0),
            va="center",
            fontsize=7,
            color="white" if lines and name != "lifelong_ray_bare" else "black",
        )
        top = max(top, *found)
    for share in lines:
        at = share * servers["torch"]["images_per_s"]
        axes.axvline(at, color=OTHERS, linestyle="-" if share == 1 else ":", linewidth=1)
        top = max(top, at)
    axes.set_yticks(range(len(figures)), [_NAMES[name] for name in figures], fontsize=7)
    axes.set_xlim(0, (1.05 if lines else 1.18) * (top or 1))
    axes.tick_params(axis="x", labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)


def _is_tiny(servers: Mapping[str, Any]) -> bool:
    """Whether the model alone is so fast that its line would be far outside."""
    if "torch" not in servers:
        return True
    best = max(
        (
            its["requests_per_s"] or 0
            for found in servers.values()
            for its in found.get("connections", {}).values()
        ),
        default=0,
    )
    return bool(servers["torch"]["images_per_s"] > 2 * best)


# -- the others ------------------------------------------------------------------------


def _precision(report: dict[str, Any]) -> str:
    rows, best = [], []
    for model, its in report["models"].items():
        for size, found in its["batches"].items():
            plain = found["fp32"]["contiguous"]["images_per_second"]
            ways = {
                (precision, layout): one
                for precision, layouts in found.items()
                for layout, one in layouts.items()
            }
            rows += [
                [
                    model,
                    size,
                    precision,
                    layout.replace("_", " "),
                    f"{one['ms_median']:.2f}",
                    f"{one['images_per_second']:,.0f}",
                    f"{one['images_per_second'] / plain:.2f}",
                ]
                for (precision, layout), one in ways.items()
            ]
            (precision, layout), fastest = max(
                ways.items(), key=lambda way: way[1]["images_per_second"]
            )
            best.append(
                f"{model} in batches of {size}: {precision}, {layout.replace('_', ' ')}, "
                f"{fastest['images_per_second'] / plain:.1f} times"
            )
    columns = ("model", "batch", "precision", "layout", "ms", "images/s", "times")
    return "\n\n".join(
        [
            table(columns, rows),
            f"Fastest is {'; '.join(best)}. What a lower precision gives depends on the model's "
            "size and on the processor's instructions. Accuracy is not measured here: the gate "
            "judges a version in each precision that it is to answer in. GPUs were not measured.",
        ]
    )


def _cascade(report: dict[str, Any]) -> str:
    rows = [
        [
            f"{100 * one['max_accuracy_loss']:.0f} %",
            one["precision"],
            size,
            f"{one['calibration']['light_share']:.2f} / {one['light_share']:.2f}",
            f"{100 * one['accuracy_alone']:.1f}",
            f"{100 * one['accuracy_together']:.1f}",
            f"{speed['alone']:,.0f}",
            f"{speed['together']:,.0f}",
            f"{speed['together'] / speed['alone']:.1f}",
        ]
        for one in report["results"]
        for size, speed in one["images_per_second"].items()
    ]
    columns = ("allowed loss", "precision", "batch", "light share, stated / tested")
    columns += ("accuracy alone, %", "together, %", "images/s alone", "together", "times")
    losses = [one["accuracy_alone"] - one["accuracy_together"] for one in report["results"]]
    within = all(
        loss <= one["max_accuracy_loss"]
        for loss, one in zip(losses, report["results"], strict=True)
    )
    setup = report["setup"]
    return "\n\n".join(
        [
            table(columns, rows),
            f"On {setup['testing']:,} test images the loss was at most {100 * max(losses):.1f} "
            f"points{', and within what was allowed every time' if within else ''}. Trained on "
            f"{setup['training']:,} images for a few epochs, the heavy model is far from its best; "
            "a better one leaves less to a light model, and the gain is smaller. One data set and "
            "one seed.",
        ]
    )


def _image_log(report: dict[str, Any]) -> str:
    rows, compared = [], []
    for name, found in report["data"].items():
        ways = found["ways"]
        rows += [
            [
                name,
                way,
                f"{its['bytes_per_image']:,.0f} of {found['pixel_bytes']:,}",
                f"{its['write_us_median']:.1f}",
                f"{its['read_us_median']:.1f}",
            ]
            for way, its in ways.items()
        ]
        size, time = (
            ways["rows"][key] / ways["png"][key] for key in ("bytes_per_image", "write_us_median")
        )
        compared.append(f"{name}: {size:.2f} times the bytes of PNG in {time:.2f} times the time")
    return "\n\n".join(
        [
            table(("data", "way", "bytes of an image", "writing, us", "reading, us"), rows),
            f"Rows less the row above take, on {'; '.join(compared)}. Small images only: what "
            "larger photographs come to was not measured.",
        ]
    )


def _account(its: Mapping[str, float | None]) -> str:
    """What log, assignment and metrics cost, with the lowest and highest round."""
    shares = [its.get(f"account_share{which}") for which in ("", "_lowest", "_highest")]
    return "-" if shares[0] is None else "{} ({} to {})".format(*map(_percent, shares))


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f}"


_SECTIONS = (
    ("serving", _SERVING, _serving),
    ("serving_thread", _THREAD, _thread),
    ("serving_precision", _PRECISION, _precision),
    ("cascade", _CASCADE, _cascade),
    ("image_log", _IMAGE_LOG, _image_log),
)

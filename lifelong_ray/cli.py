"""The ``lifelong`` command: argument parsing, wiring and printing only."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lifelong_ray.client import LifelongClient
from lifelong_ray.config import default_file, load_config
from lifelong_ray.cycle import CycleReport
from lifelong_ray.feedback import load_secrets, uuid7
from lifelong_ray.release import Experiment, Intent, Registry, ReleaseDesk
from lifelong_ray.storage import open_store
from lifelong_ray.types import ConfigError, LifelongError, VersionDamagedError, VersionError

app = typer.Typer(
    help="A classifier that keeps learning while it serves.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
rollout_app = typer.Typer(help="Take a version towards stable.", no_args_is_help=True)
app.add_typer(rollout_app, name="rollout")
experiment_app = typer.Typer(help="Several versions side by side.", no_args_is_help=True)
app.add_typer(experiment_app, name="experiment")
# Names, paths and messages are printed as they are: [b], :+1: and numbers mean nothing here.
console = Console(markup=False, emoji=False, highlight=False)

ConfigOption = Annotated[
    Path | None, typer.Option("--config", help="YAML file; see conf/local.yaml.")
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="section.key=value; may be repeated.")
]
ReasonOption = Annotated[str, typer.Option("--reason", help="Kept in the audit record.")]


@contextmanager
def reported_errors() -> Iterator[None]:
    """Print an expected error as one line and exit with 1; let the others show their trace."""
    try:
        yield
    except LifelongError as error:
        line = Text.assemble(("error:", "red"), f" {error}")
        Console(stderr=True).print(line, soft_wrap=True)
        raise typer.Exit(1) from None


def write_json(path: Path | None, value: object) -> None:
    """Write a result where ``--out`` says, if it does."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def print_cycle_report(report: CycleReport, out: Path | None) -> None:
    """Print what one training did, and write it to `out` as JSON."""
    write_json(out, report.to_json())
    table = Table(title=f"{report.kind} {report.version}", title_justify="left")
    for column in ("path", "hold-out", "validation", "seconds", "samples", "gate"):
        table.add_column(column, justify="left" if column in ("path", "gate") else "right")
    for name, path in report.paths.items():
        values: dict[str, Any] = dict(path)
        validation = values.get("validation_accuracy")
        table.add_row(
            f"{name}{' *' if name == report.path else ''}",
            f"{values['holdout_accuracy']:.3f}",
            "-" if validation is None else f"{validation:.3f}",
            f"{values['train_seconds'] + values['extra_seconds']:.2f}",
            f"{values['samples_seen']:,}",
            "passed" if values["gate_passed"] else "refused",
        )
    console.print(table)
    console.print(f"run {report.run_id}: {report.reason}", soft_wrap=True)
    if not report.released:
        console.print(
            f"{report.version} is registered but not offered for release: "
            f"{report.why_not_released}",
            soft_wrap=True,
        )


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the report, pictures and store.")] = Path(
        "runs/demo"
    ),
    seed: Annotated[int, typer.Option(help="Decides every random choice.")] = 0,
    data: Annotated[
        str, typer.Option(help="digits, torchvision:NAME, an .npz, or a folder of images.")
    ] = "digits",
    set_: SetOption = None,
    short: Annotated[bool, typer.Option(help="Less traffic; the same steps.")] = False,
) -> None:
    """Run the whole loop on real images and report what it did."""
    from lifelong_ray.demo.report import print_table, write_reports
    from lifelong_ray.demo.story import Pace, aims, demo_config, tell_story

    started_s = time.monotonic()

    def say(what: str) -> None:
        passed = f"{time.monotonic() - started_s:6.1f} s"
        console.print(Text.assemble((passed, "dim"), f"  {what}"))
        spinner.update(Text(what))  # a plain string would be read as markup

    with reported_errors(), console.status("starting") as spinner:
        # The Makefile quotes what it passes on, so that no shell has expanded a ~.
        out, data = out.expanduser(), os.path.expanduser(data)  # noqa: PTH111 - may be no path
        _make_demo_folder(out)
        config = demo_config(out, seed=seed, data=data, overrides=tuple(set_ or ()))
        pace = Pace(rate=25, calm_s=3, changed_s=20) if short else Pace()
        story = tell_story(config, out, seed=seed, pace=pace, say=say)
        paths = write_reports(story, out)
        print_table(story.figures, console)
        for path in paths:
            console.print(str(path))
        required = {"always"}
        if data == "digits" and not short and not set_:
            required.add("by default")
        missed = [a for a in aims(story.figures) if not a.met and a.required in required]
        if missed:
            shown = ", ".join(f"{a.figure} is not {a.bound}" for a in missed)
            raise LifelongError(f"the demo did not show what it should: {shown}")


def _make_demo_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        has_demo = (out / "store").exists()
    except OSError as error:
        raise LifelongError(
            f"--out {out} cannot be used as a folder ({error.strerror}); choose another"
        ) from None
    if has_demo:
        raise LifelongError(
            f"{out / 'store'} holds an earlier demo; remove {out} or choose another --out"
        )


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="File to write.")] = Path("lifelong.yaml"),
) -> None:
    """Write a configuration file with every setting at its default."""
    if path.exists():
        raise typer.BadParameter(f"{path} exists; choose another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(default_file(), encoding="utf-8")
    console.print(f"wrote {path}")


@app.command()
def status(
    config: ConfigOption = None,
    set_: SetOption = None,
    token: Annotated[
        bool, typer.Option(help="Print the operators' token and nothing else.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Write it as JSON.")] = None,
) -> None:
    """Say which version users see, and how far a rollout is."""
    with reported_errors():
        settings = load_config(config, tuple(set_ or ()))
        store = open_store(settings.store)
        if token:
            print(load_secrets(store, os.environ).admin_token)
            return
        document, _ = ReleaseDesk(store, time.time).read()
        write_json(out, document.model_dump(mode="json"))
        rollout = document.rollout
        console.print(f"store     {store.url}", soft_wrap=True)
        console.print(f"stable    {document.stable or 'none yet: train_job.py --base makes one'}")
        console.print(f"previous  {document.previous or '-'}")
        if rollout is None:
            console.print("rollout   -")
        else:
            console.print(
                f"rollout   {rollout.candidate}: {rollout.phase}, weight {rollout.weight} %, "
                f"step {rollout.step_index + 1} of {len(rollout.steps)}; {rollout.message}"
            )
        experiment = document.experiment
        if experiment is not None:
            arms = ", ".join(f"{arm.version} {arm.weight} %" for arm in experiment.arms)
            console.print(f"experiment {arms}; {experiment.message or 'under way'}")


@app.command()
def versions(config: ConfigOption = None, set_: SetOption = None) -> None:
    """List every registered version."""
    with reported_errors():
        registry = Registry(open_store(load_config(config, tuple(set_ or ())).store))
        table = Table()
        for column in ("version", "parent", "path", "classes", "hold-out", "gate"):
            table.add_column(column)
        for name in registry.versions():
            manifest = registry.manifest(name)
            accuracy = manifest.metrics.get("holdout_accuracy")
            passed = manifest.gate is not None and manifest.gate.passed
            table.add_row(
                name,
                manifest.parent or "-",
                manifest.path,
                str(len(manifest.class_names)),
                "-" if accuracy is None else f"{accuracy:.3f}",
                "passed" if passed else "refused",
            )
        console.print(table)


def _ask(config: Path | None, set_: list[str] | None, expected: str, **intent: object) -> None:
    """Leave a wish for the controller, and say what will come of it.

    Args:
        expected: What happens; may name the versions ``{stable}``, ``{previous}`` and
            ``{candidate}`` of the document.
    """
    with reported_errors():
        store = open_store(load_config(config, tuple(set_ or ())).store)
        now_s = time.time()
        asked = {"id": str(uuid7(now_s)), "actor": "cli", "at_s": now_s} | intent
        try:
            wish = Intent.model_validate(asked)
        except ValidationError as error:
            raise ConfigError("; ".join(str(e["msg"]) for e in error.errors())) from None
        document = ReleaseDesk(store, time.time).request(wish)
        rollout = document.rollout
        told = expected.format(
            stable=document.stable,
            previous=document.previous,
            candidate=wish.candidate or (rollout.candidate if rollout else "the candidate"),
        )
        console.print(f"{wish.verb} asked for; the rollout controller carries it out: {told}")


@rollout_app.command("start")
def rollout_start(
    candidate: Annotated[str, typer.Argument(help="A registered version.")],
    config: ConfigOption = None,
    set_: SetOption = None,
    reason: ReasonOption = "",
    steps: Annotated[
        str, typer.Option(help="YAML, as rollout.steps; those of the configuration if left out.")
    ] = "",
    force: Annotated[bool, typer.Option(help="Without a passed gate, too.")] = False,
) -> None:
    """Ask for the rollout of a version, step by step towards stable."""
    with reported_errors():
        parsed = _yaml_list("--steps", steps)
    _ask(
        config,
        set_,
        "{candidate} is loaded, then takes its steps beside {stable}; lifelong status follows it",
        verb="start",
        reason=reason,
        candidate=candidate,
        steps=parsed,
        force=force,
    )


@experiment_app.command("start")
def experiment_start(
    arm: Annotated[
        list[str],
        typer.Option(help="VERSION=PER_CENT; once per arm, stable among them, 100 together."),
    ],
    config: ConfigOption = None,
    set_: SetOption = None,
    reason: ReasonOption = "",
    hours: Annotated[float, typer.Option(help="After which it ends by itself.")] = 24.0,
    adaptive: Annotated[
        bool, typer.Option(help="Let weights follow what is seen (Thompson sampling).")
    ] = False,
    metric: Annotated[
        str, typer.Option(help="What adaptive weights go by: accuracy or corrections.")
    ] = "accuracy",
) -> None:
    """Ask for requests to be divided among versions, and measured; stable stays."""
    with reported_errors():
        arms = [_arm(text) for text in arm]
    _ask(
        config,
        set_,
        "requests are divided once every front holds every arm; {stable} stays stable",
        verb="start_experiment",
        reason=reason,
        experiment={
            "arms": arms,
            "end_s": time.time() + 3_600 * hours,
            "adaptive": adaptive,
            "metric": metric,
        },
    )


def _arm(text: str) -> dict[str, Any]:
    version, _, weight = text.partition("=")
    if not version or not weight.isdecimal():
        raise ConfigError(f"--arm is {text!r}; give VERSION=PER_CENT, such as v1.1=20")
    return {"version": version, "weight": int(weight)}


@experiment_app.command("end")
def experiment_end(
    config: ConfigOption = None, set_: SetOption = None, reason: ReasonOption = ""
) -> None:
    """Ask for the end of the experiment; its result is stored, stable stays."""
    told = "its result is stored, users return to {stable}"
    _ask(config, set_, told, verb="end_experiment", reason=reason)


@experiment_app.command("show")
def experiment_show(
    experiment_id: Annotated[str, typer.Argument(help="That under way if left out.")] = "",
    config: ConfigOption = None,
    set_: SetOption = None,
    out: Annotated[Path | None, typer.Option(help="Write it as JSON.")] = None,
) -> None:
    """Show what an experiment comes to, so far or in the end."""
    with reported_errors():
        desk = ReleaseDesk(open_store(load_config(config, tuple(set_ or ())).store), time.time)
        experiment = desk.experiment(experiment_id) if experiment_id else desk.read()[0].experiment
        if experiment is None:
            raise LifelongError(
                "no experiment is under way; name an ended one, or begin one with "
                "lifelong experiment start"
            )
        write_json(out, experiment.model_dump(mode="json"))
        _print_experiment(experiment)


def _print_experiment(experiment: Experiment) -> None:
    state = "under way" if experiment.began_s else experiment.message
    if experiment.ended_at_s is not None:
        state = f"ended by {experiment.ended_by}: {experiment.ended_why}"
    console.print(f"{experiment.id}: {state}", soft_wrap=True)
    result = experiment.result
    if result is None:
        console.print(", ".join(f"{arm.version} {arm.weight} %" for arm in experiment.arms))
        return
    sure = f"{100 * (1 - result.alpha):g} % interval"
    table = Table()
    columns = ("arm", "weight, %", "requests", "labelled", "accuracy", sure, "corrections")
    for column in (*columns, "accuracy less stable's", sure):
        table.add_column(column, justify="left" if column == "arm" else "right")
    differences = {one.version: one for one in result.against_stable}
    for arm, seen in zip(experiment.arms, result.arms, strict=True):
        one = differences.get(arm.version)
        table.add_row(
            arm.version,
            str(arm.weight),
            f"{seen.requests:,}",
            f"{seen.labelled:,}",
            "-" if seen.accuracy is None else f"{seen.accuracy:.3f}",
            f"{seen.accuracy_low:.3f} to {seen.accuracy_high:.3f}",
            f"{seen.corrections:,}",
            (
                "-"
                if one is None or one.accuracy_difference is None
                else f"{one.accuracy_difference:+.3f}"
            ),
            (
                f"{one.accuracy_difference_low:+.3f} to {one.accuracy_difference_high:+.3f}"
                if one
                else "stable"
            ),
        )
    console.print(table)
    if not result.is_split_by_weight:
        console.print("requests are not split by weight; nothing of this is sure", soft_wrap=True)


def _yaml_list(option: str, text: str) -> list[Any]:
    """Read a list that an option gives as YAML; empty for nothing."""
    try:
        value = yaml.safe_load(text) if text else []
    except yaml.YAMLError as error:
        raise ConfigError(f"{option} is not YAML: {error}") from None
    if not isinstance(value, list):
        raise ConfigError(f"{option} must be a list, such as '[{{setWeight: 20}}]'; got {text!r}")
    return value


@app.command()
def promote(
    config: ConfigOption = None,
    set_: SetOption = None,
    reason: ReasonOption = "",
    force: Annotated[bool, typer.Option(help="Without evidence, too.")] = False,
) -> None:
    """Ask for the candidate's promotion without the remaining steps."""
    when = "once every front holds it" if force else "once the evidence is there"
    told = f"{{candidate}} takes the place of {{stable}} {when}"
    _ask(config, set_, told, verb="promote", reason=reason, force=force)


@app.command()
def abort(config: ConfigOption = None, set_: SetOption = None, reason: ReasonOption = "") -> None:
    """Ask for the end of the rollout; stable stays."""
    told = "{candidate} gets no more requests, users stay with {stable}"
    _ask(config, set_, told, verb="abort", reason=reason)


@app.command()
def pause(config: ConfigOption = None, set_: SetOption = None, reason: ReasonOption = "") -> None:
    """Ask for the rollout to stay as it is until resumed."""
    told = "{candidate} keeps its share until it is resumed; proof of being worse still aborts"
    _ask(config, set_, told, verb="pause", reason=reason)


@app.command()
def resume(config: ConfigOption = None, set_: SetOption = None, reason: ReasonOption = "") -> None:
    """Ask for a paused rollout to go on, accepting what paused it."""
    _ask(config, set_, "{candidate} goes on with its steps", verb="resume", reason=reason)


@app.command()
def rollback(
    config: ConfigOption = None, set_: SetOption = None, reason: ReasonOption = ""
) -> None:
    """Ask for the previous stable version."""
    told = "users return from {stable} to {previous} once every front holds it"
    _ask(config, set_, told, verb="rollback", reason=reason)


@app.command()
def doctor(config: ConfigOption = None, set_: SetOption = None) -> None:
    """Check the configuration, the store and every version."""
    with reported_errors():
        settings = load_config(config, tuple(set_ or ()))
        console.print("configuration: good")
        store = open_store(settings.store)
        console.print(f"store {store.url}: reachable", soft_wrap=True)
        document, _ = ReleaseDesk(store, time.time).read()
        console.print(f"stable: {document.stable or 'none yet'}")
        registry = Registry(store)
        damaged = []
        for name in registry.versions():
            try:
                registry.load(name)
            except VersionError as error:
                damaged.append(name)
                console.print(f"version {name}: {error}", soft_wrap=True)
            else:
                console.print(f"version {name}: every file matches its checksum")
        if document.stable is not None and document.stable not in registry.versions():
            damaged.append(document.stable)
        if damaged:
            raise VersionDamagedError(
                f"{', '.join(damaged)} cannot be served; restore the files, or release another "
                "version"
            )


@app.command()
def predict(
    image: Annotated[Path, typer.Argument(help="An image file.", exists=True, dir_okay=False)],
    url: Annotated[str, typer.Option(help="Base URL.")] = "http://127.0.0.1:8000",
) -> None:
    """Classify one image file over HTTP."""
    with reported_errors(), LifelongClient(url) as client:
        suffix = image.suffix.lower().lstrip(".").replace("jpg", "jpeg")
        answer = client.predict(image.read_bytes(), f"image/{suffix}")
        console.print(
            f"{answer.class_name}  confidence {answer.confidence:.3f}  {answer.model_version}"
        )


def main() -> None:
    """Entry point of the console script."""
    app()

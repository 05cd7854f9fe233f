"""The ``lifelong`` command: what it prints, what it writes, how it fails."""

import json
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import Result
from typer.testing import CliRunner

from lifelong_ray.cli import app, print_cycle_report
from lifelong_ray.config import Config, RolloutConfig, StepConfig, StoreConfig, load_config
from lifelong_ray.cycle import CycleReport
from lifelong_ray.release import (
    Check,
    FrontReport,
    GateReport,
    Intent,
    Manifest,
    Observation,
    Pairs,
    Registry,
    ReleaseDesk,
    Rollout,
    advance,
)
from lifelong_ray.storage import Store, open_store
from lifelong_ray.types import LifelongError
from tests.conftest import free_port

ROOT = Path(__file__).parents[2]
Run = Callable[..., Result]
PASSED, REFUSED = (
    GateReport(
        passed=passed,
        checks=(Check(name="accuracy", value=0.8, threshold=0.7, passed=passed, reason=reason),),
        num_examples=10,
    )
    for passed, reason in ((True, "good"), (False, "bad"))
)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("LIFELONG_STORE_URL", str(tmp_path / "store"))
    return open_store(StoreConfig(url=str(tmp_path / "store")))


@pytest.fixture
def run(store: Store, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr("lifelong_ray.cli.console.width", 200)

    def invoke(*arguments: str) -> Result:
        return CliRunner().invoke(app, arguments, catch_exceptions=False)

    return invoke


def clock() -> float:
    return 1_700_000_000.0


def register(
    store: Store, version: str, parent: str | None = None, gate: GateReport | None = PASSED
) -> None:
    manifest = Manifest(
        version=version,
        parent=parent,
        kind="update" if parent else "base",
        path="fast" if parent else "base",
        class_names=("a", "b"),
        created_at_s=0.0,
        run_id="run",
        gate=gate,
        metrics={"holdout_accuracy": 0.91},
    )
    Registry(store).register(manifest, {"model.safetensors": version.encode() * 100})


def stable(store: Store, *updates: str) -> None:
    """Release v1, and register these updates of it."""
    register(store, "v1")
    for version in updates:
        register(store, version, "v1")
    ReleaseDesk(store, clock).create_if_missing("v1", actor="test")


def rolling_out(store: Store, message: str = "") -> None:
    """Release v1, with a rollout of v1.1 under way."""
    stable(store, "v1.1")
    desk = ReleaseDesk(store, clock)
    document, tag = desk.read()
    rollout = Rollout(
        id="r",
        candidate="v1.1",
        steps=(StepConfig(setWeight=5),),
        salt="s",
        started_at_s=0.0,
        step_started_at_s=0.0,
        message=message,
    )
    desk.swap(document.changed(rollout=rollout), tag)


def error_of(result: Result) -> str:
    """What a command that failed says: its error in words, and nothing of its code."""
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr
    return result.stderr.removeprefix("error: ")


# ---------------------------------------------------------------- status, versions


def test_status_of_an_empty_store_says_how_to_begin(run: Run) -> None:
    result = run("status")

    assert result.exit_code == 0
    assert "none yet: train_job.py --base makes one" in result.stdout


def test_status_names_the_stable_version_and_is_written_as_json(
    run: Run, store: Store, tmp_path: Path
) -> None:
    stable(store)

    result = run("status", "--out", str(tmp_path / "new" / "status.json"))

    written = json.loads((tmp_path / "new" / "status.json").read_text())
    assert "stable    v1" in result.stdout
    assert written["stable"] == "v1"


def test_the_operators_token_is_printed_alone(run: Run, store: Store) -> None:
    result = run("status", "--token")

    secrets = json.loads(store.read("secrets.json"))
    assert result.stdout.strip() in secrets.values()


def test_versions_are_listed_with_their_gate(run: Run, store: Store) -> None:
    register(store, "v1")
    register(store, "v1.1", "v1", gate=REFUSED)
    register(store, "v1.2", "v1", gate=None)

    lines = run("versions").stdout.splitlines()

    row = {line.split()[1]: line for line in lines if "│ v1" in line}
    assert "passed" in row["v1"]
    assert "0.910" in row["v1"]
    assert "refused" in row["v1.1"]
    assert "refused" in row["v1.2"]


# ---------------------------------------------------------------- promote, abort, rollback


@pytest.mark.parametrize("verb", ["promote", "abort", "pause", "resume", "rollback"])
def test_a_wish_on_an_empty_store_is_refused_in_one_line(run: Run, verb: str) -> None:
    result = run(verb)

    assert error_of(result).startswith("nothing is released yet")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("verb", ["promote", "abort", "pause", "resume", "rollback"])
def test_a_wish_without_a_rollout_is_refused(run: Run, store: Store, verb: str) -> None:
    stable(store)

    result = run(verb)

    assert error_of(result)
    assert ReleaseDesk(store, clock).read()[0].intents == ()


def test_a_wish_during_a_rollout_waits_for_the_controller(run: Run, store: Store) -> None:
    stable(store, "v1.1")
    start = Intent(id="i", verb="start", actor="t", reason="", at_s=0.0, candidate="v1.1")
    ReleaseDesk(store, clock).request(start)

    result = run("abort", "--reason", "looks bad")

    intents = ReleaseDesk(store, clock).read()[0].intents
    assert result.exit_code == 0
    assert [(i.verb, i.actor, i.reason) for i in intents[1:]] == [("abort", "cli", "looks bad")]


@pytest.mark.parametrize(
    ("verb", "expected"),
    [
        (("promote",), "v1.1 takes the place of v1 once the evidence is there"),
        (("promote", "--force"), "v1.1 takes the place of v1 once every front holds it"),
        (("abort",), "v1.1 gets no more requests, users stay with v1"),
        (("pause",), "v1.1 keeps its share until it is resumed"),
    ],
)
def test_a_wish_says_what_will_come_of_it(
    run: Run, store: Store, verb: tuple[str, ...], expected: str
) -> None:
    rolling_out(store)

    result = run(*verb)

    assert result.exit_code == 0
    assert f"{verb[0]} asked for; the rollout controller carries it out: " in result.stdout
    assert expected in result.stdout


def test_resume_is_refused_while_nothing_is_paused_and_taken_once_it_is(
    run: Run, store: Store
) -> None:
    rolling_out(store)
    refused = run("resume")
    run("pause")

    taken = run("resume")

    assert "was not paused by anyone" in error_of(refused)
    assert taken.exit_code == 0
    assert "v1.1 goes on with its steps" in taken.stdout


# ---------------------------------------------------------------- rollout start


def test_a_rollout_is_started_with_steps_of_its_own(run: Run, store: Store) -> None:
    stable(store, "v1.1")

    result = run(
        "rollout", "start", "v1.1", "--reason", "Friday", "--steps", "[{setWeight: 20}, {pause: 9}]"
    )

    [intent] = ReleaseDesk(store, clock).read()[0].intents
    assert result.exit_code == 0
    assert "v1.1 is loaded, then takes its steps beside v1" in result.stdout
    assert (intent.verb, intent.candidate, intent.reason) == ("start", "v1.1", "Friday")
    assert intent.steps == (StepConfig(setWeight=20), StepConfig(pause=9))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("v9",), "v9"),
        (("v1.2",), "v1.2 has not passed the gate"),
        (("v1",), "v1 is stable already"),
        (("v1.1", "--steps", "[{setWeight: 120}]"), "less than or equal to 100"),
        (("v1.1", "--steps", "[{pause: 5}]"), "step 1 can never end"),
        (("v1.1", "--steps", "20"), "--steps must be a list"),
        (("v1.1", "--steps", "[{"), "--steps is not YAML"),
    ],
)
def test_a_rollout_that_cannot_be_is_refused_and_changes_nothing(
    run: Run, store: Store, arguments: tuple[str, ...], message: str
) -> None:
    stable(store, "v1.1")
    register(store, "v1.2", "v1", gate=REFUSED)
    before = store.read("current.json")

    result = run("rollout", "start", *arguments)

    assert message in error_of(result)
    assert store.read("current.json") == before


# ---------------------------------------------------------------- experiments


def test_an_experiment_is_started_shown_and_ended(run: Run, store: Store, tmp_path: Path) -> None:
    stable(store, "v1.1")
    desk = ReleaseDesk(store, time.time)

    def look() -> None:
        document, tag = desk.read()
        front = FrontReport("f1", time.time(), document.seq, ("v1", "v1.1"))
        seen = Observation(time.time(), (front,), Pairs(), slot_ready=False)
        desk.swap(advance(document, seen, RolloutConfig())[0], tag)

    started = run("experiment", "start", "--arm", "v1=80", "--arm", "v1.1=20", "--reason", "why")
    look()
    preparing = run("experiment", "show")
    look()
    under_way = run("status")
    ended = run("experiment", "end")
    name = desk.read()[0].experiment.id  # type: ignore[union-attr]  # under way
    look()
    shown = run("experiment", "show", name, "--out", str(tmp_path / "result.json"))
    gone = run("experiment", "show")

    assert "requests are divided once every front holds every arm; v1 stays" in started.stdout
    assert "v1 80 %, v1.1 20 %" in preparing.stdout
    assert "experiment v1 80 %, v1.1 20 %; under way" in under_way.stdout
    assert "its result is stored, users return to v1" in ended.stdout
    assert f"{name}: ended by cli: asked" in shown.stdout
    assert json.loads((tmp_path / "result.json").read_text())["result"]["alpha"] == 0.05
    assert "no experiment is under way" in error_of(gone)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--arm", "v1=80", "--arm", "v1.1=30"), "add up to 110, not to 100"),
        (("--arm", "v1=80", "--arm", "v1.1=-20"), "--arm is 'v1.1=-20'"),
        (("--arm", "v1=80", "--arm", "v1.1"), "give VERSION=PER_CENT"),
        (("--arm", "v1=80", "--arm", "v9=20"), "v9"),
        (("--arm", "v1=80", "--arm", "v1.2=20"), "v1.2 has not passed the gate"),
        (("--arm", "v1.1=80", "--arm", "v1.1=20"), "more than once"),
        (("--arm", "v1=80", "--arm", "v1.1=20", "--hours", "-1"), "must end later"),
        (("--arm", "v1=80", "--arm", "v1.1=20", "--metric", "clicks"), "accuracy"),
    ],
)
def test_an_experiment_that_cannot_be_is_refused_and_changes_nothing(
    run: Run, store: Store, arguments: tuple[str, ...], message: str
) -> None:
    stable(store, "v1.1")
    register(store, "v1.2", "v1", gate=REFUSED)
    before = store.read("current.json")

    result = run("experiment", "start", *arguments)

    assert message in error_of(result)
    assert store.read("current.json") == before


def test_an_experiment_that_never_was_is_named(run: Run, store: Store) -> None:
    result = run("experiment", "show", "e9")

    assert "there was never an experiment e9" in error_of(result)


# ---------------------------------------------------------------- init, doctor


def test_init_writes_a_file_that_says_the_defaults(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "new" / "my.yaml"

    result = run("init", str(path))

    monkeypatch.delenv("LIFELONG_STORE_URL")
    assert result.exit_code == 0
    assert load_config(path) == Config()
    assert set(yaml.safe_load(path.read_text())) == set(Config.model_fields)


def test_init_overwrites_nothing(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text("mine")

    result = run("init", str(path))

    assert result.exit_code == 2
    assert "exists" in result.stderr
    assert path.read_text() == "mine"


def test_doctor_is_content_with_a_sound_store(run: Run, store: Store) -> None:
    stable(store)

    result = run("doctor")

    assert result.exit_code == 0
    assert "version v1: every file matches its checksum" in result.stdout
    assert "stable: v1" in result.stdout


def test_doctor_names_every_damaged_version_and_checks_the_others(
    run: Run, store: Store, tmp_path: Path
) -> None:
    for version, parent in (("v1", None), ("v1.1", "v1"), ("v1.2", "v1")):
        register(store, version, parent)
    damaged = tmp_path / "store" / "versions" / "v1" / "model.safetensors"
    damaged.chmod(0o644)
    damaged.write_bytes(b"\0" + damaged.read_bytes()[1:])
    (tmp_path / "store" / "versions" / "v1.1" / "model.safetensors").unlink()

    result = run("doctor")

    assert result.exit_code == 1
    assert "v1/model.safetensors has SHA-256" in result.stdout
    assert "v1.1 lacks its file model.safetensors" in result.stdout
    assert "version v1.2: every file matches" in result.stdout
    assert "v1, v1.1 cannot be served" in result.stderr


def test_doctor_misses_a_stable_version_that_is_gone(
    run: Run, store: Store, tmp_path: Path
) -> None:
    stable(store)
    (tmp_path / "store" / "versions" / "v1" / "manifest.json").unlink()

    result = run("doctor")

    assert "v1 cannot be served" in error_of(result)


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize("command", ["status", "versions", "doctor", "promote"])
def test_an_unknown_key_is_answered_with_the_nearest(run: Run, command: str) -> None:
    result = run(command, "--set", "serving.prot=1")

    assert "unknown config key serving.prot; the nearest known key is port" in error_of(result)


def test_a_missing_config_file_is_named(run: Run) -> None:
    result = run("status", "--config", "nowhere.yaml")

    assert "nowhere.yaml does not exist" in error_of(result)


# ---------------------------------------------------------------- predict


def test_predict_without_a_server_is_an_error_line(run: Run, tmp_path: Path) -> None:
    image = tmp_path / "a.png"
    image.write_bytes(b"x")

    result = run("predict", str(image), "--url", f"http://127.0.0.1:{free_port()}")

    assert "does not answer POST /predict" in error_of(result)


def test_predict_of_a_missing_file_is_a_usage_error(run: Run) -> None:
    result = run("predict", "nowhere.png")

    assert result.exit_code == 2
    assert "nowhere.png" in result.stderr


# ---------------------------------------------------------------- demo


def test_a_second_demo_does_not_mix_with_the_first(run: Run, tmp_path: Path) -> None:
    (tmp_path / "out" / "store").mkdir(parents=True)

    result = run("demo", "--out", str(tmp_path / "out"))

    assert "holds an earlier demo" in error_of(result)


@pytest.mark.parametrize("below", ["", "/deeper"], ids=["file", "below a file"])
def test_a_demo_into_a_file_is_an_error_line(run: Run, tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("mine")
    out = f"{tmp_path / 'file'}{below}"

    result = run("demo", "--out", out)

    assert error_of(result).startswith(f"--out {out} cannot be used as a folder (")
    assert result.stderr.count("\n") == 1
    assert (tmp_path / "file").read_text() == "mine"


def test_what_the_demo_says_is_printed_as_it_is(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tell(*_: object, say: Callable[[str], None], **__: object) -> None:
        say("learns the class [/b] :+1:")
        raise LifelongError("[/red] is no colour")

    monkeypatch.setattr("lifelong_ray.demo.story.tell_story", tell)

    result = run("demo", "--out", str(tmp_path / "[/a]"))

    assert "learns the class [/b] :+1:" in result.stdout
    assert result.stderr == "error: [/red] is no colour\n"


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_demo_passes_names_with_spaces_and_quotes_on() -> None:
    command = ["make", "-n", "demo", "DATA=my data", "OUT=it's out", "SEED=7"]

    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)

    recipe = done.stdout[done.stdout.index(".venv/bin/lifelong") :]
    assert shlex.split(recipe.replace("\\\n", " "))[1:] == (
        ["demo", "--out", "it's out", "--seed", "7", "--data", "my data"]
    )


# ---------------------------------------------------------------- the report of a run


def report(**changed: Any) -> CycleReport:
    path = {
        "holdout_accuracy": 0.9,
        "validation_accuracy": None,
        "train_seconds": 1.0,
        "extra_seconds": 0.5,
        "samples_seen": 1_000,
        "gate_passed": True,
    }
    values: dict[str, Any] = {
        "run_id": "run-1",
        "kind": "update",
        "version": "v1.1",
        "parent": "v1",
        "path": "fast",
        "reason": "because",
        "gate_passed": True,
        "snapshot_id": "s",
        "num_training": 1,
        "num_validation": 1,
        "num_holdout": 1,
        "dropped": {},
        "class_names": ("a", "b"),
        "paths": {"fast": path},
        "prepare_seconds": 0.1,
        "gate": {},
        "released": True,
        "why_not_released": "",
    }
    return CycleReport(**(values | changed))


def test_a_report_is_a_table_and_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "report.json"

    print_cycle_report(report(), out)

    printed = capsys.readouterr().out
    assert "fast *" in printed
    assert "1,000" in printed
    assert "not offered" not in printed
    assert json.loads(out.read_text())["class_names"] == ["a", "b"]


def test_a_version_that_was_not_offered_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    print_cycle_report(report(released=False, why_not_released="v1.1 is on trial"), None)

    assert "v1.1 is registered but not offered for release: v1.1 is on trial" in (
        capsys.readouterr().out
    )


# ---------------------------------------------------------------- names are no markup


def test_a_report_prints_names_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    print_cycle_report(
        report(reason="learns [/b] :+1:", released=False, why_not_released="[/]"), None
    )

    printed = capsys.readouterr().out
    assert "run run-1: learns [/b] :+1:" in printed
    assert "not offered for release: [/]" in printed


@pytest.mark.parametrize("command", ["status", "versions", "doctor"])
def test_a_store_may_be_called_anything(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    url = str(tmp_path / "[/a] :+1:")
    monkeypatch.setenv("LIFELONG_STORE_URL", url)

    result = run(command)

    assert result.exit_code == 0
    assert url in result.stdout or command == "versions"


def test_an_error_quotes_what_was_given_as_it_is(run: Run) -> None:
    result = run("status", "--config", "[/a] [red]:+1:.yaml")

    assert "[/a] [red]:+1:.yaml does not exist" in error_of(result)


def test_status_prints_a_message_as_it_is(run: Run, store: Store) -> None:
    rolling_out(store, message="waits [/b]")

    assert "; waits [/b]" in run("status").stdout


@pytest.mark.parametrize("command", ["init", "predict"])
def test_a_usage_error_quotes_a_path_as_it_is(run: Run, tmp_path: Path, command: str) -> None:
    path = tmp_path / "[red]"
    if command == "init":
        path.write_text("mine")

    result = run(command, str(path))

    assert result.exit_code == 2
    assert "[red]" in result.stderr

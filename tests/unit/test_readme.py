"""What README.md and the guide name exists: commands, options, settings, paths, files."""

from __future__ import annotations

import importlib.util
import re
import typing
from pathlib import Path
from typing import Any

import click
import pytest
import typer
import typer.main
from pydantic import BaseModel

from lifelong_ray import cli
from lifelong_ray.config import Config, StepConfig
from lifelong_ray.on_ray.serving import http
from tests.unit.benchmarks.scripts import load

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "docs/guide.md")
DECISIONS = sorted((ROOT / "docs" / "decisions").glob("*.md"))
FENCE = re.compile(r"^```\w*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SCRIPTS = ("train_job", "tune_lambda")
MADE_BY_FASTAPI = {"/docs", "/openapi.json"}


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def code_of(page: str) -> list[str]:
    """Lines of code blocks, joined where they continue, and spans of code."""
    text = text_of(page)
    lines = "".join(FENCE.findall(text)).replace("\\\n", " ").splitlines()
    return lines + re.findall(r"`([^`\n]+)`", FENCE.sub("", text))


def found(pattern: str) -> set[str]:
    return {
        match for page in PAGES for code in code_of(page) for match in re.findall(pattern, code)
    }


def options_of(command: click.Command) -> set[str]:
    both = [
        option
        for parameter in command.params
        for option in (*parameter.opts, *parameter.secondary_opts)
    ]
    return {option for option in both if option.startswith("--")} | {"--help"}


def script(name: str) -> click.Command:
    spec = importlib.util.spec_from_file_location(f"_readme_{name}", ROOT / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    app = typer.Typer()
    app.command()(module.main)
    return typer.main.get_command(app)


# `rollout start` is one command; what follows the others are arguments.
COMMAND = r"\blifelong ([a-z]+(?: (?:start|end|show)\b)?)"


def subcommands(group: Any = None, before: str = "") -> dict[str, click.Command]:
    found: dict[str, click.Command] = {}
    for name, command in (group or typer.main.get_command(cli.app)).commands.items():
        if hasattr(command, "commands"):
            found |= subcommands(command, f"{before}{name} ")
        else:
            found[before + name] = command
    return found


def test_make_targets_exist():
    makefile = text_of("Makefile")

    targets = {line.partition(":")[0] for line in makefile.splitlines() if ": $(" in line}
    targets |= {"help", "clean"}

    assert found(r"\bmake ([a-z][a-z0-9]*)\b") <= targets


def test_make_variables_exist():
    used = found(r"\bmake \S+ (?:[A-Z]+=\S+ )*([A-Z]+)=")

    assert used
    assert all(f"$({name})" in text_of("Makefile") for name in used)


def test_make_targets_for_users_are_in_the_readme():
    described = re.findall(r"^([a-z0-9]+):.*## ", text_of("Makefile"), re.MULTILINE)

    assert set(described) - {"clean"} <= found(r"\bmake ([a-z][a-z0-9]*)\b")


def test_lifelong_commands_exist_and_all_are_in_the_readme():
    named = found(COMMAND)

    assert named == set(subcommands())


def test_options_of_lifelong_commands_exist():
    known = subcommands()
    for page in PAGES:
        for code in code_of(page):
            for command, rest in re.findall(COMMAND + r"([^|;)]*)", code):
                used = set(re.findall(r"(?<!\S)--[a-z][a-z-]*", rest))
                assert used <= options_of(known[command]), f"{page}: {code}"


@pytest.mark.parametrize("name", SCRIPTS)
def test_options_of_scripts_exist(name: str):
    known = options_of(script(name))

    calls = found(rf"\b{name}\.py\b([^'|;]*)")

    assert calls
    for call in calls:
        assert set(re.findall(r"(?<!\S)--[a-z][a-z-]*", call)) <= known, call


def benchmark(name: str) -> click.Command:
    app = typer.Typer()
    app.command()(load(name).main)
    return typer.main.get_command(app)


BENCHMARKS = (
    "continual",
    "update_cost",
    "fisher",
    "ewc_step",
    "gpu",
    "unlearning",
    "release_evidence",
)


def test_options_of_benchmarks_exist():
    decisions = [f"docs/decisions/{path.name}" for path in DECISIONS]
    calls = {
        match
        for page in (*PAGES, *decisions)
        for code in code_of(page)
        for match in re.findall(r"\bbenchmarks/(\w+)\.py\b([^'|;]*)", code)
    }

    assert {name for name, _ in calls} >= {"continual", "update_cost", "gpu"}
    for name, rest in calls:
        if name in BENCHMARKS:
            used = set(re.findall(r"(?<!\S)--[a-z][a-z-]*", rest))
            assert used <= options_of(benchmark(name)), f"{name}{rest}"


def test_options_named_by_themselves_exist():
    known = set().union(
        *(options_of(script(name)) for name in SCRIPTS),
        *(options_of(benchmark(name)) for name in BENCHMARKS),
        *(options_of(command) for command in subcommands().values()),
    )

    assert found(r"^(--[a-z][a-z-]*)") <= known


def test_script_options_are_all_explained():
    assert {"--config", "--set", "--base", "--fraction", "--precision", "--resume"} <= found(
        r"(?<!\S)(--[a-z][a-z-]*)"
    )


def test_configuration_keys_exist():
    sections = "|".join(Config.model_fields)
    files = r"(?!\S*\.(?:py|json|yaml|parquet|safetensors)\b)"
    named = found(rf"(?<![\w/.]){files}((?:{sections})(?:\.[A-Za-z_]+)+)")

    assert named
    for key in sorted(named):
        branch: typing.Any = Config
        for part in key.split("."):
            assert isinstance(branch, type), f"{key} goes through a value"
            assert issubclass(branch, BaseModel), f"{key} goes through a value"
            assert part in branch.model_fields, f"there is no {key}"
            branch = branch.model_fields[part].annotation


def test_every_section_of_the_configuration_is_in_the_readme():
    rows = re.findall(r"^\| `([a-z]+)` \|", text_of("README.md"), re.MULTILINE)

    assert set(rows) >= set(Config.model_fields)


def test_rollout_steps_are_spelled_as_in_the_configuration():
    words = found(r"\{(shadow|setWeight|pause|\w+): \d")

    assert words <= set(StepConfig.model_fields)


def test_environment_variables_are_read_somewhere():
    sources = [*ROOT.glob("*.py"), *ROOT.glob("lifelong_ray/**/*.py")]
    sources += [ROOT / "Makefile", ROOT / "cluster.yaml"]
    pattern = r"\b((?:LIFELONG|RAY)_[A-Z0-9_]+)\b"
    read = {name for path in sources for name in re.findall(pattern, path.read_text("utf-8"))}

    assert found(pattern) <= read


def test_environment_variables_of_the_package_are_in_the_readme():
    sources = [*ROOT.glob("*.py"), *ROOT.glob("lifelong_ray/**/*.py")]
    read = {
        name
        for path in sources
        for name in re.findall(r"\bLIFELONG_[A-Z0-9_]+\b", path.read_text(encoding="utf-8"))
    }

    assert read == found(r"\b(LIFELONG_[A-Z0-9_]+)\b")


def known_calls() -> set[tuple[str, str]]:
    calls = {
        (method.upper(), path)
        for path, methods in http.openapi()["paths"].items()
        for method in methods
    }
    return calls | {("GET", path) for path in MADE_BY_FASTAPI}


def test_http_calls_exist():
    named = {
        (method, path)
        for page in PAGES
        for code in code_of(page)
        for method, path in re.findall(r"\b(GET|POST|PUT) (/[\w/{}]*)", code)
    }

    fits = {
        (method, path)
        for method, path in named
        for known_method, known in known_calls()
        if method == known_method
        and (path == known or re.fullmatch(re.sub(r"\{\w+\}", r"\\w+", known), path))
    }

    assert named == fits


def test_urls_of_commands_exist():
    paths = {re.sub(r"\{\w+\}", "[^/]+", path) for _, path in known_calls()}
    named = found(r"http://127\.0\.0\.1:8000(/[\w/]+)")

    assert named
    assert all(any(re.fullmatch(path, name) for path in paths) for name in named)


def test_every_http_call_is_in_the_readme():
    readme = text_of("README.md")
    unversioned = {(m, p) for m, p in known_calls() if "/versions/{version}" not in p}

    missing = {f"{m} {p}" for m, p in unversioned - {("GET", "/openapi.json")}}

    assert {call for call in missing if f"`{call}`" not in readme} == set()


@pytest.mark.parametrize("page", [*PAGES, *(f"docs/decisions/{p.name}" for p in DECISIONS)])
def test_linked_files_exist(page: str):
    links = re.findall(r"\]\(([^)\s#]+)(?:#[^)]*)?\)", text_of(page))

    local = [link for link in links if not link.startswith(("http://", "https://"))]

    missing = [link for link in local if not ((ROOT / page).parent / link).exists()]
    assert missing == []


def test_named_python_files_exist():
    places = (ROOT, ROOT / "lifelong_ray")
    named = found(r"(?<![\w*/])((?:[a-z_]+/)*[a-z_]+\.py)\b")

    missing = {name for name in named if not any((place / name).exists() for place in places)}

    assert missing == set()


def test_folders_of_the_layout_exist():
    (layout,) = [b for b in FENCE.findall(text_of("README.md")) if b.startswith("serve_app.py")]
    for line in layout.splitlines():
        name = line.split()[0]
        place = ROOT / "lifelong_ray" if line.startswith("  ") else ROOT
        assert (place / name).exists(), name


def test_modules_of_the_package_are_all_in_the_layout():
    (layout,) = [b for b in FENCE.findall(text_of("README.md")) if b.startswith("serve_app.py")]
    named = {line.split()[0].rstrip("/") for line in layout.splitlines() if line.startswith("  ")}

    package = {
        path.name
        for path in (ROOT / "lifelong_ray").iterdir()
        if not path.name.startswith("__") and path.name != "py.typed"
    }

    assert named == package


def test_places_for_the_measured_figures_are_there_once():
    readme = text_of("README.md")

    assert readme.count("<!-- demo-figures:begin -->") == 1
    assert readme.count("<!-- demo-figures:end -->") == 1


def test_decisions_are_numbered_without_gaps():
    numbers = [int(path.name[:4]) for path in DECISIONS]

    assert numbers == list(range(1, len(numbers) + 1))

"""One update of the stable version, or a base training with ``--base``.

Works in a plain shell and under ``ray job submit``. Argument parsing and wiring only.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from lifelong_ray.cli import console, print_cycle_report, reported_errors
from lifelong_ray.config import load_config
from lifelong_ray.cycle import (
    new_run_id,
    read_run_config,
    read_run_kind,
    run_base,
    run_update,
)
from lifelong_ray.datasets import load_source
from lifelong_ray.on_ray.training import fit_on_ray
from lifelong_ray.storage import open_store
from lifelong_ray.types import ConfigError


def main(
    config: Annotated[Path | None, typer.Option(help="YAML file; see conf/local.yaml.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="section.key=value; may be repeated.")
    ] = None,
    base: Annotated[bool, typer.Option(help="Train a base version from data.source.")] = False,
    fraction: Annotated[
        float | None, typer.Option(help="Share of the examples to use: 0.1 is a dry run.")
    ] = None,
    precision: Annotated[str | None, typer.Option(help="fp32 or bf16.")] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            help="Continue an interrupted run by its id, with the settings it began with."
        ),
    ] = None,
    run: Annotated[str | None, typer.Option(help="Carry out a run prepared in the store.")] = None,
    release: Annotated[
        bool, typer.Option(help="Offer the version for release when its gate passes.")
    ] = True,
    out: Annotated[Path | None, typer.Option(help="Write the report as JSON.")] = None,
) -> None:
    """Learn what the log has gained, gate the result and offer it for release."""
    overrides = list(set_ or [])
    if fraction is not None:
        overrides.append(f"data.fraction={fraction}")
    if precision is not None:
        overrides.append(f"learning.base.precision={precision}")
        overrides.append(f"learning.update.trainer.precision={precision}")
    with reported_errors():
        settings = load_config(config, tuple(overrides))
        store = open_store(settings.store)
        run_id = run or resume or new_run_id(time.time())
        if run or resume:
            if fraction is not None or precision is not None:
                raise ConfigError(
                    f"run {run_id} keeps the settings it began with; "
                    "leave out --fraction and --precision, or start a new run"
                )
            settings = read_run_config(store, run_id)
        if resume:
            base = read_run_kind(store, run_id) == "base"
        console.print(f"run {run_id}: --resume with this id takes it up again", soft_wrap=True)
        if base:
            images = load_source(settings.data, settings.learning.seed).train
            report = run_base(
                settings,
                store,
                fit_on_ray,
                images,
                run_id=run_id,
                now_s=time.time,
                release=release,
            )
        else:
            report = run_update(
                settings, store, fit_on_ray, run_id=run_id, now_s=time.time, release=release
            )
        print_cycle_report(report, out)


if __name__ == "__main__":
    typer.run(main)

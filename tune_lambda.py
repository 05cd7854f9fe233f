"""The sweep over lambda_ewc and learning rate; writes a config that train_job.py reads.

Works in a plain shell and under ``ray job submit``. Argument parsing and wiring only.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from lifelong_ray.cli import console, reported_errors, write_json
from lifelong_ray.config import load_config
from lifelong_ray.cycle import new_run_id
from lifelong_ray.on_ray.tuning import sweep, write_config
from lifelong_ray.storage import open_store


def main(
    config: Annotated[Path | None, typer.Option(help="YAML file; see conf/local.yaml.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="section.key=value; may be repeated.")
    ] = None,
    best: Annotated[Path, typer.Option(help="Config to write, for train_job.py --config.")] = Path(
        "runs/best.yaml"
    ),
    out: Annotated[Path | None, typer.Option(help="Write all trials as JSON.")] = None,
) -> None:
    """Find the lambda_ewc and learning rate that learn most and keep enough."""
    with reported_errors():
        settings = load_config(config, tuple(set_ or ()))
        found = sweep(
            settings, open_store(settings.store), run_id=new_run_id(time.time()), now_s=time.time
        )
        # Every setting of the trials, so that the winner is trained as it was tried.
        write_config(found, best, settings.model_dump(mode="json"))
        write_json(out, {"trials": list(found.trials), "best": found.best})
        table = Table(title="trials, best first", title_justify="left")
        for column in ("lambda_ewc", "learning_rate", "retention", "plasticity"):
            table.add_column(column, justify="right")
        for row in sorted(found.trials, key=lambda row: row != found.best):
            table.add_row(*(f"{row[column]:.4g}" for column in row))
        console.print(table)
        console.print(f"best setting written to {best}", highlight=False)


if __name__ == "__main__":
    typer.run(main)

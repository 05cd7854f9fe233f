"""The sweep over lambda_ewc and learning rate; writes a config that train_job.py reads.

Works in a plain shell and under ``ray job submit``. Argument parsing and wiring only.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from lifelong_ray.cli import console, reported_errors, write_json
from lifelong_ray.config import load_config
from lifelong_ray.cycle import new_run_id
from lifelong_ray.on_ray.tuning import Sweep, Trial, draw, pareto_front, sweep, write_config
from lifelong_ray.storage import open_store


def main(
    config: Annotated[Path | None, typer.Option(help="YAML file; see conf/local.yaml.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="section.key=value; may be repeated.")
    ] = None,
    fraction: Annotated[
        float | None, typer.Option(help="Share of the new examples to use: 0.1 is a dry run.")
    ] = None,
    best: Annotated[Path, typer.Option(help="Config to write, for train_job.py --config.")] = Path(
        "runs/best.yaml"
    ),
    out: Annotated[Path | None, typer.Option(help="Write all trials as JSON.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw retention against plasticity, as PNG.")
    ] = None,
) -> None:
    """Find the lambda_ewc and learning rate that learn most and keep enough."""
    with reported_errors():
        overrides = tuple(set_ or ())
        settings = load_config(config, overrides)
        # Of the trials alone: the winner is for an update with everything.
        tried = settings
        if fraction is not None:
            tried = load_config(config, (*overrides, f"data.fraction={fraction}"))
        found = sweep(
            tried, open_store(settings.store), run_id=new_run_id(time.time()), now_s=time.time
        )
        # Every setting of the trials, so that the winner is trained as it was tried.
        write_config(found, best, settings.model_dump(mode="json"))
        write_json(out, found.to_json())
        if plot is not None:
            draw(found, plot)
        console.print(trial_table(found))
        console.print(f"best setting written to {best}", highlight=False)
        if rival := found.better_elsewhere:
            console.print(
                f"with the {rival.estimator} Fisher more is learned; to use it, make a base "
                f"training with learning.update.ewc.estimator={rival.estimator}",
                highlight=False,
            )


def trial_table(found: Sweep) -> Table:
    """All trials, the winner first, then the Pareto front, then by what they learned."""
    front = pareto_front(found.trials)

    def rank(trial: Trial) -> tuple[bool, bool, float]:
        return trial != found.best, trial not in front, -(trial.plasticity or 0.0)

    table = Table(title="trials, best first; * none keeps and learns more", title_justify="left")
    table.add_column("estimator")
    for column in ("lambda_ewc", "learning_rate", "retention", "plasticity"):
        table.add_column(column, justify="right")
    table.add_column("front")
    if any(trial.error for trial in found.trials):
        table.add_column("error")
    for trial in sorted(found.trials, key=rank):
        table.add_row(
            trial.estimator,
            *(f"{value:.4g}" for value in (trial.lambda_ewc, trial.learning_rate)),
            *("-" if v is None else f"{v:.4g}" for v in (trial.retention, trial.plasticity)),
            "*" if trial in front else "",
            *([escape(trial.error)] if len(table.columns) > 6 else []),
        )
    return table


if __name__ == "__main__":
    typer.run(main)

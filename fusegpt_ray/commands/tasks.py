"""What models are worth on zero-shot tasks: `tasks`."""

from __future__ import annotations

import json
from typing import Literal

import click

from fusegpt_ray.commands.options import (
    as_arguments,
    display,
    dtype_option,
    json_option,
    models_argument,
    quiet_option,
)
from fusegpt_ray.errors import UserError


@click.command()
@models_argument
@click.option(
    "--tasks",
    "names",
    metavar="NAME,…",
    help="Any of the lm-eval library, or of --tasks-folder (default: piqa, winogrande, hellaswag,"
    " arc_easy, arc_challenge).",
)
@click.option("--tasks-folder", metavar="DIR", help="Task files (YAML) of your own.")
@click.option("--limit", type=click.IntRange(1), help="Only the first so many samples of a task.")
@click.option(
    "--shots",
    type=click.IntRange(0),
    help="Examples before each question (default: the task's; one that says 0 keeps it).",
)
@click.option(
    "--batch", type=click.IntRange(1), default=8, show_default=True, help="Sequences at once."
)
@click.option("--cache", metavar="DIR", help="Path or URI where numbers are kept, and found again.")
@dtype_option
@click.option(
    "--engine",
    type=click.Choice(["ray", "local"]),
    default="local",
    help="Default: one process, one model after another; ray: side by side.",
)
@json_option
@quiet_option
def tasks(
    models: tuple[str, ...],
    names: str | None,
    tasks_folder: str | None,
    limit: int | None,
    shots: int | None,
    batch: int,
    cache: str | None,
    dtype: str,
    engine: Literal["ray", "local"],
    as_json: bool,
    quiet: bool,
) -> None:
    """Measure models on zero-shot tasks of lm-eval, side by side.

    Give the dense model first. The library is in the extra `eval`: pip install 'fusegpt-ray[eval]'
    """
    from fusegpt_ray.measuring.harness import USUAL, Asked, check_installed

    check_installed()
    from fusegpt_ray.measuring import tasks as work  # torch
    from fusegpt_ray.measuring.tables import of_tasks
    from fusegpt_ray.recipe.cluster_section import Cluster

    asked = Asked(USUAL if names is None else _listed(names), tasks_folder, limit, shots)
    how = work.How(dtype, batch, cache)
    with as_arguments():
        result = work.tasks(models, asked, how, Cluster(engine=engine), display(quiet))
    if as_json:
        click.echo(json.dumps(result))
        return
    from rich.console import Console

    console = Console()
    for item in of_tasks(result):
        console.print(item, markup=False)


def _listed(names: str) -> tuple[str, ...]:
    """Each name once."""
    found = tuple(dict.fromkeys(name for part in names.split(",") if (name := part.strip())))
    if not found:
        raise UserError("--tasks", names, "names no task", "give names, with commas between them")
    return found

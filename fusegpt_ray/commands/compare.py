"""Make models by several methods and set them side by side: `compare`."""

from __future__ import annotations

import json

import click

from fusegpt_ray.commands.options import (
    display,
    json_option,
    quiet_option,
    recipe_options,
    say_outcome,
)


@click.command()
@recipe_options
@click.option("--restart", is_flag=True, help="Forget unfinished runs of these names.")
@json_option
@quiet_option
@click.pass_context
def compare(
    context: click.Context,
    recipe: str,
    settings: tuple[str, ...],
    restart: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Compress by several methods, at several sparsities, and compare.

    RECIPE has a section `compare`. Tables and a plot appear in compare/NAME below the output URI.
    The exit code is 1 if a cell failed; run again, only what is missing is done.
    """
    from fusegpt_ray.comparison.cells import Comparison

    checked = Comparison.load(recipe, settings)
    from fusegpt_ray.comparison import run  # torch: after the recipe has been checked

    result = run.compare(checked, display(quiet), restart)
    if as_json:
        click.echo(json.dumps(result))
    else:
        from rich.console import Console

        from fusegpt_ray.comparison.tables import on_terminal

        console = Console()
        for item in on_terminal(result):
            console.print(item, markup=False)
    for item in result["failed"]:
        where = f"{item['model']}, {item['method']}, {item['sparsity']:.1%}"
        say_outcome("failed:", f"{where}: {item['problem']}")
    if result["failed"]:
        context.exit(1)

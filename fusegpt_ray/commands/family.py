"""Make a whole family of models: `family`."""

from __future__ import annotations

import json

import click

from fusegpt_ray.commands.options import (
    display,
    json_option,
    quiet_option,
    say_outcome,
    set_option,
)


@click.command()
@click.argument("file", metavar="FAMILY", help="YAML file; see examples/family.yaml.")
@set_option
@click.option("--restart", is_flag=True, help="Forget unfinished runs of these names.")
@json_option
@quiet_option
@click.pass_context
def family(
    context: click.Context,
    file: str,
    settings: tuple[str, ...],
    restart: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Compress many models on one cluster, and rank what comes of it.

    FAMILY is a recipe with a section `family`. The leaderboard appears in family/NAME below the
    output URI. The exit code is 1 if a member failed; run again, only what is missing is done.
    """
    from fusegpt_ray.family.members import Members

    checked = Members.load(file, settings)
    from fusegpt_ray.family import board, run  # torch: after the recipe has been checked

    result = run.compress_family(checked, display(quiet), restart)
    if as_json:
        click.echo(json.dumps(result))
    else:
        from rich.console import Console

        Console().print(board.on_terminal(result))
    failed = [row for row in result["rows"] if row["status"] == "failed"]
    for row in failed:
        say_outcome("failed:", f"{row['member']}, {row['folder']}: {row['problem']}")
    if result["state"] == "failed":
        context.exit(1)

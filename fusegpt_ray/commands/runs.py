"""Follow runs and tidy up: `status` and `clean`."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from fusegpt_ray.commands.options import json_option


@click.command()
@click.argument("uri", metavar="URI", help="An output.uri, or the folder of one run or model.")
@json_option
def status(uri: str, as_json: bool) -> None:
    """Show the models and runs below an output URI, and what they are doing."""
    from fusegpt_ray.run import status as runs

    result = runs.status(uri)
    if as_json:
        click.echo(json.dumps(result))
        return
    from rich.console import Console

    runs.show(result, Console())


@click.command()
@click.argument("uri", metavar="URI", help="An output.uri.")
@click.option("--yes", is_flag=True, help="Remove what is listed (otherwise nothing is).")
@click.option("--unfinished", is_flag=True, help="Dead runs that could go on, too.")
@click.option(
    "--age",
    type=float,
    default=10,
    metavar="MINUTES",
    help="Without a sign of life → dead (default: 10).",
)
@json_option
def clean(uri: str, yes: bool, unfinished: bool, age: float, as_json: bool) -> None:
    """List, or remove, what dead runs and pulls have left."""
    from fusegpt_ray.run import housekeeping

    found = housekeeping.leftovers(uri, age=age * 60, unfinished=unfinished)
    removed = housekeeping.clean(uri, age=age * 60, unfinished=unfinished) if yes else []
    if as_json:
        rows = [asdict(item) | {"removed": item in removed} for item in found]
        click.echo(json.dumps({"found": rows}))
        return
    from fusegpt_ray.report import byte_count

    for item in found:
        goes = "would remove" if item.dead and not yes else "kept"
        verb = "removed" if item in removed else goes
        click.echo(f"{verb:<12}  {item.uri}  {byte_count(item.size)}  {item.what}")
    dead = [item for item in found if item.dead]
    if dead and not yes:
        size = byte_count(sum(item.size for item in dead))
        click.echo(f"{size} could go; nothing was removed: that takes --yes")
    if not found:
        click.echo(f"nothing to remove in {uri}")

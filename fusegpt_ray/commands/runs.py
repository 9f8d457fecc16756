"""Follow runs and tidy up: `status` and `clean`."""

from __future__ import annotations

import json
import time
from dataclasses import asdict

import click

from fusegpt_ray.commands.options import json_option, quiet_option


@click.command()
@click.argument("uri", metavar="URI", help="An output.uri, or the folder of one run or model.")
@click.option(
    "--watch",
    is_flag=True,
    help="Again and again, until no run is at work any more; with --json a line each time, with "
    "--quiet only the last time.",
)
@click.option(
    "--every",
    type=click.FloatRange(min=0.1),
    default=5,
    metavar="SECONDS",
    help="Between two looks of --watch (default: 5).",
)
@json_option
@quiet_option
def status(uri: str, watch: bool, every: float, as_json: bool, quiet: bool) -> None:
    """Show the models and runs below an output URI, and what they are doing."""
    from rich.console import Console

    from fusegpt_ray.run import status as runs

    console = Console()
    while True:
        result = runs.status(uri)
        last = not watch or all(run["state"] != "alive" for run in result["runs"])
        if as_json and (last or not quiet):
            click.echo(json.dumps(result))
        elif last or not quiet:
            if watch and console.is_terminal and not quiet:
                console.clear()
            runs.show(result, console)
        if last:
            return
        time.sleep(every)


@click.command()
@click.argument("uri", metavar="URI", help="An output.uri.")
@click.option("--yes", is_flag=True, help="Remove what is listed (otherwise nothing is).")
@click.option("--unfinished", is_flag=True, help="Dead runs that could go on, too.")
@click.option(
    "--age",
    type=float,
    default=10,
    metavar="MINUTES",
    help="Without a heartbeat → dead (default: 10, at least 1).",
)
@json_option
@quiet_option
def clean(uri: str, yes: bool, unfinished: bool, age: float, as_json: bool, quiet: bool) -> None:
    """List, or remove, what dead runs and pulls have left."""
    from fusegpt_ray.run import housekeeping

    asked = (uri, age * 60, unfinished)
    found = housekeeping.leftovers(*asked)
    removed = housekeeping.clean(*asked, found) if yes else []
    if as_json:
        rows = [asdict(item) | {"removed": item in removed} for item in found]
        click.echo(json.dumps({"found": rows}))
        return
    from fusegpt_ray.terminal.display import byte_count

    for item in found:
        goes = "would remove" if item.dead and not yes else "kept"
        verb = "removed" if item in removed else goes
        click.echo(f"{verb:<12}  {item.uri}  {byte_count(item.size)}  {item.what}")
    if quiet:
        return
    dead = [item for item in found if item.dead]
    if dead and not yes:
        size = byte_count(sum(item.size for item in dead))
        click.echo(f"{size} could go; nothing was removed: that takes --yes")
    if not found:
        click.echo(f"nothing to remove in {uri}")

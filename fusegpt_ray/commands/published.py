"""Use what was published: `pull` and `verify`."""

from __future__ import annotations

import json

import click

from fusegpt_ray.commands.options import PUBLISHED, json_option, quiet_option, say_outcome

GOES_ON = "The same command goes on with what has arrived."
"""A note to what stops a pull."""


@click.command()
@click.argument("uri", metavar="URI", help=PUBLISHED)
@click.argument("folder", metavar="DIR", help="Local folder; it appears once it is whole.")
@json_option
@quiet_option
@click.pass_context
def pull(context: click.Context, uri: str, folder: str, as_json: bool, quiet: bool) -> None:
    """Download a published model and check it.

    Run again after a failure, it goes on with what has arrived.
    """
    from rich.console import Console

    from fusegpt_ray.publishing import download
    from fusegpt_ray.report import Transfer

    show = Transfer(Console(stderr=True, quiet=True)) if quiet else None
    try:
        path = download.pull(uri, folder, show)
    except download.Incomplete as error:
        say_outcome("failed:", error)
        context.exit(1)
    except KeyboardInterrupt as stop:
        stop.add_note(GOES_ON)
        raise
    if as_json:
        click.echo(json.dumps({"folder": str(path)}))


@click.command()
@click.argument("uri", metavar="URI", help=PUBLISHED)
@json_option
@click.pass_context
def verify(context: click.Context, uri: str, as_json: bool) -> None:
    """Compare a published model with what its manifest says.

    The exit code is 1 if something is wrong.
    """
    from fusegpt_ray.publishing import verification

    result = verification.verify(uri)
    if as_json:
        click.echo(json.dumps(result))
    else:
        for row in result["problems"]:
            click.echo(f"{row['file']} {row['problem']}")
        for row in result["remarks"]:
            click.echo(f"remark: {row['file']} {row['remark']}")
        if result["good"]:
            told = f"{result['model']}, {result['files']} files, {result['bytes']} bytes"
            click.echo(f"good: {told}")
    if not result["good"]:
        context.exit(1)

"""Look at what became of a run: `report`."""

from __future__ import annotations

import json

import click

from fusegpt_ray.commands.options import json_option


@click.command()
@click.argument("uri", metavar="URI", help="Folder of a published model, or of a run.")
@click.option(
    "--output",
    default="report.html",
    metavar="FILE",
    help="Where to write it; an older report is replaced (default: report.html).",
)
@json_option
def report(uri: str, output: str, as_json: bool) -> None:
    """Draw a published model, or a run that is under way, as one page of HTML.

    It is made from the manifest or the journal alone, and needs no network to be looked at.
    """
    from fusegpt_ray.reporting import page

    path = page.write(uri, output)
    click.echo(json.dumps({"report": path}) if as_json else path)

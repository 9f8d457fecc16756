"""Look at what became of a run, a comparison or a family: `report`."""

from __future__ import annotations

import json

import click

from fusegpt_ray.commands.options import json_option, quiet_option

_WHOSE = "Folder of a published model, a run, a comparison or a family."


@click.command()
@click.argument("uri", metavar="URI", help=_WHOSE)
@click.option(
    "--output",
    default="report.html",
    metavar="FILE",
    help="Where to write it; an older report is replaced (default: report.html).",
)
@json_option
@quiet_option
def report(uri: str, output: str, as_json: bool, quiet: bool) -> None:
    """Draw a model, a run, a comparison or a family as one page of HTML.

    Also of what is under way. It is made from the manifest, the journal, table.json or family.json
    alone, and needs no network to be looked at.
    """
    from fusegpt_ray.reporting.place import write

    del quiet  # nothing but the result is said in any case
    path = write(_page(uri, output), output)
    click.echo(json.dumps({"report": path}) if as_json else path)


def _page(uri: str, output: str) -> str:
    """By what lies in the folder."""
    from fusegpt_ray.run.outputs import Outputs
    from fusegpt_ray.store import comparison, family, storage

    there = Outputs.look(uri)
    if comparison.TABLE in there.files:
        from fusegpt_ray.comparison import page as of_comparison

        return of_comparison.html(comparison.Told.read(there.uri).model_dump())
    if family.BOARD in there.files:
        from fusegpt_ray.family import page as of_family

        board = family.FamilyBoard.read(there.uri)
        inside = storage.absolute(output).rpartition("/")[0] == there.uri
        return of_family.html(board.told.model_dump(), linked=inside)
    from fusegpt_ray.reporting import page
    from fusegpt_ray.reporting.facts import told_by

    return page.html(told_by(there))

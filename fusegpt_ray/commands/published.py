"""Use what was published: `pull`, `verify` and `publish`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

import click

from fusegpt_ray.commands.options import PUBLISHED, json_option, quiet_option, say_outcome
from fusegpt_ray.errors import UserError

GOES_ON = "The same command goes on with what has arrived."
"""A note to what stops a pull."""


@click.command()
@click.argument("uri", metavar="URI", help=PUBLISHED)
@click.argument("folder", metavar="DIR", help="Local folder; it appears once it is whole.")
@click.option(
    "--family",
    is_flag=True,
    help="URI is the folder of a family; each of its models gets a folder in DIR.",
)
@click.option(
    "--member",
    "members",
    multiple=True,
    metavar="NAME",
    help="Of a family: only the models of this member; may be given several times.",
)
@json_option
@quiet_option
@click.pass_context
def pull(
    context: click.Context,
    uri: str,
    folder: str,
    family: bool,
    members: tuple[str, ...],
    as_json: bool,
    quiet: bool,
) -> None:
    """Download a published model, or a whole family, and check it.

    Run again after a failure, it goes on with what has arrived.
    """
    from rich.console import Console

    from fusegpt_ray.publishing import download
    from fusegpt_ray.terminal.display import Transfer

    if members and not family:
        raise UserError("--member", members[0], "only a family has members", "add --family")
    pulled, failed = [], False
    for source, target in _to_pull(uri, folder, members, quiet) if family else [(uri, folder)]:
        show = Transfer(Console(stderr=True, quiet=True)) if quiet else None
        try:
            pulled.append(str(download.pull(source, target, show)))
        except download.Incomplete as error:
            say_outcome("failed:", error)
            failed = True
        except KeyboardInterrupt as stop:
            stop.add_note(GOES_ON)
            raise
    if failed:
        context.exit(1)
    if as_json:
        click.echo(json.dumps({"folders": pulled} if family else {"folder": pulled[0]}))


def _to_pull(uri: str, folder: str, members: Sequence[str], quiet: bool) -> list[tuple[str, str]]:
    """Where the models of a family are, and where each of them goes."""
    from fusegpt_ray.store.family import FamilyBoard

    board = FamilyBoard.read(uri)
    found = [(place, f"{folder}/{model.folder}") for model, place in board.chosen(members)]
    if not board.finished and not quiet:
        click.echo("the family is not finished: what is published so far is pulled", err=True)
    return found


@click.command()
@click.argument("uri", metavar="URI", help=PUBLISHED)
@json_option
@quiet_option
@click.pass_context
def verify(context: click.Context, uri: str, as_json: bool, quiet: bool) -> None:
    """Compare a published model with what its manifest says.

    The exit code is 1 if something is wrong; --quiet says nothing but that.
    """
    from rich.console import Console

    from fusegpt_ray.publishing import verification
    from fusegpt_ray.terminal.display import Transfer

    show = Transfer(Console(stderr=True, quiet=True)) if quiet else None
    result = verification.verify(uri, show)
    if as_json:
        click.echo(json.dumps(result))
    else:
        for row in result["problems"]:
            click.echo(f"{row['file']} {row['problem']}")
        for row in [] if quiet else result["remarks"]:
            click.echo(f"remark: {row['file']} {row['remark']}")
        if result["good"] and not quiet:
            told = f"{result['model']}, {result['files']} files, {result['bytes']} bytes"
            click.echo(f"good: {told}")
    if not result["good"]:
        context.exit(1)


@click.command()
@click.argument("uri", metavar="URI", help=PUBLISHED)
@click.argument("repo", metavar="REPO", help="Repository of the hub: owner/name.")
@click.option(
    "--private/--public",
    default=None,
    help="Who may see a new repository (left out: as the owner's account has it).",
)
@click.option(
    "--revision",
    default="main",
    metavar="BRANCH",
    help="Branch; made if need be (default: main).",
)
@click.option("--message", metavar="TEXT", help="Of the commit (left out: the model's name).")
@json_option
@quiet_option
def publish(
    uri: str,
    repo: str,
    private: bool | None,
    revision: str,
    message: str | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Send a published model to the Hugging Face hub.

    It is verified first, and appears there in one commit. The token is that of HF_TOKEN or of `hf
    auth login`. Run again after a failure, it goes on with what the hub has received.
    """
    from rich.console import Console

    from fusegpt_ray.publishing.upload import upload
    from fusegpt_ray.terminal.display import Transfer

    def display() -> Transfer:
        return Transfer(Console(stderr=True, quiet=True) if quiet else None)

    try:
        done = upload(
            uri, repo, private=private, revision=revision, message=message, display=display
        )
    except KeyboardInterrupt as stop:
        stop.add_note(GOES_ON)
        raise
    if as_json:
        click.echo(json.dumps(asdict(done)))
    else:
        click.echo(f"{done.url}{'' if done.new else ' holds this model already'}")

"""`fusegpt family`: many members on one cluster, and what came of each."""

from __future__ import annotations

from typing import Any

from fusegpt_ray.errors import StorageError, first_line
from fusegpt_ray.family.board import on_terminal
from fusegpt_ray.family.follow import PAGE, Board
from fusegpt_ray.family.members import SECTION, Members
from fusegpt_ray.family.watch import TableDisplay
from fusegpt_ray.run.outputs import TRAINING_FOLDER
from fusegpt_ray.scheduling.planned import planned
from fusegpt_ray.scheduling.slots import Instructions, Job, Slots
from fusegpt_ray.store import storage
from fusegpt_ray.terminal.display import Display


def compress_family(
    members: Members, display: Display | None = None, restart: bool = False
) -> dict[str, Any]:
    """Compress all members, as many at once as there is room for, and write what came of each into
    `members.folder`; returns what is in family.json (see `Board.result`).

    A member that fails is told and the others go on. Given again, only what is missing is done;
    with `restart`, unfinished runs of these names are forgotten.

    Raises:
        UserError: a member cannot be carried out, as far as this is known before any of them works.
    """
    with display or TableDisplay() as show:
        runs = [(member, run) for member in members.members for run in member.runs]
        jobs = []
        for member, run in runs:
            own = show.of_run(run.recipe.output.name)
            plan, name = planned(run, own, restart), f"{member.name}: {run.method}"
            jobs.append(Job(name, plan, own, member.priority))
        board = Board(members, jobs, show)
        if isinstance(show, TableDisplay):
            show.table = lambda: on_terminal(board.result("working"))
        asked = Instructions(
            members.folder,
            "runs",
            members.at_once,
            f"{SECTION}.at_once",
            members.gpus,
            ends_early=False,
            restart=restart,
            changed=board.changed,
        )
        Slots(jobs, asked, show).run()
        storage.remove(storage.join(members.folder, TRAINING_FOLDER), recursive=True)
        result = board.ended()
        board.write(result, _page(result, show))
        show.say(f"the leaderboard is in {members.folder}")
    return result


def _page(result: dict[str, Any], show: Display) -> bytes | None:
    """None where it cannot be drawn: models are worth more than their pictures."""
    try:
        from fusegpt_ray.family import page  # altair: takes a second

        return page.html(result, linked=True).encode(errors="replace")
    except Exception as error:  # whatever the charting libraries raise
        if isinstance(error, StorageError):
            raise
        show.say(f"no {PAGE}: it cannot be drawn here ({first_line(error)})")
        return None

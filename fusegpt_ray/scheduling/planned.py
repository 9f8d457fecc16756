"""The plans of many runs, before any of them works."""

from __future__ import annotations

from collections.abc import Iterable

from fusegpt_ray.errors import UserError
from fusegpt_ray.planning import plan as plans
from fusegpt_ray.planning.plan import Plan
from fusegpt_ray.scheduling.grid import Run
from fusegpt_ray.scheduling.mistakes import Mistakes
from fusegpt_ray.terminal.display import Display


def planned(run: Run, show: Display, restart: bool = False, looks: bool = False) -> Plan:
    """See `plan.plan`.

    Raises:
        UserError: it cannot be carried out; the message says which run it is.
    """
    try:
        return plans.plan(run.recipe, show, restart, looks, extends=True)
    except UserError as error:
        Mistakes().note([error], run.where)
        raise


def all_mistakes(runs: Iterable[Run], show: Display) -> tuple[list[UserError], list[str]]:
    """Of all of them: see `plan.mistakes`, `plan.not_looked_up`."""
    mistakes, unknown = Mistakes(stops=False), dict[str, None]()
    for run in runs:
        mistakes.note(plans.mistakes(run.recipe, show, extends=True), run.where)
        unknown |= dict.fromkeys(plans.not_looked_up(run.recipe))
    return mistakes.told, [*unknown]

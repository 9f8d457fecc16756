"""The repair of a round's gap in closed form, and what is said of it."""

from __future__ import annotations

from fusegpt_ray.fusion.repair import Repair, Repaired
from fusegpt_ray.methods.base import Round


def repaired(round: Round) -> Repaired:
    """The block before the one to remove, repaired as `fusion.start` says."""
    way = round.recipe.fusion.start
    assert way != "auto" and way != "none", "there is nothing to do"
    repair = Repair(round.stack, round.donor, way, round.folder, round.fence)
    round.show.stage(f"round {round.number}: repairing the gap of block {round.donor}")
    found = repair.on(round.workers, round.windows, round.place_WT)
    round.show.say(f"  {found.in_words()}")
    return found

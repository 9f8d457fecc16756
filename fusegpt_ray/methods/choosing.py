"""How blocks are chosen: by a metric before each round, or once for all rounds."""

from __future__ import annotations

from dataclasses import replace

from fusegpt_ray.importance.ranking import Ranking
from fusegpt_ray.importance.scoring import score
from fusegpt_ray.methods.base import Change, Choose, Question, Round


def by_metric(asked: Question) -> Ranking:
    """By `importance.metric`, anew in each round."""
    return score(
        asked.workers,
        asked.stack,
        asked.windows,
        asked.settings,
        asked.last,
        asked.sums,
        asked.candidates,
    )


def once(rank: Choose) -> Choose:
    """Ranked in the dense model; each later round takes the lowest that is left. The first round
    ranks all that may go, not only the lowest of them.
    """

    def choose(asked: Question) -> Ranking:
        known = asked.last.scores if asked.last else {}
        if known.keys() >= {*asked.free}:
            return Ranking.without_work({number: known[number] for number in asked.free})
        # Nothing was ranked yet, or only the last block can go, each time another one.
        return rank(asked)

    return choose


def all_by_metric(asked: Question) -> Ranking:
    """By `importance.metric`, the score of every block in full."""
    full = asked.settings.model_copy(update={"all": True, "racing": None})
    return by_metric(replace(asked, settings=full))


def drop(round: Round) -> Change:
    """All that happens to the block: it goes."""
    return Change(round.stack.drop(round.donor))

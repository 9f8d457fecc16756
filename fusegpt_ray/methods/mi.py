"""`mi`: the block is dropped."""

from __future__ import annotations

from fusegpt_ray.importance.scoring import score
from fusegpt_ray.methods.base import Change, Method, Round


def _drop(round: Round) -> Change:
    return Change(round.stack.drop(round.donor))


METHOD = Method("mi", score, _drop)

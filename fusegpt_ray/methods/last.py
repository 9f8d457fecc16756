"""`last`: the last blocks but the final one are dropped, from the end on, a control.

It is the simple strategy of Gromov et al. (arXiv 2403.17887): deep blocks matter least, but the
final one, which the head was trained to read, matters. Where only the last block of a model can go,
that one goes.
"""

from __future__ import annotations

from fusegpt_ray.importance.ranking import Ranking
from fusegpt_ray.methods.base import Method, Question
from fusegpt_ray.methods.choosing import drop


def _from_the_end(asked: Question) -> Ranking:
    """A block's score is how many blocks lie behind it; the final one's is above all others."""
    depth = len(asked.stack)
    behind = {n: depth - 1 - place for place, n in enumerate(asked.stack.kept)}
    return Ranking.without_work({n: float(behind[n] or depth) for n in asked.free})


METHOD = Method("last", _from_the_end, drop)

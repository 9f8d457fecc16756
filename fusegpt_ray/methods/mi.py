"""`mi`: the block is dropped."""

from __future__ import annotations

from fusegpt_ray.methods.base import Change, Method, Round


def _drop(round: Round) -> Change:
    return Change(round.stack.drop(round.donor))


METHOD = Method(
    name="mi",
    about="blocks with the lowest Macro Influence dropped, nothing trained",
    change=_drop,
    trains=False,
)

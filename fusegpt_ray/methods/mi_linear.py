"""`mi+linear`: the block is dropped, and the block before it repaired in closed form."""

from __future__ import annotations

from fusegpt_ray.methods.base import Change, Method, Round
from fusegpt_ray.methods.choosing import by_metric
from fusegpt_ray.methods.repairing import repaired


def _repair(round: Round) -> Change:
    found = repaired(round)
    stack, block = round.stack.drop(round.donor), found.block
    return Change(
        stack if block is None else stack.swap({block.dense: block}),
        found.files,
        repair=found.to_record(),
        states_batch_size=found.batch_size,
        states_bytes_read=found.bytes_read,
        states_seconds=found.seconds,
    )


METHOD = Method("mi+linear", by_metric, _repair)

"""Saving on workers: a model's shards are written, and read back, by the replicas of all nodes."""

from __future__ import annotations

import math

from fusegpt_ray.model.runner import Runner
from fusegpt_ray.publishing.shards import AT_ONCE, Shards
from fusegpt_ray.publishing.shards import put_shards as put_here
from fusegpt_ray.store.checkpoint import FileRecord
from fusegpt_ray.store.fence import Fence
from fusegpt_ray.workers.base import Workers


def put_shards(
    workers: Workers, folder: str, shards: Shards, fence: Fence
) -> dict[str, FileRecord]:
    """`shards.put_shards` on replicas, a few shards each.

    `fence` is called where a shard is written, so it must be small enough to travel. A replica that
    is lost may have written some of its shards: another writes them again, the same bytes under the
    same names, and each name always holds a whole file.
    """
    each = min(AT_ONCE, -(-len(shards) // workers.replicas))
    names = list(shards)
    parts = [names[at : at + each] for at in range(0, len(names), each)]
    tasks = [(folder, {name: shards[name] for name in part}, fence) for part in parts]
    # Nobody else helps a slow writer: it is the store that is slow.
    costs = [math.inf] * len(tasks)
    written: dict[str, FileRecord] = {}
    for _, records in workers.map(_put, tasks, workers.setup.importance.batch, costs):
        written |= records
    return {name: written[name] for name in names}


def _put(runner: Runner, folder: str, shards: Shards, fence: Fence) -> dict[str, FileRecord]:
    """On a replica, which needs no model for it. The replicas of a node share its memory."""
    return put_here(folder, shards, fence, max(1, round(AT_ONCE * runner.host_share)))

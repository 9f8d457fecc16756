"""Several sets of workers in one cluster at the same time, for runs that do not need each other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import ray

from fusegpt_ray.distributed.connection import Connection, gpus_of
from fusegpt_ray.distributed.nodes import wait_for_resources
from fusegpt_ray.errors import UserError
from fusegpt_ray.workers.base import Setup


@contextmanager
def joined(setup: Setup, asked: int | None, most: int, key: str) -> Iterator[int]:
    """Be in the cluster while the block lasts; yields how many sets of workers may be opened there.

    Args:
        asked: so many, for which the cluster must have room; None: as many as are sure to find
            free GPUs, or one where the cluster has none, because sets share cores and memory.
        most: so many are of use.
        key: of `asked`, for messages.

    Raises:
        UserError: no cluster answers, or it lacks GPUs or CPUs.
    """
    cluster, sets = setup.cluster, min(asked or 1, most)
    connection = Connection.open(cluster, sets)
    try:
        processes = max(cluster.replicas, cluster.workers if setup.trains else 0)
        gpus = max(gpus_of(cluster) * cluster.replicas, _training_gpus(setup))
        try:
            wait_for_resources(sets * gpus, sets * processes, cluster, grows=not connection.own)
        except UserError as error:
            if sets == 1:
                raise
            raise UserError(key, asked, error.problem, "lower it, or leave it out") from error
        yield sets if asked else max(1, min(most, _room(setup)))
    finally:
        connection.close()


def _room(setup: Setup) -> int:
    """For so many sets there are GPUs that nothing else uses, one for each process of theirs, and
    CPUs, one of which each set leaves to Ray Data.
    """
    cluster, free = setup.cluster, ray.available_resources()
    gpus = gpus_of(cluster) * cluster.replicas + _training_gpus(setup)
    if not gpus:
        return 1
    cpus = cluster.replicas + (cluster.workers if setup.trains else 0) + 1
    return int(min(free.get("GPU", 0) // gpus, free.get("CPU", 0) // cpus))


def _training_gpus(setup: Setup) -> int:
    return setup.cluster.workers if setup.trains and gpus_of(setup.cluster) else 0

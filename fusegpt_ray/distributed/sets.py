"""Several sets of workers in one cluster at the same time, for runs that do not need each other."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import ray

from fusegpt_ray.distributed.connection import Connection, gpus_of
from fusegpt_ray.distributed.nodes import wait_for_resources
from fusegpt_ray.errors import UserError
from fusegpt_ray.workers.base import Setup
from fusegpt_ray.workers.room import Held, Need, Room, Way


@contextmanager
def joined(
    setups: Sequence[Setup], asked: int | None, quota: float | None, key: str
) -> Iterator[Room]:
    """Be in the cluster while the block lasts; yields the room that sets of workers have there.

    Args:
        setups: of the set that each job needs.
        asked: so many sets at once, for which the cluster must have room; None: as many as are sure
            to find free GPUs, or one where a set has none, because sets share cores and memory.
        quota: GPUs that all sets together may take; None: those that are free.
        key: of `asked`, for messages.

    Raises:
        UserError: no cluster answers, or it lacks GPUs or CPUs.
    """
    sets = min(asked or 1, len(setups))
    widest = sorted(setups, key=_processes)[-sets:]
    connection = Connection.open(setups[0].cluster, [setup.cluster for setup in widest])
    try:
        gpus = sum(sorted(_held(setup, "turns").gpus for setup in setups)[-sets:])
        cpus = sum(map(_processes, widest))
        wanted = gpus if quota is None else min(gpus, quota)
        cluster = max((setup.cluster for setup in setups), key=lambda one: one.wait_minutes)
        try:
            wait_for_resources(wanted, cpus, cluster, grows=not connection.own)
        except UserError as error:
            if sets == 1:
                raise
            raise UserError(key, asked, error.problem, "lower it, or leave it out") from error
        yield _room([_need(setup) for setup in setups], asked, quota)
    finally:
        connection.close()


def _room(needs: Sequence[Need], asked: int | None, quota: float | None) -> Room:
    sets = min(asked or 1, len(needs))
    if not all(need.gpus for need in needs) or (asked and quota is None):
        there = ray.cluster_resources()
        most = Need(*(sum(sorted(kind)[-sets:]) for kind in zip(*map(_pair, needs), strict=True)))
        roomy = most.within(Need(there.get("GPU", 0), there.get("CPU", 0)))
        return Room(needs, sets, Need(quota or math.inf, math.inf), roomy)
    free = ray.available_resources()
    total = Need(min(free.get("GPU", 0), quota or math.inf), free.get("CPU", 0))
    small = sorted(needs, key=_pair)
    fitting = [n for n in range(1, len(needs) + 1) if Need.of_all(small[:n]).within(total)]
    return Room(needs, max(1, min([asked or len(needs), len(fitting)])), total, roomy=True)


def _pair(need: Need) -> tuple[float, float]:
    return need.gpus, need.cpus


def _need(setup: Setup) -> Need:
    """GPUs and CPUs that nothing else uses, one for each of its processes, and a CPU more, which it
    leaves to Ray Data.
    """
    held = _held(setup, "apart")
    return Need(held.gpus, held.replicas + held.workers + 1)


def _processes(setup: Setup) -> int:
    """That compute at the same time where replicas and training workers take turns."""
    held = _held(setup, "turns")
    return max(held.replicas, held.workers)


def _held(setup: Setup, way: Way) -> Held:
    return Held.of(setup.cluster, gpus_of(setup.cluster), setup.trains, way)

"""Several sets of workers in one cluster at the same time, for runs that do not need each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from fusegpt_ray.distributed.connection import Connection, gpus_of
from fusegpt_ray.distributed.nodes import free_resources, resources_of_any, wait_for_resources
from fusegpt_ray.errors import UserError
from fusegpt_ray.recipe.cluster_section import Cluster
from fusegpt_ray.workers.base import Setup
from fusegpt_ray.workers.room import Need, Room


@contextmanager
def joined(
    setups: Sequence[Setup], asked: int | None, quota: float | None, key: str
) -> Iterator[Room]:
    """Be in the cluster while the block lasts; yields the room that sets of workers have there.

    Args:
        setups: of the set that each job needs.
        asked, quota: see `Room.of`; the cluster must have room for so many sets.
        key: of `asked`, for messages.

    Raises:
        UserError: no cluster answers, or it lacks GPUs or CPUs.
    """
    sets = min(asked or 1, len(setups))
    widest = sorted(setups, key=_processes)[-sets:]
    connection = Connection.open(setups[0].cluster, [setup.cluster for setup in widest])
    try:
        for alike in _by_labels(setups):
            try:
                _wait(alike, sets, quota, grows=not connection.own)
            except UserError as error:
                if sets == 1:
                    raise
                raise UserError(key, asked, error.problem, "lower it, or leave it out") from error
        yield _room(setups, asked, quota)
    finally:
        connection.close()


def _by_labels(setups: Sequence[Setup]) -> Iterator[list[Setup]]:
    """Those together that run on the same nodes."""
    labels = [setup.cluster.labels for setup in setups]
    for number, one in enumerate(labels):
        if one not in labels[:number]:
            yield [setup for setup in setups if setup.cluster.labels == one]


def _wait(setups: Sequence[Setup], sets: int, quota: float | None, grows: bool) -> None:
    """Until their nodes have what the largest of these sets need."""
    needs = [_need(setup) for setup in setups]
    gpus = Need.of_largest(needs, sets).gpus
    cpus = sum(sorted(map(_processes, setups))[-sets:])
    cluster: Cluster = max((setup.cluster for setup in setups), key=lambda one: one.wait_minutes)
    wait_for_resources(gpus if quota is None else min(gpus, quota), cpus, cluster, grows)


def _room(setups: Sequence[Setup], asked: int | None, quota: float | None) -> Room:
    clusters = [setup.cluster for setup in setups]
    free, there = (_counted(kind(clusters)) for kind in (free_resources, resources_of_any))
    needs, at_once = ([_need(setup, both) for setup in setups] for both in (False, True))
    publishers = [_need(setup.publisher) for setup in setups]
    return Room.of(needs, at_once, publishers, asked, quota, free, there)


def _counted(resources: dict[str, float]) -> Need:
    return Need(resources.get("GPU", 0), resources.get("CPU", 0))


def _need(setup: Setup, at_once: bool = False) -> Need:
    return Need.of(setup.cluster, setup.trains, gpus_of(setup.cluster), at_once)


def _processes(setup: Setup) -> int:
    """That compute at the same time where replicas and training workers take turns."""
    return max(setup.cluster.replicas, setup.cluster.workers if setup.trains else 0)

"""Several sets of workers in one cluster at the same time, for runs that do not need each other."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from fusegpt_ray.distributed.autoscaler import AGAIN, Ask, Bundles, asking, bundles
from fusegpt_ray.distributed.connection import Connection, gpus_of
from fusegpt_ray.distributed.nodes import Ours, wait_for_resources
from fusegpt_ray.errors import UserError
from fusegpt_ray.recipe.cluster_section import Cluster
from fusegpt_ray.workers.base import Setup
from fusegpt_ray.workers.room import Need, ResourcePool, Room


@contextmanager
def joined(
    setups: Sequence[Setup], asked: int | None, quota: float | None, key: str
) -> Iterator[ResourcePool]:
    """Be in the cluster while the block lasts; yields the place that sets of workers have there,
    once there is enough for the largest of them. Where nodes may join, an autoscaler is asked for
    what all of them could use.

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
    grows = not connection.own
    asks = grows and any(setup.cluster.wait_minutes for setup in setups)
    try:
        with asking() as ask:
            place = Nodes(setups, asked, quota, ask if asks else lambda parts: None)
            place.ask([(_need(setup), setup.cluster) for setup in setups])
            for alike in _by_labels(setups):
                try:
                    _wait(alike, sets, quota, grows)
                except UserError as error:
                    if sets == 1:
                        raise
                    fix = "lower it, or leave it out"
                    raise UserError(key, asked, error.problem, fix) from error
            yield place
    finally:
        connection.close()


class Nodes(ResourcePool):
    """The nodes that the labels of these sets let them use, whichever there are at the moment."""

    def __init__(
        self, setups: Sequence[Setup], asked: int | None, quota: float | None, ask: Ask
    ) -> None:
        both, turns = ([_need(setup, way) for setup in setups] for way in (True, False))
        publishers = [_need(setup.publisher) for setup in setups]
        self._needs, self._limits = (turns, both, publishers), (asked, quota)
        self._nodes, self._ask = Ours([setup.cluster for setup in setups]), ask
        self._look()

    def now(self) -> Room:
        if time.monotonic() >= self._looked + AGAIN:
            self._look()
        return self._room

    def ask(self, sets: Sequence[tuple[Need, Cluster]]) -> None:
        """A request counts what others hold as well: see `autoscaler.py`. None of it is asked for
        in any case: what one of them cannot do without it asks for when it is opened.
        """
        parts, gpus, quota = list[Bundles](), 0.0, self._limits[1] or math.inf
        for need, cluster in sets:
            if len(parts) < self._room.at_once and gpus + need.gpus <= quota:
                others = Need() if parts else self._others
                together = Need.of_all([need, others])
                parts.append(bundles(together.gpus, together.cpus, cluster))
                gpus += need.gpus
        self._ask([Bundles(), *parts] if parts else [])

    def _look(self) -> None:
        ours, self._others = self._nodes.now()
        there = Need.of_all([ours, self._others])
        self._room = Room.of(*self._needs, *self._limits, ours, there)
        self._looked = time.monotonic()


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


def _need(setup: Setup, at_once: bool = False) -> Need:
    return Need.of(setup.cluster, setup.trains, gpus_of(setup.cluster), at_once)


def _processes(setup: Setup) -> int:
    """That compute at the same time where replicas and training workers take turns."""
    return max(setup.cluster.replicas, setup.cluster.workers if setup.trains else 0)

"""How much of a cluster sets of workers take, and how much there is for all of them. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self

from fusegpt_ray.recipe.cluster_section import Cluster

Way = Literal["shared", "apart", "turns"]
"""How training workers come to GPUs: each takes the rest of a replica's, and there is a replica for
each; each has one of its own beside the replicas'; or replicas end while they train."""


@dataclass(frozen=True)
class Allocation:
    """Processes of a set of workers, and the GPUs that all of them hold together: what is waited
    for, kept free for the set, planned with, and paid for.
    """

    replicas: int
    workers: int
    """Training workers; 0: nothing is trained."""
    gpus: float

    @classmethod
    def of(cls, cluster: Cluster, each: float, trains: bool, way: Way) -> Self:
        """Of what a recipe asks for.

        Args:
            each: GPUs of a replica. A training worker has one, if replicas have any.
        """
        workers = cluster.workers if trains else 0
        replicas = max(cluster.replicas, workers) if way == "shared" else cluster.replicas
        training = workers if each else 0
        if way == "apart":
            return cls(replicas, workers, each * replicas + training)
        return cls(replicas, workers, max(each * replicas, training))

    @classmethod
    def alone(cls, cluster: Cluster, trains: bool) -> Self:
        """Of a run by itself, where there are as many GPUs as it can use."""
        if cluster.engine == "local":
            return cls(1, 1 if trains else 0, 1.0)
        each = 1.0 if cluster.gpus_per_replica is None else cluster.gpus_per_replica
        return cls.of(cluster, each, trains, way_alone(each))


def way_alone(each: float) -> Way:
    """Of a set that has no others beside it, where there is room, and no other GPU is free. Ray can
    put a replica and a training worker on the same GPU where the replica has it alone; beside other
    sets it might put the worker beside a replica of another set, which does not make room for it.
    """
    return "shared" if each == 1 else "apart"


def begun(nodes: Sequence[float], replicas: int, each: float) -> float:
    """GPUs that so many replicas take, or begin, at most, of nodes that have so many each. Ray
    fills a GPU that is begun before it begins another of that node; but it may take any node.
    """
    if not each or each >= 1:
        return each * replicas
    on_a_gpu = int(1 / each + 1e-6)
    first = min(replicas, len(nodes))  # one on each node, then a GPU more for each that is full
    return min(sum(nodes), first + (replicas - first) // on_a_gpu)


@dataclass(frozen=True)
class Need:
    """What a set of workers takes."""

    gpus: float = 0
    cpus: float = 0

    @classmethod
    def of(cls, cluster: Cluster, trains: bool, gpu: float, at_once: bool = False) -> Self:
        """Of replicas and training workers that take turns, or live `at_once` beside each other.
        Each has a CPU, and one more is left to Ray Data.

        Args:
            trains: whether there are training workers.
            gpu: GPUs of a replica; a training worker has a whole one, or none if a replica has
                none. At once with the workers of several sets, each replica may begin a GPU: where
                all GPUs were begun, no set could train.
        """
        if at_once:
            held = Allocation.of(cluster, math.ceil(gpu), trains, "apart")
            return cls(held.gpus, held.replicas + held.workers + 1)
        held = Allocation.of(cluster, gpu, trains, "turns")
        return cls(held.gpus, max(held.replicas, held.workers) + 1)

    def within(self, other: Need) -> bool:
        return self.gpus <= other.gpus and self.cpus <= other.cpus

    @classmethod
    def of_all(cls, needs: Sequence[Need]) -> Need:
        return cls(sum(need.gpus for need in needs), sum(need.cpus for need in needs))

    @classmethod
    def of_largest(cls, needs: Sequence[Need], sets: int) -> Need:
        """Of so many sets, whichever these are."""
        gpus, cpus = (sorted(kind)[-sets:] for kind in zip(*map(_pair, needs), strict=True))
        return cls(sum(gpus), sum(cpus))


ANY = Need(math.inf, math.inf)


@dataclass(frozen=True)
class Room:
    """In which sets of workers may be open."""

    needs: Sequence[Need]
    """Of the set of each job, beside others."""
    at_once: int = 1
    """At most so many sets, however much there is."""
    total: Need = ANY
    """All sets together."""
    roomy: bool = False
    """Whether the replicas and the training workers of all sets can be there at once, so that they
    need not take turns."""
    both: Sequence[Need] = ()
    """Of each job's set where they do not take turns; `needs` if nothing is given."""
    publishers: Sequence[Need | None] = ()
    """Of a set that is enough to publish, of each job, where jobs wait for GPUs: one that only
    publishes is to leave its own to others. None: it does not, as all do if nothing is given."""

    def __post_init__(self) -> None:
        if not self.both:
            object.__setattr__(self, "both", self.needs)
        if not self.publishers:
            object.__setattr__(self, "publishers", [None] * len(self.needs))

    @classmethod
    def of(
        cls,
        needs: Sequence[Need],
        both: Sequence[Need],
        publishers: Sequence[Need],
        asked: int | None,
        quota: float | None,
        ours: Need,
        there: Need,
    ) -> Self:
        """For the jobs of these needs.

        Args:
            both: the same where replicas and training workers need not take turns.
            publishers: of what is enough to publish.
            asked: at most so many sets; None: as many as find GPUs, or one where a set needs none,
                because sets share cores and memory.
            quota: GPUs that all sets together may take; None: those that are ours.
            ours: all that there is but for what others use.
            there: all that there is.
        """
        if not all(need.gpus for need in needs) or (asked and quota is None):
            room = cls(needs, min(asked or 1, len(needs)), Need(quota or math.inf, math.inf))
        else:
            total = Need(min(ours.gpus, quota or math.inf), ours.cpus)
            late = () if asked else publishers
            room = cls(needs, min(asked or len(needs), len(needs)), total, publishers=late)
            there = total
        return replace(room, both=both, roomy=Need.of_largest(both, room.sets).within(there))

    @property
    def sets(self) -> int:
        """So many find room at the same time, if they are the smallest; one does in any case."""
        small = sorted(self.needs, key=_pair)
        numbers = range(1, self.at_once + 1)
        return max([1, *(n for n in numbers if Need.of_all(small[:n]).within(self.total))])


class ResourcePool:
    """Where sets of workers may be open, as long as jobs are done there. This is a room that stays
    as it is.
    """

    def __init__(self, room: Room) -> None:
        self._room = room

    def now(self) -> Room:
        """The room that there is now."""
        return self._room

    def ask(self, sets: Sequence[tuple[Need, Cluster]]) -> None:
        """Have nodes join for what these sets could take at the same time, the first of them above
        all, and no more for those that were given before. Safe to repeat, and to be repeated.
        """


def _pair(need: Need) -> tuple[float, float]:
    return need.gpus, need.cpus

"""How much of a cluster sets of workers take, and how much there is for all of them. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self

from fusegpt_ray.recipe.cluster_section import Cluster

Way = Literal["shared", "apart", "turns"]
"""How training workers come to GPUs: each takes the rest of a replica's, and there is a replica for
each; each has one of its own beside the replicas'; or replicas end while they train."""


@dataclass(frozen=True)
class Held:
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
    """Of a set that has no others beside it, where there is room. Ray can put a replica and a
    training worker on the same GPU where the replica has it alone; beside other sets it might put
    the worker beside a replica of another set, which does not make room for it.
    """
    return "shared" if each == 1 else "apart"


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
                none.
        """
        held = Held.of(cluster, gpu, trains, "apart" if at_once else "turns")
        together = sum if at_once else max
        return cls(held.gpus, together((held.replicas, held.workers)) + 1)

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
    """At most so many sets, but for those that only publish."""
    total: Need = ANY
    """All sets together."""
    roomy: bool = False
    """Whether the replicas and the training workers of all sets can be there at once, so that they
    need not take turns."""
    publishers: Sequence[Need | None] = ()
    """Of a set that is enough to publish, of each job, where jobs wait for GPUs: one that only
    publishes is to leave its own to others. None: it does not, as all do if nothing is given."""

    def __post_init__(self) -> None:
        if not self.publishers:
            object.__setattr__(self, "publishers", [None] * len(self.needs))

    @classmethod
    def of(
        cls,
        needs: Sequence[Need],
        at_once: Sequence[Need],
        publishers: Sequence[Need],
        asked: int | None,
        quota: float | None,
        free: Need,
        there: Need,
    ) -> Self:
        """For the jobs of these needs.

        Args:
            at_once: the same where replicas and training workers need not take turns.
            publishers: of what is enough to publish.
            asked: so many sets; None: as many as find free GPUs, or one where a set needs none,
                because sets share cores and memory.
            quota: GPUs that all sets together may take; None: those that are free.
            there: all that there is, free or not.
        """
        if not all(need.gpus for need in needs) or (asked and quota is None):
            sets = min(asked or 1, len(needs))
            roomy = Need.of_largest(at_once, sets).within(there)
            return cls(needs, sets, Need(quota or math.inf, math.inf), roomy)
        total = Need(min(free.gpus, quota or math.inf), free.cpus)
        small = sorted(needs, key=_pair)
        fitting = [n for n in range(1, len(needs) + 1) if Need.of_all(small[:n]).within(total)]
        sets = max(1, min(asked or len(needs), len(fitting)))
        roomy = Need.of_largest(at_once, sets).within(total)
        return cls(needs, sets, total, roomy, () if asked else publishers)


def _pair(need: Need) -> tuple[float, float]:
    return need.gpus, need.cpus

"""How much of a cluster sets of workers take, and how much there is for all of them. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self

from fusegpt_ray.cluster_section import Cluster

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

    def within(self, other: Need) -> bool:
        return self.gpus <= other.gpus and self.cpus <= other.cpus

    @classmethod
    def of_all(cls, needs: Sequence[Need]) -> Need:
        return cls(sum(need.gpus for need in needs), sum(need.cpus for need in needs))


ANY = Need(math.inf, math.inf)


@dataclass(frozen=True)
class Room:
    """In which sets of workers may be open."""

    needs: Sequence[Need]
    """Of the set of each job, beside others."""
    at_once: int = 1
    """At most so many sets."""
    total: Need = ANY
    """All sets together. One that needs more can still work by itself: its training workers share
    the GPUs of its replicas then."""
    roomy: bool = False
    """Whether the replicas and the training workers of all sets can be there at once."""

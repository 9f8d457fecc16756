"""How much of a cluster sets of workers take, and how much there is for all of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


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

"""What a scoring has measured so far, so that one that is killed and begun again does not measure
it twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fusegpt_ray.importance.search import Job, Measure

Key = tuple[int, int, tuple[int, ...]]
"""Windows in a call, number of the batch, positions of the candidates."""


@dataclass
class Sums:
    """Sums over tokens of one metric, float64 [windows of the batch, candidates].

    The search is deterministic: begun again, it asks for the same jobs.
    """

    known: dict[Key, np.ndarray] = field(default_factory=dict)
    changed: Callable[[], None] = lambda: None
    """Called after each addition."""

    def recalled(
        self, batch_size: int, measure: Callable[[list[Job]], Iterable[tuple[Job, np.ndarray]]]
    ) -> Measure:
        """`measure`, asked only for jobs that are not known yet. It may yield them in any order."""

        def ask(jobs: list[Job]) -> list[np.ndarray]:
            unknown = [job for job in jobs if (batch_size, *job) not in self.known]
            for job, sums_WC in measure(unknown) if unknown else []:
                self.known[batch_size, *job] = sums_WC
                self.changed()
            return [self.known[batch_size, *job] for job in jobs]

        return ask

    def to_json(self) -> list[Any]:
        """JSON keeps every bit of a float."""
        return [[*key, sums_WC.tolist()] for key, sums_WC in self.known.items()]

    @staticmethod
    def known_from(data: Iterable[Any]) -> dict[Key, np.ndarray]:
        """The inverse of `to_json`."""
        return {
            (batch_size, batch, tuple(positions)): np.array(sums, dtype=np.float64)
            for batch_size, batch, positions, sums in data
        }

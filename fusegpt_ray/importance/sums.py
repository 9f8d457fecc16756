"""Sums over tokens that a scoring has measured so far, so that one which is killed and begun again does not measure them twice."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fusegpt_ray.importance.search import Job, Measure


@dataclass
class Sums:
    """Of 1 − cos, float64 [windows of the batch, candidates], by (rows in a call, batch, positions of the candidates).

    The search is deterministic: begun again, it asks for the same jobs.
    """

    known: dict[tuple[int, int, tuple[int, ...]], np.ndarray] = field(default_factory=dict)
    changed: Callable[[], None] = lambda: None
    """Called whenever some have come."""

    def recalled(
        self, rows: int, measure: Callable[[list[Job]], Iterable[tuple[Job, np.ndarray]]]
    ) -> Measure:
        """`measure`, which yields jobs as they are done in any order, asked only for what is not known yet."""

        def ask(jobs: list[Job]) -> list[np.ndarray]:
            unknown = [job for job in jobs if (rows, *job) not in self.known]
            for job, sums_WC in measure(unknown) if unknown else []:
                self.known[rows, *job] = sums_WC
                self.changed()
            return [self.known[rows, *job] for job in jobs]

        return ask

    def to_json(self) -> list[Any]:
        return [
            [rows, batch, positions, sums_WC.tolist()]
            for (rows, batch, positions), sums_WC in self.known.items()
        ]

    @staticmethod
    def known_from(data: Iterable[Any]) -> dict[tuple[int, int, tuple[int, ...]], np.ndarray]:
        """What `to_json` told. JSON keeps every bit of a float."""
        return {
            (rows, batch, tuple(positions)): np.array(sums, dtype=np.float64)
            for rows, batch, positions, sums in data
        }

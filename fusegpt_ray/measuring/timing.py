"""Times of several candidates in turns, so that a machine's drift hits all of them alike.

Pure: it calls what it is given, and knows no model.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Spread:
    """A median, and the lowest and highest value beside it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """`values`: one at least."""
        return cls(statistics.median(values), min(values), max(values))

    def to_json(self) -> dict[str, float]:
        return asdict(self)


def in_turns(works: Sequence[Callable[[], T]], runs: int, warm_ups: int) -> list[list[T]]:
    """Call the works A, B, …, A, B, …; returns what each one's calls returned, in order.

    Each is called `warm_ups` times first, of which nothing is kept.
    """
    found: list[list[T]] = [[] for _ in works]
    for turn in range(warm_ups + runs):
        for work, kept in zip(works, found, strict=True):
            value = work()
            if turn >= warm_ups:
                kept.append(value)
    return found


class Stopwatch:
    """Takes moments, each once the device has nothing left to do."""

    def __init__(
        self, wait: Callable[[], object], clock: Callable[[], float] = time.perf_counter
    ) -> None:
        """
        Args:
            wait: returns once the device has done everything.
        """
        self._wait, self._clock = wait, clock
        self._moments: list[float] = []

    def mark(self) -> None:
        """What is given to the device after this counts for the next lap."""
        self._wait()
        self._moments.append(self._clock())

    @property
    def laps(self) -> list[float]:
        """Seconds between the marks."""
        return [later - earlier for earlier, later in pairwise(self._moments)]


def ratios(base: Sequence[float], other: Sequence[float]) -> list[float]:
    """How many times as fast the other is, turn by turn: values of one turn were measured next to
    each other.

    Args:
        base, other: seconds, of the same number of turns.
    """
    return [mine / its for mine, its in zip(base, other, strict=True)]

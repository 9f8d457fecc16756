"""A part of the work of a run, counted."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """One kind of work, in all rounds together."""

    name: str
    block_forwards: int
    """Of one window each; a backward pass counts as two."""
    flops: int
    """Of matrix products, a multiplication and an addition counted as two (as torch's
    `FlopCounterMode` does)."""
    batches: int = 0
    """Of windows, which processes take whole; 0: what they share can be divided evenly."""

    def longest_part(self, processes: float) -> float:
        """Of the work, the share of one of so many that divide it."""
        return -(-self.batches // processes) / self.batches if self.batches else 1 / processes

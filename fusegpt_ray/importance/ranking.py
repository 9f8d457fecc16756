"""What scoring finds: which block goes, and how far the others are known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self


@dataclass(frozen=True)
class Stopped:
    """A candidate that was not walked over all windows, because it cannot be the lowest (or,
    racing, is very unlikely to be).
    """

    at_least: float
    """Its score is no lower: what its windows so far add to the mean over all windows."""
    mean: float
    """Over the windows it was walked on: an estimate of its score."""
    windows: int
    """That it was walked on."""


@dataclass(frozen=True)
class Cost:
    """Block-forwards: one block applied to one window."""

    done: int
    single_walk: int
    """Of the full table in a single walk: N (N + 1) / 2 a window, or N where no candidate is walked
    on; and the dense model's blocks, where it is compared with and walked as well."""
    brute_force: int
    """Of N + 1 full forward passes, N² a window; of one, where no candidate is walked on; and one
    of the dense model, as above."""


@dataclass(frozen=True)
class Ranking:
    """The outcome of scoring a stack. Blocks are named by their dense numbers."""

    scores: dict[int, float]
    """Of the blocks known over `windows` windows, in the stack's order; the lowest of all is among
    them."""
    stopped: dict[int, Stopped]
    """All other blocks."""
    windows: int
    """All windows; fewer where racing left one block before their end."""
    cost: Cost
    batch_size: int | None = None
    """Windows that passed a block in one call: `importance.batch`, or fewer where memory ran out.
    """
    bytes_read: int = field(default=0, compare=False)
    """Of blocks, by all replicas together. It depends on their number and memory; nothing else
    here does."""

    @property
    def lowest(self) -> int:
        """The block to remove."""
        return lowest(self.scores)

    @property
    def estimates(self) -> dict[int, float]:
        """Of every block, as well as it is known."""
        return self.scores | {dense: item.mean for dense, item in self.stopped.items()}

    def in_words(self, metric: str) -> str:
        """The four blocks of the lowest score, `~` before an estimate, and the share of the full
        table's work that was done.

        `metric`: its `Recipe.chosen_by`.
        """
        order = sorted(self.estimates.items(), key=lambda item: (item[0] != self.lowest, item[1]))
        lowest = "  ".join(
            f"{dense}: {'~' * (dense in self.stopped)}{score:.4f}" for dense, score in order[:4]
        )
        notes = []
        if self.cost.single_walk:
            notes.append(f"{self.cost.done / self.cost.single_walk:.0%} of the full table's work")
        if "~" in lowest:
            notes.append("~: an estimate")
        goes = f"lowest {metric}  {lowest}  →  block {self.lowest} goes"
        return goes + (f" ({'; '.join(notes)})" if notes else "")

    def to_record(self) -> dict[str, Any]:
        """Its part of a round's record in journal and manifest."""
        return {
            "scores": {str(dense): score for dense, score in self.scores.items()},
            "stopped": {str(dense): vars(item).copy() for dense, item in self.stopped.items()},
            "windows": self.windows,
            "block_forwards": vars(self.cost).copy(),
            "batch_size": self.batch_size,
            "bytes_read": self.bytes_read,
        }

    @classmethod
    def without_work(cls, scores: Mapping[int, float]) -> Self:
        """Of scores for which nothing has to be walked."""
        return cls(dict(scores), {}, 0, Cost(0, 0, 0))

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Self:
        return cls(
            {int(dense): score for dense, score in record["scores"].items()},
            {int(dense): Stopped(**item) for dense, item in record["stopped"].items()},
            record["windows"],
            Cost(**record["block_forwards"]),
            record.get("batch_size"),
            record.get("bytes_read", 0),
        )


def lowest(table: Mapping[int, float]) -> int:
    """The block to remove: the lowest score, the earlier block on a tie."""
    return min(table, key=lambda dense: (table[dense], dense))

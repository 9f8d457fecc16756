"""What a run needs done, by whomever: one process (`local.py`) or a Ray cluster (`distributed/`). Both give the same results."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol, Self

import numpy as np
import torch

from fusegpt_ray.fusion.round import Round, Saved
from fusegpt_ray.importance.ranking import Ranking
from fusegpt_ray.importance.sums import Sums
from fusegpt_ray.model.source import Source
from fusegpt_ray.model.stack import Stack
from fusegpt_ray.publishing.plain import Plain
from fusegpt_ray.publishing.proof import Proof
from fusegpt_ray.recipe import Recipe
from fusegpt_ray.sections import Cluster, Dtype, Importance, Text
from fusegpt_ray.store import storage
from fusegpt_ray.training.checkpoints import Say

Epoch = Callable[[int, float], None]
"""Called after each epoch of fine-tuning with its number (from 1) and mean loss."""


@dataclass(frozen=True)
class Tuned:
    """A fine-tuned group."""

    saved: Saved
    """The neighbours' new blocks and their files."""
    losses: list[float]
    """Mean loss of each epoch."""
    rows: int
    """Windows that passed a block in one call for the states: `importance.batch`, or fewer where memory ran out."""
    micro_batch: int
    """Windows that passed a worker's group at once: what the recipe asks, or fewer where memory ran out."""
    states_seconds: float
    finetune_seconds: float
    """With what it took before a savepoint from which it went on."""


@dataclass(frozen=True)
class Setup:
    """What workers need to know to compute with one dense model."""

    source: Source
    dense: Stack
    cluster: Cluster = field(default_factory=Cluster)
    dtype: Dtype = "auto"
    """Of the arithmetic, as the recipe says it (`model.dtype`)."""
    importance: Importance = field(default_factory=Importance)
    """`importance.batch` windows pass a block in one call."""
    piece_mb: int = 16
    """See `calibration.piece_mb`."""
    loss_batch: int | None = None
    """`fusion.batch`; None where nothing is trained."""
    output_uri: str | None = None
    """Where workers write, if they do."""

    @classmethod
    def of(cls, recipe: Recipe, source: Source, dense: Stack) -> Self:
        """That of a whole compression."""
        return cls(
            source,
            dense,
            recipe.cluster,
            recipe.model.dtype,
            recipe.importance,
            recipe.calibration.piece_mb,
            recipe.fusion.batch if recipe.method != "mi" else None,
            recipe.output.uri,
        )

    @property
    def cache_gb(self) -> float | None:
        """`cluster.cache_gb` where weights are read from object storage, else 0: no folder is made for nothing."""
        places = [ref.file for ref in self.dense.trunk.values()]
        if self.output_uri is not None:
            places.append(self.output_uri)
        return self.cluster.cache_gb if any(map(storage.is_remote, places)) else 0


class Engine(Protocol):
    """Shapes: W windows of T tokens, int64."""

    dtype: torch.dtype
    """Of the arithmetic, once entered."""

    @property
    def description(self) -> str:
        """Where and how it computes, for a person."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

    def tokens(self, text: Text, key: str) -> Callable[[], Iterator[np.ndarray]]:
        """The text's tokens, piece by piece, from the beginning at each call (see `calibration.py`)."""

    def score(
        self,
        stack: Stack,
        windows_WT: np.ndarray,
        last: Ranking | None = None,
        sums: Sums | None = None,
    ) -> Ranking:
        """Find the block to remove.

        `last`: what the last round found, which saves a wave (see `importance/search.py`). `sums`: what an attempt that was killed has
        measured; what is measured now is added to it.
        """

    def finetune(
        self, job: Round, windows_WT: np.ndarray, epoch: Epoch, say: Say = lambda _: None
    ) -> Tuned:
        """Fuse and fine-tune one group, and write its new blocks to `job.folder`; goes on from a savepoint, and `say`s so."""

    def perplexity(self, stack: Stack, windows_WT: np.ndarray) -> float:
        """Of the stack as a model, over these windows."""

    def compare_source(self, windows_WT: np.ndarray) -> Plain:
        """The streamed walk of the dense model beside plain `from_pretrained` of its source."""

    def prove(self, published: Stack, folder: str, stack: Stack, windows_WT: np.ndarray) -> Proof:
        """That the published model computes what the stack does (see `proof.prove`)."""

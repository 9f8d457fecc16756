"""What a run needs done, by whomever: one process (`local.py`) or a Ray cluster (`distributed/`). Both give the same results."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

import numpy as np
import torch

from fusegpt_ray.fusion.round import Round, Saved
from fusegpt_ray.fusion.savepoint import Say
from fusegpt_ray.importance.ranking import Ranking
from fusegpt_ray.importance.sums import Sums
from fusegpt_ray.model.stack import Stack
from fusegpt_ray.publishing.plain import Plain
from fusegpt_ray.publishing.proof import Proof
from fusegpt_ray.recipe import Recipe
from fusegpt_ray.sections import Text
from fusegpt_ray.store import storage

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


class Engine(Protocol):
    """Shapes: W windows of T tokens, int64."""

    dtype: torch.dtype
    """Of the arithmetic, once entered."""

    @property
    def description(self) -> str:
        """Where and how it computes, for a person."""

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...

    def tokens(self, text: Text, key: str) -> Callable[[], Iterator[np.ndarray]]:
        """The text's tokens, piece by piece, from the beginning at each call (see `calibration.py`)."""

    def score(self, stack: Stack, windows_WT: np.ndarray, last: Ranking | None = None, sums: Sums | None = None) -> Ranking:
        """Find the block to remove.

        `last`: what the last round found, which saves a wave (see `importance/search.py`). `sums`: what an attempt that was killed has
        measured; what is measured now is added to it.
        """

    def finetune(self, job: Round, windows_WT: np.ndarray, epoch: Epoch, say: Say = lambda _: None) -> Tuned:
        """Fuse and fine-tune one group, and write its new blocks to `job.folder`; goes on from a savepoint, and `say`s so."""

    def perplexity(self, stack: Stack, windows_WT: np.ndarray) -> float:
        """Of the stack as a model, over these windows."""

    def compare_source(self, windows_WT: np.ndarray) -> Plain:
        """The streamed walk of the dense model beside plain `from_pretrained` of its source."""

    def prove(self, published: Stack, folder: str, stack: Stack, windows_WT: np.ndarray) -> Proof:
        """That the published model computes what the stack does (see `proof.prove`)."""


def cache_gb(recipe: Recipe, dense: Stack) -> float | None:
    """`cluster.cache_gb` where a run reads weights from object storage, else 0: no folder is made for nothing."""
    remote = storage.is_remote(recipe.output.uri) or any(storage.is_remote(ref.file) for ref in dense.trunk.values())
    return recipe.cluster.cache_gb if remote else 0

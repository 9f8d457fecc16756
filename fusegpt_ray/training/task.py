"""What is trained: what `finetune.py` needs to know of it.

Shapes: W windows, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch

from fusegpt_ray.model.compiled import RunBlock
from fusegpt_ray.model.empty import EmptyBlock
from fusegpt_ray.model.recorder import Context
from fusegpt_ray.model.stack import Block
from fusegpt_ray.model.trunk import Trunk
from fusegpt_ray.samples import Batch
from fusegpt_ray.store.records import FileRecord
from fusegpt_ray.training.losses import Loss
from fusegpt_ray.training.partition import Partition
from fusegpt_ray.training.span import Span
from fusegpt_ray.training.states import Source
from fusegpt_ray.training.stepper import TrainingConfig

HELD_OUT = 0
"""Stands for the held-out windows where a part of a pass is asked for."""


@dataclass(frozen=True)
class SavedBlocks:
    """Trained blocks on disk."""

    blocks: dict[int, Block]
    """By dense number."""
    files: dict[str, FileRecord]
    """What was written, by URI."""

    @classmethod
    def merged(cls, parts: Sequence[SavedBlocks]) -> Self:
        """What several workers saved, in the blocks' order."""
        blocks = {number: block for part in parts for number, block in part.blocks.items()}
        files = {uri: file for part in parts for uri, file in part.files.items()}
        return cls(dict(sorted(blocks.items())), dict(sorted(files.items())))


class Trainable(Protocol):
    """What is trained: it builds the span on a worker, says what learns in it, and saves it."""

    def build(
        self,
        meta_blocks: Sequence[EmptyBlock],
        contexts: Sequence[Context],
        device: torch.device,
        dtype: torch.dtype,
        recompute: bool,
        run: RunBlock,
        partition: Partition | None,
    ) -> Span:
        """
        Args:
            meta_blocks: of the dense model, by block number (see `Trunk`); so are the contexts.
            partition: keeps frozen weights in parts, on several workers with ZeRO 3.
        """

    @property
    def uses_head(self) -> bool:
        """Whether the loss needs the model's norm and head, which are then kept on the device."""

    def loss(self, trunk: Trunk, teacher: Trunk | None = None) -> Loss:
        """What is trained to.

        Args:
            trunk: of the model that is trained.
            teacher: of the model whose states are the aim; None: the same.
        """

    def parameter_groups(self, span: Span) -> list[dict[str, Any]]:
        """What learns: {"params", "lr"} for each learning rate."""

    def save(self, span: Span, part: int, parts: int) -> SavedBlocks:
        """Write one part of the span's blocks; all parts together are the span."""


@dataclass(frozen=True)
class TrainingTask:
    """All that a worker needs to know to train a span."""

    trainable: Trainable
    source: Source
    windows: Batch
    config: TrainingConfig
    identity: Mapping[str, Any]
    """Names what is trained: a training checkpoint of another identity is not used."""
    folder: str
    """Where its training checkpoints lie."""
    fence: Callable[[], None]
    """Called before every write: it raises where another run writes here."""
    held_out: Batch | None = None
    """What is saved is the state with the lowest loss on these windows, whole loss batches of them;
    None: the last state."""
    what: str = "fine-tuning the group"
    """For messages."""
    rate_key: str = "fusion.learning_rate"
    """The recipe's key of the learning rate, for messages."""

    @property
    def first_states(self) -> list[int]:
        """The parts whose states are computed before the training (see `_states`). Of a pass in
        several parts, each part's follow when it begins.
        """
        held_out = [] if self.held_out is None else [HELD_OUT]
        return held_out if held_out and self.config.parts > 1 else [*held_out, 1]

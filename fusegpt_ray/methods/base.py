"""What a method is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from fusegpt_ray.model.stack import Stack
from fusegpt_ray.recipe import Recipe
from fusegpt_ray.report import Display
from fusegpt_ray.store.records import FileRecord
from fusegpt_ray.workers.base import Workers


@dataclass(frozen=True)
class Round:
    """All that a method may need to know of a round."""

    number: int
    """From 1."""
    recipe: Recipe
    workers: Workers
    stack: Stack
    """The model before the round."""
    dense: Stack
    donor: int
    """Dense number of the block to remove."""
    windows_WT: np.ndarray
    """Of the calibration text."""
    origin: str
    """Names what `stack` was made from. It differs wherever a weight of the stack could differ."""
    folder: str
    """Where new blocks go."""
    checkpoints: str
    """Where training checkpoints go."""
    fence: Callable[[], None]
    """Called before every write; raises if another run writes here."""
    show: Display


@dataclass(frozen=True)
class Change:
    """What a method made of a stack."""

    stack: Stack
    """The model after the round."""
    files: Mapping[str, FileRecord] = field(default_factory=dict)
    """What was written, by URI."""
    group: tuple[int, ...] = ()
    """Dense numbers of the blocks that took part."""
    losses: tuple[float, ...] = ()
    """Mean loss of each epoch."""
    states_batch_size: int | None = None
    micro_batch: int | None = None
    """Windows that passed a block, and a worker's span, at once."""
    states_seconds: float = 0.0
    train_seconds: float = 0.0


@dataclass(frozen=True)
class Method:
    """One way to make a model shallower. The block to remove is the one of the lowest Macro
    Influence.
    """

    name: str
    """In the recipe; `sections.METHOD_SPECS` has what is known of it without its code."""
    change: Callable[[Round], Change]

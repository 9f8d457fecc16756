"""What a method is."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fusegpt_ray.importance.ranking import Ranking
from fusegpt_ray.importance.sums import Sums
from fusegpt_ray.model.stack import Stack
from fusegpt_ray.recipe.recipe import Recipe
from fusegpt_ray.recipe.sections import Importance
from fusegpt_ray.samples import Batch
from fusegpt_ray.store.records import FileRecord
from fusegpt_ray.terminal.display import Display
from fusegpt_ray.training.finetune import Pause
from fusegpt_ray.workers.base import Workers


@dataclass(frozen=True)
class Question:
    """Which block is to go: all that the answer may depend on."""

    workers: Workers
    stack: Stack
    """The model before the round."""
    windows: Batch
    """Of the calibration text, those that score blocks."""
    settings: Importance
    seed: int
    """The recipe's."""
    left: int
    """How many blocks are still to go, in this round and those after it."""
    last: Ranking | None = None
    """The last round's answer."""
    sums: Sums = field(default_factory=Sums)
    """What a killed attempt has measured."""
    candidates: Collection[int] | None = None
    """Dense numbers of the blocks that may go; None: all."""

    @property
    def free(self) -> list[int]:
        """Dense numbers of the blocks that may go."""
        kept, candidates = self.stack.kept, self.candidates
        return [n for n in kept if candidates is None or n in candidates]


Choose = Callable[[Question], Ranking]
"""Ranks a stack's blocks. The lowest goes."""


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
    removes: int | None
    """Dense number of the block to remove; None: a method that removes none."""
    left: int
    """How many blocks are still to go, in this round and those after it."""
    windows: Batch
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
    pause: Pause = lambda folder, part: None
    """See `train_span`."""
    place_WT: np.ndarray | None = None
    """Where their tokens stand in it: see `Repair.on`."""

    @property
    def donor(self) -> int:
        """Dense number of the block to remove."""
        assert self.removes is not None, "this round removes none"
        return self.removes


@dataclass(frozen=True)
class Copy:
    """A copy of a block that is put into a stack."""

    after: int
    """Number of the block behind which it is put; several behind one stay in order."""
    like: int
    """Number of the block that it is a copy of."""


CopiesOf = Callable[[Recipe, int], list[Copy]]
"""The copies that a recipe asks for in a model of so many blocks."""


@dataclass(frozen=True)
class Growth:
    """How a method makes a model deeper, all in one round."""

    place: CopiesOf
    zero: bool
    """Whether the copies' output layers are zero, so that they begin as nothing."""


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
    states_bytes_read: int = 0
    """Of blocks, by all workers together, to compute the states."""
    states_seconds: float = 0.0
    train_seconds: float = 0.0
    repair: Mapping[str, Any] | None = None
    """What the record tells of a repair in closed form (see `fusion.repair.Repaired`)."""
    replaced: tuple[int, ...] = ()
    """Numbers of consecutive blocks of which the first, trained, now stands for all."""
    inserted: tuple[Copy, ...] = ()
    """Copies that are in it now."""
    width: Mapping[str, Any] | None = None
    """What the record tells of another width (see `fusion.narrowing.Narrowed`)."""


@dataclass(frozen=True)
class Method:
    """One way to make a model smaller: how the block to remove is chosen, and what happens then; or
    one round in which the whole stack becomes narrower. Or one to make it deeper: where copies of
    blocks go."""

    name: str
    """In the recipe; `specs.METHOD_SPECS` has what is known of it without its code."""
    choose: Choose | None
    """Finds the block to remove; None: none is, and one round changes the whole stack."""
    change: Callable[[Round], Change]
    """What happens to the stack then."""
    growth: Growth | None = None
    """Where it makes the model deeper, how."""

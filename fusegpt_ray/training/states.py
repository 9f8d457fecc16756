"""The states that a span is trained on: computed once by the worker that trains on them, and kept
there for all epochs, or for its part of a single pass.

Shapes: W windows, T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from fusegpt_ray.model.rows import Own, Owns, Rows, ids_of
from fusegpt_ray.model.runner import Runner
from fusegpt_ray.model.stack import Stack
from fusegpt_ray.samples import Batch as Windows
from fusegpt_ray.training.batch import LossBatch, target_weights, token_weights


@dataclass(frozen=True)
class StatesSource:
    """Which states enter a span, and to which the span is trained."""

    stack: Stack
    start: int
    """The span begins at this position of `stack`."""
    teacher: Stack
    stop: int
    """The states entering this position of `teacher` (or leaving its last block) are the aim."""

    @torch.no_grad()
    def walk(
        self, runner: Runner, windows: Rows, owning: list[Own] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """States entering the span and the teacher's leaving it, [W, T, D] each; of a narrower
        student, which has a trunk of its own, with another D.

        One walk serves both where the blocks before the span are the teacher's. Else each stack is
        walked once. The two sets of states are all that is held of them, and lie wherever there is
        room (see `placement.py`). `owning`: see `Runner.walk`.
        """
        student = runner.for_trunk_of(self.stack)
        if student is runner:
            entering_WTD, leaving_WTD = runner.empty_states(windows, sets=2)
        else:
            (entering_WTD,), (leaving_WTD,) = (
                each.empty_states(windows) for each in (student, runner)
            )
        shared = self.stack.blocks[: self.start] == self.teacher.blocks[: self.start]
        shared = shared and student is runner
        assert self.start <= self.stop or not shared, (self.start, self.stop)
        if not shared:
            for _ in student.walk(self.stack, windows, self.start, entering_WTD):
                pass
        teacher = runner.walk(self.teacher, windows, self.stop, leaving_WTD, owning)
        for position, h_WTD in enumerate(teacher):
            if shared and position == self.start:
                entering_WTD.copy_(h_WTD)
        return entering_WTD, leaving_WTD

    def weights(self, windows: Windows) -> torch.Tensor | None:
        """Of the tokens of all windows in the loss; None: 1."""
        return token_weights(windows)

    @property
    def read(self) -> Stack:
        """What is read for the states, at most."""
        return self.teacher


@dataclass(frozen=True)
class TokensSource:
    """The states that enter a whole model, and the tokens that follow in the text."""

    stack: Stack

    @torch.no_grad()
    def walk(
        self, runner: Runner, windows: Rows, owning: list[Own] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """States [W, T, D] and tokens [W, T]; no block is run. `owning`: see `Runner.walk`."""
        runner = runner.for_trunk_of(self.stack)
        (entering_WTD,) = runner.empty_states(windows)
        for _ in runner.walk(self.stack, windows, 0, entering_WTD, owning):
            pass
        # What follows the last one is no target; see `target_weights`.
        return entering_WTD, ids_of(windows).clamp(min=0).roll(-1, dims=1)

    def weights(self, windows: Windows) -> torch.Tensor | None:
        """Of the tokens of all windows in the loss."""
        return target_weights(windows)

    @property
    def read(self) -> Stack:
        """What is read for the states, at most."""
        return replace(self.stack, blocks=())


Source = StatesSource | TokensSource


@dataclass(frozen=True)
class States:
    """A worker's states, in the order in which it trains on them."""

    entering_WTD: torch.Tensor
    leaving_WTD: torch.Tensor
    """See `LossBatch`."""
    weights_WT: torch.Tensor | None = None
    """See `LossBatch`; so are the contexts of each window's own."""
    owns: Owns | None = None

    def batches(self, size: int) -> Iterator[LossBatch]:
        """Consecutive batches of `size` windows. A smaller remainder would change the loss, so
        there must be none.
        """
        assert len(self.entering_WTD) == len(self.leaving_WTD), "states of the same windows"
        assert len(self.entering_WTD) % size == 0, (len(self.entering_WTD), size)
        whole = LossBatch(self.entering_WTD, self.leaving_WTD, self.weights_WT, self.owns)
        return whole.split(size)


def own_windows(
    windows: int, batch: int, workers: int, rank: int, part: int = 1, parts: int = 1
) -> np.ndarray:
    """The numbers of the windows that a worker trains on in one of several parts of about as many
    loss batches: its rows of every loss batch, in order.
    """
    batches = np.arange(windows).reshape(-1, workers, batch // workers)
    first, end = (len(batches) * number // parts for number in (part - 1, part))
    return batches[first:end, rank].reshape(-1)

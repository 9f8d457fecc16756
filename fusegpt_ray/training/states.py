"""The states that a span is trained on: computed once by the worker that trains on them, and kept
there for all epochs.

Shapes: W windows, T tokens, D hidden size.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from fusegpt_ray.model.memory import free_bytes
from fusegpt_ray.model.runner import Runner, state_bytes
from fusegpt_ray.model.stack import Stack
from fusegpt_ray.training.stepper import Batch

DEVICE_SHARE = 0.15
"""Share of a GPU's free memory that states may take; training needs most of it."""
HOST_SHARE = 0.5
"""Share of the host's free memory that the states of all workers on it may take."""


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
    def walk(self, runner: Runner, windows_WT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """States entering the span and the teacher's leaving it, [W, T, D] each.

        One walk serves both where the blocks before the span are the teacher's.
        """
        entering = None
        if self.stack.blocks[: self.start] != self.teacher.blocks[: self.start]:
            for entering in runner.walk(self.stack, windows_WT, self.start):  # noqa: B007
                pass
        h_WTD = None
        for position, h_WTD in enumerate(runner.walk(self.teacher, windows_WT, self.stop)):
            if position == self.start and entering is None:
                entering = h_WTD
        assert entering is not None and h_WTD is not None
        return entering, h_WTD


@dataclass(frozen=True)
class States:
    """A worker's states, in the order in which it trains on them."""

    entering_WTD: torch.Tensor
    leaving_WTD: torch.Tensor

    def batches(self, size: int) -> Iterator[Batch]:
        """Consecutive batches of `size` windows. A smaller remainder would change the loss, so
        there must be none.
        """
        assert len(self.entering_WTD) == len(self.leaving_WTD), "states of the same windows"
        assert len(self.entering_WTD) % size == 0, (len(self.entering_WTD), size)
        return zip(self.entering_WTD.split(size), self.leaving_WTD.split(size), strict=True)


def own_windows(windows: int, batch: int, workers: int, rank: int) -> np.ndarray:
    """The numbers of the windows that a worker trains on: its rows of every loss batch, in
    order.
    """
    return np.arange(windows).reshape(-1, workers, batch // workers)[:, rank].reshape(-1)


def compute_states(
    source: StatesSource, runner: Runner, windows_WT: torch.Tensor, workers: int = 1
) -> States:
    """Walk the windows to both ends of the span.

    Args:
        workers: how many processes on this machine do so at once, and share its memory.
    """
    stack = source.teacher
    windows, length = windows_WT.shape
    shape = (windows, length, state_bytes(stack, 1, runner.dtype) // runner.dtype.itemsize)
    states = States(*(_empty(shape, runner, 2 * workers) for _ in range(2)))
    done = 0
    for part in runner.chunks(stack, windows_WT):
        entering, leaving = source.walk(runner, part)
        states.entering_WTD[done : done + len(part)] = entering
        states.leaving_WTD[done : done + len(part)] = leaving
        done += len(part)
    return states


def _empty(shape: tuple[int, ...], runner: Runner, others: int) -> torch.Tensor:
    """Room for states: on the device where they are few, else in the host's memory (pinned, if
    there is a GPU), else in a temporary file.

    The file is read in order, epoch after epoch. It has no name any more, so that it ends with the
    process.
    """
    taken = math.prod(shape) * runner.dtype.itemsize
    on_gpu = runner.device.type == "cuda"
    if on_gpu and 2 * taken <= DEVICE_SHARE * runner.memory_share * free_bytes(runner.device):
        return torch.empty(shape, dtype=runner.dtype, device=runner.device)
    if others * taken <= HOST_SHARE * free_bytes(torch.device("cpu")):
        return torch.empty(shape, dtype=runner.dtype, pin_memory=on_gpu)
    with tempfile.NamedTemporaryFile(prefix="fusegpt-states-") as file:
        flat = torch.from_file(file.name, shared=True, size=math.prod(shape), dtype=runner.dtype)
        return flat.reshape(shape)

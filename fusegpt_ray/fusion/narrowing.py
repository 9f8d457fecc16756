"""Slicing a whole stack: replicas sum the covariance of the states over windows, one of them finds
its axes, and each block is rotated and written by whichever replica takes it.

What is summed, in which pieces and in which order follows from the recipe, never from the number of
replicas. With LLaMA-2-7B each of the eight pieces comes back as 134 MB.

Shapes: W windows, B windows of a batch, T tokens, n tokens that count, D hidden size, K of it kept.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from torch import nn

from fusegpt_ray.fusion.compensation import split
from fusegpt_ray.fusion.repair import dealt_out, in_order
from fusegpt_ray.fusion.rotation import (
    EMBEDDING,
    HEAD,
    NORM,
    READS,
    normalised,
    principal_axes,
    sliced_block,
    sliced_trunk,
)
from fusegpt_ray.fusion.width import Width, sliced_config
from fusegpt_ray.model.config import build_skeleton, read_config
from fusegpt_ray.model.memory import find_batch_size
from fusegpt_ray.model.names import Names
from fusegpt_ray.model.rows import as_rows, as_tensor
from fusegpt_ray.model.runner import Runner
from fusegpt_ray.model.stack import Refs, Stack
from fusegpt_ray.samples import Batch, counting
from fusegpt_ray.store import storage
from fusegpt_ray.store.checkpoint import TensorRef, read_tensors
from fusegpt_ray.store.fence import Fence, nobody_else
from fusegpt_ray.store.records import FileRecord
from fusegpt_ray.store.writer import entries_of, write_safetensors
from fusegpt_ray.workers.base import Workers

TRUNK = -1
"""In place of a block's number."""
Written = tuple[FileRecord, dict[str, TensorRef]]


@dataclass(frozen=True)
class Narrowed:
    """What came of it."""

    stack: Stack
    width: Width
    files: Mapping[str, FileRecord]
    """What was written, by URI."""
    kept: float
    """Share of the variance of the normalised states along the axes that are kept."""
    batch_size: int
    """Windows that passed a block at once."""
    bytes_read: int
    """Of blocks, by all replicas together."""
    seconds: float

    def in_words(self) -> str:
        """One line for a person."""
        return f"{self.width.in_words()}, with {self.kept:.2%} of the states' variance"

    def to_record(self) -> dict[str, Any]:
        """For the manifest."""
        return {"dense": self.width.dense, "kept": self.width.kept, "variance": self.kept}


@dataclass(frozen=True)
class Narrowing:
    """A stack that becomes narrower."""

    stack: Stack
    width: Width
    folder: str
    """Where the new tensors go."""
    fence: Fence = nobody_else
    """Called before every write, also on replicas, so it must be small enough to travel."""

    def on(self, workers: Workers, windows: Batch) -> Narrowed:
        """The narrower stack, by the states of these windows.

        Raises:
            FloatingPointError: a state is not finite.
            MemoryError: not even a single window fits.
        """
        began = time.monotonic()
        batch = workers.setup.importance.batch
        attempt = partial(self._covariance, workers, windows, split(len(windows), batch))
        (sums_DD, read), size = find_batch_size(attempt, batch, batch, "finding the states' axes")
        if not np.isfinite(sums_DD).all():
            raise FloatingPointError("the states of the calibration windows are not finite")
        ((_, (axes_DK, kept)),) = workers.map(_axes, [(sums_DD, self.width.kept)], batch)
        stack, files = self._written(workers, axes_DK, batch)
        seconds = round(time.monotonic() - began, 3)
        return Narrowed(stack, self.width, files, kept, size, read, seconds)

    def _covariance(
        self, workers: Workers, windows: Batch, pieces: list[int], batch_size: int
    ) -> tuple[np.ndarray, int]:
        """[D, D] float64, summed over the pieces in order; and the bytes of blocks read."""
        dealt = dealt_out(workers, windows, pieces)
        tasks = [(self.stack, *part) for part in dealt]
        costs = [float(len(part)) for part, _ in dealt]
        total_DD, read = np.zeros((self.width.dense, self.width.dense)), 0
        for found, more in in_order(workers.map(gather, tasks, batch_size, costs)):
            read += more
            for piece_DD in found:
                total_DD += piece_DD
        return total_DD, read

    def _written(
        self, workers: Workers, axes_DK: np.ndarray, batch: int
    ) -> tuple[Stack, dict[str, FileRecord]]:
        """The trunk and each block by themselves, in their stored dtypes."""
        config = sliced_config(self.stack.config, self.width)
        parts: list[tuple[int, Refs]] = [(TRUNK, self.stack.trunk)]
        parts += [(block.dense, block.weights) for block in self.stack.blocks]
        names = ["trunk" if number == TRUNK else f"block-{number:03d}" for number, _ in parts]
        files = [storage.join(self.folder, f"{name}.sliced.safetensors") for name in names]
        tasks = [
            (refs, number == TRUNK, axes_DK, file, self.fence)
            for (number, refs), file in zip(parts, files, strict=True)
        ]
        # A file has one writer: a task is done by another only where its own replica is lost.
        costs = [math.inf] * len(tasks)
        found: dict[int, Written] = dict(workers.map(_rotate, tasks, batch, costs))
        refs = {number: found[place][1] for place, (number, _) in enumerate(parts)}
        records = {file: found[place][0] for place, file in enumerate(files)}
        return self.stack.slice(config, refs.pop(TRUNK), refs), records


@torch.no_grad()
def gather(
    runner: Runner, stack: Stack, windows: Batch, pieces: list[int]
) -> tuple[list[np.ndarray], int]:
    """The task of one replica: for each piece (so many windows, in order) Σ xᵀx [D, D] over its
    tokens and over all norms that read the stream, x being what a norm without its weight gives;
    and the bytes of blocks that were read.

    All windows walk together. A window's part depends on its batch alone, so pieces may be dealt
    out in any way.
    """
    before, rows = runner.weights.bytes_read, as_rows(windows)
    assert not runner.by_sample(rows), "refused before (see `width.check_width`)"
    counted_WT = as_tensor(counting(windows))
    eps = float(read_config(stack.config).get_text_config().rms_norm_eps)
    (h_WTD,) = runner.empty_states(rows)
    next(runner.walk(stack, rows, 0, h_WTD))
    hidden, ends = h_WTD.shape[-1], [0, *accumulate(pieces)]
    sums = [torch.zeros(hidden, hidden, dtype=torch.float64, device=runner.device) for _ in pieces]

    def add(piece: int, first: int, h_BTD: torch.Tensor) -> None:
        x_nD = normalised(h_BTD, eps).flatten(0, 1)
        if counted_WT is not None:
            counted_n = counted_WT[first : first + len(h_BTD)].flatten()
            x_nD = x_nD[counted_n.to(x_nD.device)]
        sums[piece] += x_nD.T @ x_nD

    for block, module in runner.weights.walk(stack.blocks):
        for piece, first, h_BTD in _batches(h_WTD, ends, runner.batch_size):
            states = h_BTD.to(runner.device)
            with _entering(module, partial(add, piece, first)):
                h_BTD.copy_(runner.apply_hooked(module, block.dense, states))
        del module  # so that its memory is free when the next one is asked for
    for piece, first, h_BTD in _batches(h_WTD, ends, runner.batch_size):
        add(piece, first, h_BTD.to(runner.device))  # what the final norm reads
    return [sum_DD.cpu().numpy() for sum_DD in sums], runner.weights.bytes_read - before


def _batches(
    h_WTD: torch.Tensor, ends: Sequence[int], size: int
) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Views of the states by batches within pieces: number of the piece, first window, states."""
    for piece, (begin, end) in enumerate(pairwise(ends)):
        for first in range(begin, end, size):
            yield piece, first, h_WTD[first : min(first + size, end)]


@contextmanager
def _entering(module: nn.Module, add: Any) -> Iterator[None]:
    """While it lasts, `add` is given the states that enter a norm that reads the stream."""
    hooks = [
        module.get_submodule(norm).register_forward_pre_hook(lambda _, given: add(given[0]))
        for norm in READS
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _axes(runner: Runner, sums_DD: np.ndarray, kept: int) -> tuple[np.ndarray, float]:
    """The first axes [D, K], and the share of the variance along them. On the host: its bits are
    the same on every replica.
    """
    axes_DD, value_D = principal_axes(torch.from_numpy(sums_DD))
    share = float(value_D[:kept].sum() / value_D.sum())
    return axes_DD[:, :kept].contiguous().numpy(), share


def _rotate(
    runner: Runner, refs: Refs, trunk: bool, axes_DK: np.ndarray, file: str, fence: Fence
) -> Written:
    """Rotates and slices the tensors of the trunk or of a block, and writes them under the names
    and in the dtypes that they have.
    """
    axes, tensors = torch.from_numpy(axes_DK), read_tensors(refs)
    if trunk:
        made = _trunk(runner, tensors, axes)
    else:
        sliced = sliced_block(tensors, axes)
        made = {name: sliced[name].to(value.dtype) for name, value in tensors.items()}
    fence()
    return write_safetensors(file, entries_of(made))


def _trunk(
    runner: Runner, tensors: Mapping[str, torch.Tensor], axes: torch.Tensor
) -> dict[str, torch.Tensor]:
    """A head that was the embedding is stored from now on, in that one's dtype."""
    names = Names.of(build_skeleton(runner.stack.config))
    stored = {names.inside(name): name for name in tensors}
    given = {role: tensors[name] for role, name in stored.items()}
    given.setdefault(HEAD, given[EMBEDDING])
    made = sliced_trunk(given[EMBEDDING], given[NORM], given[HEAD], axes)
    return {stored.get(role, role): value.to(given[role].dtype) for role, value in made.items()}

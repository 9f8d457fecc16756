"""Repairing the gap that a removed block leaves: replicas sum over windows, one of them solves, and
the block before the gap is written with a changed last linear layer.

What is summed, in which pieces and in which order follows from the recipe, never from the number of
replicas. With LLaMA-2-7B and `linear`, each of the eight pieces comes back as 1.3 GB, and the
driver holds three of them where they arrive in order.

Shapes: W windows, T tokens, I inputs of the layer, D hidden size.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers.pytorch_utils import Conv1D

from fusegpt_ray.fusion.added import gather
from fusegpt_ray.fusion.compensation import Way, change, split
from fusegpt_ray.fusion.least_squares import Moments, best_fit
from fusegpt_ray.model.memory import find_batch_size
from fusegpt_ray.model.runner import Runner
from fusegpt_ray.model.stack import Block, Refs, Stack, Terms
from fusegpt_ray.samples import Batch, cut, tokens_of
from fusegpt_ray.store import storage
from fusegpt_ray.store.checkpoint import TensorRef
from fusegpt_ray.store.fence import Fence, nobody_else
from fusegpt_ray.store.records import FileRecord
from fusegpt_ray.store.writer import Entry, write_safetensors
from fusegpt_ray.text.windows import Windows
from fusegpt_ray.workers.base import Workers

Changed = dict[str, np.ndarray]
"""A layer's new tensors in float32, as the block stores them."""


@dataclass(frozen=True)
class Repaired:
    """What came of a repair."""

    donor: int
    way: Way
    seconds: float
    problem: str = ""
    """Why nothing is repaired, if that is so."""
    block: Block | None = None
    """The block before the gap, repaired."""
    files: Mapping[str, FileRecord] = field(default_factory=dict)
    """What was written, by URI."""
    layer: str | None = None
    ridge: float = math.inf
    left: float = 1.0
    """See `least_squares.Choice`."""
    batch_size: int | None = None
    """Windows that passed a block at once."""
    bytes_read: int = 0
    """Of blocks, by all replicas together."""

    def in_words(self) -> str:
        """One line for a person."""
        if self.block is None:
            return f"nothing repaired: {self.problem}"
        share = f"{1 - self.left:.0%} of what block {self.donor} added (on windows held out)"
        how = f"{self.way}, λ = {self.ridge:g}"
        return f"{self.layer} of block {self.block.dense} makes up for {share}; {how}"

    def to_record(self) -> dict[str, Any]:
        """For the manifest."""
        if self.block is None:
            return {"way": self.way, "block": None, "problem": self.problem}
        found = {"way": self.way, "block": self.block.dense, "layer": self.layer}
        return {**found, "ridge": self.ridge, "left": self.left}


@dataclass(frozen=True)
class Repair:
    """The repair of one gap."""

    stack: Stack
    """With the block to remove."""
    donor: int
    """Its dense number."""
    way: Way
    folder: str
    """Where the file of the new block goes."""
    fence: Fence = nobody_else
    """Called before the write."""

    @property
    def last(self) -> Block:
        """The block before the gap."""
        return self.stack.blocks[self.stack.position(self.donor) - 1]

    def on(self, workers: Workers, windows: Batch, place_WT: np.ndarray | None = None) -> Repaired:
        """The repaired block, fitted to these windows but the last piece of them, on which λ is
        chosen (see `compensation.split`). No token of that piece is fitted where it stands in other
        windows, too.

        Args:
            place_WT: see `text.windows.Windows`; None: windows have no token in common.

        Raises:
            FloatingPointError: a sum is not finite.
            MemoryError: not even a single window fits.
        """
        began = time.monotonic()
        if place_WT is None:
            place_WT = np.arange(tokens_of(windows).size).reshape(windows.shape)
        found = self._on(workers, windows, place_WT)
        return replace(found, seconds=round(time.monotonic() - began, 3))

    def _on(self, workers: Workers, windows: Batch, place_WT: np.ndarray) -> Repaired:
        nothing = Repaired(self.donor, self.way, 0.0)
        if not self.stack.position(self.donor):
            problem = f"no block is left before block {self.donor}"
            return replace(nothing, problem=problem)
        batch = workers.setup.importance.batch
        pieces = split(len(windows), batch)
        summed_WT = apart(place_WT, pieces[-1])
        attempt = partial(self._moments, workers, windows, summed_WT, pieces)
        what = "finding what the removed block adds"
        (layer, sums, read), size = find_batch_size(attempt, batch, batch, what)
        nothing = replace(nothing, batch_size=size, bytes_read=read)
        if layer is None:
            problem = f"block {self.last.dense} ends in no linear layer that is added to its states"
            return replace(nothing, problem=problem)
        fitted = slice(len(windows) - pieces[-1])
        tokens = len(np.unique(place_WT[fitted][summed_WT[fitted] & (place_WT[fitted] >= 0)]))
        bias = self.way == "linear" and f"{layer}.bias" in self.last.weights
        if tokens < (unknowns := len(sums[0].x_F) + bias):
            problem = (
                f"{self.way} has {unknowns} unknowns for each output, and beside the windows that"
                f" are held out the text has {tokens} different tokens; use a longer text"
            )
            return replace(nothing, problem=problem)
        ((_, (facts, own, base)),) = workers.map(
            solve, [(self.way, *sums, self.last, layer)], batch
        )
        if not own:
            problem = "on windows that were held out, every fit is worse than none"
            return replace(nothing, problem=problem)
        block, files = self._written(own, base)
        ridge, left = facts
        return replace(nothing, block=block, files=files, layer=layer, ridge=ridge, left=left)

    def _moments(
        self,
        workers: Workers,
        windows: Batch,
        summed_WT: np.ndarray,
        pieces: list[int],
        batch_size: int,
    ) -> tuple[str | None, list[Moments], int]:
        """The name of the layer, if there is one, with the sums to fit and those that are held out;
        and the bytes of blocks that were read.
        """
        dealt = dealt_out(workers, windows, pieces)
        position = self.stack.position(self.donor)
        ends = np.cumsum([len(part) for part, _ in dealt])[:-1]
        tasks = [
            (self.stack, position, self.way, *part, summed)
            for part, summed in zip(dealt, np.split(summed_WT, ends), strict=True)
        ]
        costs = [float(len(part)) for part, _ in dealt]
        names, sums, read = set(), list[Moments](), 0
        for name, moments, more in in_order(workers.map(gather, tasks, batch_size, costs)):
            names.add(name)
            read += more
            for piece in moments:  # the last one stays by itself
                sums = [sums[0] + sums[1], piece] if len(sums) == 2 else [*sums, piece]
        found = names.pop()
        return (None, [], read) if names or found is None else (found, sums, read)

    def _written(self, own: Changed, base: Changed) -> tuple[Block, dict[str, FileRecord]]:
        """The new block, of which only the layer's tensors are written."""
        name = f"without-{self.donor:03d}-block-{self.last.dense:03d}.repaired.safetensors"
        files: dict[str, FileRecord] = {}

        def write(file: str, tensors: Changed) -> dict[str, TensorRef]:
            entries = [
                Entry(key, torch.float32, value.shape, partial(torch.tensor, value))
                for key, value in tensors.items()
            ]
            self.fence()
            files[file], refs = write_safetensors(file, entries)
            return refs

        file, block = storage.join(self.folder, name), self.last
        weights, terms = {**block.weights, **write(file, own)}, block.terms
        if terms is not None:
            under = write(f"{file.removesuffix('.safetensors')}.base.safetensors", base)
            terms = Terms({**terms.base, **under}, terms.donors, terms.learned)
        return Block(block.dense, weights, terms), files


def repaired_only(
    workers: Workers,
    stack: Stack,
    removed: Sequence[int],
    way: Way,
    windows: Windows,
    folder: str,
    fence: Fence = nobody_else,
) -> Stack:
    """The stack without these blocks, each gap repaired in the order in which they go, nothing
    trained. Errors and arguments are those of `Repair`.
    """
    for donor in removed:
        block = (
            Repair(stack, donor, way, folder, fence)
            .on(workers, windows.tokens_WT, windows.place_WT)
            .block
        )
        stack = stack.drop(donor)
        if block:
            stack = stack.swap({block.dense: block})
    return stack


def apart(place_WT: np.ndarray, held_out: int) -> np.ndarray:
    """Which tokens are summed, bool [W, T]: all of the last `held_out` windows, and of the others
    those that do not stand in these. Windows are drawn at random and overlap; a fit is judged by
    what it has not seen. What stands in no text (see `Windows.place_WT`) is nobody's.

    Args:
        place_WT: where each token stands.
    """
    first = len(place_WT) - held_out
    summed_WT = np.ones(place_WT.shape, dtype=bool)
    judging = place_WT[first:]
    summed_WT[:first] = ~np.isin(place_WT[:first], judging[judging >= 0])
    return summed_WT


def dealt_out(
    workers: Workers, windows: Batch, pieces: Sequence[int]
) -> list[tuple[Batch, list[int]]]:
    """Windows in pieces (so many each, in order), as tasks of replicas: the windows of each, and
    its pieces. One piece each; where replicas read the weights for each walk, they walk once.
    """
    groups = min(workers.replicas, len(pieces)) if workers.streams else len(pieces)
    shares = [list(map(int, part)) for part in np.array_split(pieces, groups)]
    ends = np.cumsum([sum(share) for share in shares])
    return [*zip(cut(windows, map(int, ends[:-1])), shares, strict=True)]


def in_order(found: Iterator[tuple[int, Any]]) -> Iterator[Any]:
    """Numbered results that come in any order, from 0 on."""
    waiting: dict[int, Any] = {}
    following = 0
    for number, result in found:
        waiting[number] = result
        while following in waiting:
            yield waiting.pop(following)
            following += 1


def solve(
    runner: Runner, way: Way, fitted: Moments, held_out: Moments, block: Block, name: str
) -> tuple[tuple[float, float], Changed, Changed]:
    """The task of one replica: λ and what is left (see `Choice`); the new weight and bias of the
    layer; and, of a block that keeps its terms, those of the frozen layer under them, which change
    by as much. Nothing changes where λ is infinite.
    """
    empty, device = runner.trunk.meta_blocks[block.dense], runner.device
    layer = empty.module.get_submodule(name)
    bias = getattr(layer, "bias", None) is not None
    fit, ridge, left = best_fit(fitted, held_out, way == "linear" and bias, device)
    if math.isinf(ridge):
        return (ridge, left), {}, {}
    keys = [f"{name}.weight", f"{name}.bias"][: 1 + bias]

    def stored(refs: Refs) -> list[torch.Tensor]:
        found = empty.read(refs, keys)
        weight, *rest = (found[key].to(device, torch.float64) for key in keys)
        return [weight.T if isinstance(layer, Conv1D) else weight, *rest]

    own = stored(block.weights)
    added = change(way, fit, *own)

    def changed(tensors: list[torch.Tensor], refs: Refs) -> Changed:
        new = [value + more for value, more in zip(tensors, added, strict=True)]
        new[0] = new[0].T if isinstance(layer, Conv1D) else new[0]
        parameters = {key: value.float().cpu() for key, value in zip(keys, new, strict=True)}
        return {
            key: value.contiguous().numpy() for key, value in empty.stored(parameters, refs).items()
        }

    base = changed(stored(block.terms.base), block.terms.base) if block.terms else {}
    return (ridge, left), changed(own, block.weights), base

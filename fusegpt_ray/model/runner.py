"""Runs a stack block by block. Each block is fetched once for all windows at hand, so the whole
model need not be in memory.

Shapes: W windows, B windows of one call, T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Literal, Self

import torch
from torch import nn

from fusegpt_ray.model.cache import BlockCache
from fusegpt_ray.model.chunks import HELD_BYTES, chunk_size
from fusegpt_ray.model.compiled import block_function
from fusegpt_ray.model.config import read_config
from fusegpt_ray.model.memory import free_bytes
from fusegpt_ray.model.recorder import Context, run_block
from fusegpt_ray.model.stack import Stack
from fusegpt_ray.model.trunk import Trunk
from fusegpt_ray.model.weights import Weights, fits
from fusegpt_ray.store.checkpoint import read_tensors

HELD_SHARE = 0.15
"""Share of the free memory that one set of states may take, where that is less."""


def state_bytes(stack: Stack, length: int, dtype: torch.dtype = torch.float32) -> int:
    """Bytes of the states of one window of `length` tokens."""
    return dtype.itemsize * length * int(read_config(stack.config).get_text_config().hidden_size)


class Runner:
    """Runs the blocks of stacks that share one trunk."""

    def __init__(
        self,
        stack: Stack,
        device: torch.device,
        dtype: torch.dtype,
        batch_size: int,
        weights: Literal["auto", "resident", "streamed"] = "streamed",
        memory_share: float = 1.0,
        cache: BlockCache | None = None,
        compiled: bool = False,
    ) -> None:
        """
        Args:
            batch_size: windows that pass a block in one call, which bounds the activations' memory.
            weights: kept on the device, read for every walk, or whichever the memory allows.
            memory_share: share of the device's free memory that this runner may use.
            cache: the node's copies of blocks that lie in object storage.
            compiled: whether whole batches pass compiled blocks (see `compiled.py`).
        """
        self.stack, self.device, self.dtype = stack, device, dtype
        self.batch_size, self.memory_share = batch_size, memory_share
        self.compiled, self.run_block = compiled, block_function(compiled)
        self.trunk = Trunk(stack, device, dtype, cache.tensors if cache else read_tensors)
        self.resident = weights == "resident" or (
            weights == "auto" and fits(stack, device, dtype, memory_share)
        )
        self.weights = Weights(stack, self.trunk.meta_blocks, device, dtype, self.resident, cache)

    def with_batch_size(self, batch_size: int) -> Self:
        """The same runner, with other calls: it shares the trunk and the weights."""
        other = copy.copy(self)
        other.batch_size = batch_size
        return other

    def for_trunk_of(self, stack: Stack) -> Runner:
        """This runner, or for a stack with a trunk of its own (a published model) another beside it
        that keeps no weights.
        """
        if stack.trunk == self.stack.trunk:
            return self
        return Runner(
            stack,
            self.device,
            self.dtype,
            self.batch_size,
            memory_share=self.memory_share,
            compiled=self.compiled,
        )

    def offload(self) -> None:
        """Move everything from a GPU to the host's memory, so that a training worker may use it."""
        if self.device.type != "cpu":
            self.trunk.model.to("cpu")
            self.weights.offload()

    def reload(self) -> None:
        """Undo `offload`; does nothing if there was none."""
        if self.device.type != "cpu":
            self.trunk.model.to(self.device)
            self.weights.reload()

    def chunks(self, stack: Stack, windows_WT: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Windows that should walk together, see `chunk_size`: a walk holds about three times their
        states.
        """
        windows, length = windows_WT.shape
        held = min(HELD_BYTES, HELD_SHARE * self.memory_share * free_bytes(self.device))
        size = chunk_size(windows, self.batch_size, state_bytes(stack, length), held=held)
        return windows_WT.split(size)

    @torch.no_grad()
    def embed(self, windows_WT: torch.Tensor) -> torch.Tensor:
        """States [W, T, D] entering the first block."""
        return torch.cat([self.trunk.embed(part) for part in windows_WT.split(self.batch_size)])

    @torch.no_grad()
    def apply(self, module: nn.Module, dense: int, h_WTD: torch.Tensor) -> torch.Tensor:
        """States [W, T, D] after the block, which was number `dense` of the dense model."""
        parts = []
        for part in h_WTD.split(self.batch_size):
            # Compiling takes seconds, so fewer windows than usual pass the block as it is.
            run = self.run_block if len(part) == self.batch_size else run_block
            parts.append(run(module, part, self.context(dense, part)))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def context(self, dense: int, h_BTD: torch.Tensor) -> Context:
        """What block `dense` is called with beside these states."""
        batch, length, _ = h_BTD.shape
        return self.trunk.contexts(batch, length)[dense]

    @torch.no_grad()
    def walk(
        self, stack: Stack, windows_WT: torch.Tensor, stop: int | None = None
    ) -> Iterator[torch.Tensor]:
        """Yield the states [W, T, D] that enter block 0, 1, …, and at last those that leave the
        last block (or that enter block `stop`).
        """
        h_WTD = self.embed(windows_WT)
        yield h_WTD
        for block, module in self.weights.walk(stack.blocks[:stop]):
            h_WTD = self.apply(module, block.dense, h_WTD)
            del module  # so that its memory is free when the next one is asked for
            yield h_WTD

    @torch.no_grad()
    def token_losses(self, h_WTD: torch.Tensor, windows_WT: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy in nats of predicting tokens 1 … T−1 of each window from the states
        that leave the last block: [W] float64.
        """
        means = []
        for h_1TD, ids_1T in zip(h_WTD.split(1), windows_WT.split(1), strict=True):
            logits_TV = self.trunk.logits(h_1TD)[0, :-1].float()  # one window's logits at a time
            loss_T = nn.functional.cross_entropy(
                logits_TV, ids_1T[0, 1:].to(self.device), reduction="none"
            )
            means.append(loss_T.double().mean().cpu())
        return torch.stack(means)

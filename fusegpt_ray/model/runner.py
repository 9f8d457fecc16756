"""Runs a stack block by block: each is fetched once for all rows at hand, so that the whole model need not be in memory.

Shapes: W windows, B rows, T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Literal, Self

import torch
from torch import nn

from fusegpt_ray.model.cache import BlockCache
from fusegpt_ray.model.chunks import HELD_BYTES, chunk_size
from fusegpt_ray.model.config import read_config
from fusegpt_ray.model.memory import free_bytes
from fusegpt_ray.model.recorder import Context, run_block
from fusegpt_ray.model.stack import Stack
from fusegpt_ray.model.trunk import Trunk
from fusegpt_ray.model.weights import Weights, fits
from fusegpt_ray.store.checkpoint import read_tensors

HELD_SHARE = 0.15
"""Of the free memory that one set of states may take, if that is less."""


def pick_device() -> torch.device:
    """The accelerator torch sees, else the CPU. (Ray's resources say where a task runs, torch says what is there.)"""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pick_dtype(name: str, stack: Stack, device: torch.device) -> torch.dtype:
    """The arithmetic's dtype for the recipe's `model.dtype`. Looks at the trunk, which no round changes (fused blocks are float32)."""
    if name != "auto":
        return getattr(torch, name)
    sizes = {2: 0, 4: 0}
    for ref in stack.trunk.values():
        sizes[2 if ref.dtype.itemsize <= 2 else 4] += ref.end - ref.begin
    return torch.bfloat16 if device.type != "cpu" and sizes[2] > sizes[4] else torch.float32


def state_bytes(stack: Stack, length: int, dtype: torch.dtype = torch.float32) -> int:
    """What the states of a window of `length` tokens take."""
    return dtype.itemsize * length * int(read_config(stack.config).get_text_config().hidden_size)


class Runner:
    """Runs the blocks of stacks that share one trunk."""

    def __init__(
        self,
        stack: Stack,
        device: torch.device,
        dtype: torch.dtype,
        rows: int,
        weights: Literal["auto", "resident", "streamed"] = "streamed",
        share: float = 1.0,
        cache: BlockCache | None = None,
    ) -> None:
        """`rows`: how many rows pass a block in one call, which bounds the memory of activations.

        `weights`: kept on the device, read for every walk, or as memory allows; `share`: of the free memory that this runner may use;
        `cache`: this node's, of what lies in object storage.
        """
        self.stack, self.device, self.dtype, self.rows, self.share = (
            stack,
            device,
            dtype,
            rows,
            share,
        )
        self.trunk = Trunk(stack, device, dtype, cache.tensors if cache else read_tensors)
        self.keeps = weights == "resident" or (
            weights == "auto" and fits(stack, device, dtype, share)
        )
        self.weights = Weights(stack, self.trunk.meta_blocks, device, dtype, self.keeps, cache)

    def with_batch_size(self, rows: int) -> Self:
        """The same, with so many rows in a call."""
        other = copy.copy(self)
        other.rows = rows
        return other

    def chunks(self, stack: Stack, windows_WT: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Windows that should walk together, see `chunk_size`: a walk holds their states some three times."""
        windows, length = windows_WT.shape
        held = min(HELD_BYTES, HELD_SHARE * self.share * free_bytes(self.device))
        return windows_WT.split(
            chunk_size(windows, self.rows, state_bytes(stack, length), held=held)
        )

    def for_trunk_of(self, stack: Stack) -> Runner:
        """This one, or another beside it that keeps no weights if the stack has a trunk of its own: a published model."""
        return (
            self
            if stack.trunk == self.stack.trunk
            else Runner(stack, self.device, self.dtype, self.rows, share=self.share)
        )

    @torch.no_grad()
    def embed(self, windows_WT: torch.Tensor) -> torch.Tensor:
        """States [W, T, D] entering the first block."""
        return torch.cat([self.trunk.embed(part) for part in windows_WT.split(self.rows)])

    @torch.no_grad()
    def apply(self, module: nn.Module, dense: int, h_BTD: torch.Tensor) -> torch.Tensor:
        """States [B, T, D] after the block, which was number `dense` of the dense model; at most `rows` rows a call."""
        parts = [
            run_block(module, part, self.context(dense, part)) for part in h_BTD.split(self.rows)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def context(self, dense: int, h_BTD: torch.Tensor) -> Context:
        rows, length, _ = h_BTD.shape
        return self.trunk.contexts(rows, length)[dense]

    @torch.no_grad()
    def walk(
        self, stack: Stack, windows_WT: torch.Tensor, stop: int | None = None
    ) -> Iterator[torch.Tensor]:
        """The states [W, T, D] entering block 0, 1, …, and last those after the last block (or entering block `stop`)."""
        h_BTD = self.embed(windows_WT)
        yield h_BTD
        for block, module in self.weights.walk(stack.blocks[:stop]):
            h_BTD = self.apply(module, block.dense, h_BTD)
            del module  # before the next one is asked for
            yield h_BTD

    @torch.no_grad()
    def token_losses(self, h_WTD: torch.Tensor, windows_WT: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy (nats) of predicting tokens 1 … T−1 of each window from the states after the last block: [W] float64."""
        means = []
        for h_1TD, ids_1T in zip(
            h_WTD.split(1), windows_WT.split(1), strict=True
        ):  # one window's logits at a time
            logits_TV = self.trunk.logits(h_1TD)[0, :-1].float()
            loss_T = nn.functional.cross_entropy(
                logits_TV, ids_1T[0, 1:].to(self.device), reduction="none"
            )
            means.append(loss_T.double().mean().cpu())
        return torch.stack(means)

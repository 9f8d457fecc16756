"""Runs a stack block by block. Each block is fetched once for all windows of a walk, however many,
so the whole model need not be in memory. Their states wait wherever there is room
(`placement.py`).

Shapes: W windows, B windows of one call, T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from itertools import count
from typing import Literal, Self

import torch
from torch import nn

from fusegpt_ray.errors import UserError
from fusegpt_ray.model.cache import BlockCache
from fusegpt_ray.model.compiled import block_function
from fusegpt_ray.model.config import read_config
from fusegpt_ray.model.device import deterministic_or_not
from fusegpt_ray.model.placement import empty_states, transform
from fusegpt_ray.model.recorder import Context, run_block
from fusegpt_ray.model.rows import Own, Owns, Rows, all_alike, each, ids_of, one_sample
from fusegpt_ray.model.stack import Stack
from fusegpt_ray.model.trunk import Trunk
from fusegpt_ray.model.weights import Weights, fits
from fusegpt_ray.samples import Samples
from fusegpt_ray.store.checkpoint import read_tensors


def state_bytes(stack: Stack, length: int, dtype: torch.dtype = torch.float32) -> int:
    """Bytes of the states of one window of `length` tokens."""
    return dtype.itemsize * length * _hidden_size(stack)


def _hidden_size(stack: Stack) -> int:
    return int(read_config(stack.config).get_text_config().hidden_size)


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
        host_share: float = 1.0,
    ) -> None:
        """
        Args:
            batch_size: windows that pass a block in one call, which bounds the activations' memory.
            weights: kept on the device, read for every walk, or whichever the memory allows.
            memory_share: share of the device's free memory that this runner may use.
            cache: the node's copies of blocks that lie in object storage.
            compiled: whether whole batches pass compiled blocks (see `compiled.py`).
            host_share: share of the host's free memory that this runner's states may count on.
        """
        self.stack, self.device, self.dtype = stack, device, dtype
        self.batch_size = batch_size
        self.memory_share, self.host_share = memory_share, host_share
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
            host_share=self.host_share,
        )

    def offload(self, trunk: bool = True) -> None:
        """Move everything (or all but the trunk) from a GPU to the host's memory, so that a
        training worker may use it.
        """
        if self.device.type != "cpu":
            if trunk:
                self.trunk.model.to("cpu")
            self.weights.offload(self.host_share)

    def reload(self) -> None:
        """Undo `offload`; does nothing if there was none."""
        if self.device.type != "cpu":
            self.trunk.model.to(self.device)
            self.weights.reload()

    def empty_states(self, windows: Rows, sets: int = 1) -> list[torch.Tensor]:
        """Room for so many sets of these windows' states [W, T, D], where there is any."""
        shape = (*windows.shape, _hidden_size(self.stack))
        return empty_states(
            shape, self.dtype, self.device, sets, self.memory_share, self.host_share
        )

    def by_sample(self, windows: Rows) -> bool:
        """Whether each of the windows passes the blocks alone (see `rows.py`)."""
        return isinstance(windows, Samples) or self.trunk.by_sample

    @torch.no_grad()
    def enter(self, windows: Rows) -> tuple[torch.Tensor, Owns | None]:
        """States [W, T, D] entering the first block, on the device; and what the blocks are called
        with for each window, where that is not the same for all.
        """
        if isinstance(windows, Samples) or self.by_sample(windows):
            shape = (*windows.shape, _hidden_size(self.stack))
            h_WTD = torch.empty(shape, dtype=self.dtype, device=self.device)
            return h_WTD, self._enter_each(windows, h_WTD)
        parts = [self.trunk.embed(part) for part in windows.split(self.batch_size)]
        return torch.cat(parts), None

    def _enter_each(self, windows: Rows, into_WTD: torch.Tensor) -> Owns:
        owns = []
        text: Own | None = None
        for number in range(len(windows)):
            ids_1n, inputs = one_sample(windows, number)
            if not inputs and ids_1n.shape[1] == windows.shape[1] and not self.trunk.by_sample:
                h_1nD = self.trunk.embed(ids_1n)
                text = text or Own.of(h_1nD.shape[1], self.trunk.contexts(*ids_1n.shape), True)
                owns.append(text)
            else:
                h_1nD, contexts = self.trunk.enter(ids_1n, inputs)
                owns.append(Own.of(h_1nD.shape[1], contexts))
            into_WTD[number, : h_1nD.shape[1]] = h_1nD[0]
            into_WTD[number, h_1nD.shape[1] :] = 0
        return owns

    @torch.no_grad()
    def apply(
        self, module: nn.Module, dense: int, h_WTD: torch.Tensor, owns: Owns | None = None
    ) -> torch.Tensor:
        """States [W, T, D] after the block, which was number `dense` of the dense model.

        `owns`: as `enter` gave them.
        """
        size = self.batch_size
        parts = [
            self._after(module, dense, part, owns and owns[row : row + size])
            for row, part in zip(count(step=size), h_WTD.split(size), strict=False)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def apply_hooked(self, module: nn.Module, dense: int, h_BTD: torch.Tensor) -> torch.Tensor:
        """As `apply`, of one batch, by a block that has hooks: these are no part of a compiled one.
        Gradients are the caller's affair.
        """
        context = self.context(dense, h_BTD)
        return deterministic_or_not(lambda: run_block(module, h_BTD, context))

    def _after(
        self, module: nn.Module, dense: int, h_BTD: torch.Tensor, owns: Owns | None = None
    ) -> torch.Tensor:
        if owns is not None and not all_alike(owns):
            run_one = partial(self._after_one, module, dense)
            return each(run_one, h_BTD, owns, partial(self._after, module, dense))
        # Compiling takes seconds, so fewer windows than usual pass the block as it is.
        whole = len(h_BTD) == self.batch_size
        run = self.run_block if self.compiled and whole else run_block
        context = self.context(dense, h_BTD)
        return deterministic_or_not(lambda: run(module, h_BTD, context))

    def _after_one(
        self, module: nn.Module, dense: int, h_1nD: torch.Tensor, own: Own
    ) -> torch.Tensor:
        context = own.contexts[dense].to(self.device)
        return deterministic_or_not(lambda: run_block(module, h_1nD, context))

    def context(self, dense: int, h_BTD: torch.Tensor) -> Context:
        """What block `dense` is called with beside these states."""
        batch, length, _ = h_BTD.shape
        return self.trunk.contexts(batch, length)[dense]

    @torch.no_grad()
    def walk(
        self,
        stack: Stack,
        windows: Rows,
        stop: int | None = None,
        into_WTD: torch.Tensor | None = None,
        owning: list[Own] | None = None,
    ) -> Iterator[torch.Tensor]:
        """Yield the states [W, T, D] that enter block 0, 1, …, and at last those that leave the
        last block (or that enter block `stop`).

        It is the same tensor every time, `into_WTD` if that is given, in which each step replaces
        the states of the one before: on the device, or in the host's memory.

        `owning` is filled with what `enter` gives beside the states.
        """
        h_WTD = self.empty_states(windows)[0] if into_WTD is None else into_WTD
        owns = None
        if isinstance(windows, Samples) or self.by_sample(windows):
            owns = self._enter_each(windows, h_WTD)
            if owning is not None:
                owning[:] = owns
        else:
            transform(self.trunk.embed, windows, h_WTD, self.batch_size, self.device)
        yield h_WTD
        for block, module in self.weights.walk(stack.blocks[:stop]):
            self._advance(module, block.kind, h_WTD, owns)
            del module  # so that its memory is free when the next one is asked for
            yield h_WTD

    def _advance(
        self, module: nn.Module, dense: int, h_WTD: torch.Tensor, owns: Owns | None
    ) -> None:
        """The states become those after the block.

        Raises:
            UserError: it returns them in another dtype, so that they would be rounded.
        """

        first = count(step=self.batch_size)  # batches are asked for in order

        def after(h_BTD: torch.Tensor) -> torch.Tensor:
            begin = next(first)
            own = owns and owns[begin : begin + len(h_BTD)]
            out_BTD = self._after(module, dense, h_BTD, own)
            if out_BTD.dtype != h_BTD.dtype:
                problem = f"block {dense} returns {out_BTD.dtype} for states in {h_BTD.dtype}"
                name = str(out_BTD.dtype).removeprefix("torch.")
                raise UserError("model.dtype", self.dtype, problem, f"set it to {name}")
            return out_BTD

        transform(after, h_WTD, h_WTD, self.batch_size, self.device)

    @torch.no_grad()
    def token_losses(
        self,
        h_WTD: torch.Tensor,
        windows: Rows,
        targets_WS: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Mean cross-entropy in nats of predicting tokens 1 … T−1 of each window from the states
        that leave the last block: [W] float64.

        `targets_WS`: which of these T−1 tokens count, bool; None: all of them.
        """
        means = []
        ids_WT = ids_of(windows).clamp(min=0)
        for row, (h_1TD, ids_1T) in enumerate(zip(h_WTD.split(1), ids_WT.split(1), strict=True)):
            logits_TV = self.trunk.logits(h_1TD)[0, :-1].float()  # one window's logits at a time
            loss_T = nn.functional.cross_entropy(
                logits_TV, ids_1T[0, 1:].to(self.device), reduction="none"
            )
            if targets_WS is not None:
                loss_T = loss_T[targets_WS[row].to(loss_T.device)]
            means.append(loss_T.double().mean().cpu())
        return torch.stack(means)

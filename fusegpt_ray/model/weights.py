"""The blocks of stacks with their weights on the device: kept there where they fit, else read again for every walk.

Notable: while a block computes, a thread reads the next one, so that two are there at a time. Both ways give the same modules, and so
the same results.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property

import torch
from torch import nn

from fusegpt_ray.model.cache import BlockCache
from fusegpt_ray.model.memory import free_bytes, is_out_of_memory, release
from fusegpt_ray.model.stack import Block, Refs, Stack
from fusegpt_ray.model.trunk import load_block
from fusegpt_ray.store.checkpoint import read_tensors

RESIDENT_SHARE = 0.4
"""Of the free memory that the dense blocks may take for good. Fused ones come on top; the rest is for states, activations and, in one
process, fine-tuning."""


class Weights:
    """Modules of blocks of the dense stack and of those that rounds make of it."""

    def __init__(
        self,
        dense: Stack,
        meta_blocks: Sequence[nn.Module],
        device: torch.device,
        dtype: torch.dtype,
        keep: bool,
        cache: BlockCache | None = None,
    ) -> None:
        """`meta_blocks`: the dense model's blocks without weights, by dense number. `keep`: hold blocks for later walks."""
        self.meta_blocks, self.device, self.dtype, self.keep, self.cache = (
            meta_blocks,
            device,
            dtype,
            keep,
            cache,
        )
        self._needed: list[Refs] = []  # by the walk under way
        self._dense = set(map(_key, dense.blocks))
        self._kept: dict[Hashable, nn.Module] = {}

    def of(self, block: Block) -> nn.Module:
        """One block, read now unless it is kept."""
        return self._kept.get(_key(block)) or self._read(block)

    def walk(self, blocks: Sequence[Block]) -> Iterator[tuple[Block, nn.Module]]:
        """The blocks in order, each with its module; the caller lets go of one before it asks for the next."""
        self._needed = [block.weights for block in blocks]
        if self.keep:
            yield from self._walk_kept(blocks)
            return
        with ThreadPoolExecutor(1, thread_name_prefix="next-block") as reader:
            ahead: Future[nn.Module] | None = None
            for block, following in zip(blocks, [*blocks[1:], None], strict=True):
                module = self._arrived(ahead, block)
                ahead = (
                    reader.submit(self._read_aside, following) if following is not None else None
                )
                yield block, module
                del module

    @property
    def kept(self) -> int:
        """How many blocks are kept now."""
        return len(self._kept)

    def forget(self) -> None:
        """Let go of all that is kept."""
        self._kept.clear()
        release()

    def _walk_kept(self, blocks: Sequence[Block]) -> Iterator[tuple[Block, nn.Module]]:
        """What is neither wanted now nor a dense block's was replaced by a round: it goes first."""
        wanted = [_key(block) for block in blocks]
        for key in set(self._kept) - self._dense - set(wanted):
            del self._kept[key]
        for key, block in zip(wanted, blocks, strict=True):
            if key not in self._kept:
                self._kept[key] = self._read(block)
            yield block, self._kept[key]

    def _read(self, block: Block) -> nn.Module:
        tensors = (
            self.cache.tensors(block.weights, self._needed)
            if self.cache
            else read_tensors(block.weights)
        )
        return load_block(self.meta_blocks[block.dense], tensors, self.device, self.dtype)

    def _read_aside(self, block: Block) -> nn.Module:
        """In the reader's thread; on a GPU beside the kernels of the block in use."""
        if self.device.type != "cuda":
            return self._read(block)
        with torch.cuda.device(self.device), torch.cuda.stream(self._aside):
            module = self._read(block)
        self._aside.synchronize()
        return module

    @cached_property
    def _aside(self) -> torch.cuda.Stream:
        """One for all: what a block leaves is used again only by reads of the same stream."""
        return torch.cuda.Stream(self.device)

    def _arrived(self, ahead: Future[nn.Module] | None, block: Block) -> nn.Module:
        if ahead is None:
            return self._read(block)
        try:
            module = ahead.result()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            error.__traceback__ = (
                None  # the future keeps the error, and with its frames what had been read
            )
        else:
            if (
                self.device.type == "cuda"
            ):  # the reader's stream shall not use this memory again before ours is done with it
                for tensor in (*module.parameters(), *module.buffers()):
                    tensor.record_stream(torch.cuda.current_stream(self.device))
            return module
        release()  # two blocks were too many
        return self._read(block)


def fits(stack: Stack, device: torch.device, dtype: torch.dtype, share: float) -> bool:
    """Whether the weights of all blocks fit into what they may take of a `share` of the memory that is free now."""
    numbers = sum(
        (ref.end - ref.begin) // ref.dtype.itemsize
        for block in stack.blocks
        for ref in block.weights.values()
    )
    return numbers * dtype.itemsize <= RESIDENT_SHARE * share * free_bytes(device)


def _key(block: Block) -> Hashable:
    return block.dense, frozenset(block.weights.items())

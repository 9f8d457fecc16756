"""The blocks of stacks with their weights on the device: kept there where they fit, or read again
for every walk.

While a block computes, a thread reads the next one, so that two are there at a time. Kept or read,
the modules are the same, and so are the results.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property

import torch
from torch import nn

from fusegpt_ray.model.cache import BlockCache, Entries
from fusegpt_ray.model.empty import EmptyBlock, load_block
from fusegpt_ray.model.memory import empty_cache, free_bytes, is_out_of_memory, pinned_bytes
from fusegpt_ray.model.names import Tensors
from fusegpt_ray.model.stack import Block, Refs, Stack
from fusegpt_ray.model.staging import Staging
from fusegpt_ray.store.checkpoint import Reading, read_tensors

RESIDENT_SHARE = 0.4
"""Share of the free memory that the dense blocks may take for the whole run. Fused blocks come on
top; the rest is for states, activations and, in a single process, fine-tuning."""

OFFLOAD_SHARE = 0.8
"""Share of the host's free memory that all processes of a node may take for blocks that make room
on GPUs. Ray's memory monitor would kill one of them where hardly anything is left."""


class Weights:
    """Modules of the dense stack's blocks, and of those that rounds make of them."""

    def __init__(
        self,
        dense: Stack,
        meta_blocks: Sequence[EmptyBlock],
        device: torch.device,
        dtype: torch.dtype,
        keep: bool,
        cache: BlockCache | None = None,
    ) -> None:
        """
        Args:
            meta_blocks: the dense model's blocks without weights, by dense number.
            keep: whether blocks stay on the device for later walks.
        """
        self.meta_blocks, self.device, self.dtype = meta_blocks, device, dtype
        self.keep, self.cache = keep, cache
        self.bytes_read = 0
        """Of blocks, as they are stored, since this object was made."""
        self._needed: Entries = frozenset  # of the node's cache, by the last walk
        self._dense = set(map(_key, dense.blocks))
        self._kept: dict[Hashable, nn.Module] = {}
        self._host: dict[Hashable, dict[str, torch.Tensor]] = {}  # copies of what is kept
        self._away = False  # since `offload`
        # On a CPU files are read into the tensors that are computed with.
        self._staging = Staging(device, dtype) if device.type == "cuda" else None

    def of(self, block: Block) -> nn.Module:
        """One block, read now unless it is kept."""
        assert not self._away, "the blocks that are kept are not on the device"
        return self._kept.get(_key(block)) or self._read(block)

    def walk(self, blocks: Sequence[Block]) -> Iterator[tuple[Block, nn.Module]]:
        """The blocks in order, each with its module. The caller drops its reference to one before
        it asks for the next.
        """
        if self.cache:
            self._needed = self.cache.entries([block.weights for block in blocks])
        if self.keep:
            yield from self._walk_kept(blocks)
            return
        with ThreadPoolExecutor(1, thread_name_prefix="next-block") as reader:
            ahead: Future[nn.Module] | None = None
            for block, following in zip(blocks, [*blocks, None][1:], strict=True):
                module = self._arrived(ahead, block)
                ahead = None
                if following is not None:
                    ahead = reader.submit(self._read_aside, following)
                yield block, module
                del module

    @property
    def kept(self) -> int:
        """How many blocks are kept now."""
        return len(self._kept)

    def forget(self) -> None:
        """Drop all blocks that are kept."""
        self._kept.clear()
        self._host.clear()
        empty_cache()

    def offload(self, host_share: float = 1.0) -> None:
        """Move the blocks that are kept from the GPU to pinned memory of the host, where they fit
        into this process's share of what is free there: others of the node do the same now.

        Weights never change, so the copies stay: each block is copied to the host once. A walk
        brings each block back for its turn.
        """
        self._away = True
        free = OFFLOAD_SHARE * host_share * free_bytes(torch.device("cpu"))
        for key, module in list(self._kept.items()):
            copies = self._host.get(key)
            if copies is None:
                tensors = dict(_tensors(module))
                free -= sum(pinned_bytes(tensor.nbytes) for tensor in tensors.values())
                if free < 0:
                    del self._kept[key]  # it is read again when it is needed
                    continue
                copies = {name: tensor.cpu().pin_memory() for name, tensor in tensors.items()}
                self._host[key] = copies
            for name, tensor in _tensors(module):
                tensor.data = copies[name]
        empty_cache()

    def reload(self) -> None:
        """Bring the blocks back to the GPU that `offload` has moved away."""
        self._away = False
        for module in self._kept.values():
            for _, tensor in _tensors(module):
                tensor.data = tensor.data.to(self.device, non_blocking=True)

    def _walk_kept(self, blocks: Sequence[Block]) -> Iterator[tuple[Block, nn.Module]]:
        """First drop what a later round has replaced: blocks that are neither wanted nor dense."""
        wanted = [_key(block) for block in blocks]
        for key in set(self._kept) - self._dense - set(wanted):
            del self._kept[key]
            self._host.pop(key, None)
        for key, block in zip(wanted, blocks, strict=True):
            module = self._kept.get(key)
            if module is None:
                module = self._read(block)
                if not self._away:
                    self._kept[key] = module
                yield block, module
            elif self._away:
                for _, tensor in _tensors(module):
                    tensor.data = tensor.data.to(self.device, non_blocking=True)
                try:
                    yield block, module
                finally:  # also where a walk is given up because memory runs out
                    for name, tensor in _tensors(module):
                        tensor.data = self._host[key][name]
            else:
                yield block, module
            del module

    def stored(self, refs: Refs) -> Tensors:
        """A block's tensors in the dtypes in which they are stored, read now on the way of all
        blocks: on a GPU they are there already.
        """
        return self._tensors(refs, self._staging.read_as_stored if self._staging else read_tensors)

    def _read(self, block: Block) -> nn.Module:
        self.bytes_read += stored_bytes([block])
        read = self._staging.read if self._staging else read_tensors
        tensors = self._tensors(block.weights, read)
        return load_block(self.meta_blocks[block.kind], tensors, self.device, self.dtype)

    def _tensors(self, refs: Refs, read: Reading) -> Tensors:
        return self.cache.tensors(refs, self._needed, read) if self.cache else read(refs)

    def _read_aside(self, block: Block) -> nn.Module:
        """In the reader's thread; on a GPU beside the kernels of the block in use."""
        if self.device.type != "cuda":
            return self._read(block)
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            module = self._read(block)
        self._stream.synchronize()
        return module

    @cached_property
    def _stream(self) -> torch.cuda.Stream:
        """One for all reads: memory that a block frees is used again by reads of this stream
        only.
        """
        return torch.cuda.Stream(self.device)

    def _arrived(self, ahead: Future[nn.Module] | None, block: Block) -> nn.Module:
        if ahead is None:
            return self._read(block)
        try:
            module = ahead.result()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            # The future keeps the error, and its frames would keep what had been read.
            error.__traceback__ = None
        else:
            if self.device.type == "cuda":
                # The reader's stream must not use this memory again before ours is done with it.
                for _, tensor in _tensors(module):
                    tensor.record_stream(torch.cuda.current_stream(self.device))
            return module
        empty_cache()  # two blocks were too many
        return self._read(block)


def fits(stack: Stack, device: torch.device, dtype: torch.dtype, memory_share: float) -> bool:
    """Whether the weights of all blocks fit into what they may take of the device's free memory."""
    refs = [ref for block in stack.blocks for ref in block.weights.values()]
    elements = sum((ref.end - ref.begin) // ref.dtype.itemsize for ref in refs)
    return elements * dtype.itemsize <= RESIDENT_SHARE * memory_share * free_bytes(device)


def stored_bytes(blocks: Sequence[Block]) -> int:
    """Of the blocks' weights, in the files in which they lie."""
    return sum(ref.end - ref.begin for block in blocks for ref in block.weights.values())


def _key(block: Block) -> Hashable:
    return block.kind, frozenset(block.weights.items())


def _tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()

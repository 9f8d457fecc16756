"""Streamed writing of safetensors files, tensor by tensor, anywhere fsspec reaches; the library's
own writer needs the whole file in memory. The format: see `checkpoint.py`.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from fusegpt_ray.store import ranges, storage
from fusegpt_ray.store.checkpoint import CODES, SINGLE, TensorRef
from fusegpt_ray.store.records import FileRecord
from fusegpt_ray.store.retry import with_retries
from fusegpt_ray.store.threads import one_ahead


@dataclass(frozen=True)
class Entry:
    """A tensor to be written: its size is known now, its values are fetched when its turn comes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    load: Callable[[], torch.Tensor]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def entries_of(tensors: Mapping[str, torch.Tensor]) -> list[Entry]:
    """Tensors that are there, on any device, each copied to the host when its turn comes."""
    return [
        Entry(name, value.dtype, tuple(value.shape), partial(torch.Tensor.cpu, value))
        for name, value in tensors.items()
    ]


def layout(
    file: str, tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]]
) -> tuple[bytes, dict[str, TensorRef]]:
    """The header of a safetensors file of these tensors (name, dtype, shape), and their places."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    places, end = [], 0
    for name, dtype, shape in tensors:
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        places.append((name, dtype, shape, begin, end))
        header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    head = struct.pack("<Q", len(raw)) + raw
    return head, {
        name: TensorRef(file, name, CODES[dtype], shape, len(head) + begin, len(head) + end)
        for name, dtype, shape, begin, end in places
    }


def write_safetensors(
    file: str, entries: Sequence[Entry]
) -> tuple[FileRecord, dict[str, TensorRef]]:
    """Write one safetensors file tensor by tensor; returns its record and the tensors' places.

    While a tensor is written, it is hashed by another thread and the next one is loaded by a third.
    After a failure that may pass, the whole file is written again from newly loaded entries.
    """
    return with_retries(file, lambda: _write_once(file, entries))


def _write_once(file: str, entries: Sequence[Entry]) -> tuple[FileRecord, dict[str, TensorRef]]:
    head, refs = layout(file, ((entry.name, entry.dtype, entry.shape) for entry in entries))
    digest, total = hashlib.sha256(), 0
    with storage.writing(file) as out, ThreadPoolExecutor(1, "hash") as other:

        def put(data: bytes | memoryview) -> None:
            nonlocal total
            hashed = other.submit(digest.update, data)
            out.write(data)
            hashed.result()
            total += len(data)

        put(head)
        for entry, tensor in zip(entries, one_ahead(_load, entries), strict=True):
            assert tuple(tensor.shape) == entry.shape, (entry.name, tensor.shape, entry.shape)
            assert total == refs[entry.name].begin
            put(ranges.memory_of(tensor))
    return FileRecord(total, digest.hexdigest()), refs


def _load(entry: Entry) -> torch.Tensor:
    return entry.load().to(dtype=entry.dtype).contiguous()


def plan_shards(entries: Iterable[Entry], shard_bytes: int) -> dict[str, list[Entry]]:
    """File name → its tensors, in order, each file at most `shard_bytes` (or one tensor)."""
    shards: list[list[Entry]] = [[]]
    room = shard_bytes
    for entry in entries:
        if shards[-1] and entry.bytes > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(entry)
        room -= entry.bytes
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {
        f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors": shard
        for i, shard in enumerate(shards)
    }

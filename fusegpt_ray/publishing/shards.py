"""The shards of a model: written, and read back as soon as they are written, several at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from fusegpt_ray.publishing.proof import read_back
from fusegpt_ray.store import storage
from fusegpt_ray.store.checkpoint import FileRecord
from fusegpt_ray.store.fence import Fence
from fusegpt_ray.store.local import UNFINISHED
from fusegpt_ray.store.threads import at_once
from fusegpt_ray.store.writer import Entry, write_safetensors

AT_ONCE = 4
"""Shards that a process writes at the same time; each keeps three tensors in memory at most."""
Shards = Mapping[str, Sequence[Entry]]
"""File name → its tensors."""
Put = Callable[[str, Shards, Fence], Mapping[str, FileRecord]]
"""Writes shards into a folder, and reads them back (see `put_shards`)."""


def put_shards(
    folder: str, shards: Shards, fence: Fence, threads: int = AT_ONCE
) -> dict[str, FileRecord]:
    """Write shards into a folder, so many at once, and read each back; what was written, by file
    name.

    Repeated, by whichever process, it puts the same bytes in the place of the same files.

    Raises:
        StorageError: the store failed.
        ProofError: what arrived is not what was sent, or holds NaN or Inf.
    """
    records = at_once(partial(_put, folder, fence), shards.items(), threads)
    return dict(zip(shards, records, strict=True))


def _put(folder: str, fence: Fence, shard: tuple[str, Sequence[Entry]]) -> FileRecord:
    name, entries = shard
    fence()
    file = storage.join(folder, name)
    record, _ = write_safetensors(file, entries)
    read_back(file, record)
    return record


def remove_unfinished(folder: str, fence: Fence) -> None:
    """Remove what a writer that was killed has left in a folder of this machine."""
    if storage.is_remote(folder):
        return
    for name in filter(UNFINISHED.fullmatch, storage.names(folder)):
        fence()
        storage.remove(storage.join(folder, name))

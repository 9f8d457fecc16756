"""Blocks of object storage on this node's disk: fetched once by whichever process needs them first,
read there by all. No Ray.

Notable:
- an entry is one file, named by what it holds: the tensors' bytes one after another, and their
  checksum, which is computed whenever they are read. It appears whole, by a rename;
- one process fetches at a time: it holds the folder's lock. Waiting for an entry is waiting for
  that lock, which the kernel frees when its holder is killed. Reading takes no lock;
- what does not fit is read from its store as if there were no cache. Nothing that a walk needs
  makes room for the rest of the walk:
  the block used longest ago is the one needed next, so that evicting it would make every use a
  miss;
- the cache never fails a run: what goes wrong with the disk is said once, and read from the store.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cache as once
from pathlib import Path
from typing import BinaryIO, Self

import torch
import xxhash

from fusegpt_ray.model.stack import Refs
from fusegpt_ray.store import storage
from fusegpt_ray.store.checkpoint import Reading, read_tensors
from fusegpt_ray.store.ranges import EndedEarly, memory_of
from fusegpt_ray.store.scratch import locked, make_own, temporary

_LOG = logging.getLogger(__name__)
_OURS = re.compile(r"[0-9a-f]{64}.*\.(block|part|safetensors)")
"""Also the entries of older versions: nobody reads them, but they take space until they go."""
_SAID: set[tuple[Path, int | None]] = set()
Entries = Callable[[], Collection[str]]
"""The names of entries, which are formed when they are first asked for."""


@dataclass(frozen=True)
class BlockCache:
    """Tensors of remote files, kept in a folder of this node that all its processes share.

    Made once a run or task, on the node that reads: it takes files not to change while it lives.
    """

    folder: Path
    limit: int | None
    """Bytes of all files in it, at any time; None: half of what the disk would have free without
    them."""
    _versions: dict[str, str | None] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @classmethod
    def open(cls, limit_gb: float | None = None) -> Self | None:
        """This node's cache, shrunk to its limit (see `cluster.cache_gb`); None if there is to be
        none, or there can be none.
        """
        if limit_gb == 0:
            return None
        # A folder of its own also where the user names the place, which may hold other things.
        given = os.environ.get("FUSEGPT_CACHE")
        place = Path(given or tempfile.gettempdir()).expanduser().absolute()
        folder = place / f"fusegpt-ray-{os.geteuid()}" / "blocks"
        cache = cls(folder, None if limit_gb is None else int(limit_gb * 1e9))
        try:
            for path in (*([place] if given else []), folder.parent, folder):
                make_own(path)
            with locked(folder):
                cache._make_room(0)
        except OSError as error:
            _say_once(folder, error)
            return None
        return cache

    def tensors(
        self, refs: Refs, needed: Entries = frozenset, read: Reading = read_tensors
    ) -> dict[str, torch.Tensor]:
        """The tensors, from this node's disk where that can be.

        Args:
            needed: by the walk under way (see `entries`). None of them makes room for this.
            read: how files are read. What is fetched to be kept here is on the CPU, however.
        """
        far = _remote(refs)
        if (name := self._name(far)) is None:
            return read(refs)
        found = None
        with self._forgiving():
            make_own(self.folder)
            found = _read(self.folder / name, far, read)
        if found is None:
            found = self._fetch(name, far, needed(), read)
        return found | read({name: refs[name] for name in refs.keys() - far.keys()})

    def entries(self, blocks: Collection[Refs]) -> Entries:
        """Of these blocks. A walk asks for this once, not for each block that it reads: else a
        model of N blocks would have N² names formed.
        """
        return once(lambda: {name for refs in blocks if (name := self._name(_remote(refs)))})

    def _name(self, far: Refs) -> str | None:
        """What the entry of these tensors is called; nothing if there are none, or their store does
        not tell when a file changes.
        """
        for file in {ref.file for ref in far.values()} - self._versions.keys():
            self._versions[file] = storage.version(file)
        rows = [
            [name, ref.file, self._versions[ref.file], ref.code, ref.shape, ref.begin, ref.end]
            for name, ref in far.items()
        ]
        known = rows and all(self._versions[ref.file] for ref in far.values())
        return f"{hashlib.sha256(json.dumps(rows).encode()).hexdigest()}.block" if known else None

    def _fetch(
        self, name: str, far: Refs, needed: Collection[str], read: Reading
    ) -> dict[str, torch.Tensor]:
        """The tensors from their store, or from an entry that another process has made meanwhile;
        kept if there is room.
        """
        path, part = self.folder / name, None
        with ExitStack() as held:
            with self._forgiving():
                make_own(self.folder)
                held.enter_context(locked(self.folder))
                if (found := _read(path, far, read)) is not None:
                    return found
                if path.exists():
                    _LOG.warning("%s is damaged: removed, and fetched again", path)
                    path.unlink(missing_ok=True)
                size = sum(ref.end - ref.begin for ref in far.values()) + _Checksum().digest_size
                if self._make_room(size, needed):
                    part = held.enter_context(temporary(path.with_suffix(".part"), size))
            if part is None:
                held.close()  # nobody has to wait for what is not kept
            tensors = read_tensors(far)
            if part is not None and self._is_unchanged(far):
                with self._forgiving():
                    self._keep(path, part, [memory_of(tensor) for tensor in tensors.values()])
            return tensors

    def _make_room(self, size: int, needed: Collection[str] = ()) -> bool:
        """Keep within the limit with so many more bytes: what dead processes left goes, then what
        was used longest ago. The lock is ours.

        False, and no entry goes, if they do not fit beside the needed ones.
        """
        taken, others = 0, []
        for found in [found for found in os.scandir(self.folder) if _OURS.fullmatch(found.name)]:
            with suppress(FileNotFoundError):
                if found.name.endswith(".part"):
                    os.unlink(found)
                    continue
                info = found.stat(follow_symlinks=False)
                taken += info.st_size
                if found.name not in needed:
                    others.append((info.st_mtime_ns, info.st_size, found.path))
        limit = self.limit
        if limit is None:
            limit = (shutil.disk_usage(self.folder).free + taken) // 2
        excess, leaving = taken + size - limit, []
        for _, freed, path in sorted(others):
            if excess > 0:
                leaving.append(path)
                excess -= freed
        if excess > 0:
            _LOG.info(
                "%s: %d bytes do not fit within %d: read from their store each time",
                self.folder,
                size,
                limit,
            )
            return False
        for path in leaving:
            Path(path).unlink(missing_ok=True)
        return True

    def _is_unchanged(self, far: Refs) -> bool:
        """Whether the files are still those that the entry is named by."""
        files = {ref.file for ref in far.values()}
        changed = [file for file in files if storage.version(file) != self._versions.get(file)]
        for file in changed:
            self._versions.pop(file, None)
        return not changed

    def _keep(self, path: Path, part: BinaryIO, data: list[memoryview]) -> None:
        checksum = _Checksum()
        for piece in data:
            part.write(piece)
            checksum.update(piece)
        part.write(checksum.digest())
        part.flush()
        _touch(Path(part.name))
        os.replace(part.name, path)

    @contextmanager
    def _forgiving(self) -> Iterator[None]:
        """Say what goes wrong with the disk, and go on without it."""
        try:
            yield
        except OSError as error:
            _say_once(self.folder, error)


_Checksum = xxhash.xxh3_128
"""Finds damage, at the speed of memory; nobody but us can write in the folder."""


def _remote(refs: Refs) -> Refs:
    files = {file for file in {ref.file for ref in refs.values()} if storage.is_remote(file)}
    return {name: refs[name] for name in sorted(refs) if refs[name].file in files}


def _read(path: Path, far: Refs, read: Reading) -> dict[str, torch.Tensor] | None:
    """An entry's tensors; nothing if it is not there, or damaged."""
    checksum, here, end = _Checksum(), {}, 0
    for name, ref in far.items():
        begin, end = end, end + ref.end - ref.begin
        here[name] = replace(ref, file=str(path), begin=begin, end=end)
    with suppress(FileNotFoundError, EndedEarly):
        tensors = read(here, checksum.update)
        after = (end, end + checksum.digest_size + 1)
        if storage.read_ranges(str(path), [after]) == [checksum.digest()]:
            _touch(path)
            return tensors
    return None


def _touch(path: Path) -> None:
    """It is used now, to the nanosecond: the kernel's own time of writing may be some ms old."""
    os.utime(path, ns=(time.time_ns(), time.time_ns()))


def _say_once(folder: Path, error: OSError) -> None:
    if (folder, error.errno) not in _SAID:
        _SAID.add((folder, error.errno))
        _LOG.warning("blocks are not kept in %s: %s", folder, error)

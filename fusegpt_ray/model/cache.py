"""Blocks of object storage on this node's disk: fetched once by whichever process needs them first,
read there by all. No Ray.

Notable:
- an entry is one safetensors file, named by what it holds and by its own checksum:
  `<key>-<sha256>.safetensors`. It appears whole, by a rename; its size and time are looked at
  whenever it is used, its checksum when a process first uses it;
- who fetches holds a lock on the temporary file, which takes its full size on the disk before
  anything is fetched. Waiting for an entry is waiting for that lock, which the kernel frees when
  its holder is killed;
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
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO, NamedTuple, Self

import torch

from fusegpt_ray.model.stack import Refs
from fusegpt_ray.store import storage
from fusegpt_ray.store.checkpoint import layout, read_parts, read_tensors
from fusegpt_ray.store.scratch import locked, make_own, removed_if_dead, reserve

_LOG = logging.getLogger(__name__)
_OURS = re.compile(r"[0-9a-f]{64}(-[0-9a-f]{64}\.safetensors|\.part)")


class _Entry(NamedTuple):
    path: Path
    size: int
    inode: int
    modified: int


_SOUND: set[_Entry] = set()
"""Whose checksums this process has seen to be right. Another size, inode or time is another entry.
"""
_SAID: set[tuple[Path, int | None]] = set()


class _StoreError(Exception):
    """An error of the store, not of our disk."""

    def __init__(self, error: OSError) -> None:
        self.error = error


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
        given = os.environ.get("FUSEGPT_CACHE")
        folder = (
            Path(given or f"{tempfile.gettempdir()}/fusegpt-ray-{os.geteuid()}/blocks")
            .expanduser()
            .absolute()
        )
        cache = cls(folder, None if limit_gb is None else int(limit_gb * 1e9))
        try:
            for path in (folder,) if given else (folder.parent, folder):
                make_own(path)
            cache._make_room(0)
        except OSError as error:
            _say_once(folder, error)
            return None
        return cache

    def tensors(self, refs: Refs, among: Collection[Refs] = ()) -> dict[str, torch.Tensor]:
        """`read_tensors`, from this node's disk where that can be (see `local`)."""
        here = self.local(refs, among)
        try:
            return read_tensors(here)
        except OSError:
            if here is refs:
                raise
            return read_tensors(refs)  # it was evicted in the meantime, or the disk fails

    def local(self, refs: Refs, among: Collection[Refs] = ()) -> Refs:
        """Refs to the same tensors in a file on this node, fetched if it is not there yet; `refs`
        itself where that cannot be.

        `among`: everything that the walk under way needs. None of it makes room for this.
        """
        remote = _remote(refs)
        head, placed = layout("", ((name, ref.dtype, ref.shape) for name, ref in remote.items()))
        try:
            if (key := self._key(remote)) is None:
                return refs
            make_own(self.folder)
            path = self._path(key, max(ref.end for ref in placed.values()), head, remote, among)
        except _StoreError as error:
            raise error.error from error.error.__cause__
        except OSError as error:
            _say_once(self.folder, error)
            return refs
        return (
            refs
            if path is None
            else {**refs, **{name: replace(ref, file=str(path)) for name, ref in placed.items()}}
        )

    def _key(self, remote: Refs) -> str | None:
        """What names these tensors' bytes; nothing if there are none, or their store does not tell
        when a file changes.
        """
        with _blaming_the_store():
            for file in {ref.file for ref in remote.values()} - self._versions.keys():
                self._versions[file] = storage.version(file)
        rows = [
            [name, ref.file, self._versions[ref.file], ref.code, ref.shape, ref.begin, ref.end]
            for name, ref in remote.items()
        ]
        known = rows and all(self._versions[ref.file] for ref in remote.values())
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest() if known else None

    def _path(
        self, key: str, size: int, head: bytes, remote: Refs, among: Collection[Refs]
    ) -> Path | None:
        """The entry's file, filled if it is not there yet; nothing if there is no room for it."""
        while True:
            found = self._find(key)
            if found and _is_sound(found):
                with suppress(FileNotFoundError):
                    os.utime(found.path, ns=(time.time_ns(), found.modified))
                return found.path
            with locked(self.folder / f"{key}.part") as part:
                if self._find(key) != found:
                    continue  # another process was faster
                if found:
                    _LOG.warning("%s is damaged: removed, and fetched again", found.path)
                    found.path.unlink(missing_ok=True)
                if not self._make_room(size, {self._key(_remote(refs)) for refs in among}, part):
                    return None
                tensors = self._fetch(remote)
                return (
                    None
                    if tensors is None
                    else self._keep(key, part, [head, *(tensors[name] for name in remote)])
                )

    def _find(self, key: str) -> _Entry | None:
        for name in os.listdir(self.folder):
            if name.startswith(f"{key}-") and _OURS.fullmatch(name):
                with suppress(FileNotFoundError):
                    info = (self.folder / name).lstat()
                    return _Entry(self.folder / name, info.st_size, info.st_ino, info.st_mtime_ns)
        return None

    def _make_room(
        self, size: int, needed: Collection[str | None] = (), part: BinaryIO | None = None
    ) -> bool:
        """Have a file take its size on the disk, within the limit: what dead processes left goes,
        then what was used longest ago.

        False, and no entry goes, if it does not fit beside the needed ones.
        """
        with self._alone():
            if part:
                part.truncate(0)  # it may be a dead process's
            taken, others = 0, []
            for path in [
                self.folder / name for name in os.listdir(self.folder) if _OURS.fullmatch(name)
            ]:
                if path.suffix == ".part" and removed_if_dead(path):
                    continue
                with suppress(FileNotFoundError):
                    info = path.lstat()
                    taken += info.st_size
                    if path.suffix != ".part" and path.name[:64] not in needed:
                        others.append((info.st_atime_ns, info.st_size, path))
            limit = (
                (shutil.disk_usage(self.folder).free + taken) // 2
                if self.limit is None
                else self.limit
            )
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
                path.unlink(missing_ok=True)
            if part:
                reserve(part, size)
            return True

    def _alone(self) -> AbstractContextManager[BinaryIO]:
        """While nobody else makes room, and no temporary file becomes an entry."""
        return locked(self.folder / "lock")

    def _fetch(self, remote: Refs) -> dict[str, bytes] | None:
        """The tensors' bytes; nothing if a file changed while they were read."""
        with _blaming_the_store():
            tensors = dict(read_parts(remote))
            changed = [
                file
                for file in {ref.file for ref in remote.values()}
                if storage.version(file) != self._versions[file]
            ]
        for file in changed:
            del self._versions[file]
        return None if changed else tensors

    def _keep(self, key: str, part: BinaryIO, data: list[bytes]) -> Path:
        digest = hashlib.sha256()
        for piece in data:
            part.write(piece)
            digest.update(piece)
        part.flush()
        path = self.folder / f"{key}-{digest.hexdigest()}.safetensors"
        with self._alone():
            os.replace(part.name, path)
        info = os.fstat(part.fileno())
        _SOUND.add(_Entry(path, info.st_size, info.st_ino, info.st_mtime_ns))
        return path


@contextmanager
def _blaming_the_store() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _StoreError(error) from error


def _remote(refs: Refs) -> Refs:
    return {name: refs[name] for name in sorted(refs) if storage.is_remote(refs[name].file)}


def _is_sound(entry: _Entry) -> bool:
    if entry in _SOUND:
        return True
    with suppress(FileNotFoundError), entry.path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() == entry.path.stem[65:]:
            _SOUND.add(entry)
    return entry in _SOUND


def _say_once(folder: Path, error: OSError) -> None:
    if (folder, error.errno) not in _SAID:
        _SAID.add((folder, error.errno))
        _LOG.warning("blocks are not kept in %s: %s", folder, error)

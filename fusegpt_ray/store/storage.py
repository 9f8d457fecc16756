"""A few operations over fsspec, the same for local folders, s3://, gs://, hf:// and memory://.

Object stores have no rename (s3fs copies and leaves the source). Cached listings are never trusted.
A path is a name, never a pattern: only calls of fsspec that take it literally are used (not `rm`,
`get`, `put`, `cat` or `glob`). A prefix is no file; a folder is all below its name and a slash.
Failures that may pass are retried; others raise a `StorageError` (see `retry.py`).
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any, BinaryIO, cast

import fsspec
from fsspec.implementations.local import LocalFileSystem

from fusegpt_ray.store.filesystem import absolute as absolute
from fusegpt_ray.store.filesystem import filesystem as filesystem
from fusegpt_ray.store.filesystem import is_remote as is_remote
from fusegpt_ray.store.filesystem import join as join
from fusegpt_ray.store.local import fill_local, link, place_local, stream_local
from fusegpt_ray.store.local import missing_folders as missing_folders
from fusegpt_ray.store.local import remove_empty as remove_empty
from fusegpt_ray.store.retry import with_retries
from fusegpt_ray.store.stream import RangedFile
from fusegpt_ray.store.threads import one_ahead

STEP = 1 << 25
"""Bytes of a file held at a time by what reads it from end to end."""
SMALL = 1 << 25
"""Bytes of the largest foreign JSON file that is read: parsed, it takes several times as much."""
REMOVED_AT_ONCE = 16
"""Objects whose removal is asked for at the same time."""


def exists(uri: str) -> bool:
    fs, path = filesystem(uri)
    if isinstance(fs, LocalFileSystem):  # also below a file, or a link to itself
        return bool(fs.exists(path))
    try:
        _info(uri)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _info(uri: str) -> dict[str, Any]:
    """
    Raises:
        FileNotFoundError: there is none, though perhaps others whose names begin like it.
    """
    fs, path = filesystem(uri)
    fs.invalidate_cache(path)
    info: dict[str, Any] = with_retries(uri, lambda: fs.info(path))
    if info.get("type") == "directory" and not isinstance(fs, LocalFileSystem):
        raise FileNotFoundError(errno.ENOENT, "a prefix, not a file", uri)
    return info


def names(uri: str) -> list[str]:
    """Names of the files directly in a folder, sorted; empty if there is no such folder."""
    fs, path, entries = _entries(uri)
    # The hub's cache is made of links, which are neither files nor directories to fsspec.
    files = (
        entry["name"]
        for entry in entries
        if entry["type"] == "file" or (entry.get("islink") and fs.isfile(entry["name"]))
    )
    # A file is listed as if it lay in itself.
    return sorted(name.rsplit("/", 1)[-1] for name in files if name != path)


def _entries(uri: str) -> tuple[fsspec.AbstractFileSystem, str, list[dict[str, Any]]]:
    """What is directly in a folder (nothing if there is none), its file system and its path."""
    fs, path = filesystem(uri)
    # Also below a file, or a link to itself.
    if isinstance(fs, LocalFileSystem) and not fs.exists(path):
        return fs, path, []
    fresh = {"refresh": True} if "s3" in fs.protocol else {}
    try:
        return fs, path, with_retries(uri, lambda: fs.ls(path, detail=True, **fresh))
    except FileNotFoundError:
        return fs, path, []


def below(uri: str) -> dict[str, dict[str, Any]]:
    """What fsspec tells of each file in a folder and its folders, by the path from it."""
    fs, path = filesystem(uri)
    fs.invalidate_cache()
    begin = path.rstrip("/") + "/"
    found = with_retries(uri, lambda: fs.find(path, detail=True))
    # Not the file that is called like the folder, nor what some clients mark folders by.
    inside = [name for name in found if name.startswith(begin) and not name.endswith("/")]
    return {name.removeprefix(begin): found[name] for name in sorted(inside)}


def folders(uri: str) -> list[str]:
    """Names of the folders directly in a folder, sorted; empty if there is no such folder."""
    fs, _, entries = _entries(uri)
    found = (
        entry["name"]
        for entry in entries
        if entry["type"] == "directory" or (entry.get("islink") and fs.isdir(entry["name"]))
    )
    return sorted({name.rstrip("/").rsplit("/", 1)[-1] for name in found})


def size(uri: str) -> int:
    return int(_info(uri)["size"])


def read(uri: str, limit: int | None = None) -> bytes:
    """A whole file; with a `limit`, one of at most so many bytes.

    Raises:
        OSError: it is larger, or, with a limit, a device or the like, which may never end.
    """
    fs, path = filesystem(uri)
    if limit is not None:
        if isinstance(fs, LocalFileSystem) and os.path.exists(path) and not os.path.isfile(path):
            raise OSError("not a file")
        if (there := size(uri)) > limit:
            raise OSError(f"it has {there} bytes, more than the {limit} such a file may have")
    return bytes(with_retries(uri, lambda: fs.cat_file(path)))


def read_ranges(uri: str, ranges: list[tuple[int, int]]) -> list[bytes]:
    """The bytes [begin, end) of several ranges of one file, read concurrently where possible."""
    fs, path = filesystem(uri)
    begins, ends = [begin for begin, _ in ranges], [end for _, end in ranges]
    paths = [path] * len(ranges)
    # on_error="raise": fsspec would otherwise hand exceptions back as if they were bytes.
    return [
        bytes(part)
        for part in with_retries(uri, lambda: fs.cat_ranges(paths, begins, ends, on_error="raise"))
    ]


def stream(uri: str) -> Iterator[memoryview]:
    """A file's bytes, `STEP` at a time; a step that breaks off is read again, not the file.

    The next step is read while the last one is used, which is there only until the next is asked
    for: two pieces of memory take turns (new memory would take longer than reading into it).
    """
    total = size(uri)
    steps = [(begin, min(begin + STEP, total)) for begin in range(0, total, STEP)]
    turns = cycle([memoryview(bytearray(min(STEP, total))) for _ in steps[:2]])

    def load(step: tuple[int, int]) -> memoryview:
        begin, end = step
        part = next(turns)[: end - begin]
        if (got := _fill(uri, begin, part)) != len(part):
            raise OSError(f"{uri} ended early: {begin + got} of {total} bytes")
        return part

    yield from one_ahead(load, steps)


def _fill(uri: str, begin: int, memory: memoryview) -> int:
    """Read a file's bytes from a place on into memory; how many of them there were."""
    fs, path = filesystem(uri)
    if "file" in fs.protocol:
        return fill_local(path, begin, memory)
    (data,) = read_ranges(uri, [(begin, begin + len(memory))])
    memory[: len(data)] = data
    return len(data)


@contextmanager
def reading(uri: str) -> Iterator[BinaryIO]:
    """A file's bytes, to be read in a stream."""
    fs, path = filesystem(uri)
    if "s3" not in fs.protocol:  # nothing to wait for, or a file system with retries of its own
        with fs.open(path, "rb") as file:
            yield file
        return
    yield cast(BinaryIO, io.BufferedReader(RangedFile(uri, size(uri), read_ranges), STEP))


def download(uri: str, path: str) -> None:
    """Copy a file to a local path, `STEP` bytes in memory at a time."""

    def once() -> None:
        with open(path, "wb") as file:
            for part in stream(uri):
                file.write(part)

    with_retries(path, once)


def read_json(uri: str) -> Any:
    return json.loads(read(uri, SMALL))


def write(uri: str, data: bytes, retry_for: float | None = None) -> None:
    """Write or replace a small file: readers see all the old bytes or all the new ones.

    `retry_for`: seconds to retry while the store fails, if not the usual ones.
    """
    fs, path = filesystem(uri)

    def once() -> None:
        _make_parent(fs, path)
        if "file" in fs.protocol:
            place_local(Path(path), data, os.replace)
        else:
            fs.pipe_file(path, data)

    with_retries(uri, once, retry_for)


def create(uri: str, data: bytes) -> None:
    """Write a file that must not exist yet.

    Of several writers at once exactly one succeeds, where the store has conditional writes. To it
    those are one who write the very same bytes; so a lease holds a word of its owner's own.

    Raises:
        FileExistsError: it exists, with other bytes.
    """
    fs, path = filesystem(uri)

    def once() -> None:
        _make_parent(fs, path)
        try:
            if "file" in fs.protocol:
                place_local(Path(path), data, link)
            else:
                fs.pipe_file(path, data, mode="create")
        except OSError as error:
            # A lost conditional put is FileExistsError on some servers, OSError(22) on others.
            if not isinstance(error, FileExistsError) and not exists(uri):
                raise
            # One whose answer was lost is sent again, by us or (silently) by the store's library,
            # and is then refused although it succeeded.
            if not _holds(uri, data):
                raise FileExistsError(uri) from error

    with_retries(uri, once)


def _holds(uri: str, data: bytes) -> bool:
    with suppress(FileNotFoundError):  # it was there just now
        return size(uri) == len(data) and read(uri) == data
    return False


@contextmanager
def writing(uri: str) -> Iterator[BinaryIO]:
    """A stream into a new file, which appears only when the block ends without an exception.

    Not retried: a stream cannot be repeated, its writer can (see `writer.write_safetensors`).
    """
    fs, path = filesystem(uri)
    _make_parent(fs, path)
    if "file" in fs.protocol:
        with stream_local(Path(path)) as stream_to:
            yield stream_to
        return
    file = fs.open(path, "wb")
    try:
        yield cast(BinaryIO, file)
        file.close()
    except BaseException:
        # The error worth reporting is what broke the stream, not a failure to tidy up after it.
        with suppress(Exception):
            # A multipart upload to an object store: nothing appears.
            if isinstance(file, fsspec.spec.AbstractBufferedFile):
                file.closed = True
                file.discard()
            else:
                with suppress(OSError):  # its last bytes may have no room
                    file.close()
                fs.rm_file(path)
        raise


def remove(uri: str, recursive: bool = False) -> None:
    """Remove a file, or with `recursive` a folder and all in it; nothing happens if there is none.

    On an object store the files of a folder are listed and removed one by one, by their names.
    """
    fs, path = filesystem(uri)
    if isinstance(fs, LocalFileSystem):
        if fs.exists(path):
            fs.rm(path, recursive=recursive)
        return
    paths = [f"{path}/{name}" for name in below(uri)] if recursive else [path]
    with ThreadPoolExecutor(REMOVED_AT_ONCE, thread_name_prefix="remove") as threads:
        for _ in threads.map(partial(_remove_object, fs), paths):
            pass
    fs.invalidate_cache()


def _remove_object(fs: fsspec.AbstractFileSystem, path: str) -> None:
    def once() -> None:
        with suppress(FileNotFoundError):
            fs.rm_file(path)

    with_retries(fs.unstrip_protocol(path), once)


def sha256(uri: str) -> str:
    """SHA-256 of a file's bytes, in hex; two times `STEP` bytes in memory."""
    digest = hashlib.sha256()
    for part in stream(uri):
        digest.update(part)
    return digest.hexdigest()


def fingerprint(uri: str) -> str:
    """What changes with a file's bytes: the store's own checksum of an object, else SHA-256."""
    return _checksum(_info(uri)) or f"sha256 {sha256(uri)}"


def version(uri: str) -> str | None:
    """What changes when a file is written anew, told without reading it.

    The store's own checksum, else size and time; None where the store tells neither.
    """
    fs, path = filesystem(uri)
    info = _info(uri)
    try:
        return (
            _checksum(info)
            or f"{info['size']} bytes of {with_retries(uri, lambda: fs.modified(path))}"
        )
    except NotImplementedError:  # a store that does not tell the time
        return None


def _checksum(info: dict[str, Any]) -> str | None:
    keys = ("ETag", "etag", "md5Hash", "content_md5", "crc32c")
    return next((f"{key} {info[key]}" for key in keys if info.get(key)), None)


def _make_parent(fs: fsspec.AbstractFileSystem, path: str) -> None:
    # Object stores have no folders, and creating "folders" may ask for rights on buckets.
    if "file" in fs.protocol:
        fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)

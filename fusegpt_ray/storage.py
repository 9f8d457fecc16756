"""A handful of verbs over fsspec: the same code for a local folder, s3://, gs://, hf:// and memory://.

Notable: no rename anywhere (S3 has none; s3fs copies and leaves the source), and listings are never trusted from a cache.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import fsspec
from fsspec.core import url_to_fs


def filesystem(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system and the path in it that `uri` names; credentials come from the environment alone."""
    fs, path = url_to_fs(str(uri))
    return fs, path


def absolute(uri: str) -> str:
    """`uri` with a local path made absolute, so that another process (with another working folder) means the same file."""
    return uri if "://" in uri else str(Path(uri).expanduser().absolute())


def join(uri: str, *parts: str) -> str:
    return "/".join([uri.rstrip("/"), *parts])


def exists(uri: str) -> bool:
    fs, path = filesystem(uri)
    fs.invalidate_cache(path)
    return bool(fs.exists(path))


def names(uri: str) -> list[str]:
    """Names of the files directly in a folder, sorted; empty if there is no such folder."""
    fs, path = filesystem(uri)
    try:
        entries = fs.ls(path, detail=True, refresh=True) if "s3" in fs.protocol else fs.ls(path, detail=True)
    except FileNotFoundError:
        return []
    # The hub's cache is made of links, which are neither files nor directories to fsspec.
    files = (entry["name"] for entry in entries if entry["type"] == "file" or (entry.get("islink") and fs.isfile(entry["name"])))
    return sorted(name.rsplit("/", 1)[-1] for name in files)


def size(uri: str) -> int:
    fs, path = filesystem(uri)
    return int(fs.size(path))


def read(uri: str) -> bytes:
    fs, path = filesystem(uri)
    return bytes(fs.cat_file(path))


def read_ranges(uri: str, ranges: list[tuple[int, int]]) -> list[bytes]:
    """The bytes [begin, end) of one file, several ranges at once (concurrently where the store can)."""
    fs, path = filesystem(uri)
    begins, ends = [begin for begin, _ in ranges], [end for _, end in ranges]
    # on_error="raise": fsspec would otherwise hand exceptions back as if they were bytes.
    return [bytes(part) for part in fs.cat_ranges([path] * len(ranges), begins, ends, on_error="raise")]


def read_json(uri: str) -> Any:
    return json.loads(read(uri))


def write(uri: str, data: bytes) -> None:
    fs, path = filesystem(uri)
    _make_parent(fs, path)
    fs.pipe_file(path, data)


def create(uri: str, data: bytes) -> None:
    """Write a file that must not exist yet; of several writers at once exactly one succeeds (where the store can tell).

    Raises:
        FileExistsError: it exists.
    """
    fs, path = filesystem(uri)
    _make_parent(fs, path)
    if "file" in fs.protocol:
        _create_local(Path(path), data)
        return
    try:
        fs.pipe_file(path, data, mode="create")
    except OSError as error:  # a conditional put that lost is FileExistsError on some servers, OSError(22) on others
        if isinstance(error, FileExistsError) or exists(uri):
            raise FileExistsError(uri) from error
        raise


def _create_local(path: Path, data: bytes) -> None:
    """All of it or nothing, whatever kills us: a hard link to a finished file appears at once, and fails if the name is taken."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
                raise
            if path.exists():  # a file system without hard links: here two writers at the same moment could both succeed
                raise FileExistsError(errno.EEXIST, "exists", str(path)) from error
            temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def writing(uri: str) -> Iterator[BinaryIO]:
    """A stream into a new file, which a reader may see only when the block ends without an exception."""
    fs, path = filesystem(uri)
    _make_parent(fs, path)
    file = fs.open(path, "wb")
    try:
        yield cast(BinaryIO, file)
    except BaseException:
        if isinstance(file, fsspec.spec.AbstractBufferedFile):  # an object store's multipart upload: nothing appears
            if not file.closed:
                file.discard()
                file.closed = True
        else:
            file.close()
            fs.rm_file(path)
        raise
    file.close()


def remove(uri: str, recursive: bool = False) -> None:
    """Remove a file, or with `recursive` a folder and all in it; nothing happens if there is none."""
    fs, path = filesystem(uri)
    fs.invalidate_cache(path)
    if fs.exists(path):
        fs.rm(path, recursive=recursive)


def sha256(uri: str) -> str:
    """SHA-256 of a file's bytes, in hex; a few megabytes in memory at a time."""
    fs, path = filesystem(uri)
    digest = hashlib.sha256()
    with fs.open(path, "rb") as file:
        while part := file.read(1 << 22):
            digest.update(part)
    return digest.hexdigest()


def fingerprint(uri: str) -> str:
    """What changes with a file's bytes: the store's own checksum of an object, else SHA-256."""
    fs, path = filesystem(uri)
    info = fs.info(path)
    for key in ("ETag", "etag", "md5Hash", "content_md5", "crc32c"):
        if info.get(key):
            return f"{key} {info[key]}"
    return f"sha256 {sha256(uri)}"


def _make_parent(fs: fsspec.AbstractFileSystem, path: str) -> None:
    if "file" in fs.protocol:  # object stores have no folders, and creating "folders" may ask for rights on buckets
        fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)

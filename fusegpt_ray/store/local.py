"""Local files that appear whole or not at all, and the folders around them."""

from __future__ import annotations

import errno
import os
import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

UNFINISHED = re.compile(r"\..+\.[0-9a-f]{8}")
"""What a file is called until it is whole, and stays called if its writer is killed."""


def _unfinished(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}")


def place_local(path: Path, data: bytes, place: Callable[[Path, Path], None]) -> None:
    """All of it or nothing, whatever kills us: `place` gives a finished temporary file its name."""
    temporary = _unfinished(path)
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        place(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def stream_local(path: Path) -> Iterator[BinaryIO]:
    """A stream into a file that appears, whole, when the block ends without an exception.

    It takes the place of one that is there. Of several who write the same at the same time, each
    finds a whole file.
    """
    temporary = _unfinished(path)
    try:
        with open(temporary, "xb") as file:
            yield file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def fill_local(path: str, begin: int, memory: memoryview) -> int:
    """Read a file's bytes from a place on into memory; how many of them there were."""
    got = 0
    with open(path, "rb", buffering=0) as file:
        file.seek(begin)
        while count := file.readinto(memory[got:]):
            got += count
    return got


def write_from(path: str, begin: int, data: bytes) -> None:
    """Write these bytes into a file from a place on, its end; the file need not be there.

    What a write that failed left behind that place is written over.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
    with open(descriptor, "wb", buffering=0) as file:
        file.seek(begin)
        while data:
            data = data[file.write(data) :]


def link(temporary: Path, path: Path) -> None:
    """A hard link to a finished file appears at once, and fails if the name is taken."""
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
            raise
        # Without hard links, two writers at the same moment could both succeed.
        if path.exists():
            raise FileExistsError(errno.EEXIST, "exists", str(path)) from error
        temporary.rename(path)


def missing_folders(uri: str) -> list[Path]:
    """The local folders that writing here would make, deepest first; none on object stores."""
    folders = [] if "://" in uri else [Path(uri), *Path(uri).parents]
    return [folder for folder in folders if not folder.exists()]


def remove_empty(folders: list[Path]) -> None:
    """Remove local folders, the deepest first, up to one that holds something."""
    with suppress(OSError):
        for folder in folders:
            if folder.exists():
                folder.rmdir()

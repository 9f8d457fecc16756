"""A folder of one machine that its processes share, for one of them at a time."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """This folder is ours alone until the block ends, or the process does; others wait."""
    directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)
        yield
    finally:
        os.close(directory)


@contextmanager
def temporary(path: Path, size: int) -> Iterator[BinaryIO]:
    """A new file whose name begins and ends like this path, gone in the end unless it was renamed.

    It takes so many bytes of the disk at once: a full one says so now.
    """
    handle, name = tempfile.mkstemp(path.suffix, path.stem, path.parent)
    try:
        with open(name, "wb", opener=lambda *_: handle) as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(handle, 0, size)
            yield file
    finally:
        with suppress(FileNotFoundError):
            os.unlink(name)


def make_own(folder: Path) -> None:
    """Have a folder that only we can write in: what lies there is believed."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    info = folder.lstat()
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.geteuid() or info.st_mode & 0o022:
        problem = (
            "a link, or another user's, or others may write there: "
            "have FUSEGPT_CACHE name a folder of your own"
        )
        raise PermissionError(errno.EACCES, problem, str(folder))

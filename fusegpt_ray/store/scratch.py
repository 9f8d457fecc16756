"""Files shared by the processes of a machine, each locked by one at a time.

The kernel releases a lock when its process ends.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def locked(path: Path) -> Iterator[BinaryIO]:
    """A file of this name for us alone, until the block ends or the process does; others wait.

    It may hold what a dead process left. It is removed in the end, unless it was renamed.
    """
    while True:
        with open(
            path,
            "r+b",
            opener=lambda name, flags: os.open(name, flags | os.O_CREAT | os.O_NOFOLLOW, 0o600),
        ) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not _is(file, path):
                continue  # renamed or removed by whom we waited for: this lock is of no use now
            try:
                yield file
            finally:
                if _is(file, path):
                    path.unlink(missing_ok=True)
            return


def removed_if_dead(path: Path) -> bool:
    """Remove such a file if the process that had it is dead. True: there is none (any more)."""
    try:
        with path.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is(file, path):
                path.unlink()
    except BlockingIOError:
        return False
    except FileNotFoundError:
        pass
    return True


def reserve(file: BinaryIO, size: int) -> None:
    """Take so many bytes of the disk for a file: a full one says so now."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)
    else:
        os.truncate(file.fileno(), size)


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


def _is(file: BinaryIO, path: Path) -> bool:
    """Whether an open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.lstat())
    except FileNotFoundError:
        return False

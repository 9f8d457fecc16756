"""Local files that appear whole or not at all, and the folders around them."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


def place_local(path: Path, data: bytes, place: Callable[[Path, Path], None]) -> None:
    """All of it or nothing, whatever kills us: `place` gives a finished temporary file its name."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        place(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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

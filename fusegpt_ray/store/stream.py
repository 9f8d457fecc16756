"""A file of an object store as a stream."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any


class RangedFile(io.RawIOBase):
    """A file read in ranges; only a broken range is read again."""

    def __init__(
        self, uri: str, total: int, read_ranges: Callable[[str, list[tuple[int, int]]], list[bytes]]
    ) -> None:
        """`total`: bytes of the file; `read_ranges`: see `storage.read_ranges`."""
        self.uri, self.total, self.at, self.read_ranges = uri, total, 0, read_ranges

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.total}[whence]
        return self.at

    def readinto(self, into: Any) -> int:
        end = min(self.at + len(into), self.total)
        if end <= self.at:
            return 0
        (part,) = self.read_ranges(self.uri, [(self.at, end)])
        into[: len(part)] = part
        self.at += len(part)
        return len(part)

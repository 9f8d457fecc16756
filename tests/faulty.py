"""A store that fails as a test wants it to: `faulty:///path` is the local file, seen through
`Faulty.fault`.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

Fault = Callable[[str, int, bytes], bytes]
"""File name, offset and true bytes of one read → what arrives (or an exception)."""


def honest(name: str, begin: int, data: bytes) -> bytes:
    return data


class Faulty(LocalFileSystem):
    protocol = "faulty"
    fault: Fault = staticmethod(honest)
    asked: list[tuple[str, int]]
    """File name and offset of every read so far."""

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.removeprefix("faulty://"))

    def cat_file(
        self, path: str, start: int | None = None, end: int | None = None, **options: Any
    ) -> bytes:
        return self._read(self._strip_protocol(path), start or 0, end)

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        return (
            io.BytesIO(self._read(path, 0, None))
            if mode == "rb"
            else super()._open(path, mode, **options)
        )

    def _read(self, path: str, begin: int, end: int | None) -> bytes:
        file = Path(path)
        Faulty.asked.append((file.name, begin))
        return Faulty.fault(file.name, begin, file.read_bytes()[begin:end])


fsspec.register_implementation("faulty", Faulty, clobber=True)
Faulty.asked = []


@contextmanager
def failing(fault: Fault = honest) -> Iterator[list[tuple[str, int]]]:
    """While it lasts, reads go through `fault`; gives the list of the reads."""
    Faulty.fault, Faulty.asked = staticmethod(fault), []
    try:
        yield Faulty.asked
    finally:
        Faulty.fault = staticmethod(honest)

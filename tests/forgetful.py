"""A store whose answers get lost as a test wants it to: `forgetful://bucket/…` is in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import fsspec
from fsspec.implementations.memory import MemoryFileSystem

Loses = Callable[[str], bool]
"""Whether nobody hears that the object of this path was created, though it was."""


class Forgetful(MemoryFileSystem):
    protocol = "forgetful"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    loses: Loses = staticmethod(lambda path: False)
    lost: ClassVar[list[str]] = []
    """The paths of those."""
    removed: Callable[[str], object] = staticmethod(lambda path: None)
    """Hears of what was removed."""

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.removeprefix("forgetful://"))

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
        super().pipe_file(path, value, mode, **options)
        if mode == "create" and Forgetful.loses(path):
            Forgetful.lost.append(path)
            raise ConnectionError("the answer was lost")

    def rm_file(self, path: str) -> None:
        super().rm_file(path)
        Forgetful.removed(path)


fsspec.register_implementation("forgetful", Forgetful, clobber=True)


@contextmanager
def losing() -> Iterator[list[str]]:
    """While it lasts, the answer is lost to the first creation of each path; gives the paths."""
    Forgetful.store.clear()
    Forgetful.lost = []
    Forgetful.loses = staticmethod(lambda path: path not in Forgetful.lost)
    try:
        yield Forgetful.lost
    finally:
        Forgetful.loses = staticmethod(lambda path: False)

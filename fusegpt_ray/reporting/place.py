"""Where a report may be written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fusegpt_ray.errors import UserError
from fusegpt_ray.store import storage
from fusegpt_ray.uris import refuse_secret

OURS = b"<!doctype html>\n<!-- a report of fusegpt -->\n"
"""How every report begins."""
_NO_PLACE = (
    ValueError,  # the protocol is unknown …
    ImportError,  # … or its package is missing
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    FileExistsError,  # a folder above it is a file
)


def write(page: str, output: str, key: str = "--output") -> str:
    """Write a report; returns where it is.

    Args:
        output, key: see `free`.

    Raises:
        UserError: the file may not be written.
    """
    place = free(output, key)
    with _explained(output, key):
        storage.write(place, page.encode(errors="replace"))
    return place


def free(output: str, key: str = "--output") -> str:
    """The place of a report that may be written.

    Args:
        output: the file, anywhere fsspec reaches. Only another report may be there.
        key: the option that names it, for messages.

    Raises:
        UserError: it cannot be looked at, or something else is there.
    """
    refuse_secret(key, output)
    place, taken = storage.absolute(output), False
    with _explained(output, key):
        if storage.exists(place):
            with storage.reading(place) as file:
                taken = file.read(len(OURS)) != OURS
    if taken:
        problem = "there is something else than a report"
        raise UserError(key, output, problem, "give another file")
    return place


@contextmanager
def _explained(output: str, key: str) -> Iterator[None]:
    try:
        yield
    except _NO_PLACE as error:
        problem = f"cannot be written ({error})"
        raise UserError(key, output, problem, "give another file") from error

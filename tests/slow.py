"""The tests that `make test` leaves to `make test-all`, and the rule that marks them.

A test belongs here if it takes long, seldom fails, and another test that `make test` runs guards
the same promise (see PROMISES.md). The list lives in one place so that a glance shows what a short
run does not cover.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

SLOW: tuple[str, ...] = ()
"""A file, a test of it (with all its cases), or a single case, as pytest writes them."""


def covers(entry: str, nodeid: str) -> bool:
    """Whether an entry of the list means this test."""
    return nodeid == entry or nodeid.startswith((f"{entry}::", f"{entry}["))


def mark_slow(items: Iterable[pytest.Item], whole_files: bool) -> None:
    """Mark what the list names.

    Raises pytest.UsageError for an entry that names nothing: a test that was renamed would silently
    move back into the short run. Tests of a file can only be missed where whole files are collected.
    """
    items = list(items)
    collected = {item.nodeid.partition("::")[0] for item in items}
    for entry in SLOW:
        found = [item for item in items if covers(entry, item.nodeid)]
        for item in found:
            item.add_marker(pytest.mark.slow)
        file = entry.partition("::")[0]
        gone = not (ROOT / file).exists() or (whole_files and file in collected and not found)
        if gone:
            raise pytest.UsageError(f"tests/slow.py names {entry}, and there is no such test")

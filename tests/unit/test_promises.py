"""PROMISES.md names tests that exist, and `make test` runs at least one for each promise."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from slow import SLOW

ROOT = Path(__file__).parents[2]
ROWS = re.findall(
    r"^\| (?!promise )(.+) \| (`tests/.+) \|$", (ROOT / "tests/PROMISES.md").read_text(), re.M
)


def whole_in_slow(test: str) -> bool:
    """Whether every case of a test is slow: single cases, which end in `]`, leave the others."""
    return test in SLOW or test.partition("::")[0] in SLOW


def test_the_table_was_read() -> None:
    assert len(ROWS) > 80


@pytest.mark.parametrize(("promise", "cell"), ROWS, ids=[promise[:40] for promise, _ in ROWS])
def test_a_promise_keeps_a_test_in_the_short_run(promise: str, cell: str) -> None:
    tests = re.findall(r"`([^`]+)`", cell)
    for test in tests:
        file, _, name = test.partition("::")
        text = (ROOT / file).read_text()
        assert not name or re.search(rf"^def {name}\(", text, re.MULTILINE), test
    assert not all(whole_in_slow(test) for test in tests), promise

"""docs/security.md names, beside each line, tests and files that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/security.md").read_text()
ROWS = re.findall(r"^\| (?!threat |---)(.+?) \| (.+) \| (.+) \|$", PAGE, re.MULTILINE)


def test_the_tables_were_read() -> None:
    assert len(ROWS) > 20


@pytest.mark.parametrize(("threat", "upheld"), [(row[0], row[2]) for row in ROWS])
def test_what_upholds_a_line_exists(threat: str, upheld: str) -> None:
    names = re.findall(r"`([^`]+)`", upheld)
    assert names, threat
    for name in names:
        file, _, test = name.partition("::")
        assert (ROOT / file).exists(), name
        text = (ROOT / file).read_text() if test else ""
        assert not test or re.search(rf"^def {test}\(", text, re.MULTILINE), name

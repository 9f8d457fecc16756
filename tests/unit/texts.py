"""Rows of text in a file, and the key under which a recipe names it."""

from __future__ import annotations

import json
from pathlib import Path

KEY = "calibration.data"
LARGE = 1 << 20


def write_jsonl(path: Path, rows: list[str], column: str = "text") -> None:
    path.write_text("".join(json.dumps({column: row}) + "\n" for row in rows), encoding="utf-8")

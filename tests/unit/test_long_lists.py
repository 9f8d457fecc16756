"""Lists of files and models that anybody may have written take time by their length, not by its
square. Processor time is measured, which others on the machine do not lengthen much.
"""

from __future__ import annotations

import json
import time
from typing import Any

from fusegpt_ray.store.family import FamilyBoard
from fusegpt_ray.store.manifest import Manifest

MANY = 20_000
ENOUGH = 5.0
"""Seconds: several times what it takes; by the square it would be from ten to a hundred."""


def test_a_manifest_of_many_files() -> None:
    entry = {"bytes": 1, "sha256": "0" * 64}
    files = {f"folder-{number:06d}/file.json": entry for number in range(MANY)}
    raw = json.dumps({"format": 1, "kept": [0], "files": files}).encode()
    began = time.process_time()
    assert len(Manifest.parse(raw, "here").files) == MANY
    assert time.process_time() - began < ENOUGH


def test_a_family_of_many_models() -> None:
    began = time.process_time()
    assert len(FamilyBoard.parse(board(MANY), "here").models) == MANY
    assert time.process_time() - began < ENOUGH


def board(models: int) -> dict[str, Any]:
    about = {"member": "a", "method": "mi", "source": "s", "status": "done", "run": "r"}
    about |= {"parameters": {"dense": 1}}
    rows = [about | {"folder": f"Folder-{number:06d}"} for number in range(models)]
    return {"format": 1, "name": "n", "state": "done", "rows": rows}

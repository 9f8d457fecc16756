"""No input takes more than a bounded memory before it is refused (see bombs.py)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

UNIT = Path(__file__).parent
MOST_MB = 2000
"""What a process may take, a few hundred for what it imports among it.

JSON of `storage.SMALL` bytes, all of empty lists, takes 900 once it is parsed; 8 rows of Parquet
that each are as long as a row may be, or a bit longer, 600, twice for a moment.
"""


def set_off(choice: str, folder: Path) -> dict[str, dict[str, Any]]:
    environment = os.environ | {
        "PYTHONPATH": f"{UNIT}:{UNIT.parent}:{UNIT.parents[1]}",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, str(UNIT / "bombs.py"), str(folder), choice]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    return {row["name"]: row for row in rows}


@pytest.mark.parametrize(("choice", "count"), [("some", 2), ("others", 21)])
def test_every_bomb_is_refused_within_a_bounded_memory(
    choice: str, count: int, tmp_path: Path
) -> None:
    results = set_off(choice, tmp_path)
    print(
        *(
            f"{row['name']:<36}{row['seconds']:>6} s{row['peak_mb']:>7} MB"
            for row in results.values()
        ),
        sep="\n",
    )
    assert len(results) == count
    assert not {
        name: row["said"]
        for name, row in results.items()
        if row["code"] != 2 or "Traceback" in row["said"]
    }
    assert not [name for name, row in results.items() if not row["untouched"]]
    assert not {name: row["peak_mb"] for name, row in results.items() if row["peak_mb"] > MOST_MB}
